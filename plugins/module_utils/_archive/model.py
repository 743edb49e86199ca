# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What an archive says: points, their members and the snapshot tree. Plain values, and what follows from them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum

from ansible_collections.kvmops.backup.plugins.module_utils._notices import Notice

FORMAT_VERSION = 1
CHUNK_BYTES = 4 * 2**20


class Role(str, Enum):
    """What a member of the archive is."""

    DISK = "disk"  # the lowest layer of a disk in this archive
    LAYER = "layer"  # a qcow2 layer on top of `parent`
    MEMORY = "memory"
    ISO = "iso"
    NVRAM = "nvram"
    TPM = "tpm"
    BOOT = "boot"  # a file of the host that QEMU loads: kernel, initial RAM disk, firmware


class Consistency(str, Enum):
    """How the point's disks relate to the guest: agent (frozen file systems), memory, crash, off (powered off)."""

    AGENT = "agent"
    MEMORY = "memory"
    CRASH = "crash"
    OFF = "off"


@dataclass(frozen=True)
class Member:
    """One row of a point's member table.

    `size_bytes` is the size of the bytes in the archive, `virtual_size_bytes` what a guest sees (0 where there is no such thing).
    `digest` is the hex digest over the binary digests of its 4 MiB chunks; "" in a foreign archive.
    `image_format` is that of the bytes in the archive, `original_format` that of the file on its host.
    """

    name: str
    role: Role
    size_bytes: int
    digest: str = ""
    target: str = ""
    virtual_size_bytes: int = 0
    image_format: str = ""
    original_format: str = ""
    parent: str = ""
    former_path: str = ""
    pool: str = ""
    active: bool = False  # the top of its disk at this point: a restore of the point ends in it
    template_disk: int = 0  # stands on this disk of the template that the point requires, counted from 1; 0: on none


@dataclass(frozen=True)
class TemplateDisk:
    """One disk of a template, told by what a guest sees of it and not by how it is stored.

    `digest`: SHA-256 over the SHA-256 digests of its 4 MiB chunks, in hex; the same for raw and qcow2.
    """

    target: str
    virtual_size_bytes: int
    digest: str


@dataclass(frozen=True)
class TemplateRequirement:
    """The template that the point of a thin clone stands on: `disks` in the order of its definition tell whether it is the one.

    `uuid` and `name` are for messages only.
    """

    uuid: str
    name: str
    disks: tuple[TemplateDisk, ...]

    def fits(self, disks: tuple[TemplateDisk, ...]) -> bool:
        """Whether disks have the content that is required, in the same order; targets do not matter."""
        return _contents(self.disks) == _contents(disks)


def _contents(disks: tuple[TemplateDisk, ...]) -> list[tuple[int, str]]:
    return [(disk.virtual_size_bytes, disk.digest) for disk in disks]


@dataclass(frozen=True)
class SnapshotNode:
    """One node of the snapshot tree: libvirt's whole <domainsnapshot>."""

    name: str
    xml: str
    parent: str = ""
    current: bool = False


@dataclass(frozen=True)
class Skipped:
    """A device that is not in the archive, and why."""

    device: str
    reason: str


@dataclass(frozen=True)
class Conversion:
    """That an archive was made of another product's package, of which, and what became of its hardware.

    `descriptor`: SHA-256 of the package's descriptor; `options`: those of the conversion, as text to compare. `files`: name,
    algorithm and hex digest of the package's files that are in the archive. `replaced`: from, to, note; `ignored`: item, note.
    """

    source: str
    descriptor: str
    options: str
    files: tuple[tuple[str, str, str], ...] = ()
    replaced: tuple[tuple[str, str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Configuration:
    """One point, as its configuration XML says it.

    `domain_xml`: the definition a restore starts from (persistent; live for transient domains), without our metadata element.
    `live_xml`: the running definition where there was one. `timestamp`: unix seconds, unique and increasing in an archive.
    `format_version` 0: a foreign archive, `members` then come from file names and image headers.
    `autostart`: libvirt starts the VM with the host, which no definition says.
    `digest_algorithm`: of chunks and members, one of digests.ALGORITHMS; the same in all points of an archive.
    `digests_member`/`digests_digest`: the member with the chunk digests of all members new at this point, and its own digest.
    `requires`: the template that a thin clone stands on, None for any other VM. `provides`: the disks of a template, () of others;
    the archive of a template is the one that is needed when `requires.fits(provides)`.
    `conversion`: the package of another product that the archive was made of, None for a backup.
    `member_name`: the XML's own name in the archive; `digest`: SHA-256 of that member with the digest's own digits read as zeros.
    """

    timestamp: int
    domain_xml: str
    vm_name: str
    vm_uuid: str
    members: tuple[Member, ...]
    live_xml: str = ""
    consistency: Consistency = Consistency.OFF
    mode: str = "full"
    incrementable: bool = False
    template: bool = False
    autostart: bool = False
    requires: TemplateRequirement | None = None
    provides: tuple[TemplateDisk, ...] = ()
    snapshots: tuple[SnapshotNode, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[Notice, ...] = ()
    created: str = ""
    tool_version: str = ""
    format_version: int = FORMAT_VERSION
    digest_algorithm: str = "sha256"
    digests_member: str = ""
    digests_digest: str = ""
    parent_point: int = 0
    parent_digest: str = ""
    conversion: Conversion | None = None
    member_name: str = ""
    digest: str = ""

    # Made once: an archive from elsewhere may have thousands of disks.
    @functools.cached_property
    def layers(self) -> dict[str, Member]:
        """Disk images by name."""
        return {each.name: each for each in self.members if each.role in (Role.DISK, Role.LAYER)}

    @functools.cached_property
    def tops(self) -> dict[str, Member]:
        """The image that each disk was on, by its target."""
        return {each.target: each for each in reversed(self.layers.values()) if each.active}


@dataclass(frozen=True)
class Damage:
    """A damaged extent: bytes `offset`..`offset+length` of `member` ("" = the archive file itself) and the points lost with it."""

    member: str
    offset: int
    length: int
    points: tuple[int, ...] = ()
    reason: str = ""


def chain_of(point: Configuration, target: str) -> tuple[Member, ...]:
    """The layers that a disk stood on at a point, the active one first; () for a disk that the point has not."""
    member = point.tops.get(target)
    chain: dict[str, Member] = {}
    while member is not None and member.name not in chain:
        chain[member.name] = member
        member = point.layers.get(member.parent)
    return tuple(chain.values())
