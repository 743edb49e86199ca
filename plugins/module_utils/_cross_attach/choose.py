# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which disk of which VM a user means, by id, path, serial, or target and VM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers as image_layers
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import receivers
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    find_domain,
    libvirt,
    translate,
    unless_gone,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import disk_ids
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.disk_ids import VmDisk


@dataclass(frozen=True)
class Candidate:
    """A disk of a VM of this host."""

    vm_uuid: str
    vm_name: str
    disk: VmDisk


@dataclass(frozen=True)
class Chosen:
    """The disk that is meant. `template`: the one of the template below it, where the user has named that one."""

    disk: Candidate
    template: Candidate | None = None


def candidates(conn: Connection, vm: str = "") -> list[Candidate]:
    """The disks of all VMs, or of one; those that were attached to it are not its own."""
    try:
        domains = [find_domain(conn, vm)] if vm else conn.listAllDomains(0)
        found = []
        for domain in domains:
            with unless_gone():
                flags = libvirt.VIR_DOMAIN_XML_INACTIVE if domain.isPersistent() and not domain.isActive() else 0
                view = domain_xml.parse(domain.XMLDesc(flags))
                disks = disk_ids.of_vm(conn, domain, view)
                found += [
                    Candidate(view.uuid, view.name, each) for each in disks if not receivers.is_attached(each.disk)
                ]
    except libvirt.libvirtError as error:
        raise translate(error, "The VMs of this host") from error
    return found


def choose(conn: Connection, vdisk: str, source_vm: str, thin_clone: str) -> Chosen:
    """The disk that is meant. Raises RefusedError where there is none, or more than one."""
    named = pick(candidates(conn, source_vm), vdisk, source_vm)
    if not thin_clone:
        return Chosen(named)
    clone = find_domain(conn, thin_clone)
    if named.vm_uuid == clone.UUIDString():
        return Chosen(named)
    own = [each for each in candidates(conn, thin_clone) if named.disk.path in image_layers.below(each.disk.path)[1:]]
    if len(own) != 1:
        raise RefusedError(
            f"The thin clone {thin_clone}",
            f"{'no disk' if not own else 'more than one disk'} of it stands on {named.disk.original} of {named.vm_name}",
            "Name the disk of the clone itself, without thin_clone.",
        )
    return Chosen(own[0], named)


def pick(disks: Sequence[Candidate], vdisk: str, source_vm: str = "") -> Candidate:
    """The one disk that a text means, of all disks or those of the VM that is named. Pure but for links in paths.

    Raises RefusedError where there is none, or more than one.
    """
    path = _filenames.real(vdisk) if vdisk.startswith("/") else ""
    found = [each for each in disks if _means(each.disk, vdisk, path, by_target=bool(source_vm))]
    if not found:
        raise _none(disks, vdisk, source_vm)
    if len(found) > 1:
        names = "; ".join(f"{each.disk.disk.name} of {each.vm_name}, id {each.disk.id}" for each in found)
        raise RefusedError(f"The disk {vdisk}", f"more than one is meant: {names}", "Name it by its id.")
    return found[0]


def _none(disks: Sequence[Candidate], vdisk: str, source_vm: str) -> RefusedError:
    if not source_vm:
        hint = "kvmops.backup.vm_info shows ids and paths; a target (vda) needs source_vm."
        return RefusedError(f"The disk {vdisk}", "no VM of this host has such a disk", hint)
    own = ", ".join(f"{each.disk.disk.target} ({each.disk.original or each.disk.disk.name})" for each in disks)
    has = f"Its disks: {own}." if own else "It has no disk of its own."
    return RefusedError(f"The disk {vdisk}", f"the VM {source_vm} has no such disk", has)


def _means(disk: VmDisk, text: str, path: str, *, by_target: bool) -> bool:
    if path:
        return path in (disk.path, disk.original)
    serial = disk.disk.serial
    return text.lower() == disk.id or bool(serial and text == serial) or (by_target and text == disk.disk.target)


def names_of(candidate: Candidate | None) -> Iterable[str]:
    """The names under which the disk of a template stands for that of its clone."""
    return () if candidate is None else (candidate.disk.id, candidate.disk.original)
