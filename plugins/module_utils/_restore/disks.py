# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which members make up which disk of the definition, and what becomes of every <disk> element."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Union

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._restore import host_exposure
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import ExistingVm, HostFacts

_TARGET = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_LAYERS = 200  # of one disk, as for libvirt
#: What names the source of a disk of a type; libvirt does not look at the others.
_SOURCE_ATTRIBUTES = {
    "file": "file", "block": "dev", "dir": "dir", "volume": "volume", "network": "name", "vhostuser": "path",
    "vhostvdpa": "dev", "nvme": "namespace",
}  # fmt: skip


@dataclass(frozen=True)
class Restored:
    """The disk comes from the archive: its layers, lowest first."""

    chain: tuple[Member, ...]


@dataclass(frozen=True)
class Kept:
    """The element stays with this source, as its attributes: a medium or a LUN of this host; {} for an empty drive."""

    source: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Emptied:
    """The drive stays without its medium."""

    reason: str


@dataclass(frozen=True)
class Dropped:
    """The element is left out. `untrusted`: only because the archive is not ours to trust."""

    reason: str
    untrusted: bool = False


Fate = Union[Restored, Kept, Emptied, Dropped]


@dataclass(frozen=True)
class DiskDecision:
    """Fate of each disk by target."""

    fates: Mapping[str, Fate]
    warnings: tuple[Notice, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class DiskElement:
    """What matters here of a <disk>. `source`: its file, device or volume, by its type ("" for none); `pool`: a volume's."""

    target: str
    device: str
    type: str
    source: str
    pool: str

    @property
    def source_attributes(self) -> dict[str, str]:
        """The source as libvirt reads it, and nothing else; {} for an empty drive."""
        if not self.source:
            return {}
        return {**({"pool": self.pool} if self.pool else {}), _SOURCE_ATTRIBUTES.get(self.type, "file"): self.source}


def elements(root: etree._Element) -> list[DiskElement]:
    """All disks of a domain definition in document order."""
    found = []
    for disk in root.findall("devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        kind = disk.get("type") or "file"
        name = (source.get(_SOURCE_ATTRIBUTES.get(kind, "file")) or "") if source is not None else ""
        if source is not None and not name and kind in ("network", "nvme", "vhostuser", "vhostvdpa"):
            name = "network"
        found.append(
            DiskElement(
                target=(target.get("dev") or "") if target is not None else "",
                device=disk.get("device") or "disk",
                type=kind,
                source=name,
                pool=(source.get("pool") or "") if source is not None and kind == "volume" else "",
            )
        )
    return found


def file_of(disk: DiskElement, pools: Mapping[str, str]) -> str:
    """The file of this host that a disk names, also as the volume of a pool (``pools``: their directories); "" for others."""
    if disk.type == "volume":
        return os.path.join(pools[disk.pool], disk.source) if disk.pool in pools and disk.source else ""
    return disk.source if disk.type == "file" else ""


def decide(
    configuration: Configuration,
    root: etree._Element,
    facts: HostFacts,
    others: Sequence[ExistingVm],
    *,
    trusted: bool,
    bare: bool = False,
    then: bool = False,
) -> DiskDecision:
    """Decides about the disks of one definition; one that is not ``trusted`` gets nothing of this host that is not everybody's.

    ``others``: the VMs that stay. ``bare``: the definition comes from an .xml file; it then gets no disk at all.
    ``then``: it is that of a snapshot, whose disks are the files that it names.
    """
    disks = elements(root)
    targets = [disk.target for disk in disks]
    if not all(map(_TARGET.fullmatch, targets)) or len(set(targets)) != len(targets):
        return DiskDecision({}, problems=("the configuration has disks without a target of their own",))
    if bare:
        reason = "a configuration file is restored without disks"
        return DiskDecision({disk.target: Dropped(reason) for disk in disks})
    tops = _tops_then(configuration, disks) if then else _tops(configuration, disks, facts)
    fates: dict[str, Fate] = {}
    warnings: list[Notice] = []
    problems: list[str] = []
    skipped = {item.device: item.reason for item in configuration.skipped}
    for disk in disks:
        if disk.target in tops:
            chain, problem = _chain(tops[disk.target], configuration)
            if problem:
                problems.append(problem)
            fates[disk.target] = Restored(_placed(chain, disk))
        else:
            fates[disk.target] = _without_member(disk, facts, others, trusted, skipped.get(disk.target, ""))
            if disk.device == "lun" and isinstance(fates[disk.target], Kept):
                text = f"The VM gets a block device of this host: {disk.source} ({disk.target})."
                warnings.append(Notice(Code.REACHES_HOST, text))
        if disk.device == "cdrom" and isinstance(fates[disk.target], Restored):
            fates[disk.target] = _cd_image(disk, tops[disk.target], facts, trusted, warnings)
    return DiskDecision(fates, tuple(warnings), tuple(problems))


def _tops(configuration: Configuration, disks: Sequence[DiskElement], facts: HostFacts) -> dict[str, Member]:
    """The member that each target shows at this point: the top layer of a disk, or a CD image."""
    images = [member for member in configuration.members if member.role in (Role.DISK, Role.LAYER, Role.ISO)]
    tops = {member.target: member for member in images if member.target and (member.active or member.role is Role.ISO)}
    # one image in two drives is in the archive once
    isos = {member.former_path: member for member in images if member.role is Role.ISO and member.former_path}
    drives = {disk.target: isos.get(file_of(disk, facts.pools)) for disk in disks if disk.device == "cdrom"}
    return {**{target: image for target, image in drives.items() if image is not None}, **tops}


def _tops_then(configuration: Configuration, disks: Sequence[DiskElement]) -> dict[str, Member]:
    """The member that held each disk of an earlier definition."""
    images = [member for member in configuration.members if member.role in (Role.DISK, Role.LAYER, Role.ISO)]
    # a file that was moved from one target to another is in the archive under both
    places: dict[tuple[str, str, str], Member] = {}
    for member in images:
        for pool, source in (("", member.former_path), (member.pool, os.path.basename(member.former_path))):
            places[member.target, pool, source] = member
            places.setdefault(("", pool, source), member)
    found = {}
    for disk in disks:
        here, anywhere = (disk.target, disk.pool, disk.source), ("", disk.pool, disk.source)
        member_then = places.get(here) or places.get(anywhere)
        if disk.source and member_then is not None:
            found[disk.target] = member_then
    return found


def _chain(top: Member, configuration: Configuration) -> tuple[tuple[Member, ...], str]:
    """Layers from the lowest to ``top``, and what is wrong with them."""
    members = {member.name: member for member in configuration.members}
    chain = [top]
    while chain[0].parent:
        parent = members.get(chain[0].parent)
        if parent is None:
            return tuple(chain), f"{chain[0].name} needs {chain[0].parent}, which is not in the archive"
        if parent in chain or len(chain) >= _MAX_LAYERS:
            return tuple(chain), f"the layers below {top.name} form a circle, or there are more than {_MAX_LAYERS}"
        chain.insert(0, parent)
    if chain[0].role is Role.LAYER:  # a thin clone's lowest layer is a DISK that names the disk of its template
        return tuple(chain), f"{chain[0].name} stands on an image that is not in the archive"
    return tuple(chain), ""


def _placed(chain: Sequence[Member], disk: DiskElement) -> tuple[Member, ...]:
    """The layers with what a foreign archive does not say: they belong together where the top of the disk was."""
    directory = os.path.dirname(chain[-1].former_path)
    return tuple(
        replace(
            member,
            former_path=member.former_path or (os.path.join(directory, member.name) if directory else ""),
            pool=member.pool or chain[-1].pool or disk.pool,
        )
        for member in chain
    )


def _without_member(
    disk: DiskElement, facts: HostFacts, others: Sequence[ExistingVm], trusted: bool, why: str
) -> Fate:
    """``why`` it was not backed up, if the archive says so."""
    if disk.device in ("cdrom", "floppy"):
        if not disk.source:
            return Kept()
        kept = _kept_medium(disk, facts, trusted)
        if kept is not None:
            return kept
        if file_of(disk, facts.pools) in facts.files and not trusted:
            return Emptied(
                f"the medium {disk.source} is not in the archive, and an archive that is not trusted is shown a file of this "
                "host only if every user may read it and none but root may replace it"
            )
        return Emptied(f"the medium {disk.source} is neither in the archive nor on this host")
    if disk.device == "lun":
        problem = _lun_problem(disk, facts, others) if trusted else host_exposure.NOT_TAKEN
        return Dropped(f"the LUN {disk.source} {problem}", not trusted) if problem else Kept(disk.source_attributes)
    missing = f"{disk.source or 'the disk'} is not in the archive"
    return Dropped(f"{missing}: {why}" if why else missing)


def _kept_medium(disk: DiskElement, facts: HostFacts, trusted: bool) -> Kept | None:
    """The medium where this host has it and it may be shown to a guest."""
    path = file_of(disk, facts.pools)
    image = facts.files.get(path)
    if image is None or not (image.public or (trusted and image.pool_iso)):
        return None
    if trusted:
        return Kept(disk.source_attributes)
    return Kept({"file": path}) if image.settled else None


def _lun_problem(disk: DiskElement, facts: HostFacts, others: Sequence[ExistingVm]) -> str:
    device = facts.block_devices.get(disk.source)
    if disk.type != "block":
        return "is not a local block device"
    if device is None:
        return "is not on this host"
    user = next((vm.name for vm in others if vm.files & {disk.source, device.real_path}), "")
    return f"belongs to the VM {user}" if user else device.problem


def _cd_image(disk: DiskElement, member: Member, facts: HostFacts, trusted: bool, warnings: list[Notice]) -> Fate:
    """An image found at its former path is used as it is (C4), as long as it may be shown to a guest."""
    path = member.former_path or disk.source
    image = facts.files.get(path)
    if image is None or file_of(disk, facts.pools) != path:
        return Restored((member,))
    kept = _kept_medium(disk, facts, trusted)
    if kept is None and trusted and image.matches is True:
        kept = Kept(disk.source_attributes)
    if kept is None:
        if image.matches is not True:
            text = f"{path} may be another file than the CD image in the archive and is private: it is not used."
            warnings.append(Notice(Code.FROM_HOST, text))
        return Restored((member,))
    if image.matches is False:
        text = f"The CD image {path} differs from {member.name} in the archive and is used as it is."
        warnings.append(Notice(Code.FROM_HOST, text))
    return kept
