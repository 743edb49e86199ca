# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Whether there is room: in the place of the archive, beside the images while the copy runs, and for a later merge. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Consistency
from ansible_collections.kvmops.backup.plugins.module_utils._backup.members import PlannedMember
from ansible_collections.kvmops.backup.plugins.module_utils._backup.model import TargetFacts, VmFacts
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError, TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.standing import Standing
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.snapshot import SnapshotPlan
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

_REFLINK_FILE_SYSTEMS = ("xfs", "btrfs", "bcachefs", "ocfs2")
_OVERHEAD_BYTES = 2**20  # headers, digests and XML of an ordinary VM
_LOW_SPACE_BYTES = 2**30
_OVERLAY_BYTES = 2**20  # of an empty one: header and tables


def about_backup(
    facts: VmFacts,
    target: TargetFacts,
    compressed: bool,
    planned_members: Sequence[PlannedMember],
    consistency: Consistency,
    snapshot: SnapshotPlan | None,
    what: str,
) -> list[Notice]:
    """Warnings about space on both sides. Raises TargetError where the archive cannot fit."""
    need = needed_bytes(facts, target, compressed, planned_members, consistency)
    warnings = [each.about(f"the file system of {target.directory}") for each in target.can.warnings]
    certain = need - (facts.view.memory_bytes if consistency is Consistency.MEMORY else 0)
    if need > target.free_bytes:
        figures = f"about {human_bytes(need)} are needed and {human_bytes(target.free_bytes)} are free"
        if certain > target.free_bytes and not compressed:
            raise TargetError(f"{what} to {target.directory}", figures, target.hint)
        # a memory image or compressed data may turn out much smaller; what does not fit then fails cleanly
        warnings.append(Notice(Code.SPACE, f"{target.directory} may be too small: {figures}, before compression"))
    elif not (target.can.keeps_holes or compressed):
        whole = sum(facts.images[each.path].size_bytes for each in planned_members if each.path in facts.images)
        if whole > target.free_bytes:
            figures = (
                f"with the holes of the images {human_bytes(whole)}, and {human_bytes(target.free_bytes)} are free"
            )
            text = f"{target.directory} may be too small, as its file system does not seem to keep holes: {figures}"
            warnings.append(Notice(Code.SPACE, text))
    return warnings + (_beside(facts, snapshot) if snapshot else [])


def needed_bytes(
    facts: VmFacts,
    target: TargetFacts,
    compressed: bool,
    planned_members: Sequence[PlannedMember],
    consistency: Consistency,
) -> int:
    """Blocks of the target's file system that the point takes at most, before compression."""
    shared = not compressed and target.fs_type in _REFLINK_FILE_SYSTEMS
    need = _OVERHEAD_BYTES
    for planned in planned_members:
        image = facts.images.get(planned.path)
        if image is None:
            need += facts.file_bytes.get(planned.path, 0)
        elif not (shared and image.device_id == target.device_id and not planned.from_raw):
            need += min(image.allocated_bytes, image.size_bytes)
    return need + (facts.view.memory_bytes if consistency is Consistency.MEMORY else 0)


def _beside(facts: VmFacts, snapshot: SnapshotPlan) -> list[Notice]:
    """Warnings about the file systems that take what the guest writes while the copy runs."""
    beside: dict[int, str] = {}
    for overlay in snapshot.overlays:
        beside.setdefault(facts.images[overlay.base_path].device_id, overlay.base_path)
    warnings = []
    for device, path in beside.items():
        if device in facts.free_bytes and facts.free_bytes[device] < _OVERLAY_BYTES * len(snapshot.overlays):
            resume = f", and let the VM go on: virsh resume {facts.name}" if facts.standing is Standing.IO_ERROR else "."
            there = human_bytes(facts.free_bytes[device])
            why = f"only {there} are free beside {path}, too little for the overlay of a snapshot"
            raise RefusedError(f"Backup of VM {facts.name}", why, f"Free space there{resume}")
        holds_memory = snapshot.memory_path and path == snapshot.overlays[0].base_path
        free = facts.free_bytes.get(device, 0) - (facts.view.memory_bytes if holds_memory else 0)
        if free < _LOW_SPACE_BYTES:
            text = f"only {human_bytes(max(free, 0))} are free beside {path}: what the guest writes meanwhile goes there"
            warnings.append(Notice(Code.SPACE, text))
    return warnings


def about_merging(facts: VmFacts) -> list[Notice]:
    """Warnings about file systems on which a merge of all layers could need more than there is."""
    needed: dict[int, int] = {}
    for image in facts.images.values():
        if image.backing_path:
            needed[image.device_id] = needed.get(image.device_id, 0) + image.allocated_bytes
    warnings = []
    for device, size in needed.items():
        free = facts.free_bytes.get(device, 0)
        if size > free:
            path = next(each.path for each in facts.images.values() if each.backing_path and each.device_id == device)
            text = f"merging the layers beside {path} may need up to {human_bytes(size)} there, and {human_bytes(free)} are free"
            warnings.append(Notice(Code.SPACE, text))
    return warnings
