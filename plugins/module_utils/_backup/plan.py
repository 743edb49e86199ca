# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The plan of a backup: from what is known about the VM and the target to everything that will be done. Pure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    CHUNK_BYTES,
    Configuration,
    Consistency,
    Member,
    Role,
    SavedState,
    Skipped,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup import definition
from ansible_collections.kvmops.backup.plugins.module_utils._backup.disks import Image, Judgement, Verdict, judge
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import BackupRequest, ConsistencyWish
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError, TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.agent import AgentState
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import Disk, DomainView
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import SavedStateInfo, describe
from ansible_collections.kvmops.backup.plugins.module_utils._saved_states.saved_state import Overlay, SavedStatePlan
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

_REFLINK_FILE_SYSTEMS = ("xfs", "btrfs", "bcachefs", "ocfs2")
_OVERHEAD_BYTES = 2**20  # headers, digests and XML of an ordinary VM
_LOW_SPACE_BYTES = 2**30


@dataclass(frozen=True)
class VmFacts:
    """What is known about a VM before anything is touched.

    `view`: of the definition that counts now (live for a running VM). `images`: every image that its disks and saved states
    stand on, by path. `free_bytes`: free space of the file systems of those images, by device id. `foreign_jobs`: jobs at
    work on the VM that are not ours. `locked_images`: images of an off VM that a QEMU has open all the same.
    """

    name: str
    uuid: str
    running: bool
    persistent_xml: str
    live_xml: str
    view: DomainView
    images: Mapping[str, Image]
    paused: bool = False
    saved_states: tuple[SavedStateInfo, ...] = ()
    saved_state_disks: Mapping[str, tuple[Disk, ...]] = field(default_factory=dict)
    agent: AgentState = AgentState.OFF
    managed_save: bool = False
    foreign_jobs: tuple[str, ...] = ()
    locked_images: tuple[str, ...] = ()
    nvram_bytes: int = 0
    free_bytes: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetFacts:
    """The place that the archive goes to; `file_names` are those that are there already."""

    directory: str
    free_bytes: int
    device_id: int
    fs_type: str
    file_names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class PlannedMember:
    """A member and the file it is made from; `from_raw`: a raw image that is stored as qcow2."""

    member: Member
    path: str
    from_raw: bool = False


@dataclass(frozen=True)
class BackupPlan:
    """Everything a run will do. `saved_state` None: the VM's files are copied as they stand."""

    vm_name: str
    vm_uuid: str
    running: bool
    timestamp: int
    directory: str
    archive_name: str
    consistency: Consistency
    saved_state: SavedStatePlan | None
    members: tuple[PlannedMember, ...]
    configuration: Configuration
    estimated_bytes: int
    reason: str = "full backup as asked"

    @property
    def archive_path(self) -> str:
        """Where the archive will be."""
        return os.path.join(self.directory, self.archive_name)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know before and after the run."""
        skipped = (f"{each.device} is not in the backup: {each.reason}" for each in self.configuration.skipped)
        return (*self.configuration.warnings, *skipped)


def plan(facts: VmFacts, target: TargetFacts, request: BackupRequest, *, now: int, tool_version: str) -> BackupPlan:
    """Decides a full backup. Raises RefusedError or TargetError with everything that speaks against it."""
    what = f"Backup of VM {facts.name}"
    _refuse_state(facts, what)
    judgements = _judgements(facts, request, what)
    consistency, fallback = _consistency(facts, request.consistency, what)
    timestamp, archive = _name(facts, target, request, now)
    definition_xml, differences = definition.of_point(facts.persistent_xml, facts.live_xml)
    skipped = [
        Skipped(disk.target, judgement.reason) for disk, judgement in judgements if judgement.verdict is Verdict.SKIP
    ]
    skipped += [
        Skipped(target_name, "the disk is attached only at the next start of the VM")
        for target_name in definition.only_persistent(facts.persistent_xml, facts.live_xml)
    ]
    skipped += [
        Skipped(f"{device.kind} device", f"host devices are not part of a backup ({device.description})")
        for device in facts.view.hostdevs
    ]
    if facts.view.tpm:
        skipped.append(Skipped("tpm", "the state of the TPM is not stored by this version"))
    saved_state = _saved_state(facts, judgements, consistency, timestamp, archive)
    if saved_state is None and facts.running:
        consistency = Consistency.CRASH
    members = _members(facts, judgements, timestamp)
    estimate = sum(_size_bytes(facts, planned) for planned in members) + _OVERHEAD_BYTES
    if consistency is Consistency.MEMORY:
        estimate += facts.view.memory_bytes
    warnings = [*fallback, *differences]
    warnings += [f"disk {disk.name}: {judgement.warning}" for disk, judgement in judgements if judgement.warning]
    warnings += _space(facts, target, request, members, consistency, saved_state, what)
    return BackupPlan(
        vm_name=facts.name,
        vm_uuid=facts.uuid,
        running=facts.running,
        timestamp=timestamp,
        directory=target.directory,
        archive_name=archive,
        consistency=consistency,
        saved_state=saved_state,
        members=members,
        configuration=Configuration(
            timestamp=timestamp,
            domain_xml=definition_xml,
            live_xml=facts.live_xml,
            vm_name=facts.name,
            vm_uuid=facts.uuid,
            members=(),
            consistency=consistency,
            saved_states=tuple(SavedState(s.name, s.xml, s.parent, s.current) for s in facts.saved_states),
            skipped=tuple(skipped),
            warnings=tuple(warnings),
            tool_version=tool_version,
        ),
        estimated_bytes=estimate,
    )


def with_saved_state(configuration: Configuration, snapshot_xml: str) -> Configuration:
    """The configuration with the point's own saved state, the new current one."""
    own = describe(snapshot_xml, current=True)
    others = tuple(replace(state, current=False) for state in configuration.saved_states)
    return replace(configuration, saved_states=(*others, SavedState(own.name, own.xml, own.parent, True)))


