# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What ``backup_info`` shows of a point: the VM's hardware, and what the point lacks."""

from __future__ import annotations

from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Role, chain_of
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import boot_files, domain


def of_point(point: Configuration) -> dict[str, Any]:
    """In the shape of INTERFACE.md's ``archives``."""
    return {
        "requires": _required(point),
        "config": _config(point),
        "snapshots": [
            {"name": state.name, "parent": state.parent, "current": state.current} for state in point.snapshots
        ],
        "warnings": _warnings(point),
    }


def _required(point: Configuration) -> dict[str, str] | None:
    return {"uuid": point.requires.uuid, "name": point.requires.name} if point.requires else None


def _config(point: Configuration) -> dict[str, Any]:
    view = domain.parse(point.domain_xml)
    disks = [disk for disk in view.disks if disk.device != "cdrom"]
    held = {member.former_path: member.name for member in point.members if member.role is Role.BOOT}
    return {
        "point": point.timestamp,
        "name": view.name,
        "uuid": view.uuid,
        "memory": view.memory_bytes,
        "vcpus": view.vcpus,
        "machine": view.machine,
        "arch": view.arch,
        "firmware": view.firmware,
        "disks": [_disk(disk, point) for disk in disks],
        "cds": [
            {"target": disk.target, "path": disk.path, "members": _isos(point, disk)}
            for disk in view.disks
            if disk.device == "cdrom"
        ],
        "nics": [{"mac": nic.mac, "type": nic.type, "source": nic.source, "model": nic.model} for nic in view.nics],
        "boot_files": [
            {"path": path, "kind": kind, "member": held.get(path)} for path, kind in _boot_files(point).items()
        ],
        "hostdevs": [f"{hostdev.kind} {hostdev.description}".strip() for hostdev in view.hostdevs],
    }


def _boot_files(point: Configuration) -> dict[str, str]:
    """What QEMU loads for the VM besides disks: kind by path."""
    root = _xml.parse(point.domain_xml, "The domain XML")
    return {each.path: each.kind.name for each in boot_files.named(root)}


def _disk(disk: domain.Disk, point: Configuration) -> dict[str, Any]:
    chain = chain_of(point, disk.target)
    top = chain[0] if chain else None
    return {
        "target": disk.target,
        "path": disk.path or (top.former_path if top else "") or disk.network,
        "pool": disk.pool or (top.pool if top else ""),
        "format": disk.format or (top.original_format if top else ""),
        "bus": disk.bus,
        "size": top.virtual_size_bytes if top else None,
        "members": [member.name for member in reversed(chain)],
    }


def _isos(point: Configuration, drive: domain.Disk) -> list[str]:
    """The image of a drive; one that is in two drives is in the archive once."""
    images = [member for member in point.members if member.role is Role.ISO]
    own = [member.name for member in images if member.target == drive.target]
    return own or [member.name for member in images if drive.path and member.former_path == drive.path]


def _warnings(point: Configuration) -> list[str]:
    """What the point lacks, what was noted when it was made, and what only a host can tell."""
    view = domain.parse(point.domain_xml)
    told = [
        *map(str, point.warnings),
        *(f"{skipped.device} is not in the archive: {skipped.reason}" for skipped in point.skipped),
    ]
    skipped_devices = {skipped.device for skipped in point.skipped}
    # A foreign archive's reader has told what it could not match; a bare XML has no members by nature.
    for disk in view.disks if point.format_version else ():
        held = _isos(point, disk) if disk.device == "cdrom" else chain_of(point, disk.target)
        if not held and disk.target not in skipped_devices and (disk.path or disk.volume or disk.network):
            told.append(f"{disk.name} is not in the archive")
    for hostdev in view.hostdevs:
        told.append(f"host device {hostdev.kind} {hostdev.description}: not checked here whether this host has it")
    return told
