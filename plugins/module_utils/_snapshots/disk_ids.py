# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The id of a disk, which snapshots do not change: made of the VM's uuid and the lowest image that is the VM's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers as image_layers
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection, Domain
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import layers, retained_layers
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.layers import SnapshotKind


@dataclass(frozen=True)
class VmDisk:
    """One disk of a VM. `path`: its active image, `original`: the lowest that is the VM's own; both are real paths, "" for none."""

    id: str
    path: str
    original: str
    disk: domain_xml.Disk


def of_vm(conn: Connection, domain: Domain, view: domain_xml.DomainView) -> list[VmDisk]:
    """All disks of a VM that have a source. Raises KvmopsError where libvirt does not answer."""
    frozen: dict[str, set[str]] = {}
    if domain.snapshotNum(0):
        for info in snapshots.tree(domain, secrets=False):
            for each in layers.disks_of(conn, info):
                if each.kind is SnapshotKind.EXTERNAL:
                    frozen.setdefault(each.target, set()).add(each.path)
    kept = retained_layers.load(view.uuid)
    found = []
    for disk in view.disks:
        path = layers.path_of(conn, disk)
        original = path
        if path and (disk.target in frozen or kept):
            original = lowest_own(image_layers.below(path), frozen.get(disk.target, ()), kept)
        source = original or disk.network or (f"{disk.pool}/{disk.volume}" if disk.volume else "")
        if source:
            found.append(VmDisk(_attachments.disk_id(view.uuid, source), path, original, disk))
    return found


def lowest_own(chain: Iterable[str], frozen: Iterable[str], kept: Mapping[str, str]) -> str:
    """Of a chain, active image first, the lowest that one of the VM's snapshots has frozen, or the active one. Pure."""
    own, top = {*frozen, *kept}, ""
    for path in chain:
        if not top or path in own:
            top = path
    return top
