# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Templates of this host, and who stands on their disks: told from marks and image headers. Changes nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers, qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import receivers, storage
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    libvirt,
    translate,
    unless_gone,
)
from ansible_collections.kvmops.backup.plugins.module_utils._template import mark


@dataclass(frozen=True)
class BaseDisk:
    """A disk that thin clones can stand on.

    `path` is a real path; `virtual_size_bytes` 0: the image cannot be read. `allocated_bytes`: what all its layers take.
    """

    target: str
    path: str
    format: str
    virtual_size_bytes: int
    allocated_bytes: int = 0


@dataclass(frozen=True)
class Template:
    """A VM that thin clones stand on or could; `marked`: it is a template. `disks` in the order of its definition.

    `suspended`: it has a managed-save image, and goes on writing at its next start as if it had never stopped.
    """

    uuid: str
    name: str
    marked: bool
    running: bool
    snapshots: int
    disks: tuple[BaseDisk, ...]
    suspended: bool = False


def of_domain(conn: Connection, domain: Domain) -> Template:
    """A VM as a template. Raises KvmopsError where libvirt cannot answer."""
    try:
        running = bool(domain.isActive())
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if domain.isPersistent() else 0
        root = _xml.parse(domain.XMLDesc(flags), f"the definition of {domain.name()}")
        states = domain.snapshotNum(0)
        suspended = bool(domain.hasManagedSaveImage(0))
    except libvirt.libvirtError as error:
        raise translate(error, f"The VM {domain.name()}") from error
    view = domain_xml.view(root)
    own = (disk for disk in view.disks if disk.device == "disk" and not receivers.is_attached(disk))
    disks = tuple(_base_disk(conn, disk) for disk in own)
    return Template(view.uuid, view.name, mark.is_marked(root), running, states, disks, suspended)


def templates(conn: Connection) -> tuple[Template, ...]:
    """All VMs of this host that are marked as templates."""
    return tuple(of_domain(conn, vm.domain) for vm in _vms(conn) if vm.definition.marked)


@dataclass(frozen=True)
class Neighbour:
    """A VM beside others, by all its definitions: live, persistent, and those of its snapshots.

    `disks`: real paths of its disks; `files`: these and all that they stand on. `marked`: it is a template. `attached`: files
    of disks of others that are attached to it, which it only reads.
    """

    uuid: str
    name: str
    marked: bool
    disks: frozenset[str]
    files: frozenset[str]
    attached: frozenset[str] = frozenset()


class Host:
    """All VMs of a host as they are when something is first asked here; whoever looks at many VMs asks one Host about all."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn

    @functools.cached_property
    def _vms(self) -> list[_Vm]:
        return _vms(self._conn)

    @functools.cached_property
    def neighbours(self) -> list[Neighbour]:
        """All of them, by all their definitions."""
        found = []
        for vm in self._vms:
            definitions = _all_definitions(vm)
            tops = {top for each in definitions for top in _tops(self._conn, each)}
            held = {top for each in definitions for top in _paths(self._conn, each.attached)}
            attached = frozenset(path for top in held for path in layers.below(top))
            chains = [layers.below(top) for top in tops]
            disks, files = (frozenset(path for chain in chains for path in chain[:last]) for last in (1, None))
            found.append(Neighbour(vm.domain.UUIDString(), vm.domain.name(), vm.definition.marked, disks, files, attached))
        return found

    @functools.cached_property
    def _having(self) -> dict[str, list[tuple[_Vm, bool]]]:
        """By real path, the VMs that have it as a disk, or (True) the templates that have it below one."""
        found: dict[str, list[tuple[_Vm, bool]]] = {}
        for vm in self._vms:
            chains = [layers.below(top) for top in _tops(self._conn, vm.definition)]
            disks = {chain[0] for chain in chains}
            # what a snapshot of a template has frozen is no disk of it any more
            lower = {path for chain in chains for path in chain} - disks if vm.definition.marked else set[str]()
            for path, is_below in (*((path, False) for path in disks), *((path, True) for path in lower)):
                found.setdefault(path, []).append((vm, is_below))
        return found

    def owners(self, paths: Iterable[str], but: str) -> dict[str, Template]:
        """By real path, the VM that has it as a disk, a template before others, or a template that has it below a disk.

        `but`: uuid of the VM that asks.
        """
        found: dict[str, Template] = {}
        for path in map(_filenames.real, paths):
            others = [each for each in self._having.get(path, ()) if each[0].domain.UUIDString() != but]
            # several may name one file: the template counts
            others.sort(key=lambda each: (each[1], not each[0].definition.marked))
            if others:
                found[path] = of_domain(self._conn, others[0][0].domain)
        return found


def neighbours(conn: Connection) -> list[Neighbour]:
    """All VMs of this host, as they are now."""
    return Host(conn).neighbours


def shared(tops: Iterable[str], but: str, vms: Iterable[Neighbour]) -> dict[str, str]:
    """Files of the disks of the VM with the uuid `but` that another VM has too, by real path with the name of that VM.

    What two VMs only stand on is meant to be shared, and so are the disks of a template; `tops` as QEMU is given them.
    """
    chains = [layers.below(top) for top in tops]
    disks = {chain[0] for chain in chains}
    below = {layer for chain in chains for layer in chain[1:]}
    found: dict[str, str] = {}
    for other in vms:
        if other.uuid == but:
            continue
        meant = other.disks if other.marked else frozenset[str]()
        for path in sorted((disks & other.files) | (below & (other.disks - meant))):
            found.setdefault(path, other.name)
    return found


def why_not_beside(sharing: Mapping[str, str]) -> str:
    """Why a VM gets no snapshot that stays while others have its files (see shared)."""
    users = "; ".join(f"the VM {name} has {path} too" for path, name in sharing.items())
    return f"{users}: a snapshot that stays would freeze that file, and both VMs would lose what they write"


def way_out_of_sharing(sharing: Mapping[str, str]) -> str:
    """What a person can do about it."""
    names = ", ".join(sorted(set(sharing.values())))
    return (
        f"While {names} can start with it, the VM gets full backups only: mode: auto makes them, and so does mode: full "
        "without incrementable. To have increments, undefine one of the two, or give each a disk of its own."
    )


def clones_of(conn: Connection, template: Template) -> list[str]:
    """Names of the VMs whose disks or snapshots stand on the template's disks."""
    bases = {disk.path for disk in template.disks}
    found = []
    for vm in _vms(conn):
        if vm.domain.UUIDString() == template.uuid:
            continue
        tops = {path for each in _all_definitions(vm) for path in _tops(conn, each)}
        if any(bases & {*layers.below(top)} for top in tops):
            found.append(vm.domain.name())
    return sorted(found)


