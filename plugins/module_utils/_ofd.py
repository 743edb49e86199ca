# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""OFD locks (open file description): they end with the last descriptor of the holder, whatever has killed it.

A second lock of the same process by another descriptor is refused too. ``length`` 0: to the end of the file, wherever that is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
_TAKEN = (errno.EAGAIN, errno.EACCES)


def try_lock(fd: int, start: int = 0, length: int = 0, *, shared: bool = False) -> bool:
    """Take the lock of these bytes; False when somebody else has it. Raises OSError where there are no locks."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, start, length))
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def unlock(fd: int, start: int = 0, length: int = 0) -> None:
    """Give it back."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_UNLCK, start, length))


def is_locked(fd: int, start: int = 0, length: int = 0) -> bool:
    """Whether another open file description holds a lock on any of these bytes. Raises OSError where there are no locks."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK, start, length))
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def _request(kind: int, start: int, length: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)