def _refuse_state(facts: VmFacts, what: str) -> None:
    if facts.managed_save:
        raise RefusedError(
            what,
            "it has a managed-save image, so its disks are those of a VM in mid-flight",
            f"Start it (virsh start {facts.name}) or drop the image (virsh managedsave-remove {facts.name}) first.",
        )
    if facts.locked_images:
        raise RefusedError(
            what,
            f"libvirt says it is off, but a running QEMU has {', '.join(facts.locked_images)} open",
            "Find that process (for example a VM that libvirtd lost) before anything else.",
        )
    if facts.foreign_jobs:
        raise RefusedError(
            what, f"another job is at work on it: {', '.join(facts.foreign_jobs)}", "Wait until it has ended."
        )
    mediated = [device for device in facts.view.hostdevs if device.kind == "mdev"]
    if facts.running and mediated:
        raise RefusedError(what, f"it has a mediated device ({mediated[0].description})", "Shut the VM down first.")


def _judgements(facts: VmFacts, request: BackupRequest, what: str) -> list[tuple[Disk, Judgement]]:
    judged = [
        (
            disk,
            judge(
                disk,
                facts.images.get(disk.path),
                running=facts.running,
                saved_states=bool(facts.saved_states),
                include_iso=request.include_iso,
            ),
        )
        for disk in facts.view.disks
    ]
    refused = [
        f"disk {disk.name}: {judgement.reason}" for disk, judgement in judged if judgement.verdict is Verdict.REFUSE
    ]
    if refused:
        raise RefusedError(what, "; ".join(refused), "Nothing has been touched.")
    return judged


