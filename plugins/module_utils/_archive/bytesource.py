# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The bytes of a tar stream, whatever holds them: a plain file, sought zstd frames, or a zstd stream read forward."""

from __future__ import annotations

import errno
import os
import threading
from typing import BinaryIO, Optional, Union

from ansible_collections.kvmops.backup.plugins.module_utils._archive import digests, frames
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, DamagedError, HostileError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import zstandard

Buffer = Union[bytes, memoryview]
MAX_WINDOW_BYTES = 128 * 2**20  # what `zstd -d` accepts unasked; bounds our memory too
MAX_EXPANSION_BYTES = 2**20  # zstd stores what it cannot compress, at 3 bytes for each block
_READ_AHEAD = 2**20
_ATTEMPTS = 5
_ZERO_FRAME_BYTES = 8 * 2**10


def _pread(fd: int, length: int, offset: int, path: str) -> bytes:
    try:
        return os.pread(fd, length, offset)
    except OSError as error:
        raise ArchiveError(
            f"archive {path}", f"it cannot be read at offset {offset} ({os.strerror(error.errno or errno.EIO)})"
        ) from error


class PlainBytes:
    """A plain tar file; random access from several threads. `parallel`: chunks may be asked for by several threads at once."""

    random_access = parallel = True

    def __init__(self, fd: int, path: str) -> None:
        self.fd, self._path = fd, path
        self.size: int = os.fstat(fd).st_size
        self._scratch = threading.local()
        self._data = (
            0,
            0,
            0,
        )  # [0] to [1] is a hole, [1] to [2] is data; replaced as a whole, so that threads need no lock

    def _is_hole(self, offset: int, length: int) -> bool:
        """Whether the file system says that these bytes are a hole, which means zeros."""
        begin, data, end = self._data
        if not begin <= offset < end:
            begin, data, end = self._data = self._look(offset)
        return begin <= offset and offset + length <= data

    def next_data(self, offset: int) -> int:
        """The first byte at or behind `offset` that is not in a hole."""
        begin, data, end = self._data
        if not begin <= offset < end:
            begin, data, end = self._data = self._look(offset)
        return max(offset, data)

    def _look(self, offset: int) -> tuple[int, int, int]:
        try:
            data = os.lseek(self.fd, offset, os.SEEK_DATA)
            return offset, data, os.lseek(self.fd, data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO and offset < os.fstat(self.fd).st_size >= self.size:
                return offset, self.size, self.size
            return offset, offset, offset + CHUNK_BYTES  # no such call, or the file shrank: reading will tell

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
        """As fetch, without a copy: the buffer belongs to the calling thread until its next call. ZEROS for a whole hole."""
        if length == CHUNK_BYTES and self._is_hole(offset, length):
            return digests.ZEROS
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
    """A seekable sequence of zstd frames; random access. Frames larger than ours are read by one thread, to bound memory."""

    random_access = True

    def __init__(self, fd: int, path: str, index: frames.FrameIndex) -> None:
        self.fd, self._path, self.index = fd, path, index
        self.size: int = index.stream_size
        self.parallel = index.largest <= CHUNK_BYTES
        self._local = threading.local()
        self._zero_frame = b""  # the compressed form of ZEROS, as this archive has it

    def next_data(self, offset: int) -> int:
        """`offset`: compressed archives have no holes."""
        return offset

    def frame(self, number: int) -> bytes:
        """The decompressed bytes of a frame. Raises DamagedError with the offset in the archive file."""
        begin, end = self.index.file_offsets[number], self.index.file_offsets[number + 1]
        content = self.index.stream_offsets[number + 1] - self.index.stream_offsets[number]
        if not content:
            return b""
        if end - begin > MAX_EXPANSION_BYTES + content:
            raise self._damaged(begin, end, f"{end - begin} bytes cannot be a frame of {content}")
        if not hasattr(self._local, "decompressor"):
            self._local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        data = _pread(self.fd, end - begin, begin, self._path)
        if data == self._zero_frame:
            return digests.ZEROS
        try:
            if (
                zstandard.frame_content_size(data) != content
                or zstandard.get_frame_parameters(data).window_size > MAX_WINDOW_BYTES
                or frames.measure(lambda offset, length: data[offset : offset + length], 0, len(data)).end != len(data)
            ):
                raise zstandard.ZstdError("its header does not fit the seek table")
            plain: bytes = self._local.decompressor.decompress(data, max_output_size=content)
        except (zstandard.ZstdError, frames.FrameError) as error:
            raise self._damaged(begin, end, f"the frame at offset {begin} is damaged ({error})") from error
        if len(plain) != content:
            raise self._damaged(begin, end, f"the frame at offset {begin} has {len(plain)} bytes instead of {content}")
        if len(data) < _ZERO_FRAME_BYTES and plain == digests.ZEROS:
            self._zero_frame = data
        return plain

    def _damaged(self, begin: int, end: int, why: str) -> DamagedError:
        return DamagedError(f"archive {self._path}", why, offset=begin, length=end - begin)

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
        """As fetch; a chunk that begins a frame is decompressed straight, without a copy. ZEROS for a chunk of zeros."""
        if self.parallel and offset < self.index.stream_size:
            number = self.index.find(offset)
            if self.index.stream_offsets[number] == offset and self.index.stream_offsets[number + 1] - offset >= length:
                plain = self.frame(number)
                return plain if len(plain) == length else memoryview(plain)[:length]
        return self.fetch(offset, length)


class StreamedBytes:
    """A zstd stream of unknown framing, read forward once; going back starts again."""

    random_access = parallel = False

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file, self._path = file, path
        self.fd = file.fileno()
        self.size: Optional[int] = None
        self._restart()

    def next_data(self, offset: int) -> int:
        """`offset`: compressed archives have no holes."""
        return offset

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
    magic = _pread(fd, 4, 0, path)
    number = int.from_bytes(magic.ljust(4, b"\0"), "little")
    for _attempt in range(_ATTEMPTS):
        size = os.fstat(fd).st_size
        table = frames.live_index(fd, size)
        if table or os.fstat(fd).st_size == size:
            break  # else an append has just changed where the table is
    # The seek table at the end tells a compressed archive whose first bytes are damaged.
    if magic == frames.ZSTD_MAGIC or number & 0xFFFFFFF0 == 0x184D2A50 or table:
        index = table or frames.walk(fd, size)
        return (FramedBytes(fd, path, index) if index else StreamedBytes(file, path)), True
    if not size:
        raise DamagedError(f"archive {path}", "the file is empty")
    return PlainBytes(fd, path), False
