# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The head of an external memory image: whose memory it is, as a domain XML that can be read and replaced.

Layout (libvirt's qemu_saveimage.h, 9.0 to 11.3): 16 bytes of magic, 19 little-endian 32-bit numbers (version, bytes of data,
was running, codec, offset of the cookie, unused), then the data: XML, NUL, cookie, NUL, fill. QEMU's stream follows and is
never looked at. Pure.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree

HEADER_BYTES = 92
MAX_DATA_BYTES = 2**20
_MAGIC, _UNFINISHED = b"LibvirtQemudSave", b"LibvirtQemudPart"
_NUMBERS = struct.Struct("<19I")
_VERSION, _DATA_BYTES, _CODEC, _COOKIE_OFFSET = 0, 1, 3, 4
_KNOWN_VERSION = 2
#: raw, gzip, bzip2, xz, lzop: they compress QEMU's stream only; a later one may keep offsets elsewhere.
_KNOWN_CODECS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class MemoryHead:
    """Header and data of an image. ``renamable``: another XML may stand in it."""

    raw: bytes
    xml: str
    cookie: bytes
    renamable: bool


def head_bytes(header: bytes, what: str) -> int:
    """How long header and data are together. Raises HostileError for what is no memory image of a known version."""
    if header[:16] == _UNFINISHED:
        raise HostileError(what, "it is a memory image that was never finished")
    if len(header) < HEADER_BYTES or header[:16] != _MAGIC:
        raise HostileError(what, "it is no memory image of libvirt")
    numbers: tuple[int, ...] = _NUMBERS.unpack(header[16:HEADER_BYTES])
    if numbers[_VERSION] != _KNOWN_VERSION:
        raise HostileError(what, f"it is of version {numbers[_VERSION]}, this collection knows {_KNOWN_VERSION}")
    if not 0 < numbers[_DATA_BYTES] <= MAX_DATA_BYTES or numbers[_COOKIE_OFFSET] >= numbers[_DATA_BYTES]:
        raise HostileError(what, f"its head says impossible sizes ({numbers[_DATA_BYTES]}, {numbers[_COOKIE_OFFSET]})")
    return HEADER_BYTES + numbers[_DATA_BYTES]


def parse(raw: bytes, what: str) -> MemoryHead:
    """The head from its bytes, ``head_bytes`` of them. Raises HostileError."""
    if len(raw) != head_bytes(raw, what):
        raise HostileError(what, "it ends within its head")
    numbers, data = _NUMBERS.unpack(raw[16:HEADER_BYTES]), raw[HEADER_BYTES:]
    offset = numbers[_COOKIE_OFFSET]
    xml, end, _dummy = (data[:offset] if offset else data).partition(b"\0")
    cookie, cookie_end, _dummy = data[offset:].partition(b"\0") if offset else (b"", b"\0", b"")
    if not end or not cookie_end:
        raise HostileError(what, "its XML does not end")
    try:
        return MemoryHead(raw, xml.decode(), cookie, numbers[_CODEC] in _KNOWN_CODECS)
    except UnicodeDecodeError as error:
        raise HostileError(what, "its XML is not UTF-8") from error


def without_secrets(head: MemoryHead, what: str) -> bytes:
    """The head without the passwords of the VM's displays; as it is where it has none. Raises as `with_xml`."""
    if "passwd" not in head.xml:
        return head.raw
    root = _xml.parse(head.xml, what)
    secret = [each for each in root.iterfind("devices/graphics") if each.get("passwd") is not None]
    for graphics in secret:
        graphics.attrib.pop("passwd")
    return with_xml(head, root, what) if secret else head.raw


def with_xml(head: MemoryHead, root: etree._Element, what: str) -> bytes:
    """The head with another domain XML, of the same length. Raises RefusedError where that cannot be."""
    if not head.renamable:
        raise RefusedError(what, "its codec is not known, so it cannot get a new name, uuid or place")
    for element in root.iter():  # blanks are room for longer paths
        if len(element) and not (element.text or "").strip():
            element.text = None
        if not (element.tail or "").strip():
            element.tail = None
    text = _xml.text(root).encode() + b"\0"
    numbers = list(_NUMBERS.unpack(head.raw[16:HEADER_BYTES]))
    numbers[_COOKIE_OFFSET] = len(text) if numbers[_COOKIE_OFFSET] else 0
    data = text + (head.cookie + b"\0" if numbers[_COOKIE_OFFSET] else b"")
    room = numbers[_DATA_BYTES]
    if len(data) > room:
        raise RefusedError(what, f"{len(data)} bytes of XML do not fit in its {room}; shorter paths would")
    return head.raw[:16] + _NUMBERS.pack(*numbers) + data.ljust(room, b"\0")