def stands_on(conn: Connection, domain: Domain, template: Template) -> bool:
    """Whether a VM has a layer on every disk of the template; it may have got other disks since."""
    bases = [disk.path for disk in template.disks]
    root = _xml.parse(domain.XMLDesc(0), f"the definition of {domain.name()}")
    disks = [disk for disk in domain_xml.view(root).disks if disk.device == "disk"]
    chains = [layers.below(storage.disk_path(conn, disk)) for disk in disks]
    return all(any(base in chain[1:] for chain in chains) for base in bases)


def files(disks: Sequence[BaseDisk]) -> frozenset[str]:
    """Real paths of all files that disks consist of."""
    return frozenset(layer for disk in disks for layer in layers.below(disk.path))


def numbers(template: Template) -> Mapping[str, int]:
    """By real path, which disk of the template it is, counted from 1."""
    return {disk.path: number for number, disk in enumerate(template.disks, 1)}


@dataclass(frozen=True)
class _Definition:
    """What of a definition tells whose a file is: the disks in it, or in those of a snapshot. `attached`: disks of other VMs."""

    marked: bool
    disks: tuple[domain_xml.Disk, ...]
    attached: tuple[domain_xml.Disk, ...] = ()


@dataclass(frozen=True)
class _Vm:
    """A VM of this host; `two`: it runs, and has a persistent definition too; `snapshots`: it has some."""

    domain: Domain
    definition: _Definition
    two: bool
    snapshots: bool


def _vms(conn: Connection) -> list[_Vm]:
    """All VMs of this host; of each, one question to libvirt: there may be hundreds, and every run asks."""
    both = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE | libvirt.VIR_CONNECT_LIST_DOMAINS_PERSISTENT
    found: list[tuple[Domain, _Definition]] = []
    try:
        for domain in conn.listAllDomains(0):
            with unless_gone():
                found.append((domain, _definition(domain.XMLDesc(0))))
        two = {domain.UUIDString() for domain in conn.listAllDomains(both)}
        some = {domain.UUIDString() for domain in conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_HAS_SNAPSHOT)}
    except libvirt.libvirtError as error:
        raise translate(error, "The VMs of this host") from error
    return [_Vm(domain, definition, domain.UUIDString() in two, domain.UUIDString() in some) for domain, definition in found]


def _all_definitions(vm: _Vm) -> list[_Definition]:
    """The VM's definition, the persistent one where that is another, and those of snapshots."""
    found = [vm.definition]
    try:
        with unless_gone():
            if vm.two:
                found.append(_definition(vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))
            for each in vm.domain.listAllSnapshots(0) if vm.snapshots else ():
                with unless_gone():
                    found.append(_definition(each.getXMLDesc(0)))
    except libvirt.libvirtError as error:
        raise translate(error, f"The VM {vm.domain.name()}") from error
    return found


@functools.lru_cache(maxsize=4096)  # a run looks several times
def _definition(text: str) -> _Definition:
    root = _xml.parse(text, "the definition of a VM")
    roots = [root] if root.tag == "domain" else [*root.iterfind("domain"), *root.iterfind("inactiveDomain")]
    disks = [disk for each in roots for disk in domain_xml.view(each).disks if disk.device == "disk"]
    own = tuple(disk for disk in disks if not receivers.is_attached(disk))
    # a snapshot of a VM that held such a disk has none of its data
    held = tuple(disk for disk in disks if receivers.is_attached(disk)) if root.tag == "domain" else ()
    return _Definition(mark.is_marked(root), own, held)


def _tops(conn: Connection, definition: _Definition) -> list[str]:
    """Files of the disks in a definition, as it spells them."""
    return _paths(conn, definition.disks)


def _paths(conn: Connection, disks: Iterable[domain_xml.Disk]) -> list[str]:
    return [path for path in (storage.disk_path(conn, disk) for disk in disks) if path]


def _base_disk(conn: Connection, disk: domain_xml.Disk) -> BaseDisk:
    path, fmt = _filenames.real(storage.disk_path(conn, disk)), disk.format or "raw"
    size_bytes = allocated_bytes = 0
    if os.path.exists(path) and fmt in ("qcow2", "raw"):
        try:
            size_bytes = qemu_img.info(path, fmt).virtual_size_bytes
            allocated_bytes = sum(os.stat(layer).st_blocks * 512 for layer in layers.below(path))
        except (ImageError, OSError):
            size_bytes = 0  # judged as a disk whose content is not known
    return BaseDisk(disk.target, path, fmt, size_bytes, allocated_bytes)
