# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Heads of external memory images: read, given another XML, refused."""

from __future__ import annotations

import struct

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import memory_image

XML = b"<domain type='kvm'>\n  <name>web</name>\n  <title>a title</title>\n</domain>"
COOKIE = b"<cookie><cpu/></cookie>"


def image(
    xml: bytes = XML,
    *,
    cookie: bytes = COOKIE,
    version: int = 2,
    codec: int = 0,
    room: int = 4096,
    offset: int | None = None,
    magic: bytes = b"LibvirtQemudSave",
) -> bytes:
    """Header and data as libvirt writes them."""
    data = xml + b"\0" + (cookie + b"\0" if cookie else b"")
    place = (len(xml) + 1 if cookie else 0) if offset is None else offset
    header = magic + struct.pack("<19I", version, room, 1, codec, place, *[0] * 14)
    return header + data.ljust(room, b"\0")


def parsed(raw: bytes) -> memory_image.MemoryHead:
    assert memory_image.head_bytes(raw[:92], "image") == len(raw)
    return memory_image.parse(raw, "image")


@pytest.mark.parametrize("cookie", [COOKIE, b""])
def test_what_is_read_is_what_was_written(cookie: bytes) -> None:
    head = parsed(image(cookie=cookie))
    assert (head.xml.encode(), head.cookie, head.renamable) == (XML, cookie, True)


@pytest.mark.parametrize("cookie", [COOKIE, b""])
def test_another_xml_keeps_length_flags_and_cookie(cookie: bytes) -> None:
    raw = image(cookie=cookie, codec=4)
    root = etree.fromstring("<domain type='kvm'><name>a longer name than it had</name></domain>")
    changed = memory_image.with_xml(parsed(raw), root, "image")
    again = parsed(changed)
    assert len(changed) == len(raw) and again.cookie == cookie and "a longer name" in again.xml
    numbers = struct.unpack("<19I", changed[16:92])
    assert numbers[:4] == (2, 4096, 1, 4) and changed.endswith(b"\0")


def test_blanks_make_room_and_what_still_does_not_fit_is_refused() -> None:
    head = parsed(image(room=len(XML) + len(COOKIE) + 2))
    root = etree.fromstring(XML)
    root.find("name").text = "web-2"  # longer, but without the line breaks it fits
    assert "web-2" in parsed(memory_image.with_xml(head, root, "image")).xml
    assert " title" in head.xml  # blanks in a text are no fill
    root.find("name").text = "w" * 200
    with pytest.raises(RefusedError, match="do not fit"):
        memory_image.with_xml(head, root, "image")


def test_an_unknown_codec_can_be_read_but_not_renamed() -> None:
    head = parsed(image(codec=6))
    assert not head.renamable
    with pytest.raises(RefusedError, match="codec"):
        memory_image.with_xml(head, etree.fromstring(XML), "image")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (image(version=3), "version 3"),
        (image(magic=b"LibvirtQemudPart"), "never finished"),
        (b"QEVM" + bytes(200), "no memory image"),
        (image()[:50], "no memory image"),
        (image(room=0), "impossible sizes"),
        (image(room=2**31)[:92], "impossible sizes"),
        (image(offset=2**32 - 1), "impossible sizes"),
        (image()[:-1], "ends within"),
        (image(xml=b"\xff\xfe"), "not UTF-8"),
        (b"LibvirtQemudSave" + struct.pack("<19I", 2, 64, 1, 0, 0, *[0] * 14) + b"<" * 64, "does not end"),
    ],
)
def test_what_is_no_head_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(HostileError, match=words):
        memory_image.head_bytes(raw[:92], "image")
        memory_image.parse(raw, "image")


def test_only_the_passwords_of_displays_are_taken_out() -> None:
    xml = b"<domain><name>web</name><devices><graphics type='vnc' passwd='geheim' listen='::1'/></devices></domain>"
    head = parsed(image(xml))
    bare = parsed(memory_image.without_secrets(head, "image"))
    assert "passwd" not in bare.xml and "::1" in bare.xml and len(bare.raw) == len(head.raw)
    assert bare.cookie == head.cookie
    assert memory_image.without_secrets(bare, "image") == bare.raw
    with pytest.raises(RefusedError):
        memory_image.without_secrets(parsed(image(xml, codec=9)), "image")
