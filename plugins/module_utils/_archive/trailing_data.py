# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What stands behind the end of a native archive: the remains of an append that died, or something else.

Only the former may be cut off. See docs/FORMAT.md, "Appending".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from ansible_collections.kvmops.backup.plugins.module_utils._archive import config, digests, names, tar
from ansible_collections.kvmops.backup.plugins.module_utils._archive.bytesource import Bytes, FramedBytes, PlainBytes
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration
from ansible_collections.kvmops.backup.plugins.module_utils._archive.tar import Entry
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._image.zero import is_zero

COMMIT_BYTES = 2 * tar.BLOCK  # zero before the commit: the header's place, and the head of the digests
_MARK = re.compile(rb"kvmops append, point [0-9]{1,11}\n\0*")
_PIECE = 2**20
_NEXT = "the next append removes it"
_APPEND = f"of an append that is under way or was interrupted; {_NEXT}"


@dataclass(frozen=True)
class TrailingData:
    """`text` says what it is, "" for nothing. `ours`: an append left it, no point is lost with it. `lost`: points that cannot be
    reached because the header before them is gone."""

    text: str = ""
    ours: bool = True
    lost: tuple[int, ...] = ()


def mark(timestamp: int) -> bytes:
    """The block that tells the remains of an append, until everything but the commit is durable. 0: which is being cut off."""
    return f"kvmops append, point {timestamp}\n".encode().ljust(tar.BLOCK, b"\0")


def find(source: Bytes, end: int, size_bytes: int) -> TrailingData:
    """What stands behind the end marker at offset `end` of the tar stream; `size_bytes` is the size of the file."""
    if isinstance(source, PlainBytes):
        return _plain(source, end)
    if isinstance(source, FramedBytes) and source.index.pending:
        return TrailingData(f"{size_bytes - source.index.end} bytes {_APPEND}")
    return TrailingData()


def _plain(source: PlainBytes, end: int) -> TrailingData:
    begin = end + COMMIT_BYTES
    if _MARK.fullmatch(source.fetch(begin, tar.BLOCK)):
        return TrailingData(f"{source.size - begin} bytes {_APPEND}")
    if _all_zero(source, begin):
        return TrailingData()
    header = _first_header(source, begin)
    entries = _entries(source, header) if header is not None else []
    points = [point for point in (_configuration(source, entry) for entry in entries) if point]
    if header is None or not points:
        return TrailingData(f"{source.size - begin} bytes behind the end of the archive", ours=False)
    if len(points) == 1 and _digests_fit(source, end, header, entries, points[0]):
        return TrailingData(f"point {points[0].timestamp}, whose append was interrupted before its last step; {_NEXT}")
    lost = tuple(point.timestamp for point in points)
    return TrailingData(
        f"the header at offset {end} is gone, behind which are the points {', '.join(map(str, lost))}", False, lost
    )


def _all_zero(source: PlainBytes, position: int) -> bool:
    while position < source.size:
        position = source.next_data(position)
        data = source.fetch(position, _PIECE)
        if not is_zero(memoryview(data)):
            return False
        position += len(data) or _PIECE
    return True


def _first_header(source: PlainBytes, begin: int) -> Optional[int]:
    """Offset of the first tar header; as far behind `begin` as digests reach."""
    position = begin
    while position < min(source.size, begin + digests.MAX_BYTES + tar.ALIGN):
        data = source.fetch(position, _PIECE)
        for at in range(0, len(data) - tar.BLOCK + 1, tar.BLOCK):
            if tar.is_header(data[at : at + tar.BLOCK]):
                return position + at
        position += _PIECE
    return None


def _entries(source: PlainBytes, begin: int) -> Sequence[Entry]:
    """The members from a header on, up to the first that is broken; offsets are those of the file."""
    found = []
    walk = tar.Walk(lambda offset, length: source.fetch(begin + offset, length), source.size - begin)
    try:
        for entry in walk.entries():
            found.append(
                Entry(entry.name, begin + entry.header_offset, begin + entry.offset, entry.size_bytes, entry.mtime)
            )
    except KvmopsError:
        pass  # what was found until there is what can be said
    return found


def _configuration(source: PlainBytes, entry: Entry) -> Optional[Configuration]:
    if names.point_of(entry.name) is None or entry.size_bytes > config.MAX_BYTES:
        return None
    try:
        point = config.decode(source.fetch(entry.offset, entry.size_bytes), entry.name)
    except KvmopsError:
        return None
    return point if point and point.format_version else None


def _digests_fit(source: PlainBytes, end: int, header: int, entries: Sequence[Entry], point: Configuration) -> bool:
    """Whether only the header of the digests member is missing, as before a commit."""
    new = {entry.name for entry in entries}
    algorithm = digests.ALGORITHMS[point.digest_algorithm]
    size = digests.room((member.size_bytes for member in point.members if member.name in new), algorithm)
    begin = end + tar.BLOCK
    if tar.round_up(begin + size, tar.BLOCK) != header:
        return False
    return algorithm.of_chunk(source.fetch(begin, size)).hex() == point.digests_digest
