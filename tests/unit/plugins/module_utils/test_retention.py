# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Retention: Proxmox's own examples, the limits, and what must never go in random histories.

The property test looks at 10^4 histories, chosen by a seed that is printed; KVMOPS_BACKUP_EXHAUSTIVE=1 at 10^5.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._policy import FUTURE_S
from ansible_collections.kvmops.backup.plugins.module_utils._retention import (
    DAY_S,
    ArchiveFacts,
    RetentionVerdict,
    Rules,
    in_order,
    judge,
    make_room,
)

SEED = int(os.environ.get("KVMOPS_BACKUP_SEED", "0")) or random.randrange(2**32)
HISTORIES = 100_000 if os.environ.get("KVMOPS_BACKUP_EXHAUSTIVE") else 10_000
UTC = timezone.utc
NOW = 1_800_000_000


def at(text: str, zone: timezone | ZoneInfo = UTC) -> int:
    """Unix time of ``2019-12-04T11:59:15``."""
    return int(datetime.fromisoformat(text).replace(tzinfo=zone).timestamp())


def archives(times: Sequence[str]) -> list[ArchiveFacts]:
    return [ArchiveFacts(path=each, vm_uuid="elsa", newest=at(each)) for each in times]


def kept(found: Sequence[ArchiveFacts], rules: Rules, **options: object) -> set[str]:
    options = {"now": max(each.newest for each in found), "tz": UTC, **options}
    return {verdict.path for verdict in judge(found, rules, **options) if verdict.keep}  # type: ignore[arg-type]


HOURS = [f"2019-11-15T{each}:15" for each in ("09:39", "10:49", "10:59", "11:39", "11:49", "11:59")]
WEEKS = [f"{each}T11:59:15" for each in (
    "2018-11-15", "2019-11-15", "2019-11-21", "2019-11-22", "2019-11-29",
    "2019-12-01", "2019-12-02", "2019-12-03", "2019-12-04",
)]  # fmt: skip
DAYS = [f"2019-12-{each}:15" for each in ("02T11:59", "03T11:59", "04T11:59", "04T12:59")]


# What the tests of Proxmox Backup Server expect (tests/prune.rs).
@pytest.mark.parametrize(
    ("times", "rules", "expected"),
    [
        (HOURS, Rules(hourly=3), [0, 2, 5]),
        (HOURS, Rules(hourly=2), [2, 5]),
        (WEEKS, Rules(daily=1), [8]),
        (WEEKS, Rules(last=1, daily=1), [7, 8]),
        (WEEKS, Rules(daily=1, weekly=1), [5, 8]),
        (WEEKS, Rules(daily=1, weekly=1, monthly=1), [3, 5, 8]),
        (WEEKS, Rules(monthly=1, yearly=1), [0, 8]),
        (DAYS, Rules(last=4), [0, 1, 2, 3]),
        (DAYS, Rules(last=3), [1, 2, 3]),
        (DAYS, Rules(last=2), [2, 3]),
        (DAYS, Rules(last=1), [3]),
        (DAYS, Rules(last=2, daily=2), [0, 1, 2, 3]),
        (DAYS, Rules(daily=3), [0, 1, 3]),
        (DAYS, Rules(daily=2), [1, 3]),
        (DAYS, Rules(weekly=5), [3]),
        (DAYS, Rules(daily=1, weekly=5), [3]),
        (DAYS, Rules(monthly=6), [3]),
        (DAYS, Rules(yearly=7), [3]),
        (DAYS, Rules(weekly=5, monthly=6, yearly=7), [3]),
    ],
)
def test_proxmox_examples(times: list[str], rules: Rules, expected: list[int]) -> None:
    assert kept(archives(times), rules) == {times[each] for each in expected}


def test_the_example_of_the_proxmox_manual_covers_years_without_gaps() -> None:
    """keep-last 3, daily 13, weekly 8, monthly 11, yearly 9, with a backup each day for three years."""
    newest = at("2025-11-22T01:00:00")
    found = [ArchiveFacts(f"{each:04}", "vm", newest - each * DAY_S) for each in range(3 * 365)]
    days = {int(each) for each in kept(found, Rules(last=3, daily=13, weekly=8, monthly=11, yearly=9))}
    # 3 + 13 days, then Sundays, then the last days of months, then the ends of the years before those
    local = [(datetime(2025, 11, 22) - timedelta(days=each)).date().isoformat() for each in sorted(days)]
    assert local[:16] == [(datetime(2025, 11, 22) - timedelta(days=each)).date().isoformat() for each in range(16)]
    assert local[16:] == [
        "2025-11-02", "2025-10-26", "2025-10-19", "2025-10-12", "2025-10-05", "2025-09-28", "2025-09-21", "2025-09-14",
        "2025-08-31", "2025-07-31", "2025-06-30", "2025-05-31", "2025-04-30", "2025-03-31", "2025-02-28", "2025-01-31",
        "2024-12-31", "2024-11-30", "2024-10-31", "2023-12-31", "2022-12-31",
    ]  # fmt: skip


