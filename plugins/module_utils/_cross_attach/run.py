# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Runs ``vdisk_cross_attach``: look, plan, freeze, attach; detach, and after the last one the way back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments, _filenames, _locks, _ownership
from ansible_collections.kvmops.backup.plugins.module_utils._attachments import Attachment, Record
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach import (
    choose,
    devices,
    info,
    plan,
    settle,
    zfs_clones,
)
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach.plan import (
    AttachPlan,
    Frozen,
    ReceiverFacts,
    SourceFacts,
)
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach.request import (
    AttachRequest,
    FreezeWish,
    Wish,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, QuiesceError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers as image_layers
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, vm_key
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import agent, receivers, storage
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    again,
    by_uuid,
    connect_to_change,
    find_domain,
    libvirt,
    renewed,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import PlaceKind
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._recovery import recovery
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import layers, snapshot
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import run as snapshot_run
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.layers import SnapshotKind
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import SnapshotFacts, SnapshotPlan
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.request import SnapshotRequest
from ansible_collections.kvmops.backup.plugins.module_utils._template import mark


@dataclass(frozen=True)
class _Run:
    """What every step needs."""

    conn: Connection
    request: AttachRequest
    context: Context


def ensure(request: AttachRequest, context: Context) -> dict[str, Any]:
    """One run of ``vdisk_cross_attach``; the module's return values. Raises KvmopsError."""
    context.progress.merge_bps = request.bandwidth_bps
    run = _Run(connect_to_change(request.uri), request, context)
    acts = {Wish.ATTACHED: _attached, Wish.DETACHED: _detached, Wish.RECONCILED: _reconciled}
    return acts[request.wish](run)


@contextmanager
def _held(run: _Run, uuids: Sequence[str], what: str) -> Iterator[Connection]:
    """The VMs, locked (in an order that all runs keep) and settled; a connection that lives. One may be gone: its lock is not."""
    conn, uri, context, timeout_s = run.conn, run.request.uri, run.context, run.request.wait_timeout_s
    with ExitStack() as stack:
        for uuid in sorted(set(uuids)):
            conn = renewed(conn)
            if by_uuid(conn, uuid) is None:
                stack.enter_context(
                    _locks.hold(_locks.of_vm(uuid), of=f"The VM {uuid}", what=what, timeout_s=timeout_s)
                )
                recovery.settle_vm(conn, uuid, context)
            else:
                door = recovery.before_change(conn, uri, uuid, context, what=lambda _name: what, timeout_s=timeout_s)
                conn, _domain = stack.enter_context(door)
        yield renewed(conn)


# --- attached ------------------------------------------------------------------------------------------------------


def _attached(run: _Run) -> dict[str, Any]:
    request = run.request
    receiver = find_domain(run.conn, request.vm)
    chosen = choose.choose(run.conn, request.vdisk, request.source_vm, request.thin_clone)
    uuids = [chosen.disk.vm_uuid, str(receiver.UUIDString())]
    if request.check_mode:
        for uuid in uuids:
            recovery.foresee(run.conn, request.uri, uuid, run.context)
        planned, record = _plan(run.conn, request, run.context)
        return _result(planned.attachment, record, changed=planned.changed)
    what = f"attaching {chosen.disk.disk.disk.target} of VM {chosen.disk.vm_name} to VM {receiver.name()}"
    with _held(run, uuids, what) as conn:
        planned, record = _plan(conn, request, run.context)
        attachment = planned.attachment
        if planned.changes:
            attachment = _attach(replace(run, conn=conn), planned, record)
        return _result(attachment, record, changed=planned.changed)


def _plan(conn: Connection, request: AttachRequest, context: Context) -> tuple[AttachPlan, Record]:
    """The plan of an attach, and the record that it goes into."""
    chosen = choose.choose(conn, request.vdisk, request.source_vm, request.thin_clone)
    source = _source_facts(conn, chosen)
    record = _attachments.load(source.uuid)
    receiver = _receiver_facts(conn, find_domain(conn, request.vm), record, source.disk.id)
    planned = plan.plan_attach(source, receiver, record, lease_s=request.lease_s, now_ns=time.time_ns())
    new = Record(source.uuid, source.name)
    if planned.freeze:
        domain = find_domain(conn, source.uuid)
        new = replace(new, zfs=_clones(conn, domain, source, request))
        if request.check_mode and not new.zfs:
            _snapshot_plan(conn, domain, quiesce=False, context=context)
    return planned, record or new


def _clones(
    conn: Connection, domain: Domain, source: SourceFacts, request: AttachRequest
) -> tuple[_attachments.ZfsClone, ...]:
    """What is to be cloned for a VM with disks on ZFS; nothing for others. Raises RefusedError."""
    found = zfs_clones.places(conn, layers.look(conn, domain).active.values())
    if all(place.kind is not PlaceKind.ZFS for place in found.values()):
        return ()
    crash = source.running and request.consistency is FreezeWish.CRASH
    clones = zfs_clones.plan(source.uuid, source.name, found, one_moment=not crash)
    zfs_clones.require_new(clones)
    return clones


def _source_facts(conn: Connection, chosen: choose.Chosen) -> SourceFacts:
    disk = chosen.disk.disk
    domain = find_domain(conn, chosen.disk.vm_uuid)
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE if domain.isPersistent() else 0
    xml = domain.XMLDesc(flags)
    place = storage.describe(conn, disk.path) if disk.path else None
    found = layers.look(conn, domain)
    state = found.state(_attachments.SNAPSHOT)
    then = state.disk(disk.disk.target) if state else None
    frozen = None
    if then is not None and then.kind is SnapshotKind.EXTERNAL and then.path in found.files:
        layer = found.files[then.path]
        frozen = Frozen(layer.path, layer.format, layer.virtual_size_bytes)
    record = _attachments.load(chosen.disk.vm_uuid)
    cloned = zfs_clones.path_in(record.zfs if record else (), disk.path)
    if cloned and os.path.exists(cloned) and disk.path in found.files:
        layer = found.files[disk.path]
        frozen = Frozen(cloned, layer.format, image_layers.size_bytes(cloned, layer.format))
    size = found.files[disk.path].virtual_size_bytes if disk.path in found.files else 0
    names = frozenset(each.name for each in found.states)
    is_lost = record is None and _attachments.SNAPSHOT in names
    return SourceFacts(
        uuid=chosen.disk.vm_uuid,
        name=chosen.disk.vm_name,
        running=found.running,
        marked=mark.is_marked_xml(xml),
        disk=disk,
        size_bytes=size,
        pool=place.pool if place else "",
        kind=place.kind if place else PlaceKind.NETWORK,
        read_only=place.read_only if place else "",
        snapshots=names,
        unrecorded=tuple(receivers.unrecorded(conn, found.files) if is_lost else ()),
        frozen=frozen,
        template=chosen.template.vm_name if chosen.template else "",
        template_names=tuple(choose.names_of(chosen.template)),
    )


def _receiver_facts(conn: Connection, domain: Domain, record: Record | None, disk_id: str) -> ReceiverFacts:
    running, persistent = bool(domain.isActive()), bool(domain.isPersistent())
    texts = [*([domain.XMLDesc(0)] if running else []), *([_inactive(domain)] if persistent else [])]
    there = plan.existing(record, disk_id, str(domain.UUIDString()))
    return ReceiverFacts(
        uuid=str(domain.UUIDString()),
        name=str(domain.name()),
        running=running,
        marked=any(mark.is_marked_xml(text) for text in texts),
        saved=persistent and not running and bool(domain.hasManagedSaveImage(0)),
        targets=frozenset(disk.target for text in texts for disk in domain_xml.parse(text).disks),
        seen=receivers.look(conn, there) if there else receivers.SeenAtReceiver(True, running, persistent),
        port=not running or devices.has_port(texts[0]),
    )


def _inactive(domain: Domain) -> str:
    return str(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))


