# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""How an archive goes: under a hidden name first, so that it is there or not there at once, then for good.

The journal names both before anything happens; what a dead run has left is taken away by `settle`, and nothing else ever is.
Unfinished archives that cannot be removed, because their file system has gone away, are left to `settle` too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _mounts
from ansible_collections.kvmops.backup.plugins.module_utils._archive import archive_locks, names, sidecars
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, Remains

OPERATION = "delete archive"


@dataclass(frozen=True)
class TrashFacts:
    """What the journal of a deletion says. ``trash``: what the archive is called from its first step on; ``inode`` and ``mount``
    tell the directory (`_mounts.identity`)."""

    archive: str
    trash: str
    sidecars: tuple[str, ...]
    directory: str
    inode: int
    mount: str = ""


def delete(path: str) -> None:
    """Removes an archive and what stands beside it, durably; works without free space. Raises ArchiveError, BusyError."""
    with archive_locks.writing(path, f"deleting {path}"):
        remove(path)


def remove(path: str) -> None:
    """As `delete`, for the one writer of the archive."""
    with archive_locks.alone(path):
        _remove(path, sidecars.of(path))


def _remove(path: str, beside: Sequence[str]) -> None:
    directory = os.path.realpath(os.path.dirname(path))
    trash = os.path.join(directory, f".kvmops-trash-{secrets.token_hex(6)}")
    journal = _journal(directory, path, trash, beside, _mounts.identity(directory))
    begun = False
    try:
        gone = path
        if journal:
            gone = _hide(path, trash)
            begun = True
            _files.sync_directory(directory)
        os.unlink(gone)
        _unlink_all(beside)
        _files.sync_directory(directory)
        begun = False
    except OSError as error:
        raise ArchiveError(f"archive {path}", f"it cannot be deleted ({error.strerror})") from error
    finally:
        if journal:
            journal.close() if begun else journal.done()


def remove_partial(path: str, place: Mapping[str, Any] | None = None) -> bool:
    """Removes an unfinished archive, durably; whether it was there. Nothing happens to a file that is anything else.

    `place`: _mounts.identity of its directory when the file was made. Where that is not there now, `settle` removes the file.
    """
    directory, name = os.path.split(path)
    if not names.is_partial(name):
        return False
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        os.unlink(path)
        _files.sync_directory(directory)
        return True
    except FileNotFoundError:
        if place is None or _mounts.is_still(directory, **place):
            return False
    except (OSError, KvmopsError):
        pass
    journal = _journal(directory, path, path, (), place or {"inode": 0})
    if journal:
        journal.close()
    return False


def settle(directory: str) -> list[str]:
    """Takes away what dead runs have hidden in a directory, or could not remove; the archives that are gone by that."""
    found = Journal.left_behind(lambda each: _is_in(each, directory))
    return [path for path in (_finish(each.journal(TrashFacts)) for each in found) if path]


def pending(directory: str) -> list[str]:
    """What `settle` would take away. Changes nothing."""
    found = [each.facts(TrashFacts) for each in Journal.peek(lambda each: _is_in(each, directory))]
    return [facts.archive for facts in found if os.path.lexists(facts.trash)]


def _journal(
    directory: str, path: str, trash: str, beside: Sequence[str], place: Mapping[str, Any]
) -> Journal[TrashFacts] | None:
    """None where there is no room for one: then the archive goes in one step."""
    facts = TrashFacts(path, trash, tuple(beside), directory, **place)
    try:
        return Journal.open(directory, OPERATION, facts)
    except (KvmopsError, OSError):
        return None


def _hide(path: str, trash: str) -> str:
    """Renames; what the archive is called now."""
    try:
        os.rename(path, trash)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return path
    return trash


def _unlink_all(paths: Sequence[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _is_in(found: Remains, directory: str) -> bool:
    """Other directories are left alone: their file systems may hang."""
    return found.head.operation == OPERATION and found.head.key in (directory, os.path.realpath(directory))


def _finish(journal: Journal[TrashFacts]) -> str:
    facts = journal.facts
    directory, trash, archive = facts.directory, facts.trash, facts.archive
    try:
        hidden = os.path.lexists(trash)
        if hidden:
            os.unlink(trash)
        elif not _mounts.is_still(directory, facts.inode, facts.mount):
            raise FileNotFoundError  # not mounted now
        if not os.path.lexists(archive):
            _unlink_all(facts.sidecars)
        _files.sync_directory(directory)
    except (OSError, KvmopsError):
        journal.close()
        return ""
    journal.done()
    return archive if hidden else ""
