# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What an attach comes to, and what of the attached disks is still where it was. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments
from ansible_collections.kvmops.backup.plugins.module_utils._attachments import Attachment, Record
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach.devices import MORE_PORTS, free_target
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import (
    NAMES,
    VOLUME_MANAGERS,
    PlaceKind,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.receivers import SeenAtReceiver
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.disk_ids import VmDisk

_FORMATS = ("qcow2", "raw")
_BY_HAND = "Give it to the receiver by hand (virsh attach-disk with --mode readonly), if it does not change meanwhile."
BY_VIRSH = "Take the disk from there: virsh detach-disk, with --live if that VM runs and with --config."
_AS_FILE = "Back the VM up by software in its guest, or move the disk to a qcow2 or raw file."


@dataclass(frozen=True)
class Frozen:
    """The file in which the snapshot has frozen a disk, and its format; `size_bytes` as a guest sees it."""

    path: str
    format: str
    size_bytes: int


@dataclass(frozen=True)
class SourceFacts:
    """The VM whose disk is wanted, and the disk.

    `marked`: it is a template. `read_only`: why nothing may be written beside the disk, "" where it may. `snapshots`: names of
    all of them. `frozen`: the disk in the snapshot of attached disks, None where there is none or the disk is not part of it.
    `unrecorded`: who has its disks, and no record says so. `template`: name of the template that the disk stands on,
    `template_names`: id and path of the template's disk.
    """

    uuid: str
    name: str
    running: bool
    marked: bool
    disk: VmDisk
    size_bytes: int
    pool: str = ""
    kind: PlaceKind = PlaceKind.DIR
    read_only: str = ""
    snapshots: frozenset[str] = frozenset()
    frozen: Frozen | None = None
    unrecorded: tuple[str, ...] = ()
    template: str = ""
    template_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReceiverFacts:
    """The VM that gets the disk. `targets`: of all its disks, in either definition. `seen`: what it has of the disk already.

    `port`: whether a disk may find a place on its bus while it runs.
    """

    uuid: str
    name: str
    running: bool
    marked: bool
    saved: bool
    targets: frozenset[str]
    seen: SeenAtReceiver
    port: bool = True


@dataclass(frozen=True)
class AttachPlan:
    """`attachment` as it will be recorded; `freeze`: the snapshot is taken first; `changes`: whether there is anything to do;
    `changed`: what the module says of it."""

    attachment: Attachment
    freeze: bool
    changes: bool
    changed: bool


def existing(record: Record | None, disk_id: str, receiver_uuid: str) -> Attachment | None:
    """The attachment of a disk at a receiver, if there is one."""
    attachments = record.attachments if record else ()
    return next((each for each in attachments if (each.disk_id, each.receiver_uuid) == (disk_id, receiver_uuid)), None)


def plan_attach(
    source: SourceFacts, receiver: ReceiverFacts, record: Record | None, *, lease_s: int, now_ns: int
) -> AttachPlan:
    """What an attach does. Raises RefusedError for what cannot be, before anything is touched."""
    now = now_ns // 10**9
    there = existing(record, source.disk.id, receiver.uuid)
    lease_until = now + lease_s if lease_s else 0
    if there is not None:
        _refuse_receiver(source, receiver)
        wanted = replace(there, leaving=False, lease_until=lease_until or there.lease_until)
        # A lease that begins again is recorded, and no change: a task with a lease can be repeated like any other.
        lease_begins = bool(lease_s and not there.lease_until)
        changed = there.leaving or lease_begins or not receiver.seen.complete
        return AttachPlan(wanted, freeze=False, changes=changed or wanted != there, changed=changed)
    _refuse_receiver(source, receiver)
    _refuse_disk(source)
    _refuse_port(receiver)
    freeze = not source.marked and not (record and record.is_frozen)
    _refuse_snapshot(source, record, freeze=freeze)
    frozen = source.frozen or Frozen(source.disk.path, source.disk.disk.format or "raw", source.size_bytes)
    return AttachPlan(
        Attachment(
            disk_id=source.disk.id,
            target=source.disk.disk.target,
            path=source.disk.original,
            attached_path=frozen.path,
            format=frozen.format,
            size_bytes=frozen.size_bytes,
            pool=source.pool,
            receiver_uuid=receiver.uuid,
            receiver_name=receiver.name,
            receiver_target=free_target(receiver.targets),
            serial=_attachments.serial(source.disk.id, receiver.uuid, now_ns),
            moment=record.created if record and record.is_frozen and not freeze else now,
            consistency=record.consistency if record and not freeze else "",
            lease_until=lease_until,
            template=source.template,
            template_names=source.template_names,
        ),
        freeze=freeze,
        changes=True,
        changed=True,
    )


def _refuse_receiver(source: SourceFacts, receiver: ReceiverFacts) -> None:
    what = f"The VM {receiver.name}"
    if receiver.uuid == source.uuid:
        raise RefusedError(what, "the disk is its own", "Name another VM as vm: the one that is to read the disk.")
    if receiver.marked:
        raise RefusedError(
            what, "it is a template: what is attached to it would be in all of its thin clones", "Name another VM."
        )
    if receiver.saved:
        raise RefusedError(
            what,
            "it has a managed-save image, and would resume without the disk",
            f"Start it first (virsh start {receiver.name}).",
        )


def _refuse_port(receiver: ReceiverFacts) -> None:
    if receiver.running and not receiver.port:
        raise RefusedError(
            f"The VM {receiver.name}",
            "it runs, and has no free PCI port for another disk",
            MORE_PORTS,
        )


def _refuse_disk(source: SourceFacts) -> None:
    reason, hint = _objection(source)
    if reason:
        raise RefusedError(f"The disk {source.disk.disk.name} of {source.name}", reason, hint)
    if source.marked and source.running:
        raise RefusedError(
            f"The template {source.name}", "it is running, and no snapshot is made of a template", "Shut it down first."
        )


def _objection(source: SourceFacts) -> tuple[str, str]:
    """Why the disk cannot be attached to another VM, and the way out; "" if it can."""
    disk = source.disk.disk
    if disk.device != "disk":
        return f"it is a {disk.device}, and only disks can be attached to another VM", _BY_HAND
    if source.kind is PlaceKind.ZVOL:
        return (
            "it is a ZFS volume, and only disks in files can be attached to another VM",
            "Clone a snapshot of the volume (zfs snapshot, zfs clone) and attach the clone by hand (virsh attach-disk with "
            "--mode readonly), or move the disk to a file on a ZFS dataset.",
        )
    if source.kind in VOLUME_MANAGERS or source.kind is PlaceKind.BLOCK:
        return f"it is on {NAMES[source.kind]}: only disks in files can be attached to another VM", _AS_FILE
    if not source.disk.path and disk.volume:
        return "its pool is not active, or has no such volume", f"Run: virsh pool-start {disk.pool}"
    if not source.disk.path:
        return "it is no file of this host", _AS_FILE
    if disk.shareable:
        return "it is shareable: other VMs may write to it at any time", _BY_HAND
    if disk.readonly and not source.marked:
        return "it is read-only, so no snapshot has it", _BY_HAND
    if disk.encrypted or disk.has_data_file or disk.has_slices:
        return "it is encrypted, has a data file or is a slice, and the receiver would not know", _AS_FILE
    if (disk.format or "raw") not in _FORMATS:
        return f"its format is {disk.format}; qcow2 and raw can be attached", _AS_FILE
    return "", ""


def _refuse_snapshot(source: SourceFacts, record: Record | None, *, freeze: bool) -> None:
    what, name = f"The VM {source.name}", _attachments.SNAPSHOT
    if freeze and source.read_only:
        raise RefusedError(
            f"The disk {source.disk.disk.name} of {source.name}",
            f"what the VM writes meanwhile has no place beside it: {source.read_only}",
            "Make the file system writable, or move the disk.",
        )
    if freeze and name in source.snapshots:
        why = f"it has a snapshot {name} that was not made by this module on this host, or whose record is lost"
        hint = "Remove the snapshot: kvmops.backup.vm_snapshot with state: absent."
        if source.unrecorded:
            why += f"; {', '.join(source.unrecorded)} reads from it"
            hint = f"{BY_VIRSH} {hint}"
        raise RefusedError(what, why, hint)
    if not freeze and record and record.is_frozen and source.frozen is None:
        others = ", ".join(record.receivers) or "nobody"
        raise RefusedError(
            f"The disk {source.disk.disk.name} of {source.name}",
            f"it is not part of the snapshot from which disks of the VM are attached to {others}, so it would show another moment",
            "Detach those first.",
        )


@dataclass(frozen=True)
class Freed:
    """An attachment that is no more, and why."""

    attachment: Attachment
    why: str


@dataclass(frozen=True)
class Reconciliation:
    """What is left of a record, what of it is gone; with nothing left, the snapshot goes and then the record."""

    kept: tuple[Attachment, ...]
    freed: tuple[Freed, ...]

    @property
    def ends(self) -> bool:
        """Whether nothing of the VM is attached to anybody."""
        return not self.kept


def reconcile(record: Record, seen: Mapping[str, SeenAtReceiver]) -> Reconciliation:
    """Compare a record with what the receivers have (by serial)."""
    kept, freed = [], []
    for each in record.attachments:
        where = seen[each.serial]
        if where.holds:
            kept.append(each)
        else:
            freed.append(Freed(each, _why_gone(each, where)))
    return Reconciliation(tuple(kept), tuple(freed))


def _why_gone(attachment: Attachment, seen: SeenAtReceiver) -> str:
    name = attachment.receiver_name
    if not seen.defined:
        return f"the VM {name} is not defined any more"
    if attachment.leaving:
        return f"the VM {name} has let it go"
    return f"the VM {name} does not have it any more"


def pending(record: Record, seen: Mapping[str, SeenAtReceiver]) -> list[str]:
    """What the next run would put right, one sentence each."""
    found = reconcile(record, seen)
    texts = [about_freed(record, each) for each in found.freed]
    if found.ends and record.is_frozen:
        texts.append(f"{record.frozen_by} of {record.source_name} is not needed any more")
    return texts


def about_freed(record: Record, freed: Freed) -> str:
    """One attachment that is no more, for messages."""
    return f"{freed.attachment.target} of {record.source_name} is free again: {freed.why}"


def about_leases(record: Record, now: float) -> list[Notice]:
    """Warnings about attachments whose time is over."""
    return [
        Notice(
            Code.LEASE_OVER,
            f"{each.target} of {record.source_name} is still attached to {each.receiver_name}, past its lease: detach it, or run "
            "vdisk_cross_attach with state: reconciled and expired: true",
        )
        for each in record.attachments
        if each.expired(now)
    ]


def status(attachment: Attachment, seen: SeenAtReceiver) -> str:
    """As the results have it."""
    if not seen.holds:
        return "gone"
    return "detaching" if attachment.leaving else "attached"


def named(
    records: Iterable[Record], receiver: Collection[str], texts: Iterable[str], source: str, clone: str
) -> list[tuple[Record, Attachment]]:
    """The attachments at a receiver (its names and uuid) that a user means by any of `texts`: id, path or serial of the disk, with
    `source` (name or uuid) its target; `clone`: of the thin clone of that name or uuid."""
    wanted = set(texts)
    found = []
    for record in records:
        owner = (record.source_name, record.source_uuid)
        for each in record.attachments:
            if each.receiver_uuid not in receiver and each.receiver_name not in receiver:
                continue
            names = {each.disk_id, each.path, each.attached_path, each.serial}
            names.add(_attachments.disk_id(record.source_uuid, each.attached_path))
            if source and (source in owner or source == each.template):
                names.add(each.target)
            if clone:
                names |= set(each.template_names)
            if (
                wanted & names
                and (not source or source in owner or source == each.template)
                and (not clone or clone in owner)
            ):
                found.append((record, each))
    return found