def _attach(run: _Run, planned: AttachPlan, record: Record) -> Attachment:
    """Record, freeze, attach, look; after a failure, what was done is undone as far as the receiver lets it go."""
    conn, attachment = run.conn, planned.attachment
    domain = find_domain(conn, record.source_uuid)
    try:
        if planned.freeze:
            freeze = _freeze_zfs if record.zfs else _freeze
            record = freeze(run, domain, record.having(attachment))
            conn, domain = again(conn, domain)
            path = zfs_clones.path_in(record.zfs, attachment.attached_path) or attachment.attached_path
            attachment = replace(attachment, attached_path=path, moment=record.created, consistency=record.consistency)
        record = replace(record.having(attachment), owners={**_owners(attachment.attached_path), **record.owners})
        _attachments.save(record)
        run.context.progress.phase("attach", attachment.target)
        devices.plug(conn, attachment)
    except BaseException:
        _undo(run, record.source_uuid, attachment)
        raise
    return attachment


def _owners(path: str) -> dict[str, _ownership.Ownership]:
    """Of an image and all that it stands on: libvirt gives them to QEMU's user with an attach, and does not take them back."""
    found = {}
    for layer in image_layers.below(path):
        with suppress(OSError):
            found[layer] = _ownership.of(layer)
    return found


