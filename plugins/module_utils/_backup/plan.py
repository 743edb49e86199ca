# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The plan of a backup: from what is known about the VM and the target to everything that will be done. Pure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames
from ansible_collections.kvmops.backup.plugins.module_utils._archive import digests, names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Consistency,
    Skipped,
    SnapshotNode,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup import definition, estimate, members, space
from ansible_collections.kvmops.backup.plugins.module_utils._backup.disks import DiskVerdict, Image, Judgement, judge
from ansible_collections.kvmops.backup.plugins.module_utils._backup.members import Base, Sources
from ansible_collections.kvmops.backup.plugins.module_utils._backup.model import BackupPlan, TargetFacts, VmFacts
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import BackupRequest, ConsistencyWish, Mode
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError, TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.agent import AgentState
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import Disk
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import Snapshot
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.standing import Standing, require_freezable
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import backup_snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import Overlay, SnapshotPlan
from ansible_collections.kvmops.backup.plugins.module_utils._template import find

_UNSAVEABLE_HOSTDEVS = ("pci", "usb", "mdev", "scsi_host")


def plan(
    facts: VmFacts,
    target: TargetFacts,
    request: BackupRequest,
    *,
    now: int,
    tool_version: str,
    base: Base | None = None,
    reason: str = "full backup as asked",
) -> BackupPlan:
    """Decides a full backup, or with `base` an increment, for that `reason`.

    `now`: unix time that the point is not older than. Raises RefusedError or TargetError with everything that speaks against it.
    """
    what = f"Backup of VM {facts.name}"
    corrupt = [image.path for image in facts.images.values() if image.corrupt]
    alone = bool(facts.checkpoints or facts.shared or corrupt)  # no snapshot can stay
    full_only = facts.thin.marked or (request.mode is Mode.AUTO and alone)
    stays = (request.incrementable and not full_only) or base is not None
    _refuse_state(facts, what)
    _refuse_emptied(facts, target, what)
    if stays:
        _refuse_incrementable(facts, corrupt, what)
    judgements = _judgements(facts, request, what, stays)
    consistency, fallback = _consistency(facts, request.consistency, what)
    frozen = [disk for disk, judgement in judgements if judgement.verdict is DiskVerdict.FREEZE]
    timestamp, archive = _name(facts, frozen, target, request, now, base)
    definition_xml, differences = definition.of_point(facts.persistent_xml, facts.live_xml)
    snapshot = _snapshot(
        facts, judgements, consistency, timestamp, os.path.join(target.directory, archive), stays=stays
    )
    if snapshot is not None and facts.running:
        require_freezable(facts.standing, facts.name, what)
        _refuse_corrupt(facts, snapshot, what)
    if snapshot is None and facts.running:
        consistency = Consistency.CRASH
    if snapshot is None and stays:
        raise RefusedError(what, "it has no disk that can be frozen", "Use mode: full without incrementable.")
    sources = Sources(
        facts.view,
        facts.images,
        facts.snapshots,
        facts.snapshot_disks,
        facts.nvram_bytes,
        facts.tpm_path,
        [each.path for each in facts.boot_files if request.include_boot_files and not each.problem],
    )
    stored = members.of_point(sources, judgements, timestamp, base)
    compressed = base.compressed if base else request.compress
    warnings = [*fallback, *differences]
    warnings += [each.warning.about(f"disk {disk.name}") for disk, each in judgements if each.warning]
    if facts.tpm_path and facts.view.tpm_encrypted:
        warnings.append(
            Notice(Code.KEY_NOT_STORED, "the TPM's state is encrypted; its key is not part of the backup: keep it elsewhere")
        )
    warnings += space.about_backup(facts, target, compressed, stored.new, consistency, snapshot, what)
    warnings += space.about_merging(facts) if stays else []
    warnings += _about_marks(facts, {*(each.path for each in stored.new), *(each.former_path for each in stored.kept)})
    warnings += _about_standing_alone(facts) if request.mode is Mode.AUTO else []
    warnings += _about_templates(facts, request)
    configuration = Configuration(
        timestamp=timestamp,
        domain_xml=definition_xml,
        live_xml=facts.live_xml,
        vm_name=facts.name,
        vm_uuid=facts.uuid,
        members=(),
        consistency=consistency,
        mode="incremental" if base else "full",
        incrementable=stays,
        template=facts.thin.marked,
        autostart=facts.autostart,
        requires=facts.thin.requires,
        provides=facts.thin.provides,
        snapshots=in_archive(facts.snapshots),
        skipped=_skipped(facts, judgements, request),
        warnings=tuple(warnings),
        tool_version=tool_version,
        digest_algorithm=base.newest.digest_algorithm if base else digests.chosen(request.digest).name,
    )
    sizes = [estimate.member_bytes(each, facts.images, facts.file_bytes) for each in stored.new]
    estimated = estimate.point_bytes(stored.new, sizes, replace(configuration, members=stored.kept))
    _refuse_unfit(target, archive, 0 if compressed else estimated, base, what)
    if consistency is Consistency.MEMORY:
        estimated += facts.view.memory_bytes  # at most; pages of zeros are left out
    return BackupPlan(
        vm_name=facts.name,
        vm_uuid=facts.uuid,
        running=facts.running,
        timestamp=timestamp,
        directory=target.directory,
        archive_name=archive,
        consistency=consistency,
        snapshot=snapshot,
        members=stored.new,
        kept=stored.kept,
        configuration=configuration,
        estimated_bytes=estimated,
        needed_bytes=space.needed_bytes(facts, target, compressed, stored.new, consistency),
        reason=reason,
        base=base,
        stays=stays,
        below=facts.thin.files,
    )


