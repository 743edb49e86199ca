# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Where a VM has a disk that was attached to it, by its definitions; and the one refusal of all that would change such a disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments, _filenames, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._attachments import Attachment, Record
from ansible_collections.kvmops.backup.plugins.module_utils._errors import AttachedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    by_name,
    by_uuid,
    libvirt,
    translate,
    unless_gone,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import Disk, target_of


@dataclass(frozen=True)
class SeenAtReceiver:
    """Where a receiver has an attached disk: in the running guest, in its definition. `saved`: it has a managed-save image."""

    defined: bool
    running: bool = False
    persistent: bool = False
    live: bool = False
    config: bool = False
    saved: bool = False

    @property
    def holds(self) -> bool:
        """Whether the receiver has the disk, or may have it after its next start. What was saved with it comes back with it."""
        return self.live or self.config or self.saved

    @property
    def complete(self) -> bool:
        """Whether it has the disk everywhere that it can be."""
        return self.defined and self.live == self.running and self.config == self.persistent


def names_of(conn: Connection, vm: str) -> set[str]:
    """Under which names a record may have the VM that a user names; it may have another name by now, or be gone. {} for ""."""
    names = {vm} if vm else set()
    found = by_name(conn, vm) if vm else None
    if found is not None:
        names.add(str(found.UUIDString()))
    return names


def look(conn: Connection, attachment: Attachment) -> SeenAtReceiver:
    """Where the receiver has the disk now. Raises KvmopsError where libvirt does not say: that is not known then."""
    domain = by_uuid(conn, attachment.receiver_uuid)
    if domain is None:
        return SeenAtReceiver(defined=False)
    try:
        running, persistent = bool(domain.isActive()), bool(domain.isPersistent())
        live = element_of(domain.XMLDesc(0), attachment.serial) if running else None
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE
        config = element_of(domain.XMLDesc(flags), attachment.serial) if persistent else None
        saved = persistent and not running and bool(domain.hasManagedSaveImage(0))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return SeenAtReceiver(defined=False)
        raise translate(error, f"The VM {attachment.receiver_name}") from error
    return SeenAtReceiver(True, running, persistent, live is not None, config is not None, saved)


def element_of(xml: str, serial: str) -> etree._Element | None:
    """The <disk> with that serial in a definition. Pure."""
    disks = _xml.parse(xml, "The domain XML").iterfind("devices/disk")
    return next((disk for disk in disks if disk.findtext("serial") == serial), None)


def is_attached(disk: Disk) -> bool:
    """Whether a disk in a definition is one of another VM, attached by us. Pure."""
    return disk.readonly and _attachments.is_serial(disk.serial)


def unrecorded(conn: Connection, paths: Collection[str]) -> list[str]:
    """Which VMs have one of these files as an attached disk, whatever the records say: "appliance (vdb)". Raises KvmopsError."""
    found = []
    try:
        for domain in conn.listAllDomains(0):
            with unless_gone():
                flags = [0] * bool(domain.isActive()) + [libvirt.VIR_DOMAIN_XML_INACTIVE] * bool(domain.isPersistent())
                disks = [disk for flag in flags for disk in domain_xml.parse(domain.XMLDesc(flag)).disks]
                targets = {disk.target for disk in disks if is_attached(disk) and _filenames.real(disk.path) in paths}
                found += [f"{domain.name()} ({target})" for target in sorted(targets)]
    except libvirt.libvirtError as error:
        raise translate(error, "The VMs of this host") from error
    return sorted(found)


def without_attached(xml: str) -> str:
    """A <domain> or <domainsnapshot> without the disks of other VMs that were attached to it. Pure."""
    root = _xml.parse(xml, "A definition")
    places = ("devices/disk", "domain/devices/disk", "inactiveDomain/devices/disk")
    found = [disk for place in places for disk in root.iterfind(place) if _is_attached(disk)]
    if not found:
        return xml
    targets = {target_of(disk) for disk in found}
    listed = [disk for disk in root.iterfind("disks/disk") if disk.get("name") in targets]
    for disk in (*found, *listed):
        _xml.parent_of(disk).remove(disk)
    return _xml.text(root)


def _is_attached(disk: etree._Element) -> bool:
    return disk.find("readonly") is not None and _attachments.is_serial(disk.findtext("serial", ""))


def refuse(conn: Connection, uuid: str, doing: str, *, settled: bool = True) -> None:
    """Raises AttachedError where disks of the VM are attached to other VMs: it is not snapshotted, merged, reverted, backed up,
    restored over, cloned or marked then. `doing` is what is not done, as in "Backup of VM web01".

    `settled`: the caller has settled what is not attached any more; otherwise that is left out here.
    """
    record = _attachments.load(uuid)
    if record is None:
        return
    held = [each for each in record.attachments if settled or look(conn, each).holds]
    if held:
        disks = ", ".join(dict.fromkeys(each.target for each in held))
        names = sorted({each.receiver_name for each in held})
        hint = "Detach them first: kvmops.backup.vdisk_cross_attach with state: detached."
        error = AttachedError(doing, f"disks of it ({disks}) are attached to {', '.join(names)}", hint)
        error.values = {"attached_to": names}
        raise error
    if settled:
        _refuse_unmerged(record, doing)


def _refuse_unmerged(record: Record, doing: str) -> None:
    why = f"disks of it were attached to other VMs, and {record.frozen_by} could not be removed yet"
    hint = "kvmops.backup.vdisk_cross_attach with state: reconciled removes it, or says what is in the way."
    error = AttachedError(doing, why, hint)
    error.values = {"attached_to": []}
    raise error
