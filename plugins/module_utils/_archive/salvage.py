# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Where everything in a damaged archive stood: told by its configuration, because the layout follows from the member table.

Serves the verification only, which then names all damage instead of the first broken header. A restore takes no archive whose
headers are broken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Optional, Union

from ansible_collections.kvmops.backup.plugins.module_utils._archive import config, digests, names, tar
from ansible_collections.kvmops.backup.plugins.module_utils._archive.bytesource import FramedBytes, PlainBytes
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration
from ansible_collections.kvmops.backup.plugins.module_utils._archive.tar import Entry
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, KvmopsError

_SEARCH_BYTES = config.MAX_BYTES + 16 * 2**20  # from the end: the XML, and what may have come behind it
_POINT = re.compile(rb'\spoint="([0-9]{1,11})"')


def layout(source: Union[PlainBytes, FramedBytes]) -> tuple[Entry, ...]:
    """The members of a native archive in the order of its stream, as its last whole configuration says; () without one."""
    for offset in _candidates(source):
        configuration, size = _configuration(source, offset)
        if configuration is None:
            continue
        entries = _canonical(configuration, size)
        if entries[-1].offset == offset:
            mtime = _mtime(source, entries)
            return tuple(Entry(e.name, e.header_offset, e.offset, e.size_bytes, mtime) for e in entries)
    return ()


def _fetch(source: Union[PlainBytes, FramedBytes], offset: int, length: int) -> bytes:
    """Bytes of the stream; none where they cannot be read."""
    try:
        return source.fetch(offset, length)
    except ArchiveError:
        return b""


def _candidates(source: Union[PlainBytes, FramedBytes]) -> Iterator[int]:
    """Offsets of the stream at which a configuration may begin, the last first."""
    last = source.size // tar.ALIGN * tar.ALIGN
    for offset in range(last, max(-1, last - _SEARCH_BYTES), -tar.ALIGN):
        if _fetch(source, offset, 8).startswith(b"<domain"):
            yield offset


def _configuration(source: Union[PlainBytes, FramedBytes], offset: int) -> tuple[Optional[Configuration], int]:
    """The configuration that begins there and its size; None if it is not whole."""
    blob = bytearray()
    while len(blob) <= config.MAX_BYTES and b"\0" not in blob[-tar.ALIGN :]:
        part = _fetch(source, offset + len(blob), tar.ALIGN)
        if not part:
            break
        blob += part
    data = bytes(blob).split(b"\0", 1)[0]  # there is no zero byte in XML
    found = _POINT.search(data)
    if not found:
        return None, 0
    try:
        return config.decode(data, names.configuration_member(int(found.group(1)), "")), len(data)
    except KvmopsError:
        return None, 0


def _canonical(configuration: Configuration, xml_bytes: int) -> list[Entry]:
    """The members of an archive with one point, where the writer puts them."""
    sizes = [(member.name, member.size_bytes) for member in configuration.members]
    sizes.append((configuration.digests_member, digests.room(configuration.members)))
    sizes.append((names.configuration_member(configuration.timestamp, configuration.vm_name), xml_bytes))
    entries, position = [], 0
    for name, size in sizes:
        entries.append(Entry(name, position, tar.data_offset(position), size, 0))
        position = entries[-1].end
    return entries


def _mtime(source: Union[PlainBytes, FramedBytes], entries: list[Entry]) -> int:
    """The time in the headers, which is the same in all of them; from the first that is whole."""
    for entry in entries:
        found = tar.framing(_fetch(source, entry.offset - tar.BLOCK, tar.BLOCK))
        if found and found[:2] == (entry.name, entry.size_bytes):
            return found[2]
    return 0
