# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""One writer per archive: whoever appends to, converts or deletes it. Readers need no lock.

On this host by a lock named after device and inode, which knows its holder; between hosts that share the file system by a lock
on a byte far behind the end of the file, where that file system has such locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Optional

from ansible_collections.kvmops.backup.plugins.module_utils import _locks
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, BusyError

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
_BYTE = 2**62  # QEMU locks bytes near the beginning of an image that it has open
_OTHER_HOST = "a process of another host"
_WAIT = "Wait until it has finished, or end that process: its lock goes with it."


@contextlib.contextmanager
def writing(path: str, what: str) -> Iterator[None]:
    """Makes the caller the one writer of the archive while the block runs. Raises BusyError naming the holder, ArchiveError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ArchiveError(f"archive {path}", f"it cannot be opened for writing ({error.strerror})") from error
    try:
        status = os.fstat(fd)
        with _named(path, status, what):
            if not _lock(fd):
                raise BusyError(f"Archive {path}", f"{_OTHER_HOST} is writing to it", _WAIT)
            if not os.path.exists(path) or not os.path.samestat(os.stat(path), status):
                raise BusyError(f"Archive {path}", "it was just replaced by another process", "Run the task again.")
            yield
    finally:
        os.close(fd)


def writer(path: str) -> str:
    """Who is writing to the archive now, "" for nobody (or no such file). Takes nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        holder = _locks.holder(_name(os.fstat(fd)))
        return str(holder) if holder else _OTHER_HOST if _is_locked(fd) else ""
    finally:
        os.close(fd)


@contextlib.contextmanager
def _named(path: str, status: os.stat_result, what: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locks.hold(_name(status), what=what, transient=True))
        except BusyError as error:
            raise BusyError(f"Archive {path}", error.why, _WAIT) from error
        yield


def _name(status: os.stat_result) -> str:
    return f"archive-{status.st_dev:x}-{status.st_ino:x}"


def _lock(fd: int) -> bool:
    """False if somebody else has it; True also where the file system has no locks."""
    request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _BYTE, 1, 0)
    code: Optional[int] = None
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        code = error.errno
    return code not in (errno.EAGAIN, errno.EACCES)


def _is_locked(fd: int) -> bool:
    request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _BYTE, 1, 0)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    except OSError:
        return False  # no such locks there
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