def _refuse_emptied(facts: VmFacts, target: TargetFacts, what: str) -> None:
    """Raises TargetError for a directory without any archive that a snapshot of ours says there is one in.

    A snapshot that is to be merged says nothing: the archive that it was made for may never have come to be.
    """
    if any(name.endswith((names.PLAIN_SUFFIX, names.COMPRESSED_SUFFIX)) for name in target.file_names):
        return
    here = os.path.realpath(target.directory)
    served = [
        each
        for each in backup_snapshots.of_vm(facts.snapshots)
        if each.name not in facts.unmerged and os.path.realpath(os.path.dirname(each.archive)) == here
    ]
    if served:
        states = ", ".join(each.name for each in served)
        raise TargetError(
            f"{what} to {target.directory}",
            f"there is no archive in it, but snapshots of the VM were made for {served[-1].archive}: it seems not to be mounted",
            f"Mount it. If the archives were deleted on purpose, remove {states} first (vm_snapshot with state: absent).",
        )


def _refuse_unfit(target: TargetFacts, archive: str, added_bytes: int, base: Base | None, what: str) -> None:
    """Raises TargetError where the file system cannot hold the archive under its name, with so many bytes more at least."""
    objection = target.can.objection(archive, added_bytes + (base.size_bytes if base else 0))
    if objection:
        hint = (
            "Make a full (mode: full), with a lower increment_limit from then on." if base else "Choose another place."
        )
        raise TargetError(
            f"{what} to {target.directory}", f"its file system cannot hold the archive: {objection}", hint
        )


def _about_standing_alone(facts: VmFacts) -> list[Notice]:
    """Warnings about what keeps increments from being made at all."""
    texts = []
    if facts.shared:
        why, way_out = find.why_not_beside(facts.shared), find.way_out_of_sharing(facts.shared)
        texts.append(f"{why}. {way_out}")
    if facts.checkpoints:
        why = snapshots.why_not_beside(facts.checkpoints)
        way_out = snapshots.way_out_of_checkpoints(facts.name, facts.checkpoints)
        texts.append(f"the VM is off: {why}. {way_out}")
    return [Notice(Code.NO_INCREMENT, f"nothing can be added to this archive: {text}") for text in texts]


def _about_marks(facts: VmFacts, paths: AbstractSet[str]) -> list[Notice]:
    """Warnings about images of the backup that QEMU has marked."""
    images = [image for path, image in facts.images.items() if path in paths]
    corrupt = [
        f"QEMU has marked {image.path} as corrupt: it is stored as it is, and a restore needs 'repair: true'. {_repair(image.path)}"
        for image in images
        if image.corrupt
    ]
    not_closed = [
        f"{image.path} was not closed by the QEMU that wrote to it last: it is stored as it is, and its reference counts are "
        "renewed by the next QEMU, or by a restore"
        for image in images
        if image.dirty and not image.corrupt and not facts.running
    ]
    return [
        *(Notice(Code.IMAGE_CORRUPT, text) for text in corrupt),
        *(Notice(Code.IMAGE_NOT_CLOSED, text) for text in not_closed),
    ]