def _undo(run: _Run, source_uuid: str, attachment: Attachment) -> None:
    """After a failed attach; what cannot be undone stays in the record, for the next run."""
    with suppress(KvmopsError):
        conn = renewed(run.conn)
        # a snapshot that libvirtd died of: without the record nobody would look for it before the next change
        recovery.settle_vm(conn, source_uuid, run.context)
        conn = renewed(conn)
        record = _attachments.load(source_uuid)
        if record is None:
            return
        there = plan.existing(record, attachment.disk_id, attachment.receiver_uuid)
        if there is not None and there.serial == attachment.serial:
            devices.unplug(conn, attachment)
        settle.reconcile(renewed(conn), record, run.context.progress, run.context.warn)


def _freeze(run: _Run, domain: Domain, record: Record) -> Record:
    """The snapshot from which the disks are attached; the record that knows of it. Raises KvmopsError."""
    request, context = run.request, run.context
    context.progress.phase("freeze")
    quiesce = _quiesce(domain, request.consistency, context)
    planned = _snapshot_plan(run.conn, domain, quiesce=quiesce, context=context)
    owners = {path: each for overlay in planned.overlays for path, each in _owners(overlay.base_path).items()}
    running = bool(domain.isActive())
    record = replace(record, snapshot=_attachments.SNAPSHOT, owners=owners)
    _attachments.save(record)
    facts = SnapshotFacts({}, planned.vm_uuid, planned.vm_name)
    journal = Journal.open(vm_key(planned.vm_uuid), snapshot.OPERATION, facts)
    try:
        try:
            taken = snapshot.take(run.conn, domain, planned, journal)
        except QuiesceError as error:
            if request.consistency is not FreezeWish.AUTO:
                raise
            text = f"{error.what}: {error.why}; the disks are attached as after a power failure"
            context.warn(Notice(Code.LOWER_CONSISTENCY, text))
            quiesce = False
            taken = snapshot.take(run.conn, domain, replace(planned, quiesce=False), journal)
        consistency = "agent" if quiesce else "crash" if running else "off"
        record = replace(record, created=taken.timestamp, consistency=consistency)
        _attachments.save(record)  # before the journal ends: what the one does not take back, the other does
        journal.done()
    except KvmopsError:
        if journal.facts.is_clean:
            journal.done()
        raise
    finally:
        journal.close()
    return record


def _freeze_zfs(run: _Run, domain: Domain, record: Record) -> Record:
    """The same for disks on ZFS: snapshots and clones of its datasets. Raises KvmopsError."""
    request, context = run.request, run.context
    context.progress.phase("freeze")
    found = layers.look(run.conn, domain)
    layers.require_quiet(run.conn, domain, found)
    quiesce = _quiesce(domain, request.consistency, context)
    pools = {each.snapshot.partition("@")[0].partition("/")[0] for each in record.zfs}
    if found.running and not quiesce and len(pools) > 1:
        raise RefusedError(
            f"The VM {record.source_name}",
            f"its disks are in the ZFS pools {', '.join(sorted(pools))}, which cannot be frozen at one moment",
            "Shut it down for the attach, or mend its guest agent.",
        )
    _attachments.save(record)
    zfs_clones.freeze(request.uri, domain, record, found.active.values(), quiesce=quiesce)
    consistency = "agent" if quiesce else "crash" if found.running else "off"
    record = zfs_clones.make(replace(record, created=int(time.time()), consistency=consistency))
    _attachments.save(record)
    return record


def _quiesce(domain: Domain, wish: FreezeWish, context: Context) -> bool:
    """Whether the guest agent is to freeze the file systems. Raises RefusedError where it cannot, and shall."""
    state = agent.AgentState.OFF if wish is FreezeWish.CRASH else agent.available(domain)
    if wish is FreezeWish.AGENT and state is not agent.AgentState.OK:
        raise RefusedError(f"The VM {domain.name()}", state.value, "Use consistency auto or crash, or mend the agent.")
    if wish is FreezeWish.AUTO and state not in (agent.AgentState.OK, agent.AgentState.OFF):
        context.warn(Notice(Code.LOWER_CONSISTENCY, f"{state.value}: the disks are attached as after a power failure"))
    return state is agent.AgentState.OK


