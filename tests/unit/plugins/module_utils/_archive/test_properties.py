# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What holds for all names, sizes, configurations and frames."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.kvmops.backup.plugins.module_utils._archive import config, digests, frames, names, tar
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    CHUNK_BYTES,
    Configuration,
    Consistency,
    Member,
    Role,
    Skipped,
    SnapshotNode,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import DamagedError, HostileError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives

XML_TEXT = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff")
    | st.sampled_from("\t\n\r<>&'\"]"),
    max_size=40,
)
ANY_TEXT = st.text(st.characters() | st.sampled_from("\0\x01\x1b\ud800"), max_size=40)
MEMBER_NAME = st.text("abcdefghijklmnopqrstuvwxyzABC0123456789._-", min_size=1, max_size=100).filter(
    lambda n: n not in (".", "..")
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(MEMBER_NAME, st.integers(0, 2**44)), max_size=8, unique_by=lambda pair: pair[0]))
def test_the_walk_finds_what_the_headers_say(members: list[tuple[str, int]]) -> None:
    pieces: dict[int, bytes] = {}
    position = 0
    for name, size in members:
        pieces[position] = tar.header(name, size, archives.TIMESTAMP, position)
        assert (position + len(pieces[position])) == tar.data_offset(position)
        position = tar.round_up(tar.data_offset(position) + size, tar.BLOCK)

    def fetch(offset: int, length: int) -> bytes:
        for begin, data in pieces.items():
            if begin <= offset < begin + len(data):
                return data[offset - begin : offset - begin + length]
        return bytes(max(0, min(length, position + 4096 - offset)))

    walk = tar.Walk(fetch, position + 4096)
    found = list(walk.entries())
    assert [(e.name, e.size_bytes) for e in found] == members
    assert all(e.offset % 4096 == 0 and e.mtime == archives.TIMESTAMP for e in found)
    assert walk.end == position


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a" * 101, "ä", "a\nb", "./a"])
def test_names_that_we_never_write(name: str) -> None:
    with pytest.raises((ValueError, HostileError)):
        tar.header(name, 1, 1, 0)


@given(ANY_TEXT)
def test_stems_are_plain_file_names(text: str) -> None:
    stem = names.stem(text)
    assert stem.isascii() and 0 < len(stem) <= 64 and stem[0] not in ".-" and names.checked_member(stem) == stem
    assert names.point_of(names.configuration_member(17, text)) == 17


MEMBERS = st.builds(
    Member,
    name=MEMBER_NAME,
    role=st.sampled_from(Role),
    size_bytes=st.integers(0, 2**60),
    digest=st.just("ab" * 32),
    target=XML_TEXT,
    virtual_size_bytes=st.integers(0, 2**60),
    image_format=st.sampled_from(["qcow2", "raw"]),
    original_format=st.sampled_from(["qcow2", "raw"]),
    former_path=XML_TEXT,
    pool=XML_TEXT,
    active=st.booleans(),
)
CONFIGURATIONS = st.builds(
    archives.configuration,
    st.lists(MEMBERS, max_size=4, unique_by=lambda member: member.name),
    live_xml=XML_TEXT,
    consistency=st.sampled_from(Consistency),
    incrementable=st.booleans(),
    template=st.booleans(),
    autostart=st.booleans(),
    snapshots=st.lists(st.builds(SnapshotNode, XML_TEXT, XML_TEXT, XML_TEXT, st.booleans()), max_size=3).map(tuple),
    skipped=st.lists(st.builds(Skipped, XML_TEXT, XML_TEXT), max_size=3).map(tuple),
    warnings=st.lists(st.builds(Notice, st.just(Code.RECORDED), XML_TEXT), max_size=3).map(tuple),
    created=XML_TEXT,
    tool_version=XML_TEXT,
)


@settings(max_examples=80, deadline=None)
@given(CONFIGURATIONS)
def test_a_configuration_reads_back(configuration: Configuration) -> None:
    data, digest = config.encode(configuration)
    assert len(data) % 4096 == 0
    found = config.decode(data, "1800000000_x.xml")
    assert found is not None
    assert replace(found, domain_xml="", member_name="") == replace(configuration, domain_xml="", digest=digest)
    again, _digest = config.encode(found)
    assert config.decode(again, "1800000000_x.xml") is not None
    assert b"urn:kvmops" not in found.domain_xml.encode()


