# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading a disk image file or block device once: holes are skipped and the page cache is left as it was found."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import threading
from collections.abc import Iterator

from ansible_collections.kvmops.backup.plugins.module_utils._errors import SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._image.zero import zero_fill

_SHRANK_HINT = "Something truncated the disk while it was read. Find out what writes to it and run the backup again."


class SparseFile:
    """Positional, thread-safe reads of the first ``size_bytes`` bytes of a regular file or block device.

    An unreadable sector or a file that became shorter raises SourceError; neither is ever read as zeros.
    """

    def __init__(self, path: str, size_bytes: int | None = None) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a FIFO by mistake must not hang; it has no effect on files and block devices.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceError(f"disk {path}", f"cannot be opened: {error.strerror}") from error
        try:
            mode = os.fstat(self.fd).st_mode
            self.is_regular = stat.S_ISREG(mode)
            if not self.is_regular and not stat.S_ISBLK(mode):
                raise SourceError(f"disk {path}", "it is neither a regular file nor a block device")
            present = os.lseek(self.fd, 0, os.SEEK_END)
            self.size_bytes = present if size_bytes is None else size_bytes
            if present < self.size_bytes:
                raise SourceError(f"disk {path}", f"it has {present} bytes, {self.size_bytes} were expected")
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            os.close(self.fd)
            raise
        self._cache = _PageCacheKeeper(self.fd, self.size_bytes)
        # [0] to [1] is a hole, [1] to [2] is data; replaced as a whole, so that threads need no lock.
        self._known = (0, 0, 0)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The allocated ranges between ``start`` and ``end``, ascending, as the file system tells them."""
        while start < end:
            data_start, data_end = self._next_data(start)
            if data_start >= end:
                return
            yield max(start, data_start), min(end, data_end)
            start = data_end

    def fill(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with the bytes at ``offset``; False (buffer untouched) when all of them are a hole."""
        filled = 0
        for start, end in self.data_ranges(offset, offset + len(buffer)):
            zero_fill(buffer[filled : start - offset])
            self._read(start, buffer[start - offset : end - offset])
            filled = end - offset
        if filled == 0:
            return False
        zero_fill(buffer[filled:])
        return True

    def _next_data(self, offset: int) -> tuple[int, int]:
        """The first data range at or behind ``offset``; ``(size, size)`` when there is none."""
        known = self._known
        if known[0] <= offset < known[2]:
            return known[1], known[2]
        try:
            start = os.lseek(self.fd, offset, os.SEEK_DATA)
            end = min(os.lseek(self.fd, start, os.SEEK_HOLE), self.size_bytes)
        except OSError as error:
            if error.errno == errno.ENXIO:
                # A hole up to the end, or the end has moved: only the former may be taken for zeros.
                if self.is_regular and os.fstat(self.fd).st_size < self.size_bytes:
                    raise SourceError(
                        f"disk {self.path}", f"it became shorter than {self.size_bytes} bytes", _SHRANK_HINT
                    ) from None
                start = end = self.size_bytes
            elif error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                start, end = offset, self.size_bytes
            else:
                raise self._unreadable(offset, error) from error
        self._known = (offset, min(start, self.size_bytes), end)
        return self._known[1], end

    def _read(self, offset: int, buffer: memoryview) -> None:
        self._cache.before(offset, len(buffer))
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise self._unreadable(offset + done, error) from error
            if count == 0:
                raise SourceError(
                    f"disk {self.path}",
                    f"it ends at offset {offset + done}, {self.size_bytes} bytes were expected",
                    _SHRANK_HINT,
                )
            done += count
        self._cache.after(offset, len(buffer))

    def _unreadable(self, offset: int, error: OSError) -> SourceError:
        return SourceError(
            f"disk {self.path}",
            f"cannot be read at offset {offset}: {error.strerror}",
            "Nothing was stored for it. Check the storage under the disk, then run the backup again.",
        )


class _PageCacheKeeper:
    """Drops what our reading brought into the page cache and keeps what was there before (the guest's hot data).

    Whether a page was there can only be told before readahead gets to it: mincore() is asked one window ahead.
    """

    _BLOCK = 1 << 20
    _WINDOW = 32 << 20

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._cold: dict[int, bytes] = {}

    def before(self, offset: int, length: int) -> None:
        first, last = offset // self._WINDOW, (offset + length - 1) // self._WINDOW
        if first in self._cold and last + 1 in self._cold:
            return
        with self._lock:
            for window in range(first, last + 2):
                if window not in self._cold:
                    self._cold[window] = self._look(window)
            # Readers work close together; windows far behind are not asked for again.
            for window in [known for known in self._cold if known < first - 8]:
                del self._cold[window]

    def after(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            window, within = divmod(offset, self._WINDOW)
            stop = min(end, (offset // self._BLOCK + 1) * self._BLOCK)
            cold = self._cold.get(window, b"")
            if cold[within // self._BLOCK : within // self._BLOCK + 1] == b"\1":
                os.posix_fadvise(self._fd, offset, stop - offset, os.POSIX_FADV_DONTNEED)
            offset = stop

    def _look(self, window: int) -> bytes:
        """One byte per block of the window: 1 when no page of it is in memory."""
        start = window * self._WINDOW
        length = min(self._WINDOW, self._size_bytes - start)
        if length <= 0:
            return b""
        pages = _resident_pages(self._fd, start, length)
        per_block = self._BLOCK // mmap.PAGESIZE
        return bytes(not any(pages[at : at + per_block]) for at in range(0, len(pages), per_block))


_libc = ctypes.CDLL(None, use_errno=True)


def _resident_pages(fd: int, offset: int, length: int) -> bytes:
    """One byte per page, not 0 when it is in memory; never 0 when the kernel does not tell."""
    pages = -(-length // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * pages)()
    try:
        mapping = mmap.mmap(fd, length, access=mmap.ACCESS_COPY, offset=offset)
    except (OSError, ValueError):
        return b"\1" * pages
    with mapping:
        anchor = ctypes.c_char.from_buffer(mapping)
        failed = _libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(length), vector)
        # mmap refuses to close while the anchor exports its buffer.
        del anchor
    return b"\1" * pages if failed else bytes(vector)