def _snapshot_plan(conn: Connection, domain: Domain, *, quiesce: bool, context: Context) -> SnapshotPlan:
    """The snapshot to take; all that can be known to go wrong is said before anything is touched."""
    found = layers.look(conn, domain)
    layers.require_quiet(conn, domain, found)
    wanted = SnapshotRequest(
        vm=found.vm_uuid, snapshot=_attachments.SNAPSHOT, quiesce=quiesce, description=_attachments.DESCRIPTION
    )
    planned = snapshot_run.plan_present(conn, domain, found, wanted, context.warn)
    snapshot.require_ready(conn, domain, planned)
    return planned


# --- detached ------------------------------------------------------------------------------------------------------


def _detached(run: _Run) -> dict[str, Any]:
    request = run.request
    found = _meant(run)
    if not found:
        for notice in settle.unknown(run.conn, request.vm):
            run.context.warn(notice)
        return {"changed": _finished(run), "vdisks": []}
    changed, gone = False, []
    for record, attachment in found:
        if request.check_mode:
            _foresee(run, record.source_uuid, attachment.receiver_uuid)
            gone.append((record, attachment))
            changed = True
            continue
        what = f"detaching {attachment.target} of VM {record.source_name} from VM {attachment.receiver_name}"
        with _held(run, [record.source_uuid, attachment.receiver_uuid], what) as conn:
            changed = _detach(replace(run, conn=conn), record.source_uuid, attachment) or changed
        gone.append((record, attachment))
    values = [info.describe(record, each, "detached") for record, each in gone]
    return {"changed": changed, "vdisks": values}


def _foresee(run: _Run, *uuids: str) -> None:
    """Check mode: tells what a run would settle first. The VMs may be gone."""
    for notice in recovery.pending(run.request.uri, *uuids):
        run.context.warn(notice)


def _finished(run: _Run) -> bool:
    """The disk is not attached. What is left of an earlier attach of its VM goes, or the error says why it cannot."""
    request = run.request
    try:
        chosen = choose.choose(run.conn, request.vdisk, request.source_vm, request.thin_clone).disk
    except RefusedError as error:
        run.context.warn(Notice(Code.NOTHING_FOUND, f"nothing is attached by that name, and no disk has it: {error}"))
        return False
    record = _attachments.load(chosen.vm_uuid)
    if record is None:
        lost = receivers.unrecorded(run.conn, image_layers.below(chosen.disk.path))
        if lost:
            what = f"The disk {chosen.disk.disk.name} of {chosen.vm_name}"
            raise RefusedError(what, f"the record of its attach is lost, and {', '.join(lost)} has it", plan.BY_VIRSH)
        return False
    if record.attachments:
        return False
    if request.check_mode:
        _foresee(run, chosen.vm_uuid)
        return True
    with _held(run, [chosen.vm_uuid], f"detaching {chosen.disk.disk.target} of VM {chosen.vm_name}") as conn:
        left = _attachments.load(chosen.vm_uuid)
        if left is not None and not left.attachments:
            settle.reconcile(conn, left, run.context.progress, run.context.warn)
    return True


def _meant(run: _Run) -> list[tuple[Record, Attachment]]:
    """What is attached of the disk that the user means."""
    request = run.request
    receiver = receivers.names_of(run.conn, request.vm)
    texts = {request.vdisk, request.vdisk.lower()}
    if request.vdisk.startswith("/"):
        texts.add(_filenames.real(request.vdisk))
    found = plan.named(_attachments.everything(strict=True), receiver, texts, request.source_vm, request.thin_clone)
    if found:
        return found
    with suppress(RefusedError):  # it may be known by another of its names: its present path, its serial
        chosen = choose.choose(run.conn, request.vdisk, request.source_vm, request.thin_clone)
        return plan.named(_attachments.everything(strict=True), receiver, [chosen.disk.disk.id], "", "")
    return []


