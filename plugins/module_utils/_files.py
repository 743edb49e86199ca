# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Files as a backup needs them: no overwriting, durable when said so, errors with the place's name."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import stat
import struct
import time
from collections.abc import Callable
from typing import Union

from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError

_FICLONERANGE = 0x4020940D
_FIEMAP, _EXTENT_LAST, _EXTENT_SHARED = 0xC020660B, 1, 0x2000
_FIEMAP_HEADER, _FIEMAP_EXTENT, _FIEMAP_COUNT = "=QQLLLL", "=QQQQQLLLL", 500
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100
_SYNC_FILE_RANGE_WRITE = 2
# Measured on ext4: slices of 256 KiB are written up to twice as fast as 4 MiB at once.
_SLICE_BYTES = 256 * 2**10
_HOLE_BYTES = 32 * 2**10
_GIVEN_BACK_S = 10.0
_ZEROS = bytes(_HOLE_BYTES)
_CANNOT_CLONE = {
    errno.EXDEV,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EPERM,
    errno.ETXTBSY,
    errno.EBADF,
}
_GONE = "Look at its mount, and the server or device behind it."
#: What to do about an error of a target, by errno.
WAYS_OUT = {
    errno.ENOSPC: "Free space there or choose another place; nothing of this run was published.",
    errno.EDQUOT: "Raise the quota or choose another place; nothing of this run was published.",
    errno.EROFS: "The file system is mounted read-only: choose another place.",
    errno.EACCES: "Check owner and mode of the directory.",
    errno.EEXIST: "A file of that name is there already and is never overwritten.",
    errno.ENOTCONN: _GONE,
    errno.ECONNABORTED: _GONE,
    errno.ESTALE: _GONE,
    errno.EHOSTDOWN: _GONE,
    errno.EIO: _GONE,
    errno.EFBIG: "Its file system takes no larger files: choose another place.",
}
_NO_SUCH_OPERATION = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_libc = ctypes.CDLL(None, use_errno=True)


def target_error(path: str, error: OSError, doing: str = "cannot be written") -> TargetError:
    """What an operating system error on a target means to a person."""
    code = error.errno or errno.EIO
    return TargetError(path, f"{doing} ({os.strerror(code)})", WAYS_OUT.get(code, ""))


def swapped(path: str) -> TargetError:
    """Somebody has put another file in the place of one that was made here."""
    return TargetError(
        path,
        "another file has its name by now: somebody else may write to the directory",
        "Choose a directory that root alone may write to.",
    )


def suffixed(path: str, suffix: str, limit: int = 255) -> str:
    """The path of a file beside another: its name and a suffix, cut to `limit` bytes and unlike others by a digest. Pure."""
    directory, name = os.path.split(path)
    room = limit - len(os.fsencode(suffix))
    plain = os.fsencode(name)
    if len(plain) > room:
        mark = f"-{hashlib.sha256(plain).hexdigest()[:8]}"
        name = plain[: room - len(mark)].decode("utf-8", "ignore") + mark
    return os.path.join(directory, name + suffix)


def longest_name(directory: str) -> int:
    """How many bytes a file name may have there; where nobody says, as many as nearly everywhere."""
    try:
        return os.statvfs(directory).f_namemax or 255
    except OSError:
        return 255


def free_name(path: str, suffix: str) -> str:
    """A path beside another that nothing has, with a suffix to its name; a number comes before the suffix's extension."""
    limit = longest_name(os.path.dirname(path))
    stem, extension = os.path.splitext(suffix)
    number, found = 1, suffixed(path, suffix, limit)
    while os.path.lexists(found):
        number += 1
        found = suffixed(path, f"{stem}-{number}{extension}", limit)
    return found


def read_kept(path: str, limit_bytes: int = 16 * 2**20) -> bytes:
    """A small file that was kept by us, whole. Raises OSError where it is none, or larger than it can be.

    Damage must neither hang a run nor fill its memory.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as stream:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        if status.st_size > limit_bytes:
            raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, and never more than {limit_bytes}", path)
        return stream.read(status.st_size)  # as much memory as that is taken at once


def create(path: str, mode: int = 0o600) -> int:
    """A new file's descriptor, open for reading and writing."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    except OSError as error:
        raise target_error(path, error, "cannot be created") from error


def open_existing(path: str) -> int:
    """Descriptor of a file that is there, open for reading and writing."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise target_error(path, error, "cannot be opened for writing") from error


def write_all(fd: int, data: Union[bytes, memoryview], offset: int, path: str) -> None:
    """Every byte of `data` at `offset`."""
    view = memoryview(data)
    position = 0
    while position < len(view):
        try:
            position += os.pwrite(fd, view[position : position + _SLICE_BYTES], offset + position)
        except OSError as error:
            raise target_error(path, error) from error


def start_writing_back(fd: int, offset: int, length: int) -> None:
    """Lets the kernel begin now with what the fsync would wait for; only that one reports errors."""
    _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def write_sparse(fd: int, data: Union[bytes, memoryview], offset: int, path: str) -> int:
    """Writes `data` at `offset` of a file that has a hole there, without its runs of zeros; the number of bytes written."""
    view = memoryview(data)
    begin = written = 0
    for block in range(0, len(view) + _HOLE_BYTES, _HOLE_BYTES):
        part = view[block : block + _HOLE_BYTES]
        if len(part) and not _ZEROS.startswith(part):
            continue
        if block > begin:
            write_all(fd, view[begin : min(block, len(view))], offset + begin, path)
            written += min(block, len(view)) - begin
        begin = block + _HOLE_BYTES
    return written


def resize(fd: int, size: int, path: str) -> None:
    """Sets a file's size; what is new is a hole."""
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise target_error(path, error) from error


