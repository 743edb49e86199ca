# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What stands beside an archive: notes and protection, as Proxmox VE keeps them.

`<archive>.notes` is the text, the file `<archive>.protected` is the protection.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _files
from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError

NOTES, PROTECTED = ".notes", ".protected"
MAX_NOTES_BYTES = 64 * 2**10


def notes(path: str) -> str:
    """The notes of an archive, "" for none. Only a regular file is read: neither what a link names nor a FIFO nor a directory."""
    try:
        fd = os.open(path + NOTES, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        return os.read(fd, MAX_NOTES_BYTES).decode("utf-8", "replace")
    finally:
        os.close(fd)


def set_notes(path: str, text: str) -> None:
    """Replaces the notes of an archive, durably; "" removes them. Raises RefusedError beyond 64 KiB."""
    _set(path + NOTES, checked_notes(text).encode("utf-8", "replace") or None)


def checked_notes(text: str) -> str:
    """The text, if it can be the notes of an archive. Raises RefusedError beyond 64 KiB."""
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_NOTES_BYTES:
        raise RefusedError("Option notes", f"the text has {size} bytes, {MAX_NOTES_BYTES} are allowed", "Shorten it.")
    return text


def is_protected(path: str) -> bool:
    """Whether an archive must not be deleted."""
    return _filenames.is_there(path + PROTECTED, follow=False)


def set_protected(path: str, protected: bool) -> None:
    """Protects an archive from deletion, or no longer; durable."""
    _set(path + PROTECTED, b"" if protected else None)


def of(path: str) -> list[str]:
    """The files that may stand beside an archive."""
    return [path + suffix for suffix in (NOTES, PROTECTED)]


def move(old: str, new: str) -> None:
    """Notes and protection of an archive that has a new path."""
    for suffix in (PROTECTED, NOTES):
        with contextlib.suppress(FileNotFoundError):
            os.replace(old + suffix, new + suffix)
    _files.sync_directory(os.path.dirname(new) or ".")


def _set(path: str, data: bytes | None) -> None:
    if data is None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _files.target_error(path, error, "cannot be removed") from error
    else:
        hidden = os.path.join(os.path.dirname(path), names.partial_name(os.path.basename(path), secrets.token_hex(6)))
        fd = _files.create(hidden)
        try:
            _files.write_all(fd, data, 0, path)
            _files.sync(fd, path)
            os.replace(hidden, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(hidden)
            if isinstance(error, OSError):
                raise _files.target_error(path, error) from error
            raise
        finally:
            os.close(fd)
    _files.sync_directory(os.path.dirname(path) or ".")
