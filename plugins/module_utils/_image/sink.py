# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the bytes of an archive member go when it is restored."""

from __future__ import annotations

import os
import stat
from typing import Protocol

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._image.mapping import (
    Mapping,
    can_stream_as_raw,
    read_mapping,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image.zero import nonzero_runs

__all__ = ["FileSink", "ImageSink", "Mapping", "RawSink", "can_stream_as_raw", "read_mapping"]

_CLONE_BLOCK = 4096


class ImageSink(Protocol):
    """Takes the bytes of one member, in any order and from several threads."""

    def write(self, offset: int, data: memoryview) -> None:
        """``data`` are the member's bytes at ``offset``. Raises TargetError when they cannot be written."""

    def clone(self, source_fd: int, source_offset: int, length: int) -> int:
        """Share the blocks of the member, ``length`` bytes at ``source_offset`` of ``source_fd``, where possible.

        Returns how many bytes from member offset 0 are in place now and need no write().
        """

    def finish(self) -> None:
        """Give the file its final size and make it durable. Raises TargetError; a failed fsync is final."""

    def close(self) -> None: ...


class FileSink:
    """Writes a member as it is into a new, empty regular file; zeros become holes. Owns ``fd`` from now on."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._target = _SparseTarget(fd, size_bytes)
        self.size_bytes = size_bytes

    def write(self, offset: int, data: memoryview) -> None:
        self._target.write(offset, data)

    def clone(self, source_fd: int, source_offset: int, length: int) -> int:
        return self._target.clone(source_fd, source_offset, 0, length)

    def finish(self) -> None:
        self._target.finish()

    def close(self) -> None:
        self._target.close()


class RawSink:
    """Writes the virtual content of a self-contained qcow2 member as a sparse raw file. Owns ``fd`` from now on.

    ``mapping`` comes from read_mapping() of the same member, whose tables must have passed their digests by then.
    """

    def __init__(self, fd: int, virtual_size_bytes: int, mapping: Mapping) -> None:
        self._target = _SparseTarget(fd, virtual_size_bytes)
        self._mapping = mapping
        self.size_bytes = virtual_size_bytes

    def write(self, offset: int, data: memoryview) -> None:
        for member_offset, guest_offset, length in self._mapping.pieces(offset, offset + len(data)):
            length = min(length, self.size_bytes - guest_offset)
            if length > 0:
                self._target.write(guest_offset, data[member_offset - offset : member_offset - offset + length])

    def clone(self, source_fd: int, source_offset: int, length: int) -> int:
        for member_offset, guest_offset, piece in self._mapping.pieces(0, length):
            piece = min(piece, self.size_bytes - guest_offset)
            if piece > 0 and self._target.clone(source_fd, source_offset + member_offset, guest_offset, piece) < piece:
                return member_offset
        return length

    def finish(self) -> None:
        self._target.finish()

    def close(self) -> None:
        self._target.close()


class _SparseTarget:
    """A new regular file that is written once, holes left out. Errors name it."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._path = os.readlink(f"/proc/self/fd/{fd}")
        self._size_bytes = size_bytes
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise TargetError(self._path, "it is not a regular file, so zeros could not be left out")

    def write(self, offset: int, data: memoryview) -> None:
        if offset + len(data) > self._size_bytes:
            raise ValueError(f"{len(data)} bytes at {offset} do not fit in {self._size_bytes}")
        for start, end in nonzero_runs(offset, data):
            _files.write_all(self._fd, data[start:end], offset + start, self._path)
        _files.start_writing_back(self._fd, offset, len(data))

    def clone(self, source_fd: int, source_offset: int, target_offset: int, length: int) -> int:
        """Clone whole blocks; returns how many bytes from the beginning are in place."""
        whole = length // _CLONE_BLOCK * _CLONE_BLOCK
        if source_offset % _CLONE_BLOCK or target_offset % _CLONE_BLOCK:
            return 0
        cloned = _files.clone_range(source_fd, source_offset, whole, self._fd, target_offset, self._path)
        return whole if cloned else 0

    def finish(self) -> None:
        _files.resize(self._fd, self._size_bytes, self._path)
        _files.sync(self._fd, self._path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
