# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives broken in every layer: file, zstd frames, tar headers, pax records, configuration, what stands beside them."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import strategies as st

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._archive import append, convert, frames, reader, tar
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import ArchiveWriter, Compression
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, info, request, retention, verify
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import BytesSource
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection, memory_image
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._restore import foreign_memory, run, states
from ansible_collections.kvmops.backup.plugins.module_utils._retention import Rules
from ansible_collections.kvmops.backup.tests.unit.fuzz import ODD, broken_bytes, broken_xml, fuzz, only_our_errors
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._restore import restore_values, test_restore_tree

CUT = 64 * 2**10  # a frame of the archives here
IMAGE = archives.qcow2_header()[: 2 * 65536]


@pytest.fixture(scope="module", autouse=True)
def places() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        for name in ("state_dir", "cache_dir", "run_dir"):
            patch.setattr(_paths, name, lambda: directory)
        patch.setattr(connection, "connect", _connect)
        yield


def _connect(_uri: str) -> None:
    raise KvmopsError("The connection", "not in a unit test")


@dataclass(frozen=True)
class Seed:
    """A good archive: its file, its tar stream and the members in that."""

    data: bytes
    stream: bytes
    entries: tuple[tar.Entry, ...]
    compressed: bool


def _seed(path: Path) -> Seed:
    with reader.open_archive(str(path)) as archive:
        assert archive.points, path
        stream = archive.bytes.fetch(0, 2**24)
        return Seed(path.read_bytes(), stream, archive.entries, archive.compressed)


def _with_snapshots(directory: Path, compressed: bool) -> Path:
    """Ours, of a VM with a tree of snapshots and a memory image."""
    point = test_restore_tree.point()
    head = next(iter(test_restore_tree.head().values())).raw
    name = "t.tar.zst" if compressed else "t.tar"
    compression = Compression(1) if compressed else None
    with ArchiveWriter(str(directory), name, compression=compression, timestamp=5, threads=1) as writer:
        members = []
        for member in point.members:
            source = BytesSource(head + b"QEVM" if member.role is Role.MEMORY else IMAGE)
            members.append(writer.add(member, source))
        writer.publish(archives.configuration(members, 5, **{
            key: getattr(point, key) for key in ("domain_xml", "vm_name", "vm_uuid", "snapshots")
        }, live_xml=point.domain_xml))  # fmt: skip
    return directory / name


def _foreign(memory: bytes) -> bytes:
    stream = io.BytesIO()
    root = restore_values.domain_xml()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as file:
        for name, data in {
            "web.qcow2": IMAGE, "web.first": archives.qcow2_header(backing=b"web.qcow2")[:65536], "web.raw": bytes(4096),
            "1700000000_web.xml": root.encode(), "1700000900_web.xml": root.replace("web.qcow2", "web.first").encode(),
            "web.memory": memory, "x.iso": b"CD001" * 100, "n" * 120 + ".img": b"x",
        }.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.pax_headers = len(data), 1_700_000_000.5, {"comment": "é"}
            file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@functools.cache
def seeds() -> tuple[Seed, ...]:
    """Archives of ours and of others in all forms that there are."""
    with tempfile.TemporaryDirectory() as name:
        directory, found = Path(name), []
        for compressed in (False, True):
            found.append(_seed(_with_snapshots(directory, compressed)))
            path = Path(archives.write(directory, archives.SMALL, compressed=compressed).path)
            archives.append(path, {"vda_1.snapshot": IMAGE})
            found.append(_seed(path))
            archives.append(path, {"vdb_1.snapshot": b"b" * 5000})
            found.append(_seed(path))
        memory = next(iter(test_restore_tree.head(restore_values.domain_xml()).values())).raw
        plain = _foreign(memory)
        streamed = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compressobj()
        for data in (plain, zstandard.compress(plain), streamed.compress(plain) + streamed.flush()):
            path = directory / "foreign.tar"
            path.write_bytes(data)
            found.append(_seed(path))
    return tuple(found)


def packed(stream: bytes) -> bytes:
    """A tar stream as frames with a seek table, as we write it."""
    pieces = [stream[at : at + CUT] for at in range(0, len(stream), CUT)]
    found = [zstandard.compress(piece, 1) for piece in pieces]
    return b"".join(found) + frames.seek_table(n for frame, piece in zip(found, pieces) for n in (len(frame), len(piece)))


#: Offset and width of the fields of a tar header.
FIELDS = {"name": (0, 100), "size": (124, 12), "mtime": (136, 12), "type": (156, 1), "magic": (257, 8), "prefix": (345, 155)}
NUMBERS = (
    b"00000000000\0", b"00000000001\0", b"00000001000\0", b"77777777777\0", b"000000x0000\0", b"            ", b"\0" * 12,
    b"\x80" + bytes(10) + b"\x05", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0",
)  # fmt: skip
NAMES = (
    b"vda_0.qcow2", b"web.qcow2", b"../x", b"/etc/passwd", b"", b".", b"./", b"a\nb", b"\xff\xfe", b"1.xml",
    b"1800000000_web01.xml", b"99999999999.digests", b"5.digests", b"x.memory", b"x.iso", b"x" * 100,
)  # fmt: skip


