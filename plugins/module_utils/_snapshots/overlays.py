# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a snapshot that we take consists of, as values and as facts of the journal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

# of file names: AppArmor lets libvirt's helper read images outside of libvirt's directories by it, and so allow their chain
EXTENSION = ".qcow2"


class SnapshotPhase(str, Enum):
    """How far the run as a whole had come."""

    TAKING = "taking"
    TAKEN = "taken"
    REMOVING = "removing"
    PUT_BACK = "put back"  # taking it failed, and nothing of it is left


class Step(str, Enum):
    """How far the merge of one disk had come, always recorded before the act it names (PIVOTED: after it was seen)."""

    NONE = "none"
    COMMITTING = "committing"
    PIVOTING = "pivoting"  # the persistent definition was on the overlay: it will tell whether libvirt saw the end
    PIVOTING_BLIND = "pivoting_blind"  # the persistent definition was on the base all the time: it tells nothing
    PIVOTED = "pivoted"
    LEFT = "left"  # the disk was unplugged, and its files stay for a person to judge


@dataclass(frozen=True)
class Overlay:
    """One disk of the snapshot: ``base_path`` is frozen, the guest goes on writing to ``overlay_path`` (a new qcow2).

    ``between`` are the layers of older snapshots that go with it, the one under the overlay first.
    """

    target: str
    base_path: str
    base_format: str
    overlay_path: str
    between: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """All that is merged into the base, the active image first."""
        return (self.overlay_path, *self.between)


@dataclass(frozen=True)
class SnapshotPlan:
    """A snapshot to take. Every disk of the VM is in ``overlays`` or in ``excluded_targets``."""

    vm_uuid: str
    vm_name: str
    name: str
    description: str
    overlays: tuple[Overlay, ...]
    excluded_targets: tuple[str, ...]
    memory_path: str  # "" without a memory image
    quiesce: bool  # freeze the guest's file systems through its agent
    expendable: tuple[str, ...] = ()  # internal snapshots that may go with the overlays they lie in


@dataclass(frozen=True)
class Owner:
    """Owner, mode and libvirt's labels of a base file before the snapshot."""

    uid: int
    gid: int
    mode: int
    labels: tuple[tuple[str, str], ...]  # name and value of trusted.libvirt.security.*


@dataclass(frozen=True)
class OriginalDisk:
    """What one disk was before: its <disk> in the persistent definition ("" if it had none there) and its file's owner."""

    disk_xml: str
    owner: Owner


def content_of(path: str) -> tuple[int, ...]:
    """Changes when the file is written to, wherever it is mounted then."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class MergeFacts:
    """What the journal says of every operation that merges what the guest writes to. ``steps``: by target, once there is one."""

    steps: Mapping[str, Step]

    def step(self, target: str) -> Step:
        """How far the merge of this disk had come."""
        return self.steps.get(target, Step.NONE)


@dataclass(frozen=True)
class SnapshotFacts(MergeFacts):
    """What the journal says of every operation that takes a snapshot.

    ``originals``: what the disks were before, by target. ``stood_on``: the VM's current snapshot before, "" for none. ``frozen``:
    what tells whether a base was written to since (`content_of`), by target.
    """

    vm_uuid: str
    vm_name: str
    plan: Optional[SnapshotPlan] = None
    originals: Mapping[str, OriginalDisk] = field(default_factory=dict)
    stood_on: str = ""
    phase: Optional[SnapshotPhase] = None
    frozen: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether nothing of the snapshot can be on the VM: it was never asked for, or all was put back."""
        return self.plan is None or self.phase is SnapshotPhase.PUT_BACK
