# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The bytes of a tar stream, whatever holds them: a plain file, sought zstd frames, or a zstd stream read forward."""

from __future__ import annotations

import errno
import os
import threading
from typing import BinaryIO, Optional, Union

from ansible_collections.kvmops.backup.plugins.module_utils._archive import frames
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, DamagedError, HostileError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import zstandard

Buffer = Union[bytes, memoryview]
MAX_WINDOW_BYTES = 128 * 2**20  # what `zstd -d` accepts unasked; bounds our memory too
_READ_AHEAD = 2**20


def _pread(fd: int, length: int, offset: int, path: str) -> bytes:
    try:
        return os.pread(fd, length, offset)
    except OSError as error:
        raise ArchiveError(
            f"archive {path}", f"it cannot be read at offset {offset} ({os.strerror(error.errno or errno.EIO)})"
        ) from error


class PlainBytes:
    """A plain tar file; random access from several threads."""

    random_access = True

    def __init__(self, fd: int, path: str) -> None:
        self.fd, self._path = fd, path
        self.size: Optional[int] = os.fstat(fd).st_size
        self._scratch = threading.local()

    def fetch(self, offset: int, length: int) -> bytes:
        """At most `length` bytes of the stream at `offset`; fewer only at its end."""
        parts, position = [], offset
        while length > 0:
            part = _pread(self.fd, length, position, self._path)
            if not part:
                break
            parts.append(part)
            position, length = position + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def fetch_chunk(self, offset: int, length: int) -> Buffer:
        """As fetch, without a copy: the buffer belongs to the calling thread until its next call."""
        if not hasattr(self._scratch, "view"):
            self._scratch.view = memoryview(bytearray(CHUNK_BYTES))
        view: memoryview = self._scratch.view[:length]
        done = 0
        while done < length:
            try:
                count = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                why = f"it cannot be read at offset {offset + done} ({os.strerror(error.errno or errno.EIO)})"
                raise ArchiveError(f"archive {self._path}", why) from error
            if not count:
                break
            done += count
        return view[:done]


class FramedBytes:
    """A seekable sequence of zstd frames; random access from several threads."""

    random_access = True

    def __init__(self, fd: int, path: str, index: frames.FrameIndex) -> None:
        self.fd, self._path, self.index = fd, path, index
        self.size: Optional[int] = index.stream_size
        self._local = threading.local()

    def frame(self, number: int) -> bytes:
        """The decompressed bytes of a frame. Raises DamagedError with the offset in the archive file."""
        begin, end = self.index.file_offsets[number], self.index.file_offsets[number + 1]
        content = self.index.stream_offsets[number + 1] - self.index.stream_offsets[number]
        if not content:
            return b""
        if not hasattr(self._local, "decompressor"):
            self._local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        data = _pread(self.fd, end - begin, begin, self._path)
        try:
            if (
                zstandard.frame_content_size(data) != content
                or zstandard.get_frame_parameters(data).window_size > MAX_WINDOW_BYTES
            ):
                raise zstandard.ZstdError("its header does not fit the seek table")
            plain: bytes = self._local.decompressor.decompress(data, max_output_size=content)
        except zstandard.ZstdError as error:
            raise DamagedError(
                f"archive {self._path}",
                f"the frame at offset {begin} is damaged ({error})",
                offset=begin,
                length=end - begin,
            ) from error
        if len(plain) != content:
            raise DamagedError(
                f"archive {self._path}",
                f"the frame at offset {begin} has {len(plain)} bytes instead of {content}",
                offset=begin,
                length=end - begin,
            )
        return plain

    def fetch(self, offset: int, length: int) -> bytes:
        """At most `length` bytes of the stream at `offset`; fewer only at its end."""
        parts = []
        stop = min(offset + length, self.index.stream_size)
        while offset < stop:
            number = self.index.find(offset)
            if getattr(self._local, "number", -1) != number:
                self._local.plain, self._local.number = self.frame(number), number
            begin = offset - self.index.stream_offsets[number]
            part = self._local.plain[begin : begin + stop - offset]
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def fetch_chunk(self, offset: int, length: int) -> Buffer:
        """As fetch; a chunk that begins a frame is decompressed straight, without a copy."""
        if offset < self.index.stream_size:
            number = self.index.find(offset)
            if self.index.stream_offsets[number] == offset and self.index.stream_offsets[number + 1] - offset >= length:
                return memoryview(self.frame(number))[:length]
        return self.fetch(offset, length)


class StreamedBytes:
    """A zstd stream of unknown framing, read forward once; going back starts again."""

    random_access = False

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file, self._path = file, path
        self.fd = file.fileno()
        self.size: Optional[int] = None
        self._restart()

    def _restart(self) -> None:
        self._file.seek(0)
        self._reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).stream_reader(
            self._file, read_size=_READ_AHEAD, read_across_frames=True, closefd=False
        )
        self._position = 0
        self._buffer = b""  # bytes behind the position: headers are looked at twice

    def _read(self, length: int) -> bytes:
        try:
            data: bytes = self._reader.read(length)
        except zstandard.ZstdError as error:
            if "too much memory" in str(error):
                raise HostileError(
                    f"archive {self._path}",
                    "its zstd window is larger than 128 MiB",
                    "Compress it again without --ultra --long above 27.",
                ) from error
            raise DamagedError(
                f"archive {self._path}",
                f"its zstd stream is damaged after {self._position} bytes ({error})",
                offset=self._position,
            ) from error
        return data

    def fetch(self, offset: int, length: int) -> bytes:
        """At most `length` bytes of the stream at `offset`; fewer only at its end."""
        kept = self._position - len(self._buffer)
        if offset < kept:
            self._restart()
            kept = 0
        while self._position < offset:
            if not self._take(min(_READ_AHEAD, offset - self._position), keep=0):
                return b""
            kept = self._position - len(self._buffer)
        missing = offset + length - self._position
        while missing > 0 and self._take(missing, keep=self._position - offset):
            missing = offset + length - self._position
        begin = offset - (self._position - len(self._buffer))
        return self._buffer[begin : begin + length]

    def _take(self, length: int, keep: int) -> bool:
        data = self._read(length)
        self._buffer = (self._buffer[len(self._buffer) - keep :] if keep else b"") + data
        self._position += len(data)
        return bool(data)

    fetch_chunk = fetch


Bytes = Union[PlainBytes, FramedBytes, StreamedBytes]


def open_bytes(file: BinaryIO, path: str) -> tuple[Bytes, bool]:
    """The tar stream in an open file, and whether it is compressed. Raises ArchiveError for anything else."""
    fd = file.fileno()
    size = os.fstat(fd).st_size
    magic = _pread(fd, 4, 0, path)
    if magic[:4] == frames.ZSTD_MAGIC or (
        len(magic) == 4 and int.from_bytes(magic, "little") & 0xFFFFFFF0 == 0x184D2A50
    ):
        index = frames.read_seek_table(fd, size) or frames.walk(fd, size)
        return (FramedBytes(fd, path, index) if index else StreamedBytes(file, path)), True
    if not size:
        raise DamagedError(f"archive {path}", "the file is empty")
    return PlainBytes(fd, path), False