def _repair(path: str) -> str:
    return f"Repair it while the VM is off: qemu-img check -r all {path}"


def _about_templates(facts: VmFacts, request: BackupRequest) -> list[Notice]:
    why = "which is no template or has snapshots: what is in it goes into the archive too"
    others = facts.thin.foreign.items()
    warnings = [Notice(Code.OTHERS_DISK, f"{path} belongs to the VM {name}, {why}") for path, name in others]
    if facts.thin.marked and request.incrementable and request.mode is Mode.FULL:
        warnings.append(Notice(Code.NO_INCREMENT, "the VM is a template, so the archive is not incrementable"))
    return warnings


def in_archive(states: Sequence[Snapshot]) -> tuple[SnapshotNode, ...]:
    """The tree of snapshots as a point keeps it."""
    return tuple(SnapshotNode(each.name, each.xml, each.parent, each.current) for each in states)


def _skipped(
    facts: VmFacts, judgements: Sequence[tuple[Disk, Judgement]], request: BackupRequest
) -> tuple[Skipped, ...]:
    skipped = [
        Skipped(disk.target, judgement.reason) for disk, judgement in judgements if judgement.verdict is DiskVerdict.SKIP
    ]
    skipped += [
        Skipped(disk.target, "it is a disk of another VM, attached by vdisk_cross_attach") for disk in facts.attached
    ]
    skipped += [
        Skipped(target_name, "the disk is attached only at the next start of the VM")
        for target_name in definition.only_persistent(facts.persistent_xml, facts.live_xml)
    ]
    skipped += [
        Skipped(f"{device.kind} device", f"host devices are not part of a backup ({device.description})")
        for device in facts.view.hostdevs
    ]
    skipped += [
        Skipped(
            f"filesystem {each.target}", f"what is in shared host directories is not part of a backup ({each.source})"
        )
        for each in facts.view.filesystems
    ]
    skipped += [
        Skipped(f"{each.kind.name} {each.path}", each.problem or "include_boot_files is false")
        for each in facts.boot_files
        if each.problem or not request.include_boot_files
    ]
    if facts.view.nvram_type not in ("", "file"):
        skipped.append(Skipped("nvram", f"NVRAM of type {facts.view.nvram_type} is no file of this host"))
    if facts.view.tpm not in ("", "emulator"):
        skipped.append(
            Skipped("tpm", f"the state of a TPM of type {facts.view.tpm} is not on this host's file systems")
        )
    if facts.view.tpm_file:
        skipped.append(
            Skipped("tpm", f"its state is one file, {facts.view.tpm_file}, and only state in a directory is copied")
        )
    return tuple(skipped)


def _refuse_state(facts: VmFacts, what: str) -> None:
    if facts.managed_save:
        raise RefusedError(
            what,
            "it has a managed-save image, so its disks are those of a VM in mid-flight",
            f"Start it (virsh start {facts.name}) or drop the image (virsh managedsave-remove {facts.name}) first.",
        )
    if facts.locked_images:
        users = {facts.shared[real] for real in map(_filenames.real, facts.locked_images) if real in facts.shared}
        raise RefusedError(
            what,
            f"libvirt says it is off, but a running QEMU has {', '.join(facts.locked_images)} open",
            f"Shut {', '.join(sorted(users))} down first, which has it too."
            if users
            else "Find that process (for example a VM that libvirtd lost) before anything else.",
        )
    if facts.foreign_jobs:
        raise RefusedError(
            what, f"another job is at work on it: {', '.join(facts.foreign_jobs)}", "Wait until it has ended."
        )
    if facts.thin.marked and facts.running:
        raise RefusedError(
            what, "it is a template and is running", "Shut it down; what it writes changes what clones stand on."
        )
    if facts.thin.base and facts.thin.base_trouble:
        raise RefusedError(
            what,
            f"its template {facts.thin.base.name} {facts.thin.base_trouble}",
            "Shut the template down; its thin clones may be damaged by what it wrote.",
        )
    mediated = [device for device in facts.view.hostdevs if device.kind == "mdev"]
    if facts.running and mediated:
        raise RefusedError(what, f"it has a mediated device ({mediated[0].description})", "Shut the VM down first.")


