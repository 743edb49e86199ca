# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""zstd frames: independent frames of at most 4 MiB, and the seek table that finds them.

Sources: RFC 8878 (frame and block headers), zstd's contrib/seekable_format (the table is a skippable frame at the end of the file).
"""

from __future__ import annotations

import itertools
import os
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Callable, Optional

SKIPPABLE = 0x184D2A5E
SEEKABLE = 0x8F92EAB1
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_FRAME_BYTES = 64 * 2**20  # larger frames (other tools') are streamed, not sought
MAX_FRAMES = 2**22  # 16 TiB of ours; bounds the memory of an index
MAX_HEADERS = 2**20  # frame and block headers that `walk` hops over before it gives up: bounds its time
COVER = 0x184D2A50  # skippable frames that are no seek table
HEADER_BYTES = 8  # of a skippable frame
MAX_SKIPS = 2**16  # skippable frames in a seek table: a few for each point
TRAILER_BYTES = 32
_FOOTER = struct.Struct("<IBI")
_TRAILER = struct.Struct("<16sQQ")
_TRAILER_MAGIC = b"kvmops-append-1\0"
_ENTRY_BYTES = 8
_TABLE_PIECE = 2**20
_HEADER_BYTES = 18
_WINDOW_BYTES = 4096

Fetch = Callable[[int, int], bytes]


class FrameError(ValueError):
    """The bytes at `offset` are not a whole zstd frame."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(f"{why} at offset {offset}")
        self.offset, self.why = offset, why


class NotSeekableError(ValueError):
    """Frames without a size, larger than we seek in, or more headers than anybody writes."""


@dataclass(frozen=True)
class Frame:
    """Where a frame ends, its decompressed size (None: not told, 0: skippable) and whether it carries a checksum."""

    end: int
    content: Optional[int]
    checksum: bool


@dataclass(frozen=True)
class FrameIndex:
    """Where each frame begins in the file and in the decompressed stream; both lists end with the total.

    `end` is the file offset behind the last frame (and the seek table), `problem` why reading stopped there, if it did.
    `by_table`: a seek table told it; `skips` are then the numbers of the frames that hold nothing. `pending`: behind `end` are
    the frames of an append that was not committed.
    """

    file_offsets: Sequence[int]
    stream_offsets: Sequence[int]
    end: int
    problem: str = ""
    by_table: bool = False
    skips: tuple[int, ...] = ()
    pending: bool = False

    @property
    def stream_size(self) -> int:
        """Bytes of the decompressed stream."""
        return self.stream_offsets[-1]

    @property
    def largest(self) -> int:
        """Decompressed size of the largest frame."""
        return max(
            (b - a for a, b in zip(self.stream_offsets, itertools.islice(self.stream_offsets, 1, None))), default=0
        )

    def find(self, offset: int) -> int:
        """Number of the frame that holds the byte `offset` of the stream."""
        return bisect_right(self.stream_offsets, offset) - 1

    def extent(self, offset: int, length: int) -> tuple[int, int]:
        """Offset and length in the file of the frames that hold a part of the stream."""
        first = self.find(min(offset, max(0, self.stream_size - 1)))
        last = self.find(min(offset + max(1, length), max(1, self.stream_size)) - 1)
        return self.file_offsets[first], self.file_offsets[last + 1] - self.file_offsets[first]


def skippable(payload_bytes: int) -> bytes:
    """The header of a skippable frame that hides the next bytes from every reader."""
    return struct.pack("<II", COVER, payload_bytes)


def seek_table(sizes: Iterable[int]) -> bytes:
    """Skippable frame that lists the compressed and the decompressed size of each frame, by turns; without checksums of them."""
    entries = array("I", sizes)
    count = len(entries) // 2
    if sys.byteorder == "big":
        entries.byteswap()
    head = struct.pack("<II", SKIPPABLE, _ENTRY_BYTES * count + _FOOTER.size)
    return head + entries.tobytes() + _FOOTER.pack(count, 0, SEEKABLE)


def listed_sizes(fd: int, index: FrameIndex) -> array[int]:
    """What `seek_table` was made from, for an index by a seek table."""
    count = len(index.file_offsets) - 1
    entries = array("I")
    entries.frombytes(os.pread(fd, count * _ENTRY_BYTES, index.end - _FOOTER.size - count * _ENTRY_BYTES))
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def trailer(old_end: int, timestamp: int) -> bytes:
    """What stands at the end of the file while the point `timestamp` is appended to an archive that ends at `old_end`."""
    return _TRAILER.pack(_TRAILER_MAGIC, old_end, timestamp)


def live_index(fd: int, size: int) -> Optional[FrameIndex]:
    """The index by the seek table that holds: that at the end of the file, or while an append is not committed the one before it.

    None where there is none that fits the file.
    """
    table = read_seek_table(fd, size)
    old_end = _uncommitted(fd, table) if table else _old_end(fd, size)
    if old_end is None:
        return table
    old = read_seek_table(fd, old_end)
    return replace(old, pending=True) if old and _uncommitted(fd, old) is None else None


def _old_end(fd: int, size: int) -> Optional[int]:
    """Where the archive ends by the trailer of an append under way."""
    data = os.pread(fd, TRAILER_BYTES, max(0, size - TRAILER_BYTES))
    if len(data) < TRAILER_BYTES:
        return None
    magic, old_end, _timestamp = _TRAILER.unpack(data)
    return int(old_end) if magic == _TRAILER_MAGIC and old_end < size else None