def test_a_point_of_an_archive_that_does_not_say_whether_the_vm_starts_with_the_host() -> None:
    data, digest = config.encode(archives.configuration([], autostart=True))
    without = data.replace(b' autostart="yes"', b"").replace(digest.encode(), b"0" * 64)
    now = hashlib.sha256(without).hexdigest().encode()
    found = config.decode(without.replace(b"0" * 64, now), "1800000000_x.xml")
    assert len(without) < len(data) and found is not None and not found.autostart


@settings(max_examples=40, deadline=None)
@given(ANY_TEXT, st.sampled_from(["former_path", "warnings", "skipped"]))
def test_characters_that_xml_cannot_hold(text: str, where: str) -> None:
    """A path with them is refused; a text for people loses only them."""
    holds = all(c in "\t\n\r" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c >= "\U00010000" for c in text)
    if where == "former_path":
        item = archives.configuration([Member("a", Role.DISK, 1, former_path=text)])
    elif where == "warnings":
        item = archives.configuration([], warnings=(Notice(Code.RECORDED, text),))
    else:
        item = archives.configuration([], skipped=(Skipped("vda", text),))
    if where == "former_path" and not holds:
        with pytest.raises(RefusedError, match="cannot be written as XML"):
            config.encode(item)
        return
    found = config.decode(config.encode(item)[0], "1800000000_x.xml")
    assert found is not None
    if holds:
        assert (found.members, found.warnings, found.skipped) == (item.members, item.warnings, item.skipped)


@given(st.integers(0, 300), st.integers(0, 7))
def test_every_flip_of_the_configuration_is_found(position: int, bit: int) -> None:
    data, _digest = config.encode(archives.configuration([]))
    damaged = bytearray(data)
    damaged[position * (len(data) // 301)] ^= 1 << bit
    try:
        found = config.decode(bytes(damaged), "1800000000_x.xml")
    except Exception as error:
        assert type(error).__module__.endswith("_errors")
    else:
        assert found is None or found.format_version == 0  # the reader of a native archive refuses these


@given(st.lists(st.integers(0, 3 * CHUNK_BYTES), max_size=4), st.sampled_from(list(digests.ALGORITHMS.values())))
def test_digests_round_trip(sizes: list[int], algorithm: digests.Algorithm) -> None:
    chunks = [[bytes([number]) * algorithm.digest_bytes for number in range(digests.chunk_count(size))] for size in sizes]
    members = [
        Member(f"m{number}", Role.DISK, size, digest=algorithm.of_member(b"".join(chunks[number])))
        for number, size in enumerate(sizes)
    ]
    data = digests.pack([b"".join(part) for part in chunks])
    assert len(data) == digests.room(sizes, algorithm)
    assert {name: bytes(found) for name, found in digests.unpack(data, members, algorithm).items()} == {
        member.name: b"".join(part) for member, part in zip(members, chunks)
    }
    with pytest.raises(DamagedError):
        digests.unpack(data + b"x", members, algorithm)


def test_zero_chunks_have_the_digest_of_zeros() -> None:
    import hashlib

    for data in (digests.ZEROS, bytes(CHUNK_BYTES), bytearray(CHUNK_BYTES), bytes(5), b"x" * CHUNK_BYTES):
        assert digests.SHA256.of_chunk(bytes(data)) == hashlib.sha256(data).digest()
        assert digests.BLAKE2B.of_chunk(bytes(data)) == hashlib.blake2b(data, digest_size=32).digest()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.binary(max_size=3000) | st.integers(0, 300_000).map(bytes), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_the_index_of_frames(pieces: list[bytes], checksum: bool, table: bool) -> None:
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=checksum)
    packed = [compressor.compress(piece) for piece in pieces]
    sizes = [(len(frame), len(piece)) for frame, piece in zip(packed, pieces)]
    data = b"".join(packed) + (frames.seek_table(number for pair in sizes for number in pair) if table else b"")
    descriptor = os.memfd_create("frames")
    try:
        os.write(descriptor, data)
        index = frames.walk(descriptor, len(data))
        assert index is not None and not index.problem and index.end == len(data)
        assert index.stream_size == sum(map(len, pieces))
        by_table = frames.read_seek_table(descriptor, len(data))
        assert (by_table is not None) == table
        if by_table is not None:
            assert list(by_table.file_offsets) == list(index.file_offsets)[: len(pieces) + 1]
            assert list(by_table.stream_offsets) == list(index.stream_offsets)[: len(pieces) + 1]
        shortened = frames.walk(descriptor, len(data) - 1)
        assert shortened is None or shortened.problem
    finally:
        os.close(descriptor)
