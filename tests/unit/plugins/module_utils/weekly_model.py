# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The weekly policy as a model: what stands in the place after each run. It decides with the collection's own pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, tzinfo

from ansible_collections.kvmops.backup.plugins.module_utils import _policy, _retention

VM = "6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11"
MAX_AGE_S = 20 * 3600
RUN_S = 60  # how long a backup takes


@dataclass
class File:
    """One archive: times of its points, the full first. `stands`: the VM still stands on its newest point."""

    points: list[int]
    made_incrementable: bool = True
    stands: bool = True

    @property
    def full(self) -> int:
        return self.points[0]


@dataclass
class Model:
    """The place and the VM of the worked example."""

    tz: tzinfo
    keep_days: int = 30
    limit: int = 7
    weekday: str = "sunday"
    files: list[File] = field(default_factory=list)

    def run(self, now: int) -> str:
        """One run of the policy; what it did: full, increment, "increment, merge" or nothing."""
        owed = _policy.full_owed([each.full for each in self.files], now, self.weekday, self.tz)
        newest = max((point for each in self.files for point in each.points), default=0)
        if not owed and newest >= now - MAX_AGE_S:
            return "nothing"
        cycle = [each for each in self.files if each.made_incrementable]
        base = cycle[-1] if cycle and cycle[-1].stands and not owed else None
        if base:
            base.points.append(now)
            done = "increment"
        else:
            for each in cycle:
                each.stands = False
            base = File([now])
            self.files.append(base)
            done = "full"
        if len(base.points) >= self.limit:
            base.stands = False
            done += ", merge"
        self._clean_up(now + RUN_S)
        return done

    def ad_hoc_full(self, now: int) -> None:
        """``vm_backup`` without any options: its snapshot is gone again when it ends."""
        self.files.append(File([now], made_incrementable=False, stands=False))

    def _clean_up(self, now: int) -> None:
        archives = [
            _retention.ArchiveFacts(path=str(each.full), vm_uuid=VM, newest=each.points[-1], continued=each.stands)
            for each in self.files
        ]
        verdicts = _retention.judge(archives, _retention.Rules(days=self.keep_days), now=now, tz=self.tz)
        gone = {verdict.path for verdict in verdicts if not verdict.keep}
        self.files = [each for each in self.files if str(each.full) not in gone]

    def listing(self) -> list[tuple[date, int]]:
        """The files, oldest first: local day of the full, and how many points are in it."""
        return [(datetime.fromtimestamp(each.full, self.tz).date(), len(each.points)) for each in self.files]


def nights(first: date, days: int, tz: tzinfo, missed: Sequence[date] = ()) -> Iterator[tuple[date, int]]:
    """Each day with the unix time of its 01:00, without those that are missed."""
    for number in range(days):
        day = first + timedelta(days=number)
        if day not in missed:
            yield day, int(datetime.combine(day, time(1), tz).timestamp())
