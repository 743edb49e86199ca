# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What is recorded as attached and is not any more: the disk is free then, and after the last one the source VM is what it was.

The record goes last: a run that dies leaves it, and with it all that the next one needs.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments, _filenames, _locks, _ownership, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._attachments import Record
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach import plan, zfs_clones
from ansible_collections.kvmops.backup.plugins.module_utils._errors import BusyError, KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers as image_layers
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import receivers, snapshots, storage
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    by_uuid,
    connect,
    find_domain,
    libvirt,
    renewed,
    translate,
    unless_gone,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.receivers import SeenAtReceiver
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice, Warn
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.operations import LastingOperation
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import merge


def seen_of(conn: Connection, record: Record) -> dict[str, SeenAtReceiver]:
    """What every receiver has, by serial."""
    return {each.serial: receivers.look(conn, each) for each in record.attachments}


def of_vm(conn: Connection, uuid: str, progress: Progress) -> list[str]:
    """Before a change of the VM, which the caller has locked: what was put right about disks of it and disks that it has.

    What cannot be put right now stays recorded, and the refusal says so to whoever wants to change the source.
    """
    done: list[str] = []
    record = _attachments.load(uuid)
    if record is not None:
        done += _tried(conn, record, progress)
    for source in {each.source_uuid for each, _attachment in _attachments.held_by(uuid)} - {uuid}:
        done += _other(renewed(conn), source, progress)
    return done


def _tried(conn: Connection, record: Record, progress: Progress) -> list[str]:
    done: list[str] = []
    with suppress(KvmopsError):
        done += reconcile(conn, record, progress, lambda notice: done.append(notice.text))
    return done


def _other(conn: Connection, uuid: str, progress: Progress) -> list[str]:
    """The same for a VM that is not locked yet; one that somebody is at work on is left to them."""
    record = _attachments.load(uuid)
    if record is None or not plan.pending(record, seen_of(conn, record)):
        return []

    of = f"The VM {record.source_name}"
    with suppress(BusyError), _locks.hold(_locks.of_vm(uuid), of=of, what="freeing its disks", timeout_s=0):
        fresh = _attachments.load(uuid)
        return _tried(conn, fresh, progress) if fresh else []
    return []


def reconcile(conn: Connection, record: Record, progress: Progress, warn: Warn) -> list[str]:
    """Free what no receiver has any more, under the source's lock; after the last one, the snapshot goes. What was done.

    Raises KvmopsError where the snapshot cannot go yet: the record stays.
    """
    found = plan.reconcile(record, seen_of(conn, record))
    done = [plan.about_freed(record, each) for each in found.freed]
    left = record.without(*(each.attachment for each in found.freed))
    if found.freed and not (found.ends and not record.is_frozen):
        _attachments.save(left)
    if found.ends:
        done += _end(conn, left, progress, warn)
    return done


def _end(conn: Connection, record: Record, progress: Progress, warn: Warn) -> list[str]:
    """Nothing of the source is attached: its snapshot is merged, its files get their owners back, the record goes."""
    done: list[str] = []
    domain = by_uuid(conn, record.source_uuid)
    if domain is not None and record.snapshot:
        here = next((each for each in snapshots.tree(domain, secrets=False) if each.name == record.snapshot), None)
        if here is not None and _is_ours(here, record):
            progress.phase("merge")
            removed = merge.remove_snapshots(conn, domain, [record.snapshot], Context(progress, warn))
            for notice in removed.notes:
                warn(notice)
            done.append(f"removed the snapshot {record.snapshot} of {record.source_name}")
    if domain is None and record.snapshot:
        done.append(f"{record.source_name} is not defined any more: the files of its disks, with their overlays, stay")
    done += zfs_clones.remove(record)
    _give_back(renewed(conn), record)
    _attachments.drop(record.source_uuid)
    return done


def _is_ours(found: snapshots.Snapshot, record: Record) -> bool:
    """Whether a snapshot of the name is the one that was made for these attachments, and not one that a user has made since."""
    if record.created:
        return found.created == record.created
    description = _xml.parse(found.xml, f"The snapshot {found.name}").findtext("description") or ""
    return description.strip() == _attachments.DESCRIPTION


def _give_back(conn: Connection, record: Record) -> None:
    """Owner, mode and label of files that libvirt has given to QEMU's user for a receiver; not of those that a guest has now."""
    if not record.owners:
        return
    used = _in_use(conn)
    for path, wanted in record.owners.items():
        if path not in used and os.path.exists(path):
            _ownership.give(path, wanted)


def _in_use(conn: Connection) -> set[str]:
    """Files that running VMs have as disks, or that these stand on."""
    found: set[str] = set()
    try:
        for domain in conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            with unless_gone():
                for disk in domain_xml.parse(domain.XMLDesc(0)).disks:
                    paths = [storage.disk_path(conn, disk), *(link.path for link in disk.chain)]
                    found.update(_filenames.real(each) for path in paths if path for each in image_layers.below(path))
    except libvirt.libvirtError as error:
        raise translate(error, "The VMs of this host") from error
    return found


def pending(uri: str, vm: str) -> list[str]:
    """What the next change would put right about disks of a VM (name or uuid) and disks that it has. Touches nothing."""
    records = [record for record in _attachments.everything() if _concerns(record, vm)]
    if not records:
        return []
    conn = connect(uri)
    return [text for record in records for text in plan.pending(record, seen_of(conn, record))]


def remind(vm: str) -> list[Notice]:
    """Warnings about disks of a VM, or at it, whose lease is over."""
    records = [record for record in _attachments.everything() if _concerns(record, vm)]
    return [notice for record in records for notice in plan.about_leases(record, time.time())]


def unknown(conn: Connection, *vms: str) -> list[Notice]:
    """Warnings about names and uuids ("" for none) that neither this host nor a record has: a slip, or a VM that has gone."""
    records = list(_attachments.everything())
    found = []
    for vm in vms:
        if vm and not any(_concerns(record, vm) for record in records):
            try:
                find_domain(conn, vm)
            except RefusedError as error:
                found.append(Notice(Code.NOTHING_FOUND, f"{error.what}: {error.why}, and nothing is recorded of it"))
    return found


def _concerns(record: Record, vm: str) -> bool:
    names = {record.source_uuid, record.source_name}
    return vm in names.union(*((each.receiver_uuid, each.receiver_name) for each in record.attachments))


LASTING = LastingOperation("attached disks", of_vm, pending, remind)
