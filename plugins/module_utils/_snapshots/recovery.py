# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What dead runs that took, removed or reverted to snapshots left on their VM, and how each is brought to its end.

Every later run waits for the merges of dead runs: their limit of bandwidth is the one of the progress, raised so that they end in
about an hour, and they hear no wish to cancel. With the VM whole, what cannot be merged may wait for a later run (`Unmerged`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, JournalHead
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    by_uuid,
    renewed,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.operations import Unmerged, VmOperation
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import merge, revert, snapshot
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import undo as undoing
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import unmerged as unmerge
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.merge import RemovalFacts
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import SnapshotFacts
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.revert import RevertFacts

_MERGED_WITHIN_S = 3600.0


def _settle_snapshot(
    conn: Connection, uuid: str, journal: Journal[SnapshotFacts], progress: Progress, unmerged: Unmerged | None
) -> list[str]:
    return finish_writes(conn, uuid) + undo(conn, uuid, journal, progress, unmerged)


def _settle_removal(
    conn: Connection, uuid: str, journal: Journal[RemovalFacts], progress: Progress, unmerged: Unmerged | None
) -> list[str]:
    done = finish_writes(conn, uuid)
    plan = journal.facts.plan
    try:
        with _ending(progress):
            removed = merge.remove(*_again(conn, uuid), journal, progress)
        return [*done, *map(str, removed.notes), f"{plan.vm_name}: finished the removal of {', '.join(removed.names)}"]
    except KvmopsError as error:
        found = _again(conn, uuid)
        if unmerged is None or not merge.may_wait(*found, journal.facts):
            raise
        unmerge.remember(found[1], plan.names)
        unmerged.add(plan.names, error)
    return done


def _settle_revert(
    conn: Connection, uuid: str, journal: Journal[RevertFacts], _progress: Progress, _unmerged: Unmerged | None
) -> list[str]:
    return [*finish_writes(conn, uuid), revert.resume(*_again(conn, uuid), journal)]


def finish_writes(conn: Connection, uuid: str) -> list[str]:
    """What a killed libvirtd was writing about a snapshot is written again; settling begins with it."""
    _conn, domain = _again(conn, uuid)
    return snapshots.finish_writes(domain) if domain is not None else []


def undo(
    conn: Connection, uuid: str, journal: Journal[SnapshotFacts], progress: Progress, unmerged: Unmerged | None
) -> list[str]:
    """The VM without the snapshot in the journal, if there is one. Raises as `undo.undo` does."""
    plan = journal.facts.plan
    if plan is None:
        return []
    try:
        with _ending(progress):
            return undoing.undo(*_again(conn, uuid), plan, journal, progress)
    except KvmopsError as error:
        found = _again(conn, uuid)
        if unmerged is None or not undoing.may_wait(*found, plan, journal.facts):
            raise
        unmerge.remember(found[1], [plan.name])
        unmerged.add([plan.name], error)
    return []


def tell_run(vm_name: str, head: JournalHead) -> str:
    """A clause about a run that died."""
    who = f"process {head.holder.pid} on {head.holder.host}"
    return f"a run of {head.operation} of {vm_name} ({who}) ended before it had finished"


def tell_snapshot(facts: SnapshotFacts) -> str:
    """The end of that clause, "" where there is no snapshot."""
    return f"; its snapshot {facts.plan.name} may still be there" if facts.plan is not None else ""


def _tell_snapshot(facts: SnapshotFacts, head: JournalHead) -> str:
    return tell_run(facts.vm_name, head) + tell_snapshot(facts)


def _tell_removal(facts: RemovalFacts, head: JournalHead) -> str:
    return f"{tell_run(facts.plan.vm_name, head)}; it was removing {', '.join(facts.plan.names)}"


def _tell_revert(facts: RevertFacts, head: JournalHead) -> str:
    return f"{tell_run(facts.plan.vm_name, head)}; it was reverting to {facts.plan.name}"


@contextmanager
def _ending(progress: Progress) -> Iterator[None]:
    """Merges within end in about an hour, whatever their limit of bandwidth."""
    progress.merge_within_s = _MERGED_WITHIN_S
    try:
        yield
    finally:
        progress.merge_within_s = 0.0


def _again(conn: Connection, uuid: str) -> tuple[Connection, Domain | None]:
    """A connection that lives, and the VM, None when it is not defined any more."""
    conn = renewed(conn)
    return conn, by_uuid(conn, uuid)


OPERATIONS = (
    VmOperation(snapshot.OPERATION, SnapshotFacts, _settle_snapshot, _tell_snapshot),
    VmOperation(merge.OPERATION, RemovalFacts, _settle_removal, _tell_removal),
    VmOperation(revert.OPERATION, RevertFacts, _settle_revert, _tell_revert),
)