def clone_range(source_fd: int, source_offset: int, length: int, target_fd: int, target_offset: int, path: str) -> bool:
    """Shares blocks between two files of one file system; False where that cannot be."""
    if length <= 0:
        return False
    try:
        fcntl.ioctl(target_fd, _FICLONERANGE, struct.pack("qQQQ", source_fd, source_offset, length, target_offset))
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise target_error(path, error) from error
    return True


def evidence(path: str) -> tuple[int, ...]:
    """What changes when a file is replaced or written to: device, inode, size in bytes, modification time in nanoseconds."""
    status = os.stat(path)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def freed_bytes(path: str) -> int:
    """What removing a file gives back: its blocks without those that other files share; 0 if it has another name."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        return max(int(status.st_blocks) * 512 - _shared_bytes(fd), 0) if status.st_nlink == 1 else 0
    finally:
        os.close(fd)


def _shared_bytes(fd: int) -> int:
    """See linux/fiemap.h; 0 where the file system cannot tell."""
    shared = start = 0
    size = struct.calcsize(_FIEMAP_HEADER)
    while True:
        header = struct.pack(_FIEMAP_HEADER, start, 2**64 - 1 - start, 0, 0, _FIEMAP_COUNT, 0)
        answer = bytearray(header.ljust(size + _FIEMAP_COUNT * struct.calcsize(_FIEMAP_EXTENT), b"\0"))
        try:
            fcntl.ioctl(fd, _FIEMAP, answer)
        except OSError:
            return shared
        count = struct.unpack_from(_FIEMAP_HEADER, answer)[3]
        found = list(struct.iter_unpack(_FIEMAP_EXTENT, answer[size:]))[:count]
        shared += sum(int(extent[2]) for extent in found if extent[5] & _EXTENT_SHARED)
        if not found or found[-1][5] & _EXTENT_LAST:
            return shared
        start = found[-1][0] + found[-1][2]


def wait_for_free(measure: Callable[[], int], wanted_bytes: int) -> int:
    """What is measured to be free once it is as much as wanted; file systems give back in the background, but not for ever."""
    deadline = time.monotonic() + _GIVEN_BACK_S
    while True:
        free = measure()
        if free >= wanted_bytes or time.monotonic() >= deadline:
            return free
        time.sleep(_GIVEN_BACK_S / 100)


def free_bytes(directory: str) -> int:
    """What an ordinary user may still write in a directory, with everything on the disk that was written or removed."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _libc.syncfs(fd)
        facts = os.fstatvfs(fd)
        return int(facts.f_bavail * facts.f_frsize)
    finally:
        os.close(fd)


def sync(fd: int, path: str) -> None:
    """fsync; its failure is final, because the kernel forgets what it could not write."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise target_error(path, error, "cannot be made durable") from error


def remove(path: str) -> None:
    """Removes a file, durably; none of that name is fine."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    """Makes names in a directory durable."""
    try:
        fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise target_error(path, error, "cannot be made durable") from error
    try:
        os.fsync(fd)
    except OSError as error:
        # file systems without this operation keep names durable by themselves, or cannot
        if error.errno not in _NO_SUCH_OPERATION:
            raise target_error(path, error, "cannot be made durable") from error
    finally:
        os.close(fd)


def _renameat2(old: str, new: str, flags: int) -> None:
    if _libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), new)


def rename_new(old: str, new: str) -> None:
    """Renames without replacing `new`; raises OSError.

    A file system without such a rename may have hard links, which do not replace either; where it has none (sshfs, rclone,
    exFAT), nothing but this look keeps apart two who choose the same name in the same moment.
    """
    try:
        _renameat2(old, new, _RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in _NO_SUCH_OPERATION:
            raise
        try:
            os.link(old, new)
        except FileExistsError:
            raise
        except OSError:  # whatever it says: rclone says EIO
            if os.path.lexists(new):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new) from error
            os.rename(old, new)
        else:
            os.unlink(old)


def exchange(one: str, other: str) -> None:
    """Swaps two names in one step. Raises OSError (EINVAL where the file system cannot)."""
    _renameat2(one, other, _RENAME_EXCHANGE)


def publish(partial: str, path: str) -> None:
    """Gives a durable partial file its name, durably; never replaces a file. On error the file has the partial name, or none."""
    try:
        rename_new(partial, path)
    except OSError as error:
        raise target_error(path, error, "cannot be published") from error
    try:
        sync_directory(os.path.dirname(path))
    except TargetError:
        # Nobody may believe in a file that can be gone after a power cut.
        os.rename(path, partial)
        raise


class RateLimit:
    """Keeps an operation at or below a number of bytes per second; 0 is no limit.

    `check` is called every second while it waits, and may raise: at a low rate a chunk keeps it for minutes.
    """

    def __init__(self, bytes_per_second: int, check: Callable[[], None]) -> None:
        self._rate, self._check = bytes_per_second, check
        self._begin, self._spent = time.monotonic(), 0

    def spend(self, count: int) -> None:
        """Waits until `count` more bytes fit the rate."""
        if not self._rate:
            return
        self._spent += count
        while (early := self._begin + self._spent / self._rate - time.monotonic()) > 0:
            self._check()
            time.sleep(min(early, 1.0))