def _consistency(facts: VmFacts, wish: ConsistencyWish, what: str) -> tuple[Consistency, list[str]]:
    """What will be reached, and a warning where that is less than could be expected."""
    if not facts.running:
        return Consistency.OFF, []
    passed_through = [device for device in facts.view.hostdevs if device.kind in ("pci", "usb")]
    if wish is ConsistencyWish.CRASH:
        return Consistency.CRASH, []
    if facts.paused and wish is not ConsistencyWish.AGENT:
        # After its memory was saved, a VM that is not resumed keeps its disks inactive, and nothing can be merged.
        why = "it is paused: neither its agent answers nor can its memory be saved"
        if wish is ConsistencyWish.MEMORY:
            raise RefusedError(
                f"{what} with consistency memory", why, f"Resume it (virsh resume {facts.name}) or use crash."
            )
        return Consistency.CRASH, [f"{why}; its disks are as after a power failure"]
    if wish is ConsistencyWish.AGENT and facts.agent is not AgentState.OK:
        raise RefusedError(
            f"{what} with consistency agent", facts.agent.value, "Use auto, memory or crash, or mend the agent."
        )
    if wish is not ConsistencyWish.MEMORY and facts.agent is AgentState.OK:
        return Consistency.AGENT, []
    if passed_through:
        raise RefusedError(
            what,
            f"its memory cannot be saved because of a {passed_through[0].kind} host device ({passed_through[0].description})",
            "Use consistency: crash, or install a guest agent and use consistency: agent.",
        )
    expected = (AgentState.NO_CHANNEL, AgentState.OK)
    if wish is ConsistencyWish.AUTO and facts.agent not in expected:
        return Consistency.MEMORY, [
            f"{facts.agent.value}: the backup has a memory image instead of frozen file systems"
        ]
    return Consistency.MEMORY, []


def _name(facts: VmFacts, target: TargetFacts, request: BackupRequest, now: int) -> tuple[int, str]:
    """Time and name of the archive; the next free second, so that two runs in one second do not meet."""
    timestamp = now
    while True:
        both = {names.archive_name(facts.name, timestamp, facts.uuid, compressed) for compressed in (False, True)}
        if not both & target.file_names:
            return timestamp, names.archive_name(facts.name, timestamp, facts.uuid, request.compress)
        timestamp += 1


def _saved_state(
    facts: VmFacts, judgements: Sequence[tuple[Disk, Judgement]], consistency: Consistency, timestamp: int, archive: str
) -> SavedStatePlan | None:
    frozen = [disk for disk, judgement in judgements if judgement.verdict is Verdict.FREEZE]
    if not facts.running or not frozen:
        return None
    name = f"kvmops-{timestamp}"
    directory = os.path.dirname(frozen[0].path)
    return SavedStatePlan(
        vm_uuid=facts.uuid,
        vm_name=facts.name,
        name=name,
        description=f"Temporary, made by kvmops.backup for {archive}; it goes when the copy is done.",
        overlays=tuple(
            Overlay(
                target=disk.target,
                base_path=disk.path,
                base_format=facts.images[disk.path].format,
                overlay_path=f"{disk.path}.{name}",
            )
            for disk in frozen
        ),
        excluded_targets=tuple(
            disk.target for disk, judgement in judgements if judgement.verdict is not Verdict.FREEZE
        ),
        memory_path=os.path.join(directory, f"{names.stem(facts.name)}.{name}.memory")
        if consistency is Consistency.MEMORY
        else "",
        quiesce=consistency is Consistency.AGENT,
    )


def _members(facts: VmFacts, judgements: Sequence[tuple[Disk, Judgement]], timestamp: int) -> tuple[PlannedMember, ...]:
    members: list[PlannedMember] = []
    for disk, judgement in judgements:
        if judgement.verdict in (Verdict.FREEZE, Verdict.COPY):
            members += _layers(facts, disk)
    isos: dict[str, int] = {}
    for disk, judgement in judgements:
        if judgement.verdict is Verdict.ISO and disk.path not in isos:
            isos[disk.path] = len(isos)
            stem, _suffix = os.path.splitext(os.path.basename(disk.path))
            members.append(
                PlannedMember(
                    Member(
                        name=f"{isos[disk.path]}_{names.stem(stem)}.iso",
                        role=Role.ISO,
                        size_bytes=0,
                        target=disk.target,
                        image_format="raw",
                        original_format="raw",
                        former_path=disk.path,
                        pool=facts.images[disk.path].pool,
                        active=True,
                    ),
                    disk.path,
                )
            )
    if facts.nvram_bytes:
        members.append(
            PlannedMember(
                Member(
                    name=f"{timestamp}.nvram",
                    role=Role.NVRAM,
                    size_bytes=0,
                    image_format="raw",
                    original_format="raw",
                    former_path=facts.view.nvram_path,
                ),
                facts.view.nvram_path,
            )
        )
    memories = [state.memory_path for state in facts.saved_states if state.memory == "external"]
    members += [memory_member(timestamp, number, path) for number, path in enumerate(memories, 1)]
    return tuple(members)


