# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Where everything in a damaged archive stood: told by its configuration, because the layout follows from the member table.

Serves the verification only, which then names all damage instead of the first broken header. A restore takes no archive whose
headers are broken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional, Union

from ansible_collections.kvmops.backup.plugins.module_utils._archive import config, digests, names, tar
from ansible_collections.kvmops.backup.plugins.module_utils._archive.bytesource import FramedBytes, PlainBytes
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member
from ansible_collections.kvmops.backup.plugins.module_utils._archive.tar import Entry
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, KvmopsError

_SEARCH_BYTES = config.MAX_BYTES + 16 * 2**20  # from the end: the XML, and what may have come behind it
_TIME = re.compile(rb'\spoint="([0-9]{1,11})"')
_END = b"</domain>\n"
_MAX_NEW_MEMBERS = 1000  # of an increment: bounds the time for a hostile one
Source = Union[PlainBytes, FramedBytes]


@dataclass(frozen=True)
class _Point:
    """A configuration, the offset of its bytes in the stream and their number."""

    configuration: Configuration
    offset: int
    size_bytes: int


def layout(source: Source) -> tuple[Entry, ...]:
    """The members of a native archive in the order of its stream, as its last whole configuration and those before it say;
    () without one, or where other tools have added members."""
    for offset in _candidates(source):
        point = _point_at(source, offset)
        entries: list[Entry] = []
        while point:
            part = _part(source, point)
            if part is None:
                break
            own, before = part
            mtime = _mtime(source, own)
            entries[:0] = [Entry(e.name, e.header_offset, e.offset, e.size_bytes, mtime) for e in own]
            if before is None:
                return tuple(entries)
            point = before
    return ()


def _fetch(source: Source, offset: int, length: int) -> bytes:
    """Bytes of the stream; none where they cannot be read."""
    try:
        return source.fetch(offset, length)
    except ArchiveError:
        return b""


def _candidates(source: Source) -> Iterator[int]:
    """Offsets of the stream at which a configuration may begin, the last first."""
    last = source.size // tar.ALIGN * tar.ALIGN
    for offset in range(last, max(-1, last - _SEARCH_BYTES), -tar.ALIGN):
        if _fetch(source, offset, 8).startswith(b"<domain"):
            yield offset


def _point_at(source: Source, offset: int) -> Optional[_Point]:
    """The point whose configuration begins there; None if that is not whole."""
    blob = bytearray()
    while len(blob) <= config.MAX_BYTES:
        part = _fetch(source, offset + len(blob), tar.ALIGN)
        blob += part
        # It is padded with blanks up to the next multiple; in the texts within it there is no such end.
        if len(part) < tar.ALIGN or _END in blob[-2 * tar.ALIGN :]:
            break
    data = bytes(blob)
    found = _TIME.search(data)
    if not found:
        return None
    try:
        configuration = config.decode(data, names.configuration_member(int(found.group(1)), ""))
    except KvmopsError:
        return None
    return _Point(configuration, offset, len(data)) if configuration and configuration.format_version else None


def _part(source: Source, point: _Point) -> Optional[tuple[list[Entry], Optional[_Point]]]:
    """The members that came with a point, and the point before it (None: it is the full); None if they do not fit each other.

    Everything follows from the place of the configuration, its own size and those of the members before it; how many these are
    is told by the point before, which must end where they begin.
    """
    members = point.configuration.members
    if not point.configuration.parent_digest:
        entries = _backwards(point, members, False)
        return (entries, None) if entries and entries[0].header_offset == 0 else None
    likely: Optional[tuple[list[Entry], Optional[_Point]]] = None
    for count in range(min(len(members), _MAX_NEW_MEMBERS) + 1):
        new = members[len(members) - count :]
        for digests_first in (True, False):
            entries = _backwards(point, new, digests_first)
            before = _point_before(source, entries[0].header_offset) if entries else None
            if not before or (before.configuration.timestamp, before.configuration.digest) != (
                point.configuration.parent_point,
                point.configuration.parent_digest,
            ):
                continue
            # Small members can be laid out in several ways; the digests tell which it is, or if they are damaged the names.
            if _digests_fit(source, point.configuration, entries):
                return entries, before
            if {m.name for m in members[: len(members) - count]} == {m.name for m in before.configuration.members}:
                likely = entries, before
    return likely


def _digests_fit(source: Source, configuration: Configuration, entries: Sequence[Entry]) -> bool:
    entry = next(entry for entry in entries if entry.name == configuration.digests_member)
    data = _fetch(source, entry.offset, entry.size_bytes)
    return digests.ALGORITHMS[configuration.digest_algorithm].of_chunk(data).hex() == configuration.digests_digest


def _backwards(point: _Point, new: Sequence[Member], digests_first: bool) -> list[Entry]:
    """Where the new members of a point are, if its first header is at a multiple of 4096; [] if that cannot be."""
    algorithm = digests.ALGORITHMS[point.configuration.digest_algorithm]
    digests_member = (point.configuration.digests_member, digests.room((m.size_bytes for m in new), algorithm))
    items = [(member.name, member.size_bytes) for member in new]
    if not digests_first:
        items.append(digests_member)
    items.append(
        (names.configuration_member(point.configuration.timestamp, point.configuration.vm_name), point.size_bytes)
    )
    bare = tar.BLOCK + tar.round_up(digests_member[1], tar.BLOCK) if digests_first else 0
    entries: list[Entry] = []
    data = point.offset
    for number in range(len(items) - 1, -1, -1):
        # Data begin at multiples of 4096, so the end of the member before is known up to a multiple of it.
        rest = (tar.round_up(items[number - 1][1], tar.BLOCK) if number else bare) % tar.ALIGN
        begin = data - 3 * tar.BLOCK - (data - 3 * tar.BLOCK - rest) % tar.ALIGN
        name, size = items[number]
        entries.insert(0, Entry(name, begin, data, size, 0))
        if number:
            data = begin - tar.round_up(items[number - 1][1], tar.BLOCK)
    begin = entries[0].header_offset - bare
    if bare:
        entries.insert(0, Entry(digests_member[0], begin, begin + tar.BLOCK, digests_member[1], 0))
    fits = begin >= 0 and begin % tar.ALIGN == 0 and all(tar.is_own_name(entry.name) for entry in entries)
    return entries if fits else []


def _point_before(source: Source, end: int) -> Optional[_Point]:
    """The point whose configuration ends there."""
    if not end or not _fetch(source, end - tar.ALIGN, tar.ALIGN).rstrip(b" ").endswith(b"\n"):
        return None
    for offset in range(end - tar.ALIGN, max(-1, end - config.MAX_BYTES - tar.ALIGN), -tar.ALIGN):
        if _fetch(source, offset, 8).startswith(b"<domain"):
            found = _point_at(source, offset)
            return found if found and offset + found.size_bytes == end else None
    return None


def _mtime(source: Source, entries: Sequence[Entry]) -> int:
    """The time in the headers, which is the same in all of them; from the first that is whole."""
    for entry in entries:
        found = tar.framing(_fetch(source, entry.offset - tar.BLOCK, tar.BLOCK))
        if found and found[:2] == (entry.name, entry.size_bytes):
            return found[2]
    return 0
