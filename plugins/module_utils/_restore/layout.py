# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which members become which files, where and under which names, and which files are made besides. Pure.

A layer that a snapshot has frozen is never written to again: the VM then works on a fresh overlay. With `flatten` the layers
of a disk are only needed for the time of the restore, and one image is made of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Notice
from ansible_collections.kvmops.backup.plugins.module_utils._restore import boot, places
from ansible_collections.kvmops.backup.plugins.module_utils._restore.identity import Identity
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import (
    ExistingVm,
    HostFacts,
    MadeFile,
    PlannedFile,
    RestorePlace,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import DiskFormat
from ansible_collections.kvmops.backup.plugins.module_utils._template.find import BaseDisk


@dataclass(frozen=True)
class Needed:
    """What has to come out of the archive.

    `disks`: the chain of each of the VM's disks by target, lowest layer first; `others`: the chains that snapshots stand on.
    `memories`: memory images with the name of their snapshot. `frozen`: names of members that snapshots hold.
    `overlays`: by target, the former path of the file that took the writes after the current snapshot. `bases`: disks of the
    template that a thin clone stands on. `boot`: kernel and the like, which go where the first disk goes.
    """

    disks: Mapping[str, tuple[Member, ...]]
    others: Sequence[tuple[Member, ...]] = ()
    memories: Sequence[tuple[Member, str]] = ()
    frozen: frozenset[str] = frozenset()
    overlays: Mapping[str, str] | None = None
    bases: Sequence[BaseDisk] = ()
    boot: boot.BootDecision = field(default_factory=boot.BootDecision)


@dataclass(frozen=True)
class Layout:
    """All files of the restored VM but its NVRAM; `files` have their members' order of need, layers below first.

    `tops`: by target of a disk of the VM, the file that it shows; `places`: of each file that stays, by path.
    """

    files: tuple[PlannedFile, ...]
    made: tuple[MadeFile, ...]
    tops: Mapping[str, PlannedFile | MadeFile]
    places: Mapping[str, RestorePlace]
    by_member: Mapping[str, PlannedFile]
    warnings: tuple[Notice, ...] = ()
    problems: tuple[str, ...] = ()

    def of_member(self, name: str) -> PlannedFile:
        """The file of a member."""
        return self.by_member[name]


def decide(needed: Needed, host: HostFacts, who: Identity, disk_format: DiskFormat, flat: frozenset[str]) -> Layout:
    """``flat``: the targets whose layers become one image."""
    members = _members([*needed.disks.values(), *needed.others])
    doubled = {member.name for target in flat for member in needed.disks[target]}
    # layers and the image that is made of them are there at the same time
    sized = [
        replace(m, size_bytes=2 * m.size_bytes + _below(m, needed)) if m.name in doubled else m
        for m in members.values()
    ]
    images = [_beside_disks(member, members, host) for member, _dummy in needed.memories]
    where = places.decide([*sized, *images, *(_with_first(each, members) for each in needed.boot.restored)], host)
    namer = _Namer(who)
    made: list[MadeFile] = []
    tops: dict[str, PlannedFile | MadeFile] = {}
    files: dict[str, PlannedFile] = {}
    placed: dict[str, RestorePlace] = {}
    for target in sorted(flat):
        made.append(_flat_image(target, needed.disks[target], where.places, namer, disk_format))
        tops[target] = made[-1]
        placed[made[-1].path] = where.places[needed.disks[target][-1].name]
    for member in members.values():
        place = where.places[member.name]
        temporary = member.name in doubled
        image_format = (
            member.image_format or "qcow2" if temporary or member.role is Role.ISO else _format(member, disk_format)
        )
        name = f".layer-{member.name}" if temporary else namer.of_layer(place, member, image_format)
        below = files.get(member.parent)
        base = needed.bases[member.template_disk - 1] if member.template_disk and needed.bases else None
        stands_on = below or base
        files[member.name] = PlannedFile(
            member=member,
            path=os.path.join(place.path, name),
            format="raw" if member.role is Role.ISO else image_format,
            pool="" if temporary else place.pool,
            backing=stands_on.path if stands_on is not None else "",
            backing_format=stands_on.format if stands_on is not None else "",
            temporary=temporary,
        )
        if not temporary:
            placed[files[member.name].path] = place
    made = [replace(each, backing=files[needed.disks[each.target][-1].name].path) for each in made]
    stood_on = {member.parent for member in members.values()}
    for target, chain in needed.disks.items():
        top = chain[-1]
        if target in flat:
            continue
        tops[target] = files[top.name]
        if top.name not in needed.frozen | stood_on or top.role is Role.ISO:
            continue
        place = where.places[top.name]
        overlay = MadeFile(
            target=target,
            path=os.path.join(place.path, namer.of_overlay(place, top, (needed.overlays or {}).get(target, ""))),
            format="qcow2",
            backing=files[top.name].path,
            backing_format=files[top.name].format,
            pool=place.pool,
        )
        made.append(overlay)
        tops[target] = overlay
        placed[overlay.path] = place
    for member, state in needed.memories:
        place = where.places[member.name]
        path = os.path.join(place.path, namer.of_memory(place, member, state))
        files[member.name] = PlannedFile(member=member, path=path, format="raw", pool=place.pool)
        placed[path] = place
    for member in needed.boot.restored:
        place = where.places[member.name]
        path = os.path.join(place.path, namer.of_boot_file(place, member))
        public = member.name in needed.boot.public
        files[member.name] = PlannedFile(member=member, path=path, format="raw", pool=place.pool, public=public)
        placed[path] = place
    problems = (*where.problems, *_unknown_formats(members.values()))
    return Layout(tuple(files.values()), tuple(made), tops, placed, files, where.warnings, problems)


def _below(member: Member, needed: Needed) -> int:
    """What a flat image holds of the template."""
    return needed.bases[member.template_disk - 1].allocated_bytes if member.template_disk and needed.bases else 0


def clashes(
    wanted: Mapping[str, RestorePlace],
    host: HostFacts,
    replaced: ExistingVm | None,
    others: Sequence[ExistingVm],
    force: bool,
    template: bool,
) -> tuple[list[str], list[str]]:
    """Existing files that make way for new ones (``wanted``: their places by path), and why some of them must stay.

    A restored ``template`` may take the place of one that is gone, also while clones that stood on it are still defined.
    """
    users = {path: vm.name for vm in others for path in (vm.files - vm.missing_bases if template else vm.files)}
    own = replaced.files if replaced is not None else frozenset()
    # libvirt names the files in its own directories after the VM
    known = (host.target, host.nvram_place, host.tpm_place)
    set_aside: list[str] = []
    problems: list[str] = []
    for path, place in wanted.items():
        name = os.path.basename(path)
        exists, real = name in place.names, os.path.join(place.real_path or place.path, name)
        user = users.get(path) or users.get(real)
        if user:
            problems.append(f"{path} belongs to the VM {user}")
        elif exists and not force:
            problems.append(f"the file {path} exists ('force: true' replaces it)")
        elif exists and not own & {path, real} and not place.pool and all(place is not each for each in known):
            problems.append(f"{path} exists, is no file of the VM and is in no pool (remove it yourself)")
        elif exists:
            set_aside.append(path)
    return set_aside, problems


def _beside_disks(image: Member, members: Mapping[str, Member], host: HostFacts) -> Member:
    """A memory image whose former directory is libvirt's own, or gone, is counted where the first disk was."""
    former = host.former.get(places.former_key(image))
    if not members or (former is not None and (former.pool or not places.directory_problem(former))):
        return image
    return _with_first(image, members)


def _with_first(member: Member, members: Mapping[str, Member]) -> Member:
    """A member that is counted where the first disk was."""
    first = next(iter(members.values()), None)
    if first is None:
        return replace(member, pool="", former_path="")
    name = os.path.basename(member.former_path)
    return replace(member, pool=first.pool, former_path=os.path.join(os.path.dirname(first.former_path), name))


def _members(chains: Iterable[tuple[Member, ...]]) -> dict[str, Member]:
    """Each member once, after the one that it stands on."""
    found: dict[str, Member] = {}
    for chain in chains:
        for member in chain:
            found.setdefault(member.name, member)
    return found


def _format(member: Member, disk_format: DiskFormat) -> str:
    as_raw = member.original_format == "raw" and disk_format is DiskFormat.KEEP
    return "raw" if as_raw else member.image_format or "qcow2"


def _flat_image(
    target: str, chain: tuple[Member, ...], where: Mapping[str, RestorePlace], namer: _Namer, disk_format: DiskFormat
) -> MadeFile:
    """The image that a merge of all snapshots would have left: the lowest layer's name and format."""
    place, lowest = where[chain[-1].name], chain[0]
    image_format = _format(lowest, disk_format)
    return MadeFile(
        target=target,
        path=os.path.join(place.path, namer.of_layer(place, lowest, image_format)),
        format=image_format,
        backing="",
        backing_format=chain[-1].image_format or "qcow2",
        pool=place.pool,
        flat=True,
    )


def _unknown_formats(members: Iterable[Member]) -> list[str]:
    """A damaged or disguised image must not end up as a raw disk, nor QEMU be let loose on formats nobody asked for."""
    problems = []
    for member in members:
        name, image_format = member.name, member.image_format or "qcow2"
        if image_format not in ("qcow2", "raw"):
            problems.append(f"the member {name} is {image_format}; only qcow2 and raw are restored")
        elif image_format == "raw" and name.endswith((".qcow2", ".snapshot")):
            problems.append(f"the member {name} is no qcow2 image, whatever its name says")
    return problems


class _Namer:
    """Gives each file a name of its own: the former one, or for a copy one made from the VM's name."""

    def __init__(self, who: Identity) -> None:
        self._who = who
        self._taken: set[str] = set()
        self._counts: dict[str, int] = {}

    def of_layer(self, place: RestorePlace, member: Member, image_format: str) -> str:
        """Of a disk, a layer or a CD image."""
        name = "" if self._who.new else _former_name(member, image_format)
        suffix = "iso" if member.role is Role.ISO else image_format
        return self._first_free(place, name, member.target, suffix)

    def of_overlay(self, place: RestorePlace, below: Member, former_path: str) -> str:
        """Of the fresh overlay on a frozen layer."""
        name = "" if self._who.new else _fit(os.path.basename(former_path))
        return self._first_free(place, name, below.target, "qcow2")

    def of_memory(self, place: RestorePlace, member: Member, state: str) -> str:
        """Of a memory image."""
        name = "" if self._who.new else _fit(os.path.basename(member.former_path))
        derived = f"{names.stem(self._who.name)}-{names.stem(state)}.memory"
        if self._take(place, name):
            return name
        return derived if self._take(place, derived) else self._first_free(place, "", f"{state}-memory", "memory")

    def of_boot_file(self, place: RestorePlace, member: Member) -> str:
        """Of a kernel or the like, which has the same name for many VMs."""
        prefix, name = f"{names.stem(self._who.name)}-", _fit(os.path.basename(member.former_path)) or member.name
        name = name if name.startswith(prefix) else prefix + name
        return name if self._take(place, name) else self._first_free(place, "", os.path.splitext(member.name)[0], "boot")

    def _first_free(self, place: RestorePlace, former: str, target: str, suffix: str) -> str:
        number = self._counts.get(target, 0)
        self._counts[target] = number + 1
        name = former
        while not self._take(place, name):
            counted = f"-{number}" if number else ""
            name = f"{names.stem(self._who.name)}-{names.stem(target)}{counted}.{suffix}"
            number += 1
        return name

    def _take(self, place: RestorePlace, name: str) -> bool:
        path = os.path.join(place.path, name)
        if not name or path in self._taken:
            return False
        self._taken.add(path)
        return True


def _former_name(member: Member, image_format: str) -> str:
    """The file's former name; "" where it is not known or not fit for a file of a VM."""
    name = os.path.basename(member.former_path) or member.name
    if member.former_path.startswith("/dev/") or name == f"{member.target}_0.qcow2":  # ours, for a disk that had no file here
        return ""
    if member.original_format == "raw" and image_format == "qcow2" and name.endswith(".raw"):
        name = name[: -len(".raw")] + ".qcow2"
    return _fit(name)


def _fit(name: str) -> str:
    """The name, or "" if no file of a VM should have it."""
    return "" if not name or name.startswith(".") or any(ord(letter) < 32 for letter in name) else name
