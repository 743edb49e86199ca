# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Disks on ZFS: instead of a snapshot of the VM, one of its datasets, and a clone of each, from which disks are attached."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments
from ansible_collections.kvmops.backup.plugins.module_utils._attachments import Attachment, Record, ZfsClone
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import agent, storage, zfs
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import PlaceKind
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.storage import Place
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.watchdog import Watchdog


def places(conn: Connection, paths: Iterable[str]) -> dict[str, Place]:
    """Where each of these images lies."""
    return {path: storage.describe(conn, path) for path in paths}


def plan(vm_uuid: str, vm_name: str, found: Mapping[str, Place], *, one_moment: bool) -> tuple[ZfsClone, ...]:
    """The clones to make for a VM with disks on these places. Pure. ``one_moment``: nobody writes to any of them meanwhile.

    Raises RefusedError where the disks could not show one moment.
    """
    what = f"The VM {vm_name}"
    elsewhere = [path for path, place in found.items() if place.kind is not PlaceKind.ZFS]
    if elsewhere:
        why = f"it has disks on ZFS and others ({', '.join(elsewhere)}), which cannot be frozen at one moment"
        raise RefusedError(what, why, "Move all of its disks to ZFS, or all elsewhere.")
    datasets = {place.group: place.mount_point for place in found.values()}
    pools = {dataset.partition("/")[0] for dataset in datasets}
    if len(pools) > 1 and not one_moment:
        why = f"its disks are in the ZFS pools {', '.join(sorted(pools))}, which cannot be frozen at one moment"
        raise RefusedError(what, why, "Shut it down for the attach, or give it a guest agent (consistency: agent).")
    name = f"{_attachments.SNAPSHOT}-{vm_uuid}"
    return tuple(
        ZfsClone(f"{dataset}@{name}", f"{dataset}/{name}", mount_point)
        for dataset, mount_point in sorted(datasets.items())
    )


def require_new(clones: Iterable[ZfsClone]) -> None:
    """None of the names is taken. Raises RefusedError."""
    for each in clones:
        for name in (each.snapshot, each.clone):
            if zfs.exists(name):
                raise RefusedError(
                    f"The ZFS dataset {name}", "it is there already", f"Remove it first: zfs destroy {name}"
                )


def freeze(uri: str, domain: Domain, record: Record, images: Iterable[str], *, quiesce: bool) -> Record:
    """Take the snapshots and make the clones; the record knows of both. Raises KvmopsError."""
    for path in images:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # what QEMU has written, and the file system has not yet
        finally:
            os.close(fd)
    pools: dict[str, list[str]] = {}
    for each in record.zfs:
        pools.setdefault(each.snapshot.partition("/")[0].partition("@")[0], []).append(each.snapshot)
    if quiesce:
        try:
            with Watchdog(uri, record.source_uuid), agent.bounded(domain), agent.apart(domain) as quiesced:
                quiesced.fsFreeze()
                try:
                    _take(pools)
                finally:
                    agent.thaw(domain)
        except libvirt.libvirtError as error:
            raise translate(error, f"Freezing the file systems of {record.source_name}") from error
    else:
        _take(pools)
    return record


def _take(pools: Mapping[str, list[str]]) -> None:
    for names in pools.values():
        zfs.snapshot(names)


def make(record: Record) -> Record:
    """The clones; the record knows where they are mounted."""
    made = []
    for each in record.zfs:
        mounted = zfs.clone(each.snapshot, each.clone)
        os.chmod(mounted, os.stat(each.mount_point).st_mode & 0o7777)
        made.append(ZfsClone(each.snapshot, each.clone, each.mount_point, mounted))
    return _attachments.with_clones(record, made)


def path_in(clones: Iterable[ZfsClone], path: str) -> str:
    """Where the clone of a file is; "" for one that no clone has. Pure."""
    for each in sorted(clones, key=lambda each: -len(each.mount_point)):
        if each.mounted and path.startswith(f"{each.mount_point.rstrip('/')}/"):
            return os.path.join(each.mounted, os.path.relpath(path, each.mount_point))
    return ""


def is_named_by_clone(attachment: Attachment, record: Record, text: str) -> bool:
    """Whether a user means the clone, and not the original, by a path or an id. Pure."""
    clone_id = _attachments.disk_id(record.source_uuid, attachment.attached_path)
    return bool(record.zfs) and text in (attachment.attached_path, clone_id)


def remove(record: Record) -> list[str]:
    """Nothing is attached any more: clones and snapshots go. What was done.

    Raises KvmopsError where a clone was left by a user, who has named it, or another one stands on the snapshot.
    """
    done = []
    for each in record.zfs:
        if each.stays and zfs.exists(each.clone):
            why = f"its clone {each.clone} was detached by its own name, and is still there"
            raise KvmopsError(f"The ZFS snapshot {each.snapshot}", why, f"Remove it: zfs destroy {each.clone}")
        if zfs.exists(each.clone):
            _destroy(each.clone)
        if zfs.exists(each.snapshot):
            others = zfs.clones_of(each.snapshot)
            if others:
                why = f"{', '.join(others)} stands on it"
                raise KvmopsError(f"The ZFS snapshot {each.snapshot}", why, f"Remove it: zfs destroy {others[0]}")
            _destroy(each.snapshot)
            done.append(f"removed the ZFS snapshot {each.snapshot}")
    return done


def _destroy(name: str) -> None:
    """A receiver's QEMU that has just let go may need a moment."""
    deadline = time.monotonic() + 10
    while True:
        try:
            zfs.destroy(name)
            return
        except KvmopsError as error:
            if "busy" not in error.why or time.monotonic() > deadline:
                raise
            time.sleep(0.2)
