# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What there is to know of an archive without restoring it: its points as whoever lists, judges or counts archives needs them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Conversion,
    TemplateDisk,
    TemplateRequirement,
)
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.verified import Verified
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError

CONVERTED = "it was converted from another product's package and is no backup of a VM"


@dataclass(frozen=True)
class Point:
    """Of a point (see Configuration) all but what a restore needs. `size_bytes`: of the members that are new at it;
    `consistency`: "" where the archive does not say it; `snapshots`: names; `snapshot`: the one that is current, "" for none.
    """

    timestamp: int
    vm_name: str
    vm_uuid: str
    mode: str = "full"
    consistency: str = ""
    size_bytes: int = 0
    incrementable: bool = False
    template: bool = False
    digest: str = ""
    digest_algorithm: str = "sha256"
    snapshots: tuple[str, ...] = ()
    snapshot: str = ""
    requires: TemplateRequirement | None = None
    provides: tuple[TemplateDisk, ...] = ()
    conversion: Conversion | None = None

    @classmethod
    def of(cls, point: Configuration, older: Collection[str] = ()) -> Point:
        """Of a configuration; `older`: names of the members that points before it have."""
        return cls(
            point.timestamp,
            point.vm_name,
            point.vm_uuid,
            point.mode,
            point.consistency.value if point.format_version else "",
            sum(member.size_bytes for member in point.members if member.name not in older),
            point.incrementable,
            point.template,
            point.digest,
            point.digest_algorithm,
            tuple(state.name for state in point.snapshots),
            next((state.name for state in point.snapshots if state.current), ""),
            point.requires,
            point.provides,
            point.conversion,
        )


def points_of(configurations: tuple[Configuration, ...]) -> tuple[Point, ...]:
    """The points of an archive, oldest first."""
    points = []
    known: set[str] = set()
    for each in configurations:
        points.append(Point.of(each, known))
        known.update(member.name for member in each.members)
    return tuple(points)


@dataclass(frozen=True)
class ArchiveView:
    """What a file says: its good points, oldest first. `native`: in the form that this collection gives it; `distrust`: why its
    file is not ours to trust, "" if it is. `broken`: why other points are not good, and what an append has left. `damaged`:
    there are such points, or the last verification has found damage; `found` is what it has found. `files`: those that a package
    names, whether each is there now, and its size. `shown`: what there is to show of its newest point. `glanced`: the file was not
    opened for it, the index told it."""

    path: str
    size_bytes: int
    compressed: bool
    native: bool
    points: tuple[Point, ...]
    broken: tuple[str, ...] = ()
    damaged: bool = False
    found: Verified | None = None
    distrust: str = ""
    files: tuple[tuple[str, bool, int], ...] = ()
    shown: Mapping[str, Any] = field(default_factory=dict)
    glanced: bool = False

    @property
    def not_ours(self) -> str:
        """Why it counts for nothing here; "" for ours, the backups that this collection made and nobody else can have written."""
        if not self.native:
            return "it was not made by this collection"
        return self.distrust or (CONVERTED if self.newest.conversion else "")

    @property
    def ours(self) -> bool:
        """Whether it counts."""
        return not self.not_ours

    @property
    def identity(self) -> tuple[tuple[int, str], ...]:
        """The same for an archive and its compressed form, different for any two others of this collection."""
        return tuple((point.timestamp, point.digest) for point in self.points)

    @property
    def good(self) -> bool:
        """Whether a VM can be restored from it as far as is known: what "the last good archive" counts. Only of ours."""
        return self.ours and not self.damaged

    @property
    def good_points(self) -> tuple[Point, ...]:
        """The points that no verification has found lost."""
        lost = self.found.lost if self.found else ()
        return tuple(point for point in self.points if point.timestamp not in lost)

    @property
    def newest(self) -> Point:
        """The newest good point."""
        return self.points[-1]

    def point(self, timestamp: int | None) -> Point:
        """The point of that unix time, the newest for None. Raises ArchiveError naming those that there are."""
        if timestamp is None:
            return self.newest
        for point in self.points:
            if point.timestamp == timestamp:
                return point
        known = ", ".join(str(point.timestamp) for point in self.points)
        raise ArchiveError(f"Archive {self.path}", f"it has no point {timestamp}", f"It has {known}.")