def _refuse_corrupt(facts: VmFacts, snapshot: SnapshotPlan, what: str) -> None:
    """The guest cannot use such a disk any more, and no snapshot of it could be merged."""
    for overlay in snapshot.overlays:
        if facts.images[overlay.base_path].corrupt:
            why = f"QEMU has marked {overlay.base_path} as corrupt and given it up"
            raise RefusedError(what, why, f"Shut the VM down: then it can be backed up as it is. {_repair(overlay.base_path)}")


def _refuse_incrementable(facts: VmFacts, corrupt: Sequence[str], what: str) -> None:
    if corrupt:
        why = f"QEMU has marked {', '.join(corrupt)} as corrupt, and could never merge a snapshot into it"
        raise RefusedError(what, why, f"Use mode: full without incrementable. {_repair(corrupt[0])}")
    if facts.running and not facts.persistent_xml:
        raise RefusedError(
            what,
            "it is transient: its snapshots would end with it, so nothing can be added later",
            "Use mode: full without incrementable.",
        )
    if facts.shared:
        raise RefusedError(what, find.why_not_beside(facts.shared), find.way_out_of_sharing(facts.shared))
    if facts.checkpoints:
        why = snapshots.why_not_beside(facts.checkpoints)
        hint = snapshots.way_out_of_checkpoints(facts.name, facts.checkpoints)
        raise RefusedError(what, why, f"Use mode: full without incrementable, or start the VM. {hint}")


def _judgements(facts: VmFacts, request: BackupRequest, what: str, incrementable: bool) -> list[tuple[Disk, Judgement]]:
    judged = [
        (
            disk,
            judge(
                disk,
                facts.images.get(disk.path),
                running=facts.running,
                snapshots=bool(facts.snapshots),
                include_iso=request.include_iso,
                incrementable=incrementable,
                below=_below(facts, disk.path),
                unseen=facts.unseen.get(disk.path, ""),
            ),
        )
        for disk in facts.view.disks
    ]
    refused = [
        f"disk {disk.name}: {judgement.reason}" for disk, judgement in judged if judgement.verdict is DiskVerdict.REFUSE
    ]
    if refused:
        raise RefusedError(what, "; ".join(refused), "Nothing has been touched.")
    return judged


def _below(facts: VmFacts, path: str) -> list[Image]:
    """The images that one stands on, nearest first."""
    found: list[Image] = []
    image = facts.images.get(path)
    while image is not None and image.backing_path:
        image = members.image_of(facts.images, image.backing_path)
        if image is None or image in found:
            break
        found.append(image)
    return found


def _consistency(facts: VmFacts, wish: ConsistencyWish, what: str) -> tuple[Consistency, list[Notice]]:
    """What will be reached, and a warning where that is less than could be expected."""
    if not facts.running:
        return Consistency.OFF, []
    trouble = []
    if facts.standing is Standing.IO_ERROR:
        why = f"{facts.standing.value}: mend that (often there is no space left), then: virsh resume {facts.name}"
        trouble = [Notice(Code.GUEST_STOPPED, why)]
    if wish is ConsistencyWish.CRASH:
        return Consistency.CRASH, trouble
    if facts.standing is not Standing.RUNS and wish is not ConsistencyWish.AGENT:
        # After its memory was saved, a VM that is not resumed keeps its disks inactive, and nothing can be merged.
        why = f"{facts.standing.value}: neither its agent answers nor can its memory be saved"
        if wish is ConsistencyWish.MEMORY:
            raise RefusedError(
                f"{what} with consistency memory", why, f"Let it run (virsh resume {facts.name}) or use crash."
            )
        return Consistency.CRASH, [Notice(Code.LOWER_CONSISTENCY, f"{why}; its disks are as after a power failure"), *trouble]
    if wish is ConsistencyWish.AGENT and facts.agent is not AgentState.OK:
        raise RefusedError(
            f"{what} with consistency agent", facts.agent.value, "Use auto, memory or crash, or mend the agent."
        )
    if wish is not ConsistencyWish.MEMORY and facts.agent is AgentState.OK:
        return Consistency.AGENT, []
    obstacle = _keeps_memory_from_being_saved(facts)
    if obstacle:
        raise RefusedError(
            what,
            f"its memory cannot be saved because of {obstacle}",
            "Use consistency: crash, or install a guest agent and use consistency: agent.",
        )
    expected = (AgentState.NO_CHANNEL, AgentState.OK)
    if wish is ConsistencyWish.AUTO and facts.agent not in expected:
        why = f"{facts.agent.value}: the backup has a memory image instead of frozen file systems"
        return Consistency.MEMORY, [Notice(Code.LOWER_CONSISTENCY, why)]
    return Consistency.MEMORY, []