def _uncommitted(fd: int, table: FrameIndex) -> Optional[int]:
    """Where the archive ends as long as an end frame lives that the table counts among the skipped ones; None if there is none."""
    for number in table.skips:
        begin, end = table.file_offsets[number], table.file_offsets[number + 1]
        if os.pread(fd, len(ZSTD_MAGIC), begin) == ZSTD_MAGIC:
            return end - HEADER_BYTES
    return None


def read_seek_table(fd: int, size: int) -> Optional[FrameIndex]:
    """The index by the seek table that ends at offset `size`; None where there is none that fits the bytes before it."""
    footer = os.pread(fd, _FOOTER.size, max(0, size - _FOOTER.size))
    if len(footer) < _FOOTER.size:
        return None
    count, descriptor, magic = _FOOTER.unpack(footer)
    table = count * _ENTRY_BYTES + _FOOTER.size
    if magic != SEEKABLE or descriptor or table + 8 > size or not 0 < count <= MAX_FRAMES:
        return None
    begin = size - table - 8
    if os.pread(fd, 8, begin) != struct.pack("<II", SKIPPABLE, table):
        return None
    files, streams, skips = array("Q", [0]), array("Q", [0]), list[int]()
    position, stop = begin + 8, begin + 8 + count * _ENTRY_BYTES
    while position < stop:
        numbers = array("I")
        piece = os.pread(fd, min(_TABLE_PIECE, stop - position), position)
        if len(piece) % _ENTRY_BYTES or not piece:
            return None
        numbers.frombytes(piece)
        if sys.byteorder == "big":
            numbers.byteswap()
        contents = numbers[1::2]
        if max(contents) > MAX_FRAME_BYTES:
            return None
        if not min(contents):
            skips += [len(files) - 1 + number for number, content in enumerate(contents) if not content]
            if len(skips) > MAX_SKIPS:
                return None
        for offsets, sizes in ((files, numbers[::2]), (streams, contents)):
            offsets.extend(itertools.islice(itertools.accumulate(sizes, initial=offsets[-1]), 1, None))
        position += len(piece)
    return FrameIndex(files, streams, size, by_table=True, skips=tuple(skips)) if files[-1] == begin else None


def walk(fd: int, size: int) -> Optional[FrameIndex]:
    """The index by hopping over frame and block headers, up to the first thing that is not a whole frame.

    None for files whose frames cannot be sought: no content size, larger than MAX_FRAME_BYTES, or absurdly many.
    """
    positions, sizes = array("Q", [0]), array("Q", [0])
    problem = ""
    try:
        for frame in scan(fd, size, MAX_FRAME_BYTES):
            positions.append(frame.end)
            sizes.append(sizes[-1] + (frame.content or 0))
            if len(positions) > MAX_FRAMES:
                return None
    except FrameError as error:
        problem = str(error)
    except NotSeekableError:
        return None
    return FrameIndex(positions, sizes, positions[-1], problem)


def scan(fd: int, size: int, limit: Optional[int] = None) -> Iterator[Frame]:
    """Every frame of a file, by its headers alone.

    Raises FrameError at the first thing that is no frame, NotSeekableError at one without a size or with more than `limit`
    bytes (if that is given) and after MAX_HEADERS headers.
    """
    budget = itertools.count()
    begin, window = 0, b""

    def fetch(offset: int, length: int) -> bytes:
        nonlocal begin, window
        if next(budget) > MAX_HEADERS:
            raise NotSeekableError
        if not begin <= offset <= offset + length <= begin + len(window):
            # Headers that stand close together are read at once, those far apart one by one.
            near = begin <= offset <= begin + len(window) + _WINDOW_BYTES
            begin, window = offset, os.pread(fd, _WINDOW_BYTES if near else length, offset)
        return window[offset - begin : offset - begin + length]

    position = 0
    while position < size:
        frame = measure(fetch, position, size, limit)
        yield frame
        position = frame.end


def measure(fetch: Fetch, position: int, size: int, limit: Optional[int] = None) -> Frame:
    """The frame at `position` of something of `size` bytes, by its headers. Raises as `scan`."""
    head = fetch(position, _HEADER_BYTES)
    if len(head) < 8:
        raise FrameError(position, "an incomplete frame")
    magic, length = struct.unpack_from("<II", head)
    if magic & 0xFFFFFFF0 == 0x184D2A50:
        if position + 8 + length > size:
            raise FrameError(position, "an incomplete frame")
        return Frame(position + 8 + length, 0, True)
    if head[:4] != ZSTD_MAGIC:
        raise FrameError(position, "bytes that are no zstd frame")
    descriptor = head[4]
    single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    width = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    if len(head) < at + width or descriptor & 8:
        raise FrameError(position, "a broken frame header")
    content = int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0) if width else None
    if limit is not None and (content is None or content > limit):
        raise NotSeekableError
    block = position + at + width
    while True:
        raw = fetch(block, 3)
        if len(raw) < 3:
            raise FrameError(position, "an incomplete frame")
        number = int.from_bytes(raw, "little")
        kind = number >> 1 & 3
        if kind == 3:
            raise FrameError(position, "a broken block header")
        block += 3 + (1 if kind == 1 else number >> 3)
        if number & 1:
            break
    block += 4 * checksum
    if block > size:
        raise FrameError(position, "an incomplete frame")
    return Frame(block, content, bool(checksum))
