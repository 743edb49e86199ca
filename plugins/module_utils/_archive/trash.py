# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""How an archive goes: under a hidden name first, so that it is there or not there at once, then for good.

The journal names both before anything happens; what a dead run has left is taken away by `settle`, and nothing else ever is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Sequence
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _files
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal

OPERATION = "delete archive"


def remove(path: str, sidecars: Sequence[str]) -> None:
    """Removes an archive and the files beside it, durably; works without free space. Raises ArchiveError."""
    directory = os.path.dirname(_filenames.absolute(path))
    trash = os.path.join(directory, f".kvmops-trash-{secrets.token_hex(6)}")
    journal = _journal(directory, path, trash, sidecars)
    begun = False
    try:
        gone = path
        if journal:
            gone = _hide(path, trash)
            begun = True
            _files.sync_directory(directory)
        os.unlink(gone)
        _unlink_all(sidecars)
        _files.sync_directory(directory)
        begun = False
    except OSError as error:
        raise ArchiveError(f"archive {path}", f"it cannot be deleted ({error.strerror})") from error
    finally:
        if journal:
            journal.close() if begun else journal.done()


def settle() -> list[str]:
    """Takes away what dead runs have hidden; the archives that are gone by that."""
    return [path for path in map(_finish, Journal.left_behind(_is_ours)) if path]


def pending() -> list[str]:
    """What `settle` would take away. Changes nothing."""
    return [str(facts["archive"]) for facts in Journal.peek(_is_ours) if os.path.lexists(str(facts["trash"]))]


def _journal(directory: str, path: str, trash: str, sidecars: Sequence[str]) -> Journal | None:
    """None where there is no room for one: then the archive goes in one step."""
    facts = {
        "archive": path,
        "trash": trash,
        "sidecars": list(sidecars),
        "directory": directory,
        "inode": os.stat(directory).st_ino,
    }
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


def _is_ours(facts: dict[str, Any]) -> bool:
    return facts.get("operation") == OPERATION


def _finish(journal: Journal) -> str:
    facts = journal.facts
    directory, trash, archive = str(facts["directory"]), str(facts["trash"]), str(facts["archive"])
    try:
        if os.stat(directory).st_ino != facts["inode"]:
            raise FileNotFoundError  # not mounted now
        hidden = os.path.lexists(trash)
        if hidden:
            os.unlink(trash)
        if not os.path.lexists(archive):
            _unlink_all(facts["sidecars"])
        _files.sync_directory(directory)
    except (OSError, KvmopsError):
        journal.close()
        return ""
    journal.done()
    return archive if hidden else ""
