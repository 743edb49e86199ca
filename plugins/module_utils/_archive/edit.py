# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What stands beside an archive: notes and protection, as Proxmox VE keeps them. And how an archive goes.

`<archive>.notes` is the text, the file `<archive>.protected` is the protection.
"""

from __future__ import annotations

import contextlib
import os
import secrets

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError

NOTES, PROTECTED = ".notes", ".protected"
MAX_NOTES_BYTES = 64 * 2**10


def notes(path: str) -> str:
    """The notes of an archive, "" for none."""
    with contextlib.suppress(FileNotFoundError), open(path + NOTES, "rb") as file:
        return file.read(MAX_NOTES_BYTES).decode("utf-8", "replace")
    return ""


def set_notes(path: str, text: str) -> None:
    """Replaces the notes of an archive, durably; "" removes them."""
    _set(path + NOTES, text.encode() if text else None)


def is_protected(path: str) -> bool:
    """Whether an archive must not be deleted."""
    return os.path.lexists(path + PROTECTED)


def set_protected(path: str, protected: bool) -> None:
    """Protects an archive from deletion, or no longer; durable."""
    _set(path + PROTECTED, b"" if protected else None)


def move_sidecars(old: str, new: str) -> None:
    """Notes and protection of an archive that has a new path."""
    for suffix in (PROTECTED, NOTES):
        with contextlib.suppress(FileNotFoundError):
            os.replace(old + suffix, new + suffix)
    _files.sync_directory(os.path.dirname(new) or ".")


def delete(path: str) -> None:
    """Removes an archive and what stands beside it, the archive first; durable. Raises ArchiveError."""
    try:
        os.unlink(path)
        for suffix in (NOTES, PROTECTED):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + suffix)
    except OSError as error:
        raise ArchiveError(f"archive {path}", f"it cannot be deleted ({error.strerror})") from error
    _files.sync_directory(os.path.dirname(path) or ".")


def _set(path: str, data: bytes | None) -> None:
    if data is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    else:
        hidden = os.path.join(os.path.dirname(path), names.partial_name(os.path.basename(path), secrets.token_hex(6)))
        fd = _files.create(hidden)
        try:
            _files.write_all(fd, data, 0, path)
            _files.sync(fd, path)
            os.replace(hidden, path)
        except BaseException:
            os.unlink(hidden)
            raise
        finally:
            os.close(fd)
    _files.sync_directory(os.path.dirname(path) or ".")
