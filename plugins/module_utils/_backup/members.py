# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which files of a VM a point adds to its archive, and which members of older points it goes on using. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Member,
    Role,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup.disks import (
    STORED_FORMATS,
    DiskVerdict,
    Image,
    Judgement,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import Disk, DomainView
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import Snapshot

_NUMBERED = re.compile(r"(.+)_([0-9]+)\.(?:qcow2|snapshot)|([0-9]+)_.+\.(?:iso|boot)")


@dataclass(frozen=True)
class Base:
    """The archive that an increment is added to.

    `points`: oldest first; the VM stands on the newest. `names`: every member in the file. `same_files`: paths of CD images and
    boot files that are still what the archive has of them.
    """

    path: str
    compressed: bool
    points: tuple[Configuration, ...]
    names: frozenset[str]
    same_files: frozenset[str] = frozenset()
    size_bytes: int = 0

    @property
    def newest(self) -> Configuration:
        """The point that the VM stands on."""
        return self.points[-1]


@dataclass(frozen=True)
class PlannedMember:
    """A member and the file it is made from; `from_raw`: a raw image that is stored as qcow2."""

    member: Member
    path: str
    from_raw: bool = False


@dataclass(frozen=True)
class Stored:
    """The members of a point: those that its archive has already, and those to be added."""

    kept: tuple[Member, ...]
    new: tuple[PlannedMember, ...]


@dataclass(frozen=True)
class Sources:
    """What a VM's members are made from; as in `model.VmFacts`."""

    view: DomainView
    images: Mapping[str, Image]
    snapshots: Sequence[Snapshot]
    snapshot_disks: Mapping[str, Sequence[Disk]]
    nvram_bytes: int
    tpm_path: str = ""
    boot_files: Sequence[str] = ()


def of_point(
    sources: Sources, judgements: Sequence[tuple[Disk, Judgement]], timestamp: int, base: Base | None = None
) -> Stored:
    """Every member that a point made now needs; with `base`, what that archive has of it is not stored again."""
    layers = [m for m in base.newest.members if m.role in (Role.DISK, Role.LAYER)] if base else []
    known = {(m.target, os.path.realpath(m.former_path)): m for m in layers}
    # the tops change: what was active at the newest point is below now
    kept = {key: replace(member, active=False) for key, member in known.items()}
    new: list[PlannedMember] = []
    active = {d.target: d.path for d, judgement in judgements if judgement.verdict in (DiskVerdict.FREEZE, DiskVerdict.COPY)}
    former = dict.fromkeys(_former_targets(sources, {disk.target for disk, _judgement in judgements}), "")
    for target, path in {**active, **former}.items():
        held = {real: member.name for (of, real), member in known.items() if of == target}
        new += _layers(sources, target, path, held, _next_number(base, names.stem(target)))
        key = (target, os.path.realpath(path))
        if path and key in kept:
            kept[key] = replace(kept[key], active=True)
    isos, new_isos = _isos(sources, judgements, base)
    boot, new_boot = _boot_files(sources, base, _next_number(base, None) + len(new_isos))
    new += [*new_isos, *new_boot]
    if sources.nvram_bytes:
        path = sources.view.nvram_path
        name = f"{timestamp}.nvram"
        new.append(
            PlannedMember(
                Member(name, Role.NVRAM, 0, image_format="raw", original_format="raw", former_path=path), path
            )
        )
    if sources.tpm_path:
        tpm = Member(f"{timestamp}.tpm.tar", Role.TPM, 0, former_path=sources.tpm_path)
        new.append(PlannedMember(tpm, sources.tpm_path))
    memories = [m for m in base.newest.members if m.role is Role.MEMORY] if base else []
    old = {member.former_path for member in memories}
    paths = [each.memory_path for each in sources.snapshots if each.memory == "external"]
    new += [memory_member(timestamp, n, path) for n, path in enumerate((p for p in paths if p not in old), 1)]
    return Stored((*kept.values(), *isos, *boot, *memories), tuple(new))


def memory_member(timestamp: int, number: int, path: str) -> PlannedMember:
    """An external memory image as a member; `number` counts those that a point adds."""
    name = f"{timestamp}_{number}.memory"
    return PlannedMember(Member(name=name, role=Role.MEMORY, size_bytes=0, image_format="raw", former_path=path), path)


def _next_number(base: Base | None, stem: str | None) -> int:
    """The first free number of a disk's layers, or with None of CD images and boot files, in the whole archive."""
    numbers = [-1]
    for name in base.names if base else ():
        match = _NUMBERED.fullmatch(name)
        if match and match.group(1) == stem:
            numbers.append(int(match.group(2) or match.group(3)))
    return max(numbers) + 1


def _isos(
    sources: Sources, judgements: Sequence[tuple[Disk, Judgement]], base: Base | None
) -> tuple[list[Member], list[PlannedMember]]:
    """The CD images that are inserted now: those in the archive already, and the others. Each image once."""
    known = {m.former_path: m for m in base.newest.members if m.role is Role.ISO} if base else {}
    same = base.same_files if base else frozenset()
    kept: dict[str, Member] = {}
    new: dict[str, PlannedMember] = {}
    number = _next_number(base, None)
    for disk, judgement in judgements:
        if judgement.verdict is not DiskVerdict.ISO or disk.path in kept or disk.path in new:
            continue
        if disk.path in known and disk.path in same:
            kept[disk.path] = replace(known[disk.path], target=disk.target)
            continue
        stem, _suffix = os.path.splitext(os.path.basename(disk.path))
        member = Member(
            name=f"{number + len(new)}_{names.stem(stem)}.iso",
            role=Role.ISO,
            size_bytes=0,
            target=disk.target,
            image_format="raw",
            original_format="raw",
            former_path=disk.path,
            pool=sources.images[disk.path].pool,
            active=True,
        )
        new[disk.path] = PlannedMember(member, disk.path)
    return list(kept.values()), list(new.values())


def _boot_files(sources: Sources, base: Base | None, number: int) -> tuple[list[Member], list[PlannedMember]]:
    """Kernel and the like: those in the archive already, and the others. `number`: of the first of these."""
    known = {m.former_path: m for m in base.newest.members if m.role is Role.BOOT} if base else {}
    held = {path for path in sources.boot_files if base and path in known and path in base.same_files}
    new = [path for path in sources.boot_files if path not in held]
    return [known[path] for path in sources.boot_files if path in held], [
        PlannedMember(
            Member(f"{n}_{names.stem(os.path.basename(path))}.boot", Role.BOOT, size_bytes=0, former_path=path), path
        )
        for n, path in enumerate(new, number)
    ]


def _former_targets(sources: Sources, present: AbstractSet[str]) -> Iterator[str]:
    """Disks that the VM has no more, but snapshots of it have."""
    for disks in sources.snapshot_disks.values():
        for disk in disks:
            image = image_of(sources.images, disk.path)
            stored = image and image.format in STORED_FORMATS and not image.is_device and not image.has_data_file
            if disk.device == "disk" and disk.target not in present and stored:
                yield disk.target


def _layers(sources: Sources, target: str, active: str, held: Mapping[str, str], number: int) -> list[PlannedMember]:
    """Every layer of a disk, of all branches of its snapshots, each after the one that it stands on.

    `active`: the image that the VM has now, "" for a disk that only snapshots have.
    `held`: names of those that the archive has, by real path; they are left out. `number`: of the first of the others.
    """
    order: dict[str, str] = {}  # path as the VM has it, by real path

    def visit(path: str) -> None:
        real = os.path.realpath(path)
        image = image_of(sources.images, path)
        if image is None or real in order or real in held:
            return
        if image.backing_path:
            visit(image.backing_path)
        order[real] = path

    for state in sources.snapshots:
        for former in sources.snapshot_disks.get(state.name, ()):
            if former.target == target:
                visit(former.path)
    if active:
        visit(active)
    stem, below, found = names.stem(target), dict(held), []
    for n, (real, path) in enumerate(order.items(), number):
        image = image_of(sources.images, path)
        if image is None:
            continue
        below[real] = f"{stem}_{n}.{'snapshot' if image.backing_path else 'qcow2'}"
        member = Member(
            name=below[real],
            role=Role.LAYER if image.backing_path else Role.DISK,
            size_bytes=0,
            target=target,
            virtual_size_bytes=image.virtual_size_bytes,
            image_format="qcow2",
            original_format=image.format,
            parent=below.get(os.path.realpath(image.backing_path), "") if image.backing_path else "",
            former_path=path,
            pool=image.pool,
            active=bool(active) and real == os.path.realpath(active),
            template_disk=image.template_disk,
        )
        found.append(PlannedMember(member, path, from_raw=image.format == "raw"))
    return found


def image_of(images: Mapping[str, Image], path: str) -> Image | None:
    """The image of a path, which may be spelled in another way."""
    return images.get(path) or images.get(os.path.realpath(path))
