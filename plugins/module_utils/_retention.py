# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which archives stay and which go, and why. Pure.

The counting rules are those of Proxmox (keep-last, then hourly, daily, weekly, monthly, yearly): each rule looks only at what
the rules before it have left, keeps the newest archive of a period, and does not count periods without one. `days` is a limit
over all of them. What must never go whatever the rules say is in one place, `_held`, and is applied last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Optional

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._policy import FUTURE_S

DAY_S = 86400
FOR_SPACE = "it is among the oldest here, and space is needed (free_space)"


@dataclass(frozen=True)
class ArchiveFacts:
    """What retention needs to know of a file in the place.

    `newest`: unix time of its newest good point, which is its age. `frees_bytes`: what its removal gives back.
    `not_ours`: why nobody here may judge it, "" for an archive of ours. `in_use`: who works with it, "" for nobody.
    `continued`: a backup with mode auto would add its next increment to it (or nobody can tell).
    `needs`: the templates (uuid and version) that its points cannot be restored without; `provides`: those that it holds.
    """

    path: str
    vm_uuid: str
    newest: int
    frees_bytes: int = 0
    not_ours: str = ""
    damaged: bool = False
    protected: bool = False
    in_use: str = ""
    continued: bool = False
    needs: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rules:
    """How many archives of a VM to keep, by rule; 0: there is no such rule. `days`: older ones go, whatever the others say."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    days: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise RefusedError(
                    f"Option keep_{name}", f"{value} is no number of archives", "Use 0 for no such rule."
                )

    @property
    def counting(self) -> bool:
        """Whether a rule other than `days` is given."""
        return any(value for name, value in vars(self).items() if name != "days")


@dataclass(frozen=True)
class RetentionVerdict:
    """What shall happen to the archive at a path, and why."""

    path: str
    keep: bool
    reason: str


def judge(
    archives: Sequence[ArchiveFacts],
    rules: Rules,
    *,
    now: int,
    tz: Optional[tzinfo],
    vm_uuids: Optional[Collection[str]] = None,
) -> list[RetentionVerdict]:
    """A verdict for each archive, in their order.

    `archives`: all that stand in the place, so that it is seen what they need of each other; the rules apply to each VM by
    itself, or only to those of `vm_uuids`. `tz`: the time zone that hours, days and ISO weeks are told in, None: that of the host.
    """
    verdicts: dict[str, RetentionVerdict] = {}
    own: dict[str, list[ArchiveFacts]] = {}
    for each in archives:
        if each.not_ours:
            verdicts[each.path] = RetentionVerdict(each.path, True, each.not_ours)
        elif vm_uuids is not None and each.vm_uuid not in vm_uuids:
            verdicts[each.path] = RetentionVerdict(each.path, True, "it belongs to another VM")
        else:
            own.setdefault(each.vm_uuid, []).append(each)
    for group in own.values():
        verdicts.update((verdict.path, verdict) for verdict in _by_rules(group, rules, now, tz))
    _hold_back(archives, verdicts, now)
    return [verdicts[each.path] for each in archives]


def make_room(
    archives: Sequence[ArchiveFacts], verdicts: Sequence[RetentionVerdict], *, wanted_bytes: int, free_bytes: int, now: int
) -> Optional[list[RetentionVerdict]]:
    """The verdicts with as many more removals, oldest first and of any VM, as `wanted_bytes` need; None if that cannot be.

    `verdicts`: those of `judge` for these archives; what they remove counts as free. No archive goes that need not, nor the
    newest good one of a VM of which older ones must stay.
    """
    decided = {each.path: each for each in verdicts}
    free = free_bytes + sum(each.frees_bytes for each in archives if not decided[each.path].keep)
    waiting = sorted((each for each in archives if decided[each.path].keep), key=_age)
    kept = _Kept(waiting, now)
    newest = {each.vm_uuid: each for each in waiting if kept.is_good(each)}  # the last in this order
    while free < wanted_bytes:
        # nothing is gained by an archive whose removal frees nothing
        may_go = (each for each in waiting if each.frees_bytes and each != newest.get(each.vm_uuid))
        gone = next((each for each in may_go if not kept.held(each)), None)
        if gone is None:
            return None
        waiting.remove(gone)
        kept.take(gone, -1)
        free += gone.frees_bytes
        decided[gone.path] = RetentionVerdict(gone.path, False, FOR_SPACE)
    return [decided[each.path] for each in archives]


def in_order(archives: Iterable[ArchiveFacts]) -> list[ArchiveFacts]:
    """The order to remove archives in, so that a run that ends half-way orphans none: what others need goes last."""
    return sorted(archives, key=lambda each: (bool(each.provides), _age(each)))


def _age(archive: ArchiveFacts) -> tuple[int, str]:
    return archive.newest, archive.path


def _is_future(archive: ArchiveFacts, now: int) -> bool:
    return archive.newest > now + FUTURE_S


def _by_rules(own: Sequence[ArchiveFacts], rules: Rules, now: int, tz: Optional[tzinfo]) -> list[RetentionVerdict]:
    """What the rules alone say about the archives of one VM."""
    newest_first = sorted(own, key=_age, reverse=True)
    uncounted = [each for each in newest_first if each.damaged or each.protected or _is_future(each, now)]
    counted = [each for each in newest_first if each not in uncounted]
    if rules.counting:
        verdicts = _counted(counted, rules, tz)
    else:
        why = f"it is not older than {rules.days} days (keep_days)" if rules.days else "no rule is given"
        verdicts = {each.path: RetentionVerdict(each.path, True, why) for each in newest_first}
    too_old = [each for each in newest_first if rules.days and now - each.newest > rules.days * DAY_S]
    for each in too_old:
        verdicts[each.path] = RetentionVerdict(each.path, False, f"it is older than {rules.days} days (keep_days)")
    oldest_kept = min((_age(each) for each in counted if verdicts[each.path].keep), default=None)
    for each in uncounted:
        if each.protected or _is_future(each, now):
            verdicts.setdefault(each.path, RetentionVerdict(each.path, False, "no rule counts it"))  # held back, with the reason
        elif each.path not in verdicts:
            keep = oldest_kept is None or _age(each) > oldest_kept
            why = "is kept while older ones are" if keep else "is older than all that the rules keep"
            verdicts[each.path] = RetentionVerdict(each.path, keep, f"it is damaged, so no rule counts it, and it {why}")
    return list(verdicts.values())


def _counted(newest_first: Sequence[ArchiveFacts], rules: Rules, tz: Optional[tzinfo]) -> dict[str, RetentionVerdict]:
    """Marks archives rule by rule as Proxmox does (pbs-datastore, prune.rs: mark_selections)."""

    def local(archive: ArchiveFacts) -> datetime:
        return datetime.fromtimestamp(archive.newest, tz)

    periods: tuple[tuple[str, int, Callable[[ArchiveFacts], Hashable]], ...] = (
        ("last", rules.last, lambda each: each.path),
        ("hourly", rules.hourly, lambda each: local(each).strftime("%Y-%m-%d %H:00")),
        ("daily", rules.daily, lambda each: local(each).strftime("%Y-%m-%d")),
        ("weekly", rules.weekly, lambda each: local(each).strftime("week %V of %G")),
        ("monthly", rules.monthly, lambda each: local(each).strftime("%Y-%m")),
        ("yearly", rules.yearly, lambda each: local(each).strftime("%Y")),
    )
    marks: dict[str, RetentionVerdict] = {}
    for name, count, period_of in periods:
        covered = {period_of(each) for each in newest_first if each.path in marks and marks[each.path].keep}
        taken: set[Hashable] = set()
        for each in newest_first if count else ():
            period = period_of(each)
            if each.path in marks or period in covered:
                continue
            if period in taken:
                marks[each.path] = RetentionVerdict(each.path, False, f"a newer one stands for {period} (keep_{name})")
                continue
            if len(taken) == count:
                break
            taken.add(period)
            of_period = "" if name == "last" else f" for {period}"
            marks[each.path] = RetentionVerdict(
                each.path, True, f"it is number {len(taken)} of {count}{of_period} (keep_{name})"
            )
    for each in newest_first:
        marks.setdefault(each.path, RetentionVerdict(each.path, False, "newer ones fill all rules"))
    return marks


def _hold_back(archives: Sequence[ArchiveFacts], verdicts: dict[str, RetentionVerdict], now: int) -> None:
    """Turns the verdicts on those that must not go. The newest come first, so that they are the ones that are held."""
    kept = _Kept([each for each in archives if verdicts[each.path].keep], now)
    going = sorted(
        (each for each in archives if not verdicts[each.path].keep),
        key=lambda each: (not each.damaged, _age(each)),
        reverse=True,
    )
    while True:
        held = {each.path: RetentionVerdict(each.path, True, reason) for each in going if (reason := kept.hold(each))}
        if not held:
            return
        verdicts.update(held)
        going = [each for each in going if each.path not in held]


class _Kept:
    """What is kept so far, and the one place that says what must not go beside it, whatever the rules are."""

    def __init__(self, archives: Iterable[ArchiveFacts], now: int) -> None:
        self._now = now
        self._good_of_vm: Counter[str] = Counter()
        self._needed: Counter[str] = Counter()
        self._provided: Counter[str] = Counter()
        for each in archives:
            self.take(each, 1)

    def take(self, archive: ArchiveFacts, count: int) -> None:
        """One more that is kept (1), or one less (-1)."""
        self._needed.update(dict.fromkeys(archive.needs, count))
        if self.is_good(archive):
            self._good_of_vm[archive.vm_uuid] += count
            self._provided.update(dict.fromkeys(archive.provides, count))

    def hold(self, archive: ArchiveFacts) -> str:
        """As `held` for one that is not among the kept; if it must stay, it is from now on."""
        self.take(archive, 1)
        reason = self.held(archive)
        if not reason:
            self.take(archive, -1)
        return reason

    def held(self, archive: ArchiveFacts) -> str:
        """Why an archive that is among the kept must not go; "" if it may."""
        if archive.not_ours:
            return archive.not_ours
        if archive.protected:
            return "it is protected"
        if archive.in_use:
            return f"it is in use: {archive.in_use}"
        if _is_future(archive, self._now):
            return "it is dated in the future, so its age is not known: the clock was wrong then, or is now"
        good = self.is_good(archive)
        if self._good_of_vm[archive.vm_uuid] <= good:
            return (
                "it is the last good archive of its VM" if good else "its VM has no good archive, so damaged ones stay"
            )
        if any(self._needed[each] and self._provided[each] <= good for each in archive.provides):
            return "it holds the template that a kept archive of a thin clone needs"
        return "a backup with mode auto would continue it" if archive.continued else ""

    def is_good(self, archive: ArchiveFacts) -> bool:
        """Whether a VM can be restored from it, as far as is known, and its age is known."""
        return not archive.damaged and not archive.not_ours and not _is_future(archive, self._now)