@st.composite
def broken_headers(draw: st.DrawFn, seed: Seed) -> bytes:
    """A tar stream with odd fields in its headers, their checksums mostly right, and odd extended headers."""
    stream = bytearray(seed.stream)
    entry = draw(st.sampled_from(seed.entries))
    for _dummy in range(draw(st.integers(0, 4))):
        entry = draw(st.sampled_from(seed.entries))
        at = draw(st.sampled_from((entry.header_offset, entry.offset - tar.BLOCK)))
        field = draw(st.sampled_from(sorted(FIELDS)))
        begin, width = FIELDS[field]
        value = draw(
            st.sampled_from(NUMBERS if field in ("size", "mtime") else NAMES)
            | st.binary(max_size=width)
            | st.sampled_from([bytes([each]) for each in b"01234567xgLKDVSMN\0Z"])
        )[:width]
        stream[at + begin : at + begin + width] = value.ljust(width, b"\0")
        if draw(st.integers(0, 9)):
            stream[at + 148 : at + 156] = b" " * 8
            stream[at + 148 : at + 156] = b"%06o\0 " % sum(stream[at : at + tar.BLOCK])
    if draw(st.booleans()):
        records = draw(st.lists(st.tuples(
            st.sampled_from(("path", "size", "mtime", "comment", "linkpath", "GNU.sparse.major", "GNU.volume.offset", "")),
            st.sampled_from(ODD), st.integers(-2, 2),
        ), max_size=4))  # fmt: skip
        payload = b"".join(_record(*each) for each in records)[: tar.MAX_PAX_BYTES + 1]
        block = tarfile.TarInfo("pax")
        block.size, block.type = len(payload), draw(st.sampled_from((b"x", b"g", b"L", b"K")))
        extended = block.tobuf(tarfile.USTAR_FORMAT) + payload.ljust(tar.round_up(len(payload), tar.BLOCK), b"\0")
        stream[entry.header_offset : entry.header_offset] = extended
    return bytes(stream)


def _record(key: str, value: str, wrong: int) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body) + len(str(len(body) + 3))
    return str(max(0, length + wrong)).encode() + body


@st.composite
def broken_configuration(draw: st.DrawFn, seed: Seed) -> bytes:
    """A tar stream that ends with a broken configuration, whose digest fits."""
    entry = next(each for each in reversed(seed.entries) if each.name.endswith(".xml"))
    former = seed.stream[entry.offset : entry.offset + entry.size_bytes]
    data = draw(broken_xml([former.decode()])).encode()
    if draw(st.integers(0, 3)) == 0:
        data = draw(broken_bytes(data, 2))
    digest = re.search(rb'kvmops:backup [^>]* digest="([0-9a-f]{64})"', former)
    if digest:
        data = data.rstrip() + b"\n"
        data += b" " * (-len(data) % tar.ALIGN)
        now = hashlib.sha256(data.replace(digest[1], b"0" * 64)).hexdigest().encode()
        data = data.replace(digest[1], now)
    header = tar.header(entry.name, len(data), entry.mtime, entry.header_offset)
    return seed.stream[: entry.header_offset] + header + data.ljust(tar.round_up(len(data), tar.BLOCK), b"\0") + tar.END


@st.composite
def broken_table(draw: st.DrawFn, seed: Seed) -> bytes:
    """The frames of a stream with a seek table, a trailer or hidden frames that lie."""
    pieces = [seed.stream[at : at + CUT] for at in range(0, len(seed.stream), CUT)]
    parts = [zstandard.compress(piece, 1) for piece in pieces]
    numbers = [number for part, piece in zip(parts, pieces) for number in (len(part), len(piece))]
    for _dummy in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(numbers) - 1))
        numbers[place] = draw(st.sampled_from((0, 1, 7, 8, 9, 512, 2**22, 2**26, 2**26 + 1, 2**31, 2**32 - 1)))
    data = b"".join(parts)
    if draw(st.booleans()):
        hidden = draw(st.binary(max_size=40) | st.just(parts[0]))
        data += frames.skippable(draw(st.sampled_from((len(hidden), 0, 2**32 - 1)))) + hidden
        numbers += draw(st.sampled_from(([8 + len(hidden), 0], [len(hidden), 0], [])))
    if draw(st.booleans()):
        data += frames.seek_table(numbers)
    if draw(st.booleans()):
        end = draw(st.sampled_from((0, 1, len(data) - 1, len(data), 2**40, 2**64 - 1)))
        data += frames.trailer(end, draw(st.sampled_from((0, 1, 2**64 - 1))))
    return data