def _keeps_memory_from_being_saved(facts: VmFacts) -> str:
    """The first device whose state QEMU cannot put into a memory image; "" if there is none."""
    view = facts.view
    found = [
        f"a {device.kind} host device ({device.description})"
        for device in view.hostdevs
        if device.kind in _UNSAVEABLE_HOSTDEVS
    ]
    found += [
        f"a network interface of type {nic.type} ({nic.mac})" for nic in view.nics if nic.type in ("hostdev", "vdpa")
    ]
    found += [
        f"the shared host directory {each.source} (virtiofs)" for each in view.filesystems if each.driver == "virtiofs"
    ]
    found += [f"{disk.target}, a disk of another VM, which would be part of it" for disk in facts.attached]
    found += [f"a device or feature that QEMU cannot migrate ({reason})" for reason in facts.memory_blockers]
    return next(iter(found), "")


def _name(
    facts: VmFacts,
    frozen: Sequence[Disk],
    target: TargetFacts,
    request: BackupRequest,
    now: int,
    base: Base | None,
) -> tuple[int, str]:
    """Time of the point and name of its archive: the next second in which nothing would meet what is there already."""
    states = {state.name for state in facts.snapshots}
    timestamp = max(now, base.newest.timestamp + 1) if base else now
    while True:
        both = {names.archive_name(facts.name, timestamp, facts.uuid, compressed) for compressed in (False, True)}
        free = base is not None or not both & target.file_names
        name = backup_snapshots.name(timestamp)
        files = {_memory_path(facts, frozen, name), *(_overlay_path(facts, disk, name) for disk in frozen)}
        if free and name not in states and not files & facts.snapshot_files:
            if base:
                return timestamp, os.path.basename(base.path)
            return timestamp, names.archive_name(facts.name, timestamp, facts.uuid, request.compress)
        timestamp += 1


def _snapshot(
    facts: VmFacts,
    judgements: Sequence[tuple[Disk, Judgement]],
    consistency: Consistency,
    timestamp: int,
    archive_path: str,
    *,
    stays: bool,
) -> SnapshotPlan | None:
    frozen = [disk for disk, judgement in judgements if judgement.verdict is DiskVerdict.FREEZE]
    if not frozen:
        return None
    name = backup_snapshots.name(timestamp)
    temporary = f"Temporary, made by kvmops.backup for {archive_path}; it goes when the copy is done."
    return SnapshotPlan(
        vm_uuid=facts.uuid,
        vm_name=facts.name,
        name=name,
        description=backup_snapshots.description(archive_path) if stays else temporary,
        overlays=tuple(
            Overlay(
                target=disk.target,
                base_path=disk.path,
                base_format=facts.images[disk.path].format,
                overlay_path=_overlay_path(facts, disk, name),
            )
            for disk in frozen
        ),
        excluded_targets=(
            *(disk.target for disk, judgement in judgements if judgement.verdict is not DiskVerdict.FREEZE),
            *(disk.target for disk in facts.attached),
        ),
        memory_path=_memory_path(facts, frozen, name) if consistency is Consistency.MEMORY else "",
        quiesce=consistency is Consistency.AGENT,
    )


def _overlay_path(facts: VmFacts, disk: Disk, snapshot: str) -> str:
    # not beside a symbolic link
    return backup_snapshots.overlay_path(os.path.realpath(disk.path), snapshot, facts.images[disk.path].longest_name)


def _memory_path(facts: VmFacts, frozen: Sequence[Disk], snapshot: str) -> str:
    directory = os.path.dirname(os.path.realpath(frozen[0].path)) if frozen else ""
    return os.path.join(directory, f"{names.stem(facts.name)}.{snapshot}.memory")
