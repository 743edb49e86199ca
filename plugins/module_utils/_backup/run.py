# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Runs a backup: lock, settle what dead runs left, plan, freeze, copy, publish, merge."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _locks
from ansible_collections.kvmops.backup.plugins.module_utils._archive import edit
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import (
    ArchiveWriter,
    Compression,
    PublishedArchive,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup import facts as vm_facts
from ansible_collections.kvmops.backup.plugins.module_utils._backup.plan import (
    BackupPlan,
    PlannedMember,
    memory_member,
    plan,
    with_saved_state,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import BackupRequest, ConsistencyWish
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    BusyError,
    KvmopsError,
    QuiesceError,
    RefusedError,
    SourceError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import FileSource, RawAsQcow2Source
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import storage
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.agent import AgentState
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    connect,
    find_domain,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._saved_states import recover, saved_state
from ansible_collections.kvmops.backup.plugins.module_utils._version import VERSION

_ATTEMPTS = 2  # a VM may be started or stopped while it is copied; twice in a row is no accident


@dataclass(frozen=True)
class _Done:
    """What a run has made: the archive with its point, and how long the guest stood still."""

    archive: PublishedArchive
    frozen_ms: int

    @property
    def bytes_read(self) -> int:
        """Bytes of the VM that the archive holds."""
        return sum(member.size_bytes for member in self.archive.configuration.members)


def backup(request: BackupRequest, context: Context) -> dict[str, Any]:
    """One run of ``vm_backup``; the module's return values. Raises KvmopsError."""
    begin = time.monotonic()
    conn = connect(request.uri)
    domain = find_domain(conn, request.vm)
    uuid = str(domain.UUIDString())
    place = storage.resolve_target(conn, pool=request.pool, path=request.path)
    if request.check_mode:
        for text in recover.pending(uuid):
            context.warn(f"the next run will put right: {text}")
        fresh = _young_enough(place.directory, uuid, request)
        return _unchanged(*fresh) if fresh else _result(_plan(conn, domain, place, request), None, begin, context)
    with _locks.hold(f"vm-{uuid}", what=f"backup of VM {domain.name()}", timeout_s=request.wait_timeout_s):
        for text in recover.settle(conn, uuid):
            context.warn(f"left by an earlier run and put right: {text}")
        fresh = _young_enough(place.directory, uuid, request)
        if fresh:
            return _unchanged(*fresh)
        planned, done = _attempt(conn, domain, place, request, context)
    if request.notes:
        edit.set_notes(done.archive.path, request.notes)
    return _result(planned, done, begin, context)


def _plan(
    conn: Connection, domain: Domain, place: storage.Place, request: BackupRequest, *, agent: bool = True
) -> BackupPlan:
    wishes_agent = request.consistency in (ConsistencyWish.AUTO, ConsistencyWish.AGENT)
    found = vm_facts.gather(conn, domain, secrets=request.include_secrets, ask_agent=wishes_agent and agent)
    if found.running and wishes_agent and not agent:
        found = replace(found, agent=AgentState.CANNOT_FREEZE)
    return plan(found, vm_facts.target_facts(place), request, now=int(time.time()), tool_version=VERSION)


def _attempt(
    conn: Connection, domain: Domain, place: storage.Place, request: BackupRequest, context: Context
) -> tuple[BackupPlan, _Done]:
    """Plans and runs; once more if the VM changed its power state under our hands, or its agent could not freeze."""
    agent = True
    for last in (False, True):
        context.progress.phase("plan")
        planned = _plan(conn, domain, place, request, agent=agent)
        try:
            return planned, _execute(conn, domain, planned, request, context)
        except QuiesceError as error:
            if last or request.consistency is not ConsistencyWish.AUTO:
                raise
            context.warn(f"{error}; the backup has a memory image instead of frozen file systems")
            agent = False
        except SourceError as error:
            if last or planned.running or not domain.isActive():
                raise
            context.warn(f"{error}; the VM was started meanwhile, so it is backed up as a running one")
    raise AssertionError("the loop returns or raises")


def _execute(conn: Connection, domain: Domain, planned: BackupPlan, request: BackupRequest, context: Context) -> _Done:
    facts = {"vm_uuid": planned.vm_uuid, "vm_name": planned.vm_name, "uri": request.uri}
    journal = Journal.open(f"vm-{planned.vm_uuid}", "backup", facts)
    clean = True  # nothing of this run is on the VM: its journal has nothing more to say
    try:
        # The file exists before the VM is touched: a place that cannot take it costs the guest nothing.
        with _writer(planned, request, context, journal) as writer:
            if planned.saved_state is None:
                return _Done(_write(domain, planned, writer, None), 0)
            context.progress.phase("freeze")
            clean = False
            try:
                taken = saved_state.take(conn, domain, planned.saved_state, journal)
            except (RefusedError, BusyError, QuiesceError):
                clean = True
                raise
            try:
                archive = _write(domain, planned, writer, taken)
            finally:
                saved_state.remove(conn, domain, planned.saved_state, journal, context.progress)
                clean = True
            return _Done(archive, taken.frozen_ms)
    finally:
        if clean:
            journal.done()
        else:
            journal.close()


def _writer(planned: BackupPlan, request: BackupRequest, context: Context, journal: Journal) -> ArchiveWriter:
    return ArchiveWriter(
        planned.directory,
        planned.archive_name,
        compression=Compression(request.compress_level) if request.compress else None,
        timestamp=planned.timestamp,
        threads=request.threads,
        progress=context.progress,
        on_partial=lambda path: journal.record(partial=path),
        bandwidth=request.bandwidth_bps,
    )


def _write(
    domain: Domain, planned: BackupPlan, writer: ArchiveWriter, taken: saved_state.Taken | None
) -> PublishedArchive:
    """Copies the files of the plan, which nobody writes to now, and publishes the archive."""
    members, configuration = list(planned.members), planned.configuration
    if taken and planned.saved_state and planned.saved_state.memory_path:
        number = 1 + sum(each.member.role is Role.MEMORY for each in members)
        members.append(memory_member(planned.timestamp, number, planned.saved_state.memory_path))
        configuration = with_saved_state(configuration, taken.snapshot_xml)
    before = {member.path: _files.evidence(member.path) for member in members}
    stored = tuple(_add(writer, member) for member in members)
    _refuse_changed(domain, planned, before)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(planned.timestamp))
    return writer.publish(replace(configuration, members=stored, created=created))


def _add(writer: ArchiveWriter, planned: PlannedMember) -> Member:
    source = RawAsQcow2Source(planned.path) if planned.from_raw else FileSource(planned.path)
    try:
        return writer.add(planned.member, source)
    finally:
        source.close()


def _refuse_changed(domain: Domain, planned: BackupPlan, before: dict[str, tuple[int, ...]]) -> None:
    """Nothing of what was copied was written to meanwhile. Raises SourceError: the copy would be torn."""
    what = f"Backup of VM {planned.vm_name}"
    if not planned.running and (domain.isActive() or domain.hasManagedSaveImage(0)):
        raise SourceError(what, "the VM was started or stopped while it was copied", "Run the backup again.")
    for path, evidence in before.items():
        with suppress(FileNotFoundError):
            if _files.evidence(path) == evidence:
                continue
        raise SourceError(what, f"{path} was written to while it was copied", "Run the backup again.")


def _young_enough(directory: str, uuid: str, request: BackupRequest) -> tuple[catalog.View, Configuration] | None:
    """The newest good point of the VM in this place, if `max_age` is content with it."""
    if request.max_age_s is None:
        return None
    oldest = time.time() - request.max_age_s
    found = []
    for path in catalog.find([directory]):
        # a file that was last written before then holds no younger point; foreign archives are slow to read
        if os.stat(path).st_mtime < oldest:
            continue
        with suppress(KvmopsError):
            view = catalog.look(path)
            found += [(point.timestamp, view, point) for point in view.points if view.native and point.vm_uuid == uuid]
    newest = max(found, key=lambda each: each[0], default=None)
    return (newest[1], newest[2]) if newest and newest[0] >= oldest else None


def _unchanged(view: catalog.View, point: Configuration) -> dict[str, Any]:
    return {
        "changed": False,
        "mode": "none",
        "reason": f"point {point.timestamp} of {catalog.iso_time(point.timestamp)} is younger than max_age",
        "point": point.timestamp,
        "archive": _archive(catalog.entry(view)),
    }


def _archive(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("path", "size", "compressed", "incrementable", "points")}


def _result(planned: BackupPlan, done: _Done | None, begin: float, context: Context) -> dict[str, Any]:
    """The module's return values; without `done` those of check mode."""
    for text in planned.warnings:
        context.warn(text)
    result: dict[str, Any] = {
        "changed": True,
        "mode": planned.configuration.mode,
        "reason": planned.reason,
        "consistency": planned.consistency.value,
        "estimated_bytes": planned.estimated_bytes,
        "skipped": [{"device": each.device, "reason": each.reason} for each in planned.configuration.skipped],
        "diff": _diff(planned, done),
    }
    if done is None:
        archive = {
            "path": planned.archive_path,
            "size": planned.estimated_bytes,
            "compressed": planned.archive_name.endswith(".zst"),
            "incrementable": False,
            "points": [],
        }
        return {**result, "archive": archive}
    return {
        **result,
        "archive": _archive(catalog.describe(done.archive.path)),
        "point": done.archive.configuration.timestamp,
        "frozen_ms": done.frozen_ms,
        "bytes_read": done.bytes_read,
        "bytes_written": done.archive.bytes_written,
        "duration": round(time.monotonic() - begin, 2),
    }


def _diff(planned: BackupPlan, done: _Done | None) -> dict[str, str]:
    members: Sequence[str] = [planned_member.member.name for planned_member in planned.members]
    if done:
        members = [member.name for member in done.archive.configuration.members]
    lines = [planned.archive_path, f"consistency: {planned.consistency.value}", *(f"  {name}" for name in members)]
    return {"before": "", "after": "\n".join(lines) + "\n"}