class Unprinted(bytes):
    """Bytes that no report prints: the seed makes them again."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


def broken_archives() -> st.SearchStrategy[bytes]:
    """An archive that is broken in one layer or two."""
    return _broken_archives().map(Unprinted)


@st.composite
def _broken_archives(draw: st.DrawFn) -> bytes:
    seed = draw(st.sampled_from(seeds()))
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return draw(broken_bytes(seed.data))
    if kind == 1:
        return draw(broken_table(seed))
    stream = draw((broken_headers, broken_configuration, broken_configuration)[kind - 2](seed))
    how = draw(st.integers(0, 3))
    if how == 0:
        return packed(stream)
    if how == 1:
        return zstandard.compress(stream, 1)
    return draw(broken_bytes(stream, 2)) if how == 2 else stream


class Counting:
    """Takes a member's bytes to nowhere, within its size."""

    def __init__(self, size: int) -> None:
        self._size = size

    def write(self, offset: int, data: memoryview) -> None:
        assert offset + len(data) <= self._size

    def clone(self, source_fd: int, source_offset: int, length: int) -> int:
        return 0

    def finish(self) -> None: ...

    def close(self) -> None: ...


CONTEXT = Context(Progress(), lambda _text: None)


def restore_from(path: str) -> None:
    """All that a restore reads of every point, and the plan for it, as ours and as a foreign one."""
    with reader.open_archive(path) as archive:
        for chosen in archive.points:
            with only_our_errors():
                point = foreign_memory.adopt(chosen, archive.read)
                run.check_images(archive, point)
                heads = states.memory_heads(archive.read, point)
                run._marked_corrupt(archive, point)
                for distrust in ("", "it belongs to mallory"):
                    with only_our_errors():
                        planned(point, heads, distrust)
            with only_our_errors():
                archive.extract([(member, Counting(member.size_bytes)) for member in chosen.members], threads=1)


def planned(point: Configuration, heads: states.Heads, distrust: str) -> None:
    facts = restore_values.host(target=restore_values.host().former["vms"])
    plan = test_restore_tree.plan(point, facts, restore_values.request(), heads=heads, distrust=distrust)
    for file in plan.files:
        if file.head:
            memory_image.parse(file.head, "image")


def grow(path: str) -> None:
    with reader.open_archive(path) as archive:
        if not (archive.native and archive.points):
            return
        reader.why_full(archive)
        timestamp = append.next_timestamp(archive, 0)
    with append.ArchiveAppender(path, timestamp=timestamp, sizes=[3], threads=1) as appender:
        appender.add(Member("vda_9.snapshot", Role.LAYER, 0, target="vda", parent="vda_0.qcow2"), BytesSource(b"new"))


def changed(path: str) -> None:
    """Compressed, uncompressed, and grown by a point that is given up."""
    with only_our_errors():
        grow(path)
    with only_our_errors():
        convert.uncompress(convert.compress(path, 1, threads=1, trust=True), threads=1, trust=True)


@fuzz(0.52, broken_archives())
def test_fuzz_archives(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "a.tar")
        Path(path).write_bytes(data)
        uses: tuple[Callable[[str], Any], ...] = (
            lambda name: reader.open_archive(name, use_salvage=True).close(),
            catalog.describe,
            lambda name: catalog.entry(catalog.glance(name)),
            reader.is_damaged_native,
            lambda name: verify_file(name, threads=1),
            restore_from,
            changed,
        )
        for use in uses:
            with only_our_errors():
                use(path)
        left = {name for name in os.listdir(directory) if ".partial" in name or name.startswith(".")}
        assert not left


@st.composite
def broken_places(draw: st.DrawFn) -> dict[str, bytes]:
    """A directory with an archive that is good or not, and odd files beside it."""
    good = draw(st.sampled_from(seeds())).data
    files = {"a.tar": good, "b.tar": draw(broken_archives()), "c.tar.zst": draw(st.binary(max_size=600))}
    for suffix in (".notes", ".protected", ".xml"):
        if draw(st.booleans()):
            files[f"a.tar{suffix}"] = draw(st.binary(max_size=80) | st.sampled_from(ODD).map(str.encode))
    return files


@fuzz(0.1, broken_places())
def test_fuzz_places(files: dict[str, bytes]) -> None:
    """Lists, verifications and retention of a directory with such archives."""
    with tempfile.TemporaryDirectory() as directory:
        for name, data in files.items():
            Path(directory, name).write_bytes(data)
        here = request.Selection(path=directory)
        with only_our_errors():
            info.info(request.InfoRequest(here, query="archives[].config.disks[].path"), CONTEXT)
        with only_our_errors():
            verify.verify(request.VerifyRequest(here, threads=1), CONTEXT)
        with only_our_errors():
            retention.retain(request.RetentionRequest(Rules(last=1), path=directory), CONTEXT, lambda _views: "")
        assert not set(os.listdir(directory)) - set(files)
