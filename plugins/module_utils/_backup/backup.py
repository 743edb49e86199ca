# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""One run of ``vm_backup``: lock, settle what dead runs left, look whether a backup is due at all; `run` makes it then.

Hundreds of VMs are asked every night, and of most nothing is due. So what makes a backup is imported only where one is due:
it is two thirds of the collection, and Ansible compiles it anew in every run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _capabilities, _filenames, _slots, _vm_state
from ansible_collections.kvmops.backup.plugins.module_utils._backup.archives import VmArchives, full_owed
from ansible_collections.kvmops.backup.plugins.module_utils._backup.auto_retention import Keeper
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import BackupRequest, OnUnmerged
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, retention
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView, Point
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import receivers, storage
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    again,
    connect_to_change,
)
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._policy import FUTURE_S
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._recovery import recovery
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.operations import Unmerged


@dataclass(frozen=True)
class Run:
    """What every step of a run needs."""

    conn: Connection
    domain: Domain
    place: storage.Place
    request: BackupRequest
    context: Context
    keeper: Keeper
    archives: VmArchives
    unmerged: Unmerged = field(default_factory=Unmerged)
    slot: _slots.Slot | None = None
    probed: dict[str, _capabilities.Capabilities] = field(default_factory=dict)

    def can(self, directory: str) -> _capabilities.Capabilities:
        """What the file system there can do, tried once; check mode makes no file."""
        if directory not in self.probed:
            check_mode = self.request.check_mode
            self.probed[directory] = (_capabilities.told if check_mode else _capabilities.probe)(directory)
        return self.probed[directory]

    def went(self, merged: Sequence[str]) -> dict[str, Any]:
        """What the result says of everything that is gone."""
        removed = [each.result() for each in self.keeper.removed]
        return {"merged_snapshots": list(merged), "removed_archives": removed}


def backup(request: BackupRequest, context: Context) -> dict[str, Any]:
    """The module's return values. Raises KvmopsError."""
    begin = time.monotonic()
    conn = connect_to_change(request.uri)
    context.progress.merge_bps = request.bandwidth_bps
    if not request.pool and not request.path:
        archive = _filenames.absolute(request.archive)
        request = replace(request, archive=archive, path=os.path.dirname(archive))
    place = storage.resolve_target(conn, pool=request.pool, path=request.path)
    retention.settle(place.directory, request.check_mode, context)
    if request.check_mode:
        domain, unsettled = recovery.foresee(conn, request.uri, request.vm, context)
        receivers.refuse(conn, str(domain.UUIDString()), f"Backup of VM {domain.name()}", settled=False)
        archives = VmArchives(str(domain.UUIDString()))
        run = Run(conn, domain, place, request, context, Keeper(request, context), archives)
        from ansible_collections.kvmops.backup.plugins.module_utils._backup import run as making

        return making.predicted(run, begin, unsettled=unsettled)
    unmerged = Unmerged()
    with recovery.before_change(
        conn,
        request.uri,
        request.vm,
        context,
        what=what,
        timeout_s=request.wait_timeout_s,
        unmerged=unmerged,
    ) as (conn, domain):
        uuid = str(domain.UUIDString())
        receivers.refuse(conn, uuid, f"Backup of VM {domain.name()}")
        merged: tuple[str, ...] = ()
        if not unmerged.texts and _vm_state.load(uuid).to_merge:  # what could not be merged just now need not be tried again
            from ansible_collections.kvmops.backup.plugins.module_utils._backup import cycles

            merged = cycles.finish_merge(conn, domain, uuid, context, unmerged)
        conn, domain = again(conn, domain)
        run = Run(conn, domain, place, request, context, Keeper(request, context), VmArchives(uuid), unmerged)
        result = nothing_due(run, merged)
        if result is None:
            from ansible_collections.kvmops.backup.plugins.module_utils._backup import run as making

            result = making.made(run, begin, merged)
    return _ended(run, result)


def what(name: str) -> str:
    """What others are told that wait for this run."""
    return f"backup of VM {name}"


def nothing_due(run: Run, merged: Sequence[str] = ()) -> dict[str, Any] | None:
    """The result of a run whose `max_age` a point of the VM satisfies; None where a backup is due."""
    found = _young_enough(run)
    if found is None:
        return None
    run.keeper.remove_old(run.place.directory, str(run.domain.UUIDString()))
    view, point = found
    archive = archive_row(catalog.entry(view))
    if archive["incrementable"] is None:
        from ansible_collections.kvmops.backup.plugins.module_utils._backup.incrementable import Judge

        archive["incrementable"], _why = Judge(run.request.uri, run.context, thorough=False)(view)
    return {
        "changed": bool(merged or run.keeper.removed),
        "mode": "none",
        "reason": f"point {point.timestamp} of {catalog.iso_time(point.timestamp)} is younger than max_age",
        "point": point.timestamp,
        "archive": archive,
        **run.went(merged),
    }


def _young_enough(run: Run) -> tuple[ArchiveView, Point] | None:
    """The newest good point of the VM in this place, if `max_age` is content with it and no full is owed."""
    if run.request.max_age_s is None:
        return None
    views, now = run.archives.views(run.place.directory), time.time()
    if full_owed(views, run.request.full_weekday, int(now)):
        return None
    found = [
        (view, point)
        for view in views
        for point in view.good_points
        if now - run.request.max_age_s <= point.timestamp <= now + FUTURE_S
    ]
    return max(found, key=lambda each: each[1].timestamp, default=None)


def archive_row(entry: dict[str, Any]) -> dict[str, Any]:
    """What the result says of the archive, of what the catalog does."""
    return {key: entry[key] for key in ("path", "size", "compressed", "incrementable", "points", "digest", "digest_algorithm")}


def _ended(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """The result of a run that has done what it could. Raises KvmopsError where that is not enough."""
    texts = [*run.unmerged.texts, *filter(None, [run.unmerged.urgent])]
    if texts and (run.unmerged.urgent or run.request.unmerged is OnUnmerged.FAIL):
        raise published(KvmopsError(f"Merging snapshots of VM {run.domain.name()}", "; ".join(texts)), result)
    for text in texts:
        run.context.warn(Notice(Code.UNMERGED, text))
    return result


def published(error: KvmopsError, result: dict[str, Any]) -> KvmopsError:
    """The error of a run whose point is in its archive: says so, and returns what the run would have."""
    told = type(error)(
        f"Point {result['point']} is in {result['archive']['path']}, but then failed: {error.what}", error.why, error.hint
    )
    told.values = {**result, **error.values}
    return told
