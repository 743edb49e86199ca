# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What the file system of a directory can do, found out with a hidden file before anything else is touched.

What every archive and disk needs (writes in any order, fsync, rename) is tried: its lack is an error here, not after hours of
copying. Renaming without replacing and hard links need not be tried: _files.rename_new has a way round either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _ofd
from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

_PREFIX = ".kvmops-backup-probe-"
_HOLE_BYTES = 2**20
_NO_VERDICT = (errno.ENOSPC, errno.EDQUOT, errno.ENOENT)  # ENOENT: a sweep from a host that does not see our lock
_ELSEWHERE = "Choose another place."
_CACHE = "Choose another place, or mount it with a cache (rclone mount: --vfs-cache-mode writes)."


@dataclass(frozen=True)
class Capabilities:
    """The limits of a file system. `keeps_holes` False: it reports blocks also where nothing was written.

    `mode`: what a file has that was to be 0600. `locks`: whether there are OFD locks.
    """

    max_file_bytes: int = 2**63 - 1
    max_name_bytes: int = 255
    keeps_holes: bool = True
    mode: int = 0o600
    locks: bool = True

    def objection(self, name: str, size_bytes: int = 0) -> str:
        """Why a file of that name and size has no place there, "" if it has one: a clause about the file system."""
        length = len(os.fsencode(name))
        if length > self.max_name_bytes:
            return f"it takes file names of up to {self.max_name_bytes} bytes, and {name} has {length}"
        if size_bytes > self.max_file_bytes:
            limit, size = human_bytes(self.max_file_bytes), human_bytes(size_bytes)
            return f"it takes files of up to {limit}, and {name} has about {size}"
        return ""

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """What is no obstacle and worth knowing: clauses about the file system."""
        found = []
        if self.mode & 0o077:
            found.append(f"it gives every file the mode {self.mode:04o}: keep other users out of the directory")
        if not self.locks:
            found.append("it has no locks: two hosts that write to one archive there do not notice each other")
        return tuple(Notice(Code.WEAK_FILE_SYSTEM, text) for text in found)


class _NoVerdict(Exception):
    """Nothing can be tried, as on a full file system; whether there is room is asked elsewhere."""


def told(directory: str) -> Capabilities:
    """What a file system says of itself, without a file being made: for check mode."""
    return Capabilities(max_name_bytes=_files.longest_name(directory))


def probe(directory: str) -> Capabilities:
    """What can be done in a directory. Raises TargetError where files cannot be written, renamed or made durable in it."""
    found = told(directory)
    sweep(directory)
    path = os.path.join(directory, _PREFIX + secrets.token_hex(6))
    try:
        with _file(directory, path) as fd:
            locks = _lock(fd)
            with _needs(directory, "files cannot be written there in any order", _CACHE):
                os.pwrite(fd, b"2", _HOLE_BYTES)
                os.pwrite(fd, b"1", 0)
                if os.pread(fd, 1, 0) != b"1":
                    raise OSError(errno.EIO, "what was written does not read back")
            with _needs(directory, "files cannot be renamed there"):
                os.rename(path, f"{path}-renamed")
            with _needs(directory, "files cannot be made durable there"):
                os.fsync(fd)
            _files.sync_directory(directory)
            status = os.fstat(fd)
            return Capabilities(
                max_file_bytes=_longest(fd),
                max_name_bytes=found.max_name_bytes,
                keeps_holes=status.st_blocks * 512 < status.st_size,
                mode=status.st_mode & 0o777,
                locks=locks,
            )
    except _NoVerdict:
        return found


@contextlib.contextmanager
def _file(directory: str, path: str) -> Iterator[int]:
    with _needs(directory, "no file can be created there"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
        for each in (path, f"{path}-renamed"):
            with contextlib.suppress(OSError):
                os.unlink(each)


@contextlib.contextmanager
def _needs(directory: str, lack: str, hint: str = _ELSEWHERE) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_VERDICT:
            raise _NoVerdict from error
        hint = _files.WAYS_OUT.get(error.errno or 0, hint)
        raise TargetError(f"The directory {directory}", f"{lack} ({error.strerror})", hint) from error


def _longest(fd: int) -> int:
    """The largest size that the kernel lets a file of this file system have; a seek beyond it is refused."""
    low, high = 0, 2**63 - 1
    while low < high:
        middle = high - (high - low) // 2
        try:
            os.lseek(fd, middle, os.SEEK_SET)
            low = middle
        except OSError:
            high = middle - 1
    return low


def _lock(fd: int) -> bool:
    """False where somebody else has it, or there are no locks."""
    try:
        return _ofd.try_lock(fd, 0, 1)
    except OSError:
        return False


def sweep(directory: str) -> None:
    """Removes what killed probes have left: their locks are free."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX):
                fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if _lock(fd):
                        os.unlink(entry.path)
                finally:
                    os.close(fd)
