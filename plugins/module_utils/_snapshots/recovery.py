# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What dead runs of backups, snapshots, removals and reverts left on their VM, and how each is brought to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ansible_collections.kvmops.backup.plugins.module_utils._archive import append, trash
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Facts, Journal
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    libvirt,
    renewed,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.operations import Unmerged, VmOperation
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import (
    merge,
    overlays,
    published,
    removal,
    revert,
    way_back,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import unmerged as unmerge

_MERGED_WITHIN_S = 3600.0


def settle(
    conn: Connection, uuid: str, journal: Journal, progress: Progress, unmerged: Unmerged | None = None
) -> list[str]:
    """Finish or undo what a dead run left on the VM, see VmOperation.

    ``progress`` tells of merges, and has the limit of their bandwidth, raised so that they end in about an hour; a wish to
    cancel is not heard. Raises SplitViewError, with nothing touched, when what is found has no written recovery; BusyError
    when somebody else's job is at work on a disk.
    """
    done = _finish_writes(*_again(conn, uuid))
    with _ending(progress):
        done += _merge(conn, uuid, journal, progress, unmerged)
    if overlays.REVERT in journal.facts:
        reverting = revert.from_facts(journal.facts[overlays.REVERT])
        done.append(revert.resume(*_again(conn, uuid), reverting, journal))
    partial = journal.facts.get(overlays.PARTIAL, "")
    if partial and trash.remove_partial(partial, journal.facts.get(overlays.PARTIAL_PLACE)):
        done.append(f"removed the unfinished archive {partial}")
    grown = journal.facts.get("archive", "")  # as ArchiveAppender's on_growth tells it
    with suppress(KvmopsError):  # the archive may be gone or at work; the next append looks again
        if grown and append.settle(grown):
            done.append(f"cut off what was not yet a point of {grown}")
    return done


@contextmanager
def _ending(progress: Progress) -> Iterator[None]:
    """Merges within are those of dead runs, which every later run waits for: they shall end, whatever their limit of bandwidth."""
    progress.merge_within_s = _MERGED_WITHIN_S
    try:
        yield
    finally:
        progress.merge_within_s = 0.0


def _merge(conn: Connection, uuid: str, journal: Journal, progress: Progress, unmerged: Unmerged | None) -> list[str]:
    """The snapshots that a dead run took or was removing."""
    done: list[str] = []
    # a published point needs its snapshot: that one stays
    if overlays.SNAPSHOT in journal.facts and not published.is_published(journal.facts):
        plan = overlays.plan_of(journal.facts[overlays.SNAPSHOT])
        try:
            done += way_back.bring_back(*_again(conn, uuid), plan, journal, progress)
        except KvmopsError as error:
            found = _again(conn, uuid)
            if unmerged is None or not way_back.may_wait(*found, plan, journal.facts):
                raise
            unmerge.remember(found[1], [plan.name])
            unmerged.add([plan.name], error)
    if overlays.REMOVAL in journal.facts:
        removing = removal.from_facts(journal.facts[overlays.REMOVAL])
        try:
            removed = merge.remove(*_again(conn, uuid), removing, journal, progress)
            done += [*removed.notes, f"{removing.vm_name}: finished the removal of {', '.join(removed.names)}"]
        except KvmopsError as error:
            found = _again(conn, uuid)
            if unmerged is None or not merge.may_wait(*found, removing, journal):
                raise
            unmerge.remember(found[1], removing.names)
            unmerged.add(removing.names, error)
    return done


def tell(facts: Facts) -> str:
    """What a dead run left that settle() would look at, as one clause. Reads the journal's facts only."""
    holder = facts.get("holder", {})
    who = f"process {holder.get('pid')} on {holder.get('host')}"
    about = f" of {facts['vm_name']}" if "vm_name" in facts else ""
    text = f"a run of {facts.get('operation')}{about} ({who}) ended before it had finished"
    if overlays.SNAPSHOT in facts and not published.is_published(facts):
        plan = overlays.plan_of(facts[overlays.SNAPSHOT])
        text += f"; its snapshot {plan.name} of {plan.vm_name} may still be there"
    if overlays.REMOVAL in facts:
        removing = removal.from_facts(facts[overlays.REMOVAL])
        text += f"; it was removing {', '.join(removing.names)} of {removing.vm_name}"
    if overlays.REVERT in facts:
        text += f"; it was reverting {facts[overlays.REVERT]['vm_name']} to {facts[overlays.REVERT]['name']}"
    return text


def _finish_writes(_conn: Connection, domain: Domain | None) -> list[str]:
    return snapshots.finish_writes(domain) if domain is not None else []


def _again(conn: Connection, uuid: str) -> tuple[Connection, Domain | None]:
    """A connection that lives, and the VM, None when it is not defined any more."""
    conn = renewed(conn)
    try:
        return conn, conn.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return conn, None
        raise translate(error, f"The VM {uuid}") from error


OPERATIONS = tuple(
    VmOperation(name, settle, tell)
    for name in (
        overlays.OPERATION_BACKUP,
        overlays.OPERATION_TAKE,
        overlays.OPERATION_REMOVE,
        overlays.OPERATION_REVERT,
    )
)
