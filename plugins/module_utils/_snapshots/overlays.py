# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a snapshot that we take consists of, as values and as facts of the journal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

# of file names: AppArmor lets libvirt's helper read images outside of libvirt's directories by it, and so allow their chain
EXTENSION = ".qcow2"
# operations that keep a journal about one VM, as a person reads them: "a run of …"
OPERATION_BACKUP, OPERATION_TAKE = "backup", "a snapshot"
OPERATION_REMOVE, OPERATION_REVERT = "removal of snapshots", "a revert"
SNAPSHOT = "snapshot"  # names of facts in the journal
PHASE = "phase"
FROZEN = "frozen"  # what tells whether a base was written to since: by target
STOOD_ON = "stood_on"  # the VM's current snapshot before, "" for none
PARTIAL = "partial"  # path of the unfinished archive
PARTIAL_PLACE = "partial_place"  # what tells its directory, see _mounts.identity
PUBLISHED = "published"  # true: the point is in its archive, and its snapshot stays
REMOVAL = "removal"  # the snapshots that are being removed
REVERT = "revert"  # the snapshot that is being reverted to


class Phase(str, Enum):
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
class Former:
    """What one disk was before: its <disk> in the persistent definition ("" if it had none there) and its file's owner."""

    disk_xml: str
    owner: Owner


def content_of(path: str) -> list[int]:
    """Changes when the file is written to, wherever it is mounted then."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def to_facts(plan: SnapshotPlan, formers: Mapping[str, Former]) -> dict[str, Any]:
    """The plan as JSON values for the journal."""
    return {**asdict(plan), **formers_to_facts(formers)}


def formers_to_facts(formers: Mapping[str, Former]) -> dict[str, Any]:
    """What the disks were before, by target, as JSON values for formers_of()."""
    return {"formers": {target: asdict(former) for target, former in formers.items()}}


def plan_of(facts: Mapping[str, Any]) -> SnapshotPlan:
    """The plan in a journal's snapshot fact."""
    values = {name: value for name, value in facts.items() if name != "formers"}
    values["overlays"] = tuple(
        Overlay(**{**each, "between": tuple(each.get("between", ()))}) for each in values["overlays"]
    )
    values["excluded_targets"] = tuple(values["excluded_targets"])
    values["expendable"] = tuple(values.get("expendable", ()))
    return SnapshotPlan(**values)


def formers_of(facts: Mapping[str, Any]) -> dict[str, Former]:
    """What the disks were before, by target, in a journal's fact."""
    formers = {}
    for target, each in facts["formers"].items():
        owner = each["owner"]
        labels = tuple((name, value) for name, value in owner["labels"])
        formers[target] = Former(each["disk_xml"], Owner(owner["uid"], owner["gid"], owner["mode"], labels))
    return formers


def is_clean(facts: Mapping[str, Any]) -> bool:
    """Whether nothing of the snapshot in a journal can be on the VM: it was never asked for, or all was put back."""
    return SNAPSHOT not in facts or facts.get(PHASE) == Phase.PUT_BACK


def step_fact(target: str) -> str:
    """The name of the fact that holds the Step of one disk."""
    return f"step_{target}"
