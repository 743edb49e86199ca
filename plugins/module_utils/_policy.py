# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The weekly policy: when a full is owed, when a VM is done for the day. Pure; times are unix seconds, the time zone is given."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta, tzinfo

WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_DAY_S = 86400
FUTURE_S = 3600  # a point that is further ahead was made while a clock was wrong


def week_began(now: int, weekday: str, tz: tzinfo | None = None) -> int:
    """When the last `weekday` (one of WEEKDAYS) began: its 00:00 in `tz`, None for the time zone of this host.

    On that day itself it is today's midnight. Where the clocks skip midnight, the day begins at the change; where they
    strike it twice, at the first.
    """
    today = datetime.fromtimestamp(now, tz)
    first = today.date() - timedelta(days=(today.weekday() - WEEKDAYS.index(weekday)) % 7)
    return int(datetime(first.year, first.month, first.day, tzinfo=tz).timestamp())


def full_owed(fulls: Iterable[int], now: int, weekday: str, tz: tzinfo | None = None) -> str:
    """Why a full backup is owed, "" if it is not. `fulls`: times of the good full backups that there are."""
    began = week_began(now, weekday, tz)
    if any(began <= full <= now + FUTURE_S for full in fulls):
        return ""
    return f"no good full backup since {datetime.fromtimestamp(began, tz):%A %Y-%m-%d %H:%M}"


def done_within_s(max_age_s: int, today_s: int) -> int:
    """How young a point must be for its VM to be done. `today_s`: seconds since the midnight of the host.

    Up to a day that is a point of today, or one younger than half of `max_age_s`: yesterday's run may have taken long, or
    have been made up for late. More than a day is meant as it stands.
    """
    if max_age_s > _DAY_S:
        return max_age_s
    return min(max_age_s, max(max_age_s // 2, today_s))