def test_iso_weeks_do_not_break_at_new_year() -> None:
    times = [
        "2024-12-29T01:00:00",
        "2024-12-30T01:00:00",
        "2025-01-01T01:00:00",
        "2025-01-05T01:00:00",
        "2025-01-06T01:00:00",
    ]
    assert kept(archives(times), Rules(weekly=3)) == {times[0], times[3], times[4]}


def test_days_are_those_of_the_time_zone() -> None:
    """23:30 and 00:30 UTC are one day in Berlin, in summer as in winter; the hour that comes twice is one hour."""
    berlin = ZoneInfo("Europe/Berlin")
    times = ["2026-07-01T23:30:00", "2026-07-02T00:30:00"]
    assert kept(archives(times), Rules(daily=5)) == set(times)
    assert kept(archives(times), Rules(daily=5), tz=berlin) == {times[1]}
    autumn = ["2026-10-25T00:30:00", "2026-10-25T01:30:00"]  # 02:30 twice
    assert kept(archives(autumn), Rules(hourly=5), tz=berlin) == {autumn[1]}
    assert kept(archives(autumn), Rules(hourly=5)) == set(autumn)


@pytest.mark.parametrize("rules", [Rules(), Rules(days=0, last=0)])
def test_without_a_rule_everything_stays(rules: Rules) -> None:
    assert kept(archives(WEEKS), rules) == set(WEEKS)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(RefusedError, match="keep_last: -1"):
        Rules(last=-1)


def test_days_are_a_limit_over_the_other_rules() -> None:
    found = [ArchiveFacts(f"{days}", "vm", NOW - days * DAY_S) for days in (0, 29, 30, 31, 400)]
    assert kept(found, Rules(days=30), now=NOW) == {"0", "29", "30"}
    assert kept(found, Rules(days=30, last=9, yearly=9), now=NOW) == {"0", "29", "30"}
    assert kept(found, Rules(days=30, last=2), now=NOW) == {"0", "29"}
    assert kept(found, Rules(days=30), now=NOW + 1) == {"0", "29"}


def test_what_does_not_count_pushes_nothing_out() -> None:
    good = [ArchiveFacts(f"good {days}", "vm", NOW - days * DAY_S) for days in (1, 2, 3)]
    broken = ArchiveFacts("broken", "vm", NOW, damaged=True)
    future = ArchiveFacts("future", "vm", NOW + 10 * 365 * DAY_S)
    locked = ArchiveFacts("protected", "vm", NOW - 40 * DAY_S, protected=True)
    found = [*good, broken, future, locked]
    assert kept(found, Rules(last=2), now=NOW) == {"good 1", "good 2", "broken", "future", "protected"}
    reasons = {each.path: each.reason for each in judge(found, Rules(last=2), now=NOW, tz=UTC)}
    assert "damaged" in reasons["broken"] and "future" in reasons["future"] and "protected" in reasons["protected"]
    assert reasons["good 1"] == "it is number 1 of 2 (keep_last)" and reasons["good 3"] == "newer ones fill all rules"
    older = replace(broken, newest=NOW - 9 * DAY_S)
    assert kept([*good, older], Rules(last=2), now=NOW) == {"good 1", "good 2"}
    assert kept([older], Rules(days=1), now=NOW) == {"broken"}  # it is all that there is


def test_vms_are_judged_by_themselves() -> None:
    found = [
        ArchiveFacts("a1", "a", NOW),
        ArchiveFacts("a2", "a", NOW - 1),
        ArchiveFacts("b1", "b", NOW - 2),
        ArchiveFacts("b2", "b", NOW - 3),
    ]
    assert kept(found, Rules(last=1)) == {"a1", "b1"}
    assert kept(found, Rules(last=1), vm_uuids=["a"]) == {"a1", "b1", "b2"}