def memory_member(timestamp: int, number: int, path: str) -> PlannedMember:
    """An external memory image as a member; `number` counts those of a point."""
    name = f"{timestamp}_{number}.memory"
    return PlannedMember(Member(name=name, role=Role.MEMORY, size_bytes=0, image_format="raw", former_path=path), path)


def _layers(facts: VmFacts, disk: Disk) -> list[PlannedMember]:
    """Every layer of a disk, of all branches of its saved states, each after the one that it stands on."""
    order: list[str] = []

    def visit(path: str) -> None:
        image = facts.images.get(path)
        if image is None or path in order:
            return
        if image.backing_path:
            visit(image.backing_path)
        order.append(path)

    for state in facts.saved_states:
        for former in facts.saved_state_disks.get(state.name, ()):
            if former.target == disk.target:
                visit(former.path)
    visit(disk.path)
    found = []
    stem = names.stem(disk.target)
    named = {
        path: f"{stem}_{n}.{'snapshot' if facts.images[path].backing_path else 'qcow2'}" for n, path in enumerate(order)
    }
    for path in order:
        image = facts.images[path]
        member = Member(
            name=named[path],
            role=Role.LAYER if image.backing_path else Role.DISK,
            size_bytes=0,
            target=disk.target,
            virtual_size_bytes=image.virtual_size_bytes,
            image_format="qcow2",
            original_format=image.format,
            parent=named.get(image.backing_path, ""),
            former_path=path,
            pool=image.pool,
            active=path == disk.path,
        )
        found.append(PlannedMember(member, path, from_raw=image.format == "raw"))
    return found


def _size_bytes(facts: VmFacts, planned: PlannedMember) -> int:
    """Size of a member in the archive, headers and fill included."""
    image = facts.images.get(planned.path)
    if image is None:
        return facts.nvram_bytes + CHUNK_BYTES // 512 if planned.member.role is Role.NVRAM else 0
    return (min(image.allocated_bytes, image.size_bytes) if planned.from_raw else image.size_bytes) + 8192


def _space(
    facts: VmFacts,
    target: TargetFacts,
    request: BackupRequest,
    members: Sequence[PlannedMember],
    consistency: Consistency,
    saved_state: SavedStatePlan | None,
    what: str,
) -> list[str]:
    """Warnings about space on both sides. Raises TargetError where the archive cannot fit."""
    shared = not request.compress and target.fs_type in _REFLINK_FILE_SYSTEMS
    need = _OVERHEAD_BYTES
    for planned in members:
        image = facts.images.get(planned.path)
        if image and not (shared and image.device_id == target.device_id and not planned.from_raw):
            need += min(image.allocated_bytes, image.size_bytes)
    if consistency is Consistency.MEMORY:
        need += facts.view.memory_bytes
    warnings = []
    certain = need - (facts.view.memory_bytes if consistency is Consistency.MEMORY else 0)
    if need > target.free_bytes:
        figures = f"about {human_bytes(need)} are needed and {human_bytes(target.free_bytes)} are free"
        if certain > target.free_bytes and not request.compress:
            raise TargetError(f"{what} to {target.directory}", figures, "Free space there or choose another place.")
        # a memory image or compressed data may turn out much smaller; what does not fit then fails cleanly
        warnings.append(f"{target.directory} may be too small: {figures}, before compression")
    return warnings + (_space_beside(facts, saved_state) if saved_state else [])


def _space_beside(facts: VmFacts, saved_state: SavedStatePlan) -> list[str]:
    """Warnings about the file systems that take what the guest writes while the copy runs."""
    beside: dict[int, str] = {}
    for overlay in saved_state.overlays:
        beside.setdefault(facts.images[overlay.base_path].device_id, overlay.base_path)
    warnings = []
    for device, path in beside.items():
        holds_memory = saved_state.memory_path and path == saved_state.overlays[0].base_path
        free = facts.free_bytes.get(device, 0) - (facts.view.memory_bytes if holds_memory else 0)
        if free < _LOW_SPACE_BYTES:
            warnings.append(
                f"only {human_bytes(max(free, 0))} are free beside {path}: what the guest writes meanwhile goes there"
            )
    return warnings
