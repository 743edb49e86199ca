# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Runs ``vm_snapshot``: settle what dead runs left, plan, take, remove or revert, say what the VM has now."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _files, _vm_state
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers as image_layers
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, vm_key
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import receivers, snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    connect_to_change,
    libvirt,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import Snapshot
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice, Warn
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._recovery import recovery
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import (
    backup_snapshots,
    layers,
    merge,
    overlays,
    removal,
    revert,
    snapshot,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.layers import Layers, SnapshotKind
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import (
    Overlay,
    SnapshotFacts,
    SnapshotPlan,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.request import (
    ALL_NAME,
    SnapshotRequest,
    SnapshotWish,
)
from ansible_collections.kvmops.backup.plugins.module_utils._template import find, mark

_NAME_BYTES = 80  # of a VM or a snapshot in the names of its files


@dataclass(frozen=True)
class _Run:
    conn: Connection
    domain: Domain
    request: SnapshotRequest
    context: Context
    found: Layers
    unsettled: bool = False  # check mode: what a dead run left is still there, and nothing to judge the VM by


def ensure(request: SnapshotRequest, context: Context) -> dict[str, Any]:
    """One run of ``vm_snapshot``; the module's return values. Raises KvmopsError."""
    conn = connect_to_change(request.uri)
    context.progress.merge_bps = request.bandwidth_bps
    if request.check_mode:
        domain, unsettled = recovery.foresee(conn, request.uri, request.vm, context)
        return _dispatch(_Run(conn, domain, request, context, layers.look(conn, domain), unsettled))
    with recovery.before_change(
        conn,
        request.uri,
        request.vm,
        context,
        what=lambda name: f"snapshot {request.snapshot} of VM {name}, {request.wish.value}",
        timeout_s=request.wait_timeout_s,
    ) as (conn, domain):
        return _dispatch(_Run(conn, domain, request, context, layers.look(conn, domain)))


def _dispatch(run: _Run) -> dict[str, Any]:
    acts: dict[SnapshotWish, Callable[[_Run], dict[str, Any]]] = {
        SnapshotWish.PRESENT: _present,
        SnapshotWish.ABSENT: _absent,
        SnapshotWish.REVERTED: _reverted,
    }
    doing = f"Snapshot {run.request.snapshot} of VM {run.found.vm_name}, {run.request.wish.value}"
    receivers.refuse(run.conn, run.found.vm_uuid, doing, settled=not run.request.check_mode)
    _refuse_template(run)
    return acts[run.request.wish](run)


def _refuse_template(run: _Run) -> None:
    if run.request.wish is SnapshotWish.ABSENT and not run.found.states:
        return
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE if run.domain.isPersistent() else 0
    if mark.is_marked_xml(run.domain.XMLDesc(flags)):
        raise RefusedError(
            f"The VM {run.found.vm_name}",
            "it is a template: thin clones stand on its disks, and snapshots would change them",
            "Take the mark away first: kvmops.backup.vm_template with state: absent.",
        )


# --- present -------------------------------------------------------------------------------------------------------


def _present(run: _Run) -> dict[str, Any]:
    request, found = run.request, run.found
    if found.state(request.snapshot) is not None:
        return _result(found, found, changed=False)
    plan = plan_present(run.conn, run.domain, found, request, run.context.warn)
    if request.check_mode:
        if not run.unsettled:
            snapshot.require_ready(run.conn, run.domain, plan)
        memory = "external" if request.memory else "no"
        current = next((state.name for state in found.states if state.info.current), "")
        new = Snapshot(request.snapshot, "", current, True, True, memory, plan.memory_path, "", int(time.time()))
        before = [replace(state.info, current=False) for state in found.states]
        return _values(_infos(found), [*before, new], changed=True)
    journal = Journal.open(vm_key(plan.vm_uuid), snapshot.OPERATION, SnapshotFacts({}, plan.vm_uuid, plan.vm_name))
    try:
        snapshot.take(run.conn, run.domain, plan, journal)
        journal.done()
    except KvmopsError:
        if journal.facts.is_clean:
            journal.done()
        raise
    finally:
        journal.close()
    return _result(found, layers.look(run.conn, run.domain), changed=True)


def plan_present(
    conn: Connection, domain: Domain, found: Layers, request: SnapshotRequest, warn: Warn
) -> SnapshotPlan:
    """The snapshot to take: every disk that can be frozen in a file. Raises RefusedError for one that cannot be left out."""
    if found.shared:
        why, way_out = find.why_not_beside(found.shared), find.way_out_of_sharing(found.shared)
        raise RefusedError(f"The VM {found.vm_name}", why, way_out)
    flags = libvirt.VIR_DOMAIN_XML_SECURE | (0 if found.running else libvirt.VIR_DOMAIN_XML_INACTIVE)
    new, excluded = [], []
    disks = domain_xml.parse(domain.XMLDesc(flags)).disks
    for disk in disks:
        path = disk.path or layers.path_of(conn, disk)
        if disk.device in ("cdrom", "floppy") or disk.readonly:
            excluded.append(disk.target)
        elif disk.device == "lun" or disk.shareable:
            why = "it is a LUN" if disk.device == "lun" else "it is shared"
            warn(Notice(Code.LEFT_OUT, f"{disk.name} is not part of the snapshot: {why}"))
            excluded.append(disk.target)
        else:
            _require_file(disk, path, found)
            image_format = disk.format or "raw"
            overlay = free_name(found, path, request.snapshot)
            new.append(Overlay(disk.target, path, image_format, overlay))
    if not new:
        raise RefusedError(f"The VM {found.vm_name}", "it has no disk that a snapshot could freeze")
    memory_path = ""
    if request.memory:
        held = next((disk for disk in disks if receivers.is_attached(disk)), None)
        if held:
            raise RefusedError(
                f"The VM {found.vm_name}",
                f"its memory would have {held.target} in it, a disk of another VM",
                "Detach it first (kvmops.backup.vdisk_cross_attach with state: detached), or take it without memory.",
            )
        directory = os.path.dirname(new[0].overlay_path)
        memory_path = _files.free_name(
            os.path.join(directory, _letters(found.vm_name)), f".{_letters(request.snapshot)}.memory"
        )
    return SnapshotPlan(
        vm_uuid=found.vm_uuid,
        vm_name=found.vm_name,
        name=request.snapshot,
        description=request.description,
        overlays=tuple(new),
        excluded_targets=tuple(excluded),
        memory_path=memory_path,
        quiesce=request.quiesce,
    )


def _require_file(disk: domain_xml.Disk, path: str, found: Layers) -> None:
    what, way_out = f"The disk {disk.name} of {found.vm_name}", ""
    if disk.transient:
        why = "it is transient: libvirt takes no snapshots of such VMs"
    elif path and disk.type != "block" and not _filenames.is_there(path):
        why, way_out = "its file is not there", "Bring it back, or mount what it is on."
    elif not path or not os.path.isfile(path):
        why = "it is no file, so there is no place for the overlay that a snapshot of the VM needs"
        way_out = "A snapshot has all disks of the VM: move this one to a file, or take it out of the VM meanwhile."
    elif disk.encrypted or disk.has_data_file or (disk.format or "raw") not in ("qcow2", "raw"):
        why = f"an overlay on it is not supported (format {disk.format or 'unknown'})"
    else:
        return
    raise RefusedError(what, why, way_out)


def free_name(found: Layers, path: str, name: str) -> str:
    """An unused file name for the overlay of a snapshot, beside the VM's original image."""
    return _files.free_name(revert.original_of(found, os.path.realpath(path)), f".{_letters(name)}{overlays.EXTENSION}")


def _letters(name: str) -> str:
    return os.fsencode(re.sub(r"[^\w+.-]", "_", name))[:_NAME_BYTES].decode("utf-8", "ignore")


# --- absent --------------------------------------------------------------------------------------------------------


def _absent(run: _Run) -> dict[str, Any]:
    request, found = run.request, run.found
    everything = request.snapshot == ALL_NAME and found.state(ALL_NAME) is None
    there = found.state(request.snapshot) is not None
    if not (found.states if everything else there):
        return _result(found, found, changed=False)
    names: removal.Names = removal.ALL if everything else [request.snapshot]
    plan = removal.plan_removal(found, names)
    if not run.unsettled:
        merge.require_removable(run.conn, run.domain, found, plan)
    if request.check_mode:
        for notice in plan.notes:
            run.context.warn(notice)
        left = [state.info for state in found.states if state.name in plan.kept]
        return _values(_infos(found), _reparented(_infos(found), left), changed=True)
    _end_cycle(found, plan.names, "snapshots of the VM were removed")
    removed = merge.remove_snapshots(run.conn, run.domain, names, run.context)
    for notice in removed.notes:
        run.context.warn(notice)
    return _result(found, layers.look(run.conn, run.domain), changed=True)


def _reparented(before: Sequence[Snapshot], left: Sequence[Snapshot]) -> list[Snapshot]:
    """The tree without the removed ones: their children belong to the nearest ancestor that stays."""
    parents = {info.name: info.parent for info in before}
    names = {info.name for info in left}
    current = next((info.name for info in before if info.current), "")

    def nearest(name: str) -> str:
        while name and name not in names:
            name = parents.get(name, "")
        return name

    return [replace(info, parent=nearest(info.parent), current=info.name == nearest(current)) for info in left]


def _end_cycle(found: Layers, names: Sequence[str], reason: str) -> None:
    """Tell the backups, if the newest point of any archive had one of these snapshots."""
    names_of_backups = {each.name for each in backup_snapshots.of_vm(_infos(found))}
    own = [state.info.created for state in found.states if state.name in names_of_backups]
    gone = [state.info.created for state in found.states if state.name in names]
    if own and gone and min(gone) <= max(own):
        _vm_state.end_cycle(found.vm_uuid, reason)


# --- reverted ------------------------------------------------------------------------------------------------------


def _reverted(run: _Run) -> dict[str, Any]:
    request, found = run.request, run.found
    if _stands_there(found, request.snapshot):
        return _result(found, found, changed=False)
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
    if not run.domain.isPersistent():
        raise RefusedError(f"The VM {found.vm_name}", "it is transient: there would be nothing left to revert")
    _require_no_attached(found, request.snapshot)
    plan = revert.plan_revert(found, request.snapshot, run.domain.XMLDesc(flags), int(time.time()))
    snapshots.require_no_checkpoints(run.domain)  # it is off for a moment
    for notice in plan.notes:
        run.context.warn(notice)
    if not run.unsettled:
        layers.require_quiet(run.conn, run.domain, found)
    if request.check_mode:
        after = [replace(state.info, current=state.name == request.snapshot) for state in found.states]
        return _values(_infos(found), after, changed=True)
    if backup_snapshots.of_vm(_infos(found)):
        _vm_state.end_cycle(found.vm_uuid, f"the VM was reverted to its snapshot {request.snapshot}")
    journal = Journal.open(vm_key(plan.vm_uuid), revert.OPERATION, revert.RevertFacts(plan))
    try:
        revert.run(run.conn, run.domain, journal, run.context.progress)
        journal.done()
    finally:
        journal.close()
    return _result(found, layers.look(run.conn, run.domain), changed=True)


def _require_no_attached(found: Layers, name: str) -> None:
    """The VM can come back without the disks of other VMs that it held then. Raises RefusedError: a memory image has what the
    guest had then, and libvirt itself reverts to internal snapshots."""
    state = found.state(name)
    if state is None or receivers.without_attached(state.info.xml) == state.info.xml:
        return
    if state.info.memory != "no" or any(disk.kind is SnapshotKind.INTERNAL for disk in state.disks):
        raise RefusedError(
            f"The snapshot {name} of {found.vm_name}",
            "the VM held a disk of another VM then, and would come back with it, as that file is now",
            "Take the data out of the snapshot's files by hand, or remove it.",
        )


def _stands_there(found: Layers, name: str) -> bool:
    """Whether the VM is exactly what a revert would make of it: off, on overlays that nobody has written to."""
    state = found.state(name)
    if state is None or found.running or not state.info.current or state.info.memory != "no":
        return False
    frozen = [disk for disk in state.disks if disk.kind is not SnapshotKind.NONE]
    return set(found.active) == {disk.target for disk in frozen} and all(
        disk.kind is SnapshotKind.EXTERNAL
        and found.chain(found.active[disk.target])[1:2] == (disk.path,)
        and not image_layers.has_data(found.active[disk.target])
        and found.files[found.active[disk.target]].virtual_size_bytes == found.files[disk.path].virtual_size_bytes
        for disk in frozen
    )


# --- results -------------------------------------------------------------------------------------------------------

_Infos = Sequence[Snapshot]


def _infos(found: Layers) -> list[Snapshot]:
    return [state.info for state in found.states]


def _result(before: Layers, after: Layers, *, changed: bool) -> dict[str, Any]:
    return _values(_infos(before), _infos(after), changed=changed)


def _values(before: _Infos, after: _Infos, *, changed: bool) -> dict[str, Any]:
    return {
        "changed": changed,
        "snapshots": [_describe(info) for info in after],
        "diff": {"before": _text(before), "after": _text(after)},
    }


def _describe(info: Snapshot) -> dict[str, Union[str, bool]]:
    return {
        "name": info.name,
        "parent": info.parent,
        "current": info.current,
        "memory": info.memory != "no",
        "external": info.external,
    }


def _text(infos: _Infos) -> str:
    lines = [f"{info.name} (on {info.parent or 'nothing'}){' current' if info.current else ''}" for info in infos]
    return "\n".join(lines) + "\n" if lines else ""
