# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which archives a user means: places, and whose archive is whose."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import Selection
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection, storage
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context

_DIRECTORY_POOLS = ("dir", "fs", "netfs")


def paths(selection: Selection, context: Context) -> list[str]:
    """The files that the selection names, whosever they are.

    Raises ArchiveError for a place that cannot be listed or is not mounted; among all pools, one that is not mounted is told of.
    """
    if selection.archive:
        return [_filenames.absolute(selection.archive)]
    if selection.path:
        return mounted([_filenames.absolute(selection.path)])
    directories = pool_directories(storage.pools(connection.connect(selection.uri)), selection.pool)
    if selection.pool:
        return mounted(directories)
    found = []
    for directory in directories:
        try:
            found += mounted([directory])
        except NotMountedError as error:
            context.warn(Notice(Code.NOT_MOUNTED, str(error)))
    return found


class NotMountedError(ArchiveError):
    """Nothing was found in a directory, and what belongs there is not mounted."""


def mounted(directories: Iterable[str]) -> list[str]:
    """As catalog.find; raises NotMountedError, where nothing would be found because it is not mounted."""
    found = []
    for directory in directories:
        missing = storage.not_mounted(directory)
        here = catalog.find([directory]) if os.path.isdir(directory) or not missing else []
        if missing and not here:
            raise NotMountedError(f"Directory {directory}", missing, storage.MOUNT_IT)
        found += here
    return found


def pool_directories(pools: Iterable[storage.Pool], name: str) -> list[str]:
    """The directory of the pool `name`, or those of all active directory pools for "". Raises ArchiveError."""
    if not name:
        known = [pool for pool in pools if pool.active and pool.type in _DIRECTORY_POOLS]
        return sorted({os.path.realpath(pool.target_path) for pool in known})
    pool = next((pool for pool in pools if pool.name == name), None)
    if pool is None:
        raise ArchiveError(
            f"Pool {name}", "there is no such pool on this host", "virsh pool-list --all shows what there is."
        )
    if pool.type not in _DIRECTORY_POOLS:
        raise ArchiveError(f"Pool {name}", f"it is of type {pool.type} and holds no files", "Name a directory pool.")
    if not pool.active:
        raise ArchiveError(f"Pool {name}", "it is not active", f"Start it: virsh pool-start {name}")
    return [pool.target_path]


def vm_on_host(selection: Selection, context: Context) -> str:
    """The UUID of the VM that the selection names, if this host has it or `vm` is a UUID; "" where names must decide."""
    try:
        return str(uuid.UUID(selection.vm))
    except ValueError:
        pass
    try:
        domain = connection.find_domain(connection.connect(selection.uri), selection.vm)
        return str(domain.UUIDString())
    except RefusedError:
        return ""
    except KvmopsError as error:
        context.warn(Notice(Code.NOT_LOOKED_AT, f"Whose archives they are was told by the names in them only. {error}"))
        return ""


def of_vm(views: Sequence[ArchiveView], vm: str, host_uuid: str) -> list[ArchiveView]:
    """Those archives that belong to the VM of this name or UUID. Pure.

    `host_uuid`: the UUID that decides; "": that of every archive with a point of this name. An archive without UUID
    belongs to a VM by name.
    """
    uuids = {host_uuid} if host_uuid else {v.newest.vm_uuid for v in views if any(p.vm_name == vm for p in v.points)}
    return [v for v in views if v.newest.vm_uuid in uuids - {""} or (not v.newest.vm_uuid and v.newest.vm_name == vm)]


def without_twins(views: Iterable[ArchiveView]) -> list[ArchiveView]:
    """The views, an archive and its compressed form counted once: for a moment of the conversion both are there."""
    seen = set()
    kept = []
    for view in sorted(views, key=lambda view: view.path):
        directory, base = os.path.split(view.path)
        stem = base[: -len(".zst")] if base.endswith(".zst") else base
        key = (directory, stem, view.identity)
        if not (view.ours and key in seen):
            kept.append(view)
        if view.ours:
            seen.add(key)
    return kept
