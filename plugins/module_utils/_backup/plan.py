# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The plan of a backup: from what is known about the VM and the target to everything that will be done. Pure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames
from ansible_collections.kvmops.backup.plugins.module_utils._archive import digests, names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Consistency,
    Member,
    Skipped,
    SnapshotNode,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup import definition, estimate, members
from ansible_collections.kvmops.backup.plugins.module_utils._backup.disks import DiskVerdict, Image, Judgement, judge
from ansible_collections.kvmops.backup.plugins.module_utils._backup.members import Base, PlannedMember, Sources
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import BackupRequest, ConsistencyWish, Mode
from ansible_collections.kvmops.backup.plugins.module_utils._backup.template_base import Thin
from ansible_collections.kvmops.backup.plugins.module_utils._capabilities import Capabilities
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError, TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.agent import AgentState
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.boot_files import BootFile
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import Disk, DomainView
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import Snapshot
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.standing import Standing, require_freezable
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import backup_snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.snapshot import Overlay, SnapshotPlan
from ansible_collections.kvmops.backup.plugins.module_utils._template import find
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

_REFLINK_FILE_SYSTEMS = ("xfs", "btrfs", "bcachefs", "ocfs2")
_OVERHEAD_BYTES = 2**20  # headers, digests and XML of an ordinary VM
_LOW_SPACE_BYTES = 2**30
_OVERLAY_BYTES = 2**20  # of an empty one: header and tables
_UNSAVEABLE_HOSTDEVS = ("pci", "usb", "mdev", "scsi_host")


@dataclass(frozen=True)
class VmFacts:
    """What is known about a VM before anything is touched.

    `standing`: whether a running one stands still, and why. `autostart`: it starts with the host.
    `view`: of the definition that counts now (live for a running VM). `images`: every image that its disks and snapshots
    stand on, by path. `free_bytes`: free space of the file systems of those images, by device id. `foreign_jobs`: jobs at
    work on the VM that are not ours. `locked_images`: images of an off VM that a QEMU has open all the same.
    `tpm_path`: directory with the state of an emulated TPM, "" where there is none. `file_bytes`: sizes in an archive of what is
    stored besides images, by path. `checkpoints`: those because of which libvirt takes no snapshot of the VM, which is off.
    `memory_blockers`: what keeps the memory of a running VM from being saved, in QEMU's words. `unmerged`: names
    of snapshots that an earlier run should have merged and could not. `shared`: files of its disks that
    another VM has too, with the name of that one (`find.shared`). `boot_files`: files of the host that its definitions name and
    QEMU loads. `unseen`: files of its disks that cannot be looked at, and why. `snapshot_files`: files beside its disks that are
    named as those of our snapshots. `thin`: the template that it stands on, or is. `attached`: disks of other VMs that it holds;
    `view` and all definitions are without them.
    """

    name: str
    uuid: str
    running: bool
    persistent_xml: str
    live_xml: str
    view: DomainView
    images: Mapping[str, Image]
    standing: Standing = Standing.RUNS
    autostart: bool = False
    snapshots: tuple[Snapshot, ...] = ()
    snapshot_disks: Mapping[str, tuple[Disk, ...]] = field(default_factory=dict)
    agent: AgentState = AgentState.OFF
    managed_save: bool = False
    foreign_jobs: tuple[str, ...] = ()
    locked_images: tuple[str, ...] = ()
    nvram_bytes: int = 0
    tpm_path: str = ""
    file_bytes: Mapping[str, int] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = ()
    memory_blockers: tuple[str, ...] = ()
    unmerged: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    boot_files: tuple[BootFile, ...] = ()
    unseen: Mapping[str, str] = field(default_factory=dict)
    snapshot_files: frozenset[str] = frozenset()
    thin: Thin = field(default_factory=Thin)
    attached: tuple[Disk, ...] = ()
    free_bytes: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetFacts:
    """The place that the archive goes to; `file_names` are those that are there already.

    `can`: what its file system can do. `hint`: what now, if it is too full.
    """

    directory: str
    free_bytes: int
    device_id: int
    fs_type: str
    file_names: frozenset[str] = frozenset()
    can: Capabilities = field(default_factory=Capabilities)
    hint: str = "Free space there or choose another place."


@dataclass(frozen=True)
class BackupPlan:
    """Everything a run will do. `snapshot` None: the VM's files are copied as they stand.

    `members`: what is stored; `kept`: members of older points that this one needs too. `needed_bytes`: room that the target must
    have, less than the estimate where blocks are shared. `base`: the archive that the point is added to, None for a new one.
    `stays`: the snapshot is kept, so that the next increment can stand on it. `below`: evidence of the
    files that the content of a template was read from.
    """

    vm_name: str
    vm_uuid: str
    running: bool
    timestamp: int
    directory: str
    archive_name: str
    consistency: Consistency
    snapshot: SnapshotPlan | None
    members: tuple[PlannedMember, ...]
    configuration: Configuration
    estimated_bytes: int
    needed_bytes: int = 0
    reason: str = ""
    kept: tuple[Member, ...] = ()
    base: Base | None = None
    stays: bool = False
    below: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def archive_path(self) -> str:
        """Where the archive is or will be."""
        return self.base.path if self.base else os.path.join(self.directory, self.archive_name)

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """What a person should know before and after the run."""
        skipped = (f"{each.device} is not in the backup: {each.reason}" for each in self.configuration.skipped)
        return (*self.configuration.warnings, *(Notice(Code.LEFT_OUT, text) for text in skipped))


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
    warnings += _space(facts, target, compressed, stored.new, consistency, snapshot, what)
    warnings += _space_to_merge(facts) if stays else []
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
        needed_bytes=_needed_bytes(facts, target, compressed, stored.new, consistency),
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


def _space(
    facts: VmFacts,
    target: TargetFacts,
    compressed: bool,
    planned_members: Sequence[PlannedMember],
    consistency: Consistency,
    snapshot: SnapshotPlan | None,
    what: str,
) -> list[Notice]:
    """Warnings about space on both sides. Raises TargetError where the archive cannot fit."""
    need = _needed_bytes(facts, target, compressed, planned_members, consistency)
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
    return warnings + (_space_beside(facts, snapshot) if snapshot else [])


def _needed_bytes(
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


def _space_beside(facts: VmFacts, snapshot: SnapshotPlan) -> list[Notice]:
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


def _space_to_merge(facts: VmFacts) -> list[Notice]:
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
