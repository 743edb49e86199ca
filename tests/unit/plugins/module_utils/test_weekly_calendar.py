# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The worked example of docs/WEEKLY.md over 120 days: every night, with missed days, and over both changes of the clocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils.weekly_model import Model, nights

BERLIN = ZoneInfo("Europe/Berlin")
DAY_S = 86400
SPRING, AUTUMN = date(2026, 2, 1), date(2026, 8, 30)  # Sundays; the clocks change on 29 March and 25 October
DAYS = 120
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def noon(day: date) -> int:
    return int(datetime.combine(day, time(12), BERLIN).timestamp())


def simulate(
    first: date, missed: Sequence[date] = (), after: Callable[[Model, date], None] | None = None
) -> list[tuple[date, str, list[tuple[date, int]]]]:
    """Each night's day, what its run did, and the files then. Holds what must hold on every day."""
    model = Model(BERLIN)
    seen = []
    for day, now in nights(first, DAYS, BERLIN, missed):
        done = model.run(now)
        assert model.run(now + 3 * 3600) == "nothing", day
        assert model.files
        assert all(each.points[-1] >= now - 30 * DAY_S for each in model.files), day
        if "merge" in done:
            assert WEEKDAYS[day.weekday()] == "Sat"
        seen.append((day, done, model.listing()))
        if after:
            after(model, day)
    return seen


def expected(day: date, first: date, missed: Sequence[date] = ()) -> list[tuple[date, int]]:
    """The files of that day, from the rule in words.

    A file begins on Sunday (or the first day after it with a run), has a point of each run of its week, and goes with the first
    run that is more than thirty days after its last.
    """
    weeks: dict[date, list[date]] = {}
    for number in range((day - first).days + 1):
        each = first + timedelta(days=number)
        if each not in missed:
            weeks.setdefault(each - timedelta(days=(each.weekday() + 1) % 7), []).append(each)

    def at(each: date) -> float:
        return datetime.combine(each, time(1), BERLIN).timestamp()

    return [(runs[0], len(runs)) for runs in weeks.values() if at(runs[-1]) >= at(day) + 60 - 30 * DAY_S]


@pytest.mark.parametrize("first", [SPRING, AUTUMN], ids=["spring", "autumn"])
@pytest.mark.parametrize(
    "missed",
    [[], [24], [27], [28], [24, 27], [28, 29], [24, 34, 42, 60, 61], list(range(50, 59)), list(range(40, 80))],
    ids=["none", "wednesday", "saturday", "sunday", "wed+sat", "sun+mon", "several", "nine days", "forty days"],
)
def test_120_days(first: date, missed: list[int]) -> None:
    off = [first + timedelta(days=number) for number in missed]
    seen = simulate(first, off)
    fulls = [day for day, done, _files in seen if done.startswith("full")]
    first_runs: dict[date, date] = {}
    for day, _done, _files in seen:
        first_runs.setdefault(day - timedelta(days=(day.weekday() + 1) % 7), day)
    assert fulls == list(first_runs.values())
    if not missed:
        assert {WEEKDAYS[day.weekday()] for day in fulls} == {"Sun"}
        assert {WEEKDAYS[day.weekday()] for day, done, _files in seen if "merge" in done} == {"Sat"}
    for day, _done, files in seen:
        assert files == expected(day, first, off), day


@pytest.mark.parametrize("first", [SPRING, AUTUMN], ids=["spring", "autumn"])
def test_an_ad_hoc_full_on_saturday_noon_changes_nothing_else(first: date) -> None:
    saturday = first + timedelta(days=27)

    def ad_hoc(model: Model, day: date) -> None:
        if day == saturday:
            model.ad_hoc_full(noon(day))

    for day, done, files in simulate(first, after=ad_hoc):
        regular = expected(day, first)
        extra = [file for file in files if file not in regular]
        assert [file for file in files if file not in extra] == regular, day
        kept = saturday < day and noon(saturday) >= noon(day) - 11 * 3600 + 60 - 30 * DAY_S
        assert extra == ([(saturday, 1)] if kept else []), day
        assert done.startswith("full") == (day.weekday() == 6)


def test_the_calendar_in_the_docs_is_true() -> None:
    text = (Path(__file__).parents[4] / "docs" / "WEEKLY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w{3}) (\d+ \w{3}) \| ([\w, ]+?) \| (.+?) \|$", text, re.MULTILINE)
    first = date(2026, 9, 6)
    assert len(rows) == 50
    model = Model(BERLIN)
    for (weekday, day_text, run, files), (day, now) in zip(rows, nights(first, len(rows), BERLIN)):
        assert (weekday, day_text) == (WEEKDAYS[day.weekday()], f"{day.day} {day:%b}")
        assert run == model.run(now), day
        assert files == ", ".join(f"{full.day} {full:%b} ({points})" for full, points in model.listing()), day
