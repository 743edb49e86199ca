# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a dead backup left on its VM and in its place, and how it is brought to its end.

Did it publish its point? Its journal may not know: a kill can fall between the commit and the note of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Optional

from ansible_collections.kvmops.backup.plugins.module_utils._archive import append, trash
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, JournalHead
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.operations import Unmerged, VmOperation
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import recovery
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import SnapshotFacts, SnapshotPhase

OPERATION = "backup"


@dataclass(frozen=True)
class Keep:
    """What a snapshot is to stay for: the archive and its point (unix time)."""

    archive: str
    point: int


@dataclass(frozen=True)
class BackupFacts(SnapshotFacts):
    """What the journal of a backup says.

    ``keep`` is there before the snapshot is taken, ``published`` follows the commit. ``partial`` is the unfinished archive, in
    a directory that ``partial_place`` tells (`_mounts.identity`). ``archive``: a point is being added to it, see ArchiveAppender.
    """

    keep: Optional[Keep] = None
    published: bool = False
    partial: str = ""
    partial_place: Optional[Mapping[str, Any]] = None
    archive: str = ""
    old_size_bytes: int = 0
    point: int = 0


def is_published(facts: BackupFacts) -> bool:
    """Whether the snapshot in this journal stays, because the point that it was taken for is in its archive."""
    if facts.phase is SnapshotPhase.REMOVING:
        return False  # the run had given it up, and part of it may be gone
    if facts.published:
        return True
    if facts.keep is None:
        return False
    try:
        with open_archive(facts.keep.archive) as reader:
            return any(point.timestamp == facts.keep.point for point in reader.points)
    except ArchiveError:
        return False


def settle(
    conn: Connection, uuid: str, journal: Journal[BackupFacts], progress: Progress, unmerged: Unmerged | None
) -> list[str]:
    """Finish or undo what a dead backup left, see VmOperation; a snapshot that a published point needs stays."""
    done = recovery.finish_writes(conn, uuid)
    if not is_published(journal.facts):
        done += recovery.undo(conn, uuid, journal, progress, unmerged)
    partial, grown = journal.facts.partial, journal.facts.archive
    if partial and trash.remove_partial(partial, journal.facts.partial_place):
        done.append(f"removed the unfinished archive {partial}")
    with suppress(KvmopsError):  # the archive may be gone or at work; the next append looks again
        if grown and append.settle(grown):
            done.append(f"cut off what was not yet a point of {grown}")
    return done


def tell(facts: BackupFacts, head: JournalHead) -> str:
    """What a dead backup left that settle() would look at, as one clause."""
    return recovery.tell_run(facts.vm_name, head) + ("" if is_published(facts) else recovery.tell_snapshot(facts))


OPERATIONS = (VmOperation(OPERATION, BackupFacts, settle, tell),)
