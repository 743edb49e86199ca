# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Who works with an archive: one writer (whoever appends to, converts or deletes it), and those that read all of it.

On this host by a lock named after device and inode, which knows its holder; between hosts that share the file system by a lock
on a byte far behind the end of the file, where that file system has such locks. Long readers (restore, verification) share the
lock of the next byte: an append does not mind them, but the file must not go while somebody has it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ansible_collections.kvmops.backup.plugins.module_utils import _locks, _ofd
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, BusyError

_WRITER = 2**62  # QEMU locks bytes near the beginning of an image that it has open
_READERS = _WRITER + 1
_OTHER_HOST = "a process of another host"
_READ = "it is being restored or verified"
_WAIT = "Wait until it has finished, or end that process: its lock goes with it."


@contextlib.contextmanager
def writing(path: str, what: str) -> Iterator[None]:
    """Makes the caller the one writer of the archive while the block runs. Raises BusyError naming the holder, ArchiveError."""
    with _open(path, os.O_RDWR) as fd:
        status = os.fstat(fd)
        with _named(path, status, what):
            if not _lock(fd, _WRITER):
                raise BusyError(f"Archive {path}", f"{_OTHER_HOST} is writing to it", _WAIT)
            if not _is_at(path, status):
                raise BusyError(f"Archive {path}", "it was just replaced by another process", "Run the task again.")
            yield


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Keeps the archive from being deleted or converted away while the block runs. Raises BusyError, ArchiveError."""
    with _open(path, os.O_RDONLY) as fd:
        if not _lock(fd, _READERS, shared=True) or not _is_at(path, os.fstat(fd)):
            raise BusyError(
                f"Archive {path}", "another process is just deleting or replacing it", "Run the task again."
            )
        yield


@contextlib.contextmanager
def alone(path: str) -> Iterator[None]:
    """For the one writer: while the block runs nobody begins to read the archive. Raises BusyError if somebody does already."""
    with _open(path, os.O_RDWR) as fd:
        if not _lock(fd, _READERS):
            raise BusyError(f"Archive {path}", _READ, "Wait until that has finished.")
        yield


def writer(path: str) -> str:
    """Who is writing to the archive now, "" for nobody (or no such file). Takes nothing."""
    with contextlib.suppress(ArchiveError), _open(path, os.O_RDONLY) as fd:
        return _writer(fd)
    return ""


def users(path: str) -> str:
    """Who works with the archive now, writing or reading; "" for nobody. Takes nothing."""
    with contextlib.suppress(ArchiveError), _open(path, os.O_RDONLY) as fd:
        return _writer(fd) or (_READ if _is_locked(fd, _READERS) else "")
    return ""


def _writer(fd: int) -> str:
    holder = _locks.holder(_name(os.fstat(fd)))
    return str(holder) if holder else _OTHER_HOST if _is_locked(fd, _WRITER) else ""


@contextlib.contextmanager
def _open(path: str, flags: int) -> Iterator[int]:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = "Check the path and that it is readable here."
        raise ArchiveError(f"archive {path}", f"it cannot be opened ({error.strerror})", hint) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _is_at(path: str, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False


@contextlib.contextmanager
def _named(path: str, status: os.stat_result, what: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locks.hold(_name(status), of=f"Archive {path}", what=what, transient=True))
        except BusyError as error:
            raise BusyError(error.what, error.why, _WAIT) from error
        yield


def _name(status: os.stat_result) -> str:
    return f"archive-{status.st_dev:x}-{status.st_ino:x}"


def _lock(fd: int, byte: int, *, shared: bool = False) -> bool:
    """False if somebody else has it; True also where the file system has no locks."""
    try:
        return _ofd.try_lock(fd, byte, 1, shared=shared)
    except OSError:
        return True


def _is_locked(fd: int, byte: int) -> bool:
    try:
        return _ofd.is_locked(fd, byte, 1)
    except OSError:
        return False  # no such locks there