def test_a_template_goes_with_the_last_archive_that_needs_it() -> None:
    old, new = frozenset({"t old"}), frozenset({"t new"})
    templates = [
        ArchiveFacts("t1", "t", NOW - 9 * DAY_S, provides=old),
        ArchiveFacts("t2", "t", NOW - 8 * DAY_S, provides=old),
        ArchiveFacts("t3", "t", NOW - 7 * DAY_S, provides=new),
    ]
    clones = [ArchiveFacts("c1", "c", NOW - 6 * DAY_S, needs=old), ArchiveFacts("c2", "c", NOW - DAY_S, needs=new)]
    rules = Rules(last=2)
    assert kept([*templates, *clones], rules) == {"t2", "t3", "c1", "c2"}
    assert kept([*templates, *clones], Rules(last=1)) == {"t3", "c2"}
    # only the template's are asked about: those of the clone stay, and so does what they need
    assert kept([*templates, *clones], Rules(last=1), vm_uuids={"t"}) == {"t2", "t3", "c1", "c2"}
    going = [each for each in [*templates, *clones] if each.path in ("t1", "t2", "c1")]
    assert [each.path for each in in_order(going)] == ["c1", "t1", "t2"]


GIB = 2**30


def test_room_is_made_from_the_oldest_of_any_vm_and_not_one_more() -> None:
    found = [
        ArchiveFacts("a old", "a", NOW - 9, GIB),
        ArchiveFacts("b older", "b", NOW - 10, GIB),
        ArchiveFacts("b", "b", NOW - 5, GIB),
        ArchiveFacts("a", "a", NOW - 4, GIB),
        ArchiveFacts("c only", "c", NOW - 20, GIB),
        ArchiveFacts("not ours", "", NOW - 30, 9 * GIB, not_ours="it was not made by this collection"),
    ]
    verdicts = judge(found, Rules(), now=NOW, tz=UTC)

    def removed(wanted: int, free: int = 0) -> set[str] | None:
        made = make_room(found, verdicts, wanted_bytes=wanted, free_bytes=free, now=NOW)
        return None if made is None else {each.path for each in made if not each.keep}

    assert removed(0) == set()
    assert removed(1) == removed(GIB) == {"b older"}
    assert removed(GIB + 1) == removed(2 * GIB) == {"b older", "a old"}
    assert removed(2 * GIB, free=GIB) == {"b older"}
    assert removed(2 * GIB + 1) is None


def test_the_newest_of_a_vm_does_not_go_for_space_while_an_older_one_must_stay() -> None:
    found = [
        ArchiveFacts("protected", "a", NOW - 9, GIB, protected=True),
        ArchiveFacts("newest", "a", NOW - 5, GIB),
        ArchiveFacts("damaged", "a", NOW - 4, GIB, damaged=True),
        ArchiveFacts("b", "b", NOW - 3, GIB),
    ]
    verdicts = judge(found, Rules(), now=NOW, tz=UTC)
    made = make_room(found, verdicts, wanted_bytes=GIB, free_bytes=0, now=NOW)
    assert made is not None and [each.path for each in made if not each.keep] == ["damaged"]
    assert make_room(found, verdicts, wanted_bytes=GIB + 1, free_bytes=0, now=NOW) is None


def test_room_counts_what_the_rules_remove() -> None:
    found = [ArchiveFacts(f"{each}", "a", NOW - each, GIB) for each in range(5)]
    verdicts = judge(found, Rules(last=3), now=NOW, tz=UTC)
    made = make_room(found, verdicts, wanted_bytes=3 * GIB, free_bytes=0, now=NOW)
    assert made is not None and [each.path for each in made if not each.keep] == ["2", "3", "4"]


def _history(pick: random.Random) -> list[ArchiveFacts]:
    """Archives of a few VMs, among them a template and its clone, with everything that can be odd about them."""
    found = []
    base = NOW - pick.choice((0, 3, 40, 400)) * DAY_S
    versions = [f"template {each}" for each in range(3)]
    for number in range(pick.randrange(12)):
        vm = pick.choice(("a", "b", "template", "clone", "clone"))
        age = pick.choice((0, 0, 1, 60, 3600, DAY_S, 7 * DAY_S, 31 * DAY_S, 366 * DAY_S)) * pick.randrange(4)
        newest = base - age + (pick.choice((FUTURE_S, FUTURE_S + 1, 3650 * DAY_S)) if pick.random() < 0.1 else 0)
        odd = pick.random
        found.append(
            ArchiveFacts(
                path=f"/{number:02}",
                vm_uuid=vm,
                newest=newest,
                frees_bytes=pick.randrange(4) * GIB,
                not_ours="foreign" if odd() < 0.08 else "",
                damaged=odd() < 0.2,
                protected=odd() < 0.1,
                in_use="a restore" if odd() < 0.1 else "",
                continued=odd() < 0.1,
                needs=frozenset(pick.sample(versions, pick.randrange(3))) if vm == "clone" else frozenset(),
                provides=frozenset(pick.sample(versions, pick.randrange(3))) if vm == "template" else frozenset(),
            )
        )
    return found


