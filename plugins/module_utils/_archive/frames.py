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
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

SKIPPABLE = 0x184D2A5E
SEEKABLE = 0x8F92EAB1
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_FRAME_BYTES = 64 * 2**20  # larger frames (other tools') are streamed, not sought
_FOOTER = struct.Struct("<IBI")
_ENTRY_BYTES = 8


class FrameError(ValueError):
    """The bytes at `offset` are not a whole zstd frame."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(f"{why} at offset {offset}")
        self.offset, self.why = offset, why


@dataclass(frozen=True)
class FrameIndex:
    """Where each frame begins in the file and in the decompressed stream; both lists end with the total.

    `end` is the file offset behind the last frame (and the seek table), `problem` why reading stopped there, if it did.
    """

    file_offsets: Sequence[int]
    stream_offsets: Sequence[int]
    end: int
    problem: str = ""

    @property
    def stream_size(self) -> int:
        """Bytes of the decompressed stream."""
        return self.stream_offsets[-1]

    def find(self, offset: int) -> int:
        """Number of the frame that holds the byte `offset` of the stream."""
        return bisect_right(self.stream_offsets, offset) - 1


def seek_table(frames: Sequence[tuple[int, int]]) -> bytes:
    """Skippable frame that lists (compressed, decompressed) sizes; frames carry their own checksums, so the table has none."""
    body = b"".join(struct.pack("<II", *sizes) for sizes in frames) + _FOOTER.pack(len(frames), 0, SEEKABLE)
    return struct.pack("<II", SKIPPABLE, len(body)) + body


def read_seek_table(fd: int, size: int) -> Optional[FrameIndex]:
    """The index by the seek table at the end of the file; None where there is none that fits the file."""
    if size < 8 + _FOOTER.size:
        return None
    count, descriptor, magic = _FOOTER.unpack(os.pread(fd, _FOOTER.size, size - _FOOTER.size))
    table = count * _ENTRY_BYTES + _FOOTER.size
    if magic != SEEKABLE or descriptor or table + 8 > size or count == 0:
        return None
    body = os.pread(fd, table + 8, size - table - 8)
    if len(body) != table + 8 or struct.unpack_from("<II", body) != (SKIPPABLE, table):
        return None
    numbers = struct.unpack_from(f"<{2 * count}I", body, 8)
    index = FrameIndex(
        array("Q", itertools.accumulate(numbers[::2], initial=0)),
        array("Q", itertools.accumulate(numbers[1::2], initial=0)),
        size,
    )
    if index.file_offsets[-1] != size - table - 8 or max(numbers[1::2]) > MAX_FRAME_BYTES:
        return None
    return index


def walk(fd: int, size: int) -> Optional[FrameIndex]:
    """The index by hopping over frame and block headers, up to the first thing that is not a whole frame.

    None for files whose frames cannot be sought: no content size, or larger than MAX_FRAME_BYTES.
    """
    positions, sizes = array("Q", [0]), array("Q", [0])
    position, problem = 0, ""
    while position < size:
        try:
            end, content = _frame_end(fd, position, size)
        except FrameError as error:
            problem = str(error)
            break
        if content is None or content > MAX_FRAME_BYTES:
            return None
        position = end
        positions.append(position)
        sizes.append(sizes[-1] + content)
    return FrameIndex(positions, sizes, position, problem)


def _frame_end(fd: int, position: int, size: int) -> tuple[int, Optional[int]]:
    head = os.pread(fd, 18, position)
    if len(head) < 8:
        raise FrameError(position, "an incomplete frame")
    magic, length = struct.unpack_from("<II", head)
    if magic & 0xFFFFFFF0 == 0x184D2A50:
        if position + 8 + length > size:
            raise FrameError(position, "an incomplete frame")
        return position + 8 + length, 0
    if head[:4] != ZSTD_MAGIC:
        raise FrameError(position, "bytes that are no zstd frame")
    descriptor = head[4]
    single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    width = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    if len(head) < at + width or descriptor & 8:
        raise FrameError(position, "a broken frame header")
    content = int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0) if width else None
    if content is None or content > MAX_FRAME_BYTES:
        return size, content
    block = position + at + width
    while True:
        raw = os.pread(fd, 3, block)
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
    return block, content
