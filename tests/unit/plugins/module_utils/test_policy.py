# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""When a full backup is owed: missed days, ad hoc backups, changes of daylight saving time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.kvmops.backup.plugins.module_utils import _policy

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: ZoneInfo = BERLIN) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=zone).timestamp())


@pytest.mark.parametrize(
    ("now", "began"),
    [
        ("2026-11-22T00:00:00", "2026-11-22T00:00:00"),  # a Sunday
        ("2026-11-22T01:00:00", "2026-11-22T00:00:00"),
        ("2026-11-21T23:59:59", "2026-11-15T00:00:00"),
        ("2026-11-28T01:00:00", "2026-11-22T00:00:00"),
        ("2026-03-29T03:30:00", "2026-03-29T00:00:00"),  # 02:00 to 03:00 did not exist
        ("2026-04-01T01:00:00", "2026-03-29T00:00:00"),
        ("2026-10-25T02:30:00", "2026-10-25T00:00:00"),  # 02:30 came twice
        ("2026-10-31T01:00:00", "2026-10-25T00:00:00"),
    ],
)
def test_the_week_begins_at_local_midnight(now: str, began: str) -> None:
    assert _policy.week_began(at(now), "sunday", BERLIN) == at(began)


def test_where_the_clocks_skip_midnight_the_day_begins_at_the_change() -> None:
    zone = ZoneInfo("America/Sao_Paulo")  # 2018-11-04 began at 01:00
    began = _policy.week_began(at("2018-11-04T01:30:00", zone), "sunday", zone)
    assert datetime.fromtimestamp(began, zone).isoformat() == "2018-11-04T01:00:00-02:00"
    assert datetime.fromtimestamp(began - 1, zone).isoformat() == "2018-11-03T23:59:59-03:00"


def test_where_midnight_comes_twice_the_first_counts() -> None:
    zone = ZoneInfo("America/Havana")  # 2026-11-01: from 00:59:59 back to 00:00
    second = datetime(2026, 11, 1, 0, 10, tzinfo=zone, fold=1)
    began = _policy.week_began(int(second.timestamp()), "sunday", zone)
    assert second.timestamp() - began == 70 * 60


@pytest.mark.parametrize(
    ("fulls", "now", "owed"),
    [
        ([], "2026-11-22T01:00:00", True),
        (["2026-11-15T01:00:00"], "2026-11-21T01:00:00", False),
        (["2026-11-15T01:00:00"], "2026-11-22T01:00:00", True),
        (["2026-11-22T01:00:00"], "2026-11-22T01:05:00", False),
        (["2026-11-21T12:00:00"], "2026-11-22T01:00:00", True),  # ad hoc on Saturday noon
        (["2026-11-15T01:00:00"], "2026-11-23T01:00:00", True),  # the Sunday was missed
        (["2026-11-23T01:00:00"], "2026-11-24T01:00:00", False),  # and made up for on Monday
        (["2030-01-01T00:00:00"], "2026-11-23T01:00:00", True),  # made while the clock was wrong
        (["2026-11-22T01:00:30"], "2026-11-22T01:00:00", False),  # the clock was set back a little
        (["2026-03-22T01:00:00"], "2026-03-29T01:00:00", True),
        (["2026-10-25T02:10:00"], "2026-10-25T02:40:00", False),
    ],
)
def test_owed(fulls: list[str], now: str, owed: bool) -> None:
    assert bool(_policy.full_owed([at(full) for full in fulls], at(now), "sunday", BERLIN)) == owed


def test_the_reason_names_the_day() -> None:
    assert _policy.full_owed([], at("2026-11-24T01:00:00"), "sunday", BERLIN) == (
        "no good full backup since Sunday 2026-11-22 00:00"
    )


@pytest.fixture
def in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_berlin")
def test_without_a_time_zone_it_is_that_of_the_host() -> None:
    for now in range(at("2026-03-01T00:00:00"), at("2026-11-30T00:00:00"), 5 * 3600 + 1):
        assert _policy.week_began(now, "sunday") == _policy.week_began(now, "sunday", BERLIN)


ZONES = ["Europe/Berlin", "America/New_York", "America/Havana", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC"]


@settings(max_examples=500, deadline=None)
@given(
    now=st.integers(1_500_000_000, 2_100_000_000),
    weekday=st.sampled_from(_policy.WEEKDAYS),
    zone=st.sampled_from(ZONES),
)
def test_it_is_the_last_such_day_and_no_other(now: int, weekday: str, zone: str) -> None:
    tz = ZoneInfo(zone)
    began = _policy.week_began(now, weekday, tz)
    day = datetime.fromtimestamp(began, tz)
    assert began <= now
    assert _policy.WEEKDAYS[day.weekday()] == weekday
    assert datetime.fromtimestamp(now, tz).date() - day.date() < timedelta(days=7)
    before = datetime.fromtimestamp(began - 1, tz)
    assert before.date() == day.date() - timedelta(days=1)