def _rules(pick: random.Random) -> Rules:
    def some() -> int:
        return pick.choice((0, 0, 0, 1, 1, 2, 5))

    return Rules(some(), some(), some(), some(), some(), some(), pick.choice((0, 0, 1, 7, 30)))


def _good(found: Sequence[ArchiveFacts]) -> list[ArchiveFacts]:
    return [each for each in found if not each.damaged and not each.not_ours and each.newest <= NOW + FUTURE_S]


def _check_invariants(before: Sequence[ArchiveFacts], gone: Sequence[ArchiveFacts]) -> None:
    """What E5 promises, told in other words than the code's."""
    left = [each for each in before if each not in gone]
    for each in gone:
        assert not (each.not_ours or each.protected or each.in_use or each.continued)
        assert each.newest <= NOW + FUTURE_S
    for vm in {each.vm_uuid for each in gone}:
        had, has = ([a for a in _good(some) if a.vm_uuid == vm] for some in (before, left))
        assert has, f"no good archive of {vm} is left" if had else f"{vm} had damaged ones only, and they went"
    for version in {version for each in left for version in each.needs}:
        assert any(version in each.provides for each in _good(left)) or not any(
            version in each.provides for each in gone
        ), f"{version} is needed and gone"


def test_what_must_never_go_never_goes() -> None:
    print(f"KVMOPS_BACKUP_SEED={SEED}")
    pick = random.Random(SEED)
    removals = rooms = 0
    for _number in range(HISTORIES):
        found, rules = _history(pick), _rules(pick)
        only = pick.choice((None, None, ["a"], ["template"]))
        verdicts = judge(found, rules, now=NOW, tz=UTC, vm_uuids=only)
        assert [each.path for each in verdicts] == [each.path for each in found]
        gone = _gone(found, verdicts)
        removals += len(gone)
        _check_invariants(found, gone)
        if only:
            assert all(each.vm_uuid in only for each in gone)
        if rules.days:
            young = {each.path for each in gone if NOW - each.newest <= rules.days * DAY_S}
            assert rules.counting or not young
        if not rules.counting and not rules.days:
            assert not gone
        # killed after any of the removals: still nothing is orphaned, and the next run ends where this one would have
        order = in_order(gone)
        for done in range(len(order) + 1):
            rest = [each for each in found if each not in order[:done]]
            _check_invariants(found, order[:done])
            assert {each.path for each in _gone(rest, judge(rest, rules, now=NOW, tz=UTC, vm_uuids=only))} == {
                each.path for each in order[done:]
            }
        # the order of the listing means nothing
        mixed = pick.sample(found, len(found))
        assert {each.path for each in _gone(mixed, judge(mixed, rules, now=NOW, tz=UTC, vm_uuids=only))} == {
            each.path for each in gone
        }
        rooms += _check_room(pick, found, verdicts, gone)
    assert removals > HISTORIES / 2 and rooms > HISTORIES / 10  # else nothing was looked at


def _gone(found: Sequence[ArchiveFacts], verdicts: Sequence[RetentionVerdict]) -> list[ArchiveFacts]:
    return [each for each, verdict in zip(found, verdicts) if not verdict.keep]


def _check_room(
    pick: random.Random, found: Sequence[ArchiveFacts], verdicts: Sequence[RetentionVerdict], gone: Sequence[ArchiveFacts]
) -> int:
    free, wanted = pick.randrange(3) * GIB, pick.randrange(9) * GIB
    made = make_room(found, verdicts, wanted_bytes=wanted, free_bytes=free, now=NOW)
    if made is None:
        return 0
    more = [each for each in _gone(found, made) if each not in gone]
    _check_invariants(found, _gone(found, made))
    assert free + sum(each.frees_bytes for each in [*gone, *more]) >= wanted
    if more:
        newest = max(more, key=lambda each: (each.newest, each.path))
        fewer = [each for each in [*gone, *more] if each is not newest]
        if free + sum(each.frees_bytes for each in fewer) >= wanted:
            with pytest.raises(AssertionError, match="is needed and gone"):
                _check_invariants(found, fewer)  # a template that could go only after the last archive that needed it
    return bool(more)
