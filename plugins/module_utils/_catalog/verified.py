# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What the last verification of an archive has found on this host, for those who ask later.

One JSON file per archive under the cache directory. Lost, nothing is known and nothing else happens. A finding stands until the
archive is verified again: reading bytes wrongly leaves no trace in the file's times.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _json
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import cache

_VERSION = 1


class PointDigest(Protocol):
    """What is looked at of a point."""

    @property
    def timestamp(self) -> int:
        """Its unix time."""

    @property
    def digest(self) -> str:
        """Of its configuration; "" in a foreign archive."""


@dataclass(frozen=True)
class Verified:
    """`at`: unix time. `points`: those that there were then, `lost` those of them that damage has cost.

    `coverage`: full, partial or structure. `current`: nothing was added to the file since.
    """

    at: int
    ok: bool
    coverage: str
    points: tuple[int, ...]
    lost: tuple[int, ...]
    current: bool = True


def record(
    path: str, points: Iterable[PointDigest], *, at: int, ok: bool, coverage: str, lost: Iterable[int]
) -> None:
    """Keeps a finding. A cache that cannot be written is no reason to fail."""
    known = list(points)
    try:
        stat = _files.evidence(path)
        target = _file(stat)
        kept = {
            "version": _VERSION,
            "first": _first(known),
            "stat": stat,
            "at": at,
            "ok": ok,
            "coverage": coverage,
            "points": [point.timestamp for point in known],
            "lost": sorted(set(lost)),
        }
        cache.replace_file(target, json.dumps(kept).encode())
    except OSError:
        return


def last(path: str, points: Iterable[PointDigest]) -> Verified | None:
    """The last finding about the archive at `path`, which has these points; None where there is none."""
    try:
        stat = _files.evidence(path)
        kept = _json.parse(_files.read_kept(_file(stat)))
        if kept["version"] != _VERSION or kept["first"] != _first(list(points)):
            return None
        return Verified(
            at=_json.whole(kept["at"]),
            ok=bool(kept["ok"]),
            coverage=str(kept["coverage"]),
            points=tuple(map(_json.whole, kept["points"])),
            lost=tuple(map(_json.whole, kept["lost"])),
            current=tuple(kept["stat"]) == tuple(stat),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _first(points: list[PointDigest]) -> list[int | str]:
    """Tells an archive from a later one that has got its inode."""
    return [points[0].timestamp, points[0].digest] if points else []


def _file(stat: tuple[int, ...]) -> str:
    return os.path.join(cache.directory("verified"), f"{stat[0]}-{stat[1]}.json")