def _detach(run: _Run, source_uuid: str, attachment: Attachment) -> bool:
    """Take one disk from its receiver, and after the last one the way back. False if all was done already."""
    record = _attachments.load(source_uuid)
    there = plan.existing(record, attachment.disk_id, attachment.receiver_uuid)
    if record is None or there is None:
        return False  # another run, or settling, has done it
    run.context.progress.phase("detach", attachment.target)
    if receivers.look(run.conn, there).saved:
        raise RefusedError(
            f"The VM {there.receiver_name}",
            "it has a managed-save image, and would resume with the disk",
            f"Start it (virsh start {there.receiver_name}) or give its memory up (virsh managedsave-remove {there.receiver_name}).",
        )
    record = record.having(replace(there, leaving=True))
    _attachments.save(record)
    devices.unplug(run.conn, there)
    if zfs_clones.is_named_by_clone(there, record, run.request.vdisk):
        record = _keep_clone(run, record, there)
        with suppress(KvmopsError):  # the clone is in the way now, as the user wants it
            settle.reconcile(renewed(run.conn), record, run.context.progress, run.context.warn)
        return True
    try:
        settle.reconcile(renewed(run.conn), record, run.context.progress, run.context.warn)
    except KvmopsError as error:
        why = f"{there.target} is detached, but {record.frozen_by} is still there: {error.what}: {error.why}"
        raise type(error)(f"The VM {record.source_name}", why, error.hint or "Run the task again.") from error
    return True


def _keep_clone(run: _Run, record: Record, detached: Attachment) -> Record:
    """The user has named the ZFS clone itself: it stays."""
    clones = []
    for each in record.zfs:
        stays = each.stays or detached.attached_path.startswith(f"{each.mounted}/")
        clones.append(replace(each, stays=stays))
        if stays:
            text = f"the ZFS clone {each.clone} was detached by its own name and stays; {each.snapshot} cannot be removed before it"
            run.context.warn(Notice(Code.LAYERS_STAY, f"{text}. Remove it: zfs destroy {each.clone}"))
    record = _attachments.with_clones(record, clones)
    _attachments.save(record)
    return record


# --- reconciled ----------------------------------------------------------------------------------------------------


def _reconciled(run: _Run) -> dict[str, Any]:
    request, changed = run.request, False
    done: list[dict[str, Any]] = []
    errors: list[KvmopsError] = []
    for notice in settle.unknown(run.conn, request.vm, request.source_vm):
        run.context.warn(notice)
    for record in list(_attachments.everything(strict=True)):
        if not _concerned(run.conn, record, request):
            continue
        expired = [each for each in record.attachments if request.expired and each.expired(time.time())]
        if request.check_mode:
            _foresee(run, record.source_uuid)
            seen = settle.seen_of(run.conn, record)
            gone = [each.attachment for each in plan.reconcile(record, seen).freed]
            changed = bool(expired or plan.pending(record, seen)) or changed
            stays = record.without(*expired, *gone).attachments
            done += [info.describe(record, each, "detached") for each in record.attachments if each not in stays]
            continue
        try:
            changed = _reconcile(run, record, expired) or changed
        except KvmopsError as error:  # the others are not to suffer
            errors.append(error)
        after = _attachments.load(record.source_uuid)
        left = {each.serial for each in after.attachments} if after else set()
        done += [info.describe(record, each, "detached") for each in record.attachments if each.serial not in left]
    for each in errors[1:]:
        run.context.warn(Notice(Code.CANNOT_PUT_RIGHT, str(each)))
    if errors:
        errors[0].values = {**errors[0].values, "vdisks": done, "changed": bool(changed or done)}
        raise errors[0]
    return {"changed": changed or bool(done), "vdisks": done}


def _reconcile(run: _Run, record: Record, expired: Sequence[Attachment]) -> bool:
    """Free what is gone of one source and detach what is to go; whether anything was done."""
    uuids = [record.source_uuid, *(each.receiver_uuid for each in expired)]
    with _held(run, uuids, f"reconciling the attached disks of VM {record.source_name}") as conn:
        here = replace(run, conn=conn)
        changed = [_detach(here, record.source_uuid, each) for each in expired]
        left = _attachments.load(record.source_uuid)
        if left is not None:
            changed.append(bool(settle.reconcile(renewed(conn), left, run.context.progress, run.context.warn)))
        return any(changed) or left is None


def _concerned(conn: Connection, record: Record, request: AttachRequest) -> bool:
    """Whether the user means this record, by its VM or by who has its disks."""
    own = {record.source_name, record.source_uuid}
    others = {name for each in record.attachments for name in (each.receiver_name, each.receiver_uuid)}
    source, vm = receivers.names_of(conn, request.source_vm), receivers.names_of(conn, request.vm)
    return (not source or bool(source & own)) and (not vm or bool(vm & (own | others)))


def _result(attachment: Attachment, record: Record, *, changed: bool) -> dict[str, Any]:
    return {"changed": changed, "vdisks": [info.describe(record, attachment, "attached")]}
