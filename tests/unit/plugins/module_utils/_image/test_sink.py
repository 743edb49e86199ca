# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sinks restore what sources stored; hostile tables are refused before a byte is written."""

from __future__ import annotations

import errno
import os
import random
import struct
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._image import mapping as mapping_module
from ansible_collections.kvmops.backup.plugins.module_utils._image.mapping import (
    NotStreamableError,
    can_stream_as_raw,
    read_mapping,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError, probe
from ansible_collections.kvmops.backup.plugins.module_utils._image.sink import FileSink, RawSink
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import RawAsQcow2Source
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._image.image_tools import (
    bytes_reader,
    make_raw,
    new_file,
    qemu,
    reader,
    restore,
    store,
)

MIB = 1 << 20
CLUSTER = 65536
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def to_raw(qcow2: Path, raw: Path, seed: int = 0, chunk: int = 4 * MIB) -> None:
    read_at, size = reader(qcow2)
    info = probe(read_at, size)
    assert can_stream_as_raw(info, read_at)
    restore(qcow2, RawSink(new_file(raw), info.virtual_size_bytes, read_mapping(read_at, size)), seed, chunk)


@settings(max_examples=30, deadline=None, print_blob=True, suppress_health_check=FIXTURES)
@given(
    sectors=st.integers(0, 80_000),
    seed=st.integers(0, 1 << 32),
    pieces=st.integers(0, 30),
    chunk=st.sampled_from([4 * MIB, CLUSTER, 70_000]),
)
def test_raw_to_qcow2_to_raw(tmp_path: Path, sectors: int, seed: int, pieces: int, chunk: int) -> None:
    note(f"sectors={sectors} seed={seed} pieces={pieces} chunk={chunk}")
    make_raw(tmp_path / "raw", sectors * 512, seed, pieces)
    store(RawAsQcow2Source(str(tmp_path / "raw")), tmp_path / "q")
    (tmp_path / "back").unlink(missing_ok=True)
    to_raw(tmp_path / "q", tmp_path / "back", seed, chunk)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "raw").read_bytes()
    if chunk % 4096 == 0:
        assert (tmp_path / "back").stat().st_blocks <= (tmp_path / "raw").stat().st_blocks + 8


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cluster", [512, 4096, 65536, 1 << 20])
def test_images_that_qemu_wrote(tmp_path: Path, seed: int, cluster: int) -> None:
    """Clusters in any order, discarded, zeroed, preallocated, shared with an internal snapshot."""
    print("seed", seed)
    rng = random.Random(seed * 7 + cluster)
    qcow2, size = tmp_path / "q", 24 * MIB + 512 * rng.randrange(200)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", str(qcow2), str(size))
    commands = []
    for _dummy in range(60):
        start, length = rng.randrange(size // 512 - 1) * 512, 512 * rng.choice([1, 7, 64, 200, 900])
        length = min(length, size - start)
        verb = rng.choice([f"write -P {rng.randrange(1, 255)}", "write -z", "write -z -u", "discard", "write -P 5"])
        commands += ["-c", f"{verb} {start} {length}"]
    qemu("qemu-io", "-f", "qcow2", *commands[:60], str(qcow2))
    qemu("qemu-img", "snapshot", "-c", "one", str(qcow2))
    qemu("qemu-io", "-f", "qcow2", *commands[60:], str(qcow2))
    to_raw(qcow2, tmp_path / "raw", seed, 65_000)
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(qcow2), str(tmp_path / "expected"))
    assert (tmp_path / "raw").read_bytes() == (tmp_path / "expected").read_bytes()


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    make_raw(tmp_path / "raw", 2 * MIB, seed=3)
    path = tmp_path / "q"
    for options in (["-c"], ["-o", "extended_l2=on"], ["-o", f"data_file={tmp_path / 'd'}"]):
        qemu("qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", str(tmp_path / "raw"), str(path))
        read_at, size = reader(path)
        assert not can_stream_as_raw(probe(read_at, size), read_at)
        with pytest.raises(NotStreamableError):
            read_mapping(read_at, size)
        path.unlink()
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(tmp_path / "raw"), "-F", "raw", str(path))
    read_at, size = reader(path)
    assert not can_stream_as_raw(probe(read_at, size), read_at)
    read_at, size = reader(tmp_path / "raw")
    assert not can_stream_as_raw(probe(read_at, size), read_at)


def test_too_fragmented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raw").write_bytes((b"x" * CLUSTER + bytes(CLUSTER)) * 20)
    store(RawAsQcow2Source(str(tmp_path / "raw")), tmp_path / "q")
    read_at, size = reader(tmp_path / "q")
    info = probe(read_at, size)
    monkeypatch.setattr(mapping_module, "MAX_RUNS", 20)
    assert can_stream_as_raw(info, read_at) and len(read_mapping(read_at, size).members) == 20
    monkeypatch.setattr(mapping_module, "MAX_RUNS", 19)
    assert not can_stream_as_raw(info, read_at)
    with pytest.raises(NotStreamableError):
        read_mapping(read_at, size)


def build(l1: list[int], tables: dict[int, dict[int, int]], clusters: int, virtual: int = 1 << 30) -> bytes:
    """A qcow2 by hand: header, refcount table (1), block (2), L1 (3), L2 tables and data wherever the test says."""
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        3,
        0,
        0,
        16,
        virtual,
        0,
        len(l1),
        3 * CLUSTER,
        CLUSTER,
        1,
        0,
        0,
        0,
        0,
        0,
        4,
        104,
    )
    data = bytearray(clusters * CLUSTER)
    data[: len(header)] = header
    struct.pack_into(f">{len(l1)}Q", data, 3 * CLUSTER, *l1)
    for cluster, entries in tables.items():
        for index, entry in entries.items():
            struct.pack_into(">Q", data, cluster * CLUSTER + index * 8, entry)
    return bytes(data)


COPIED = 1 << 63
HOSTILE = {
    "data cluster twice": ([4 * CLUSTER, 0], {4: {0: 5 * CLUSTER, 9: 5 * CLUSTER}}),
    "data runs overlap": ([4 * CLUSTER, 0], {4: {0: 5 * CLUSTER, 1: 6 * CLUSTER, 7: 6 * CLUSTER, 8: 7 * CLUSTER}}),
    "data on the header": ([4 * CLUSTER, 0], {4: {0: 1}, 5: {0: 0}}),
    "data on the L1 table": ([4 * CLUSTER, 0], {4: {0: 3 * CLUSTER}}),
    "data on its own L2 table": ([4 * CLUSTER, 0], {4: {0: 4 * CLUSTER}}),
    "data on a later L2 table": ([4 * CLUSTER, 5 * CLUSTER], {4: {0: 5 * CLUSTER}}),
    "L2 table twice": ([4 * CLUSTER, 4 * CLUSTER], {4: {0: 5 * CLUSTER}}),
    "L2 table is the L1 table": ([3 * CLUSTER, 0], {}),
    "L2 table behind the file": ([800 * CLUSTER, 0], {}),
    "L2 table between clusters": ([4 * CLUSTER + 512, 0], {}),
    "reserved bits in L1": ([4 * CLUSTER | 1, 0], {}),
    "reserved high bits in L1": ([4 * CLUSTER | 1 << 60, 0], {}),
    "data behind the file": ([4 * CLUSTER, 0], {4: {0: 8 * CLUSTER}}),
    "data runs out of the file": ([4 * CLUSTER, 0], {4: {n: (6 + n) * CLUSTER for n in range(5)}}),
    "data between clusters": ([4 * CLUSTER, 0], {4: {0: 5 * CLUSTER + 512}}),
    "reserved bits in L2": ([4 * CLUSTER, 0], {4: {0: 5 * CLUSTER | 2}}),
    "reserved high bits in L2": ([4 * CLUSTER, 0], {4: {0: 5 * CLUSTER | 1 << 58}}),
}


@pytest.mark.parametrize("case", sorted(set(HOSTILE) - {"data on the header"}))
def test_hostile_tables(case: str) -> None:
    l1, tables = HOSTILE[case]
    image = build(l1, tables, clusters=8)
    with pytest.raises(ImageError) as caught:
        read_mapping(bytes_reader(image), len(image))
    assert not isinstance(caught.value, NotStreamableError)


def test_a_table_named_twice_is_not_read_again_and_again() -> None:
    image = build([4 * CLUSTER, 4 * CLUSTER], {4: {0: 5 * CLUSTER}}, clusters=8)
    info = probe(bytes_reader(image), len(image))
    with pytest.raises(ImageError, match="L1 entry 1"):
        can_stream_as_raw(info, bytes_reader(image))


def test_honest_tables_by_hand() -> None:
    image = build(
        [4 * CLUSTER | COPIED, 0], {4: {0: 7 * CLUSTER, 1: 1, 2: 5 * CLUSTER | COPIED, 8191: 6 * CLUSTER | COPIED}}, 8
    )
    found = read_mapping(bytes_reader(image), len(image))
    assert list(found.pieces(0, len(image))) == [
        (5 * CLUSTER, 2 * CLUSTER, CLUSTER),
        (6 * CLUSTER, 8191 * CLUSTER, CLUSTER),
        (7 * CLUSTER, 0, CLUSTER),
    ]
    assert list(found.pieces(6 * CLUSTER - 10, 6 * CLUSTER + 10)) == [
        (6 * CLUSTER - 10, 3 * CLUSTER - 10, 10),
        (6 * CLUSTER, 8191 * CLUSTER, 10),
    ]


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_never_maps_outside(tmp_path: Path, seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    qcow2 = tmp_path / "q"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", str(qcow2), "256k")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 64k", "-c", "write -P 4 100k 8k", str(qcow2))
    image = qcow2.read_bytes()
    read_mapping(bytes_reader(image), len(image))
    for _dummy in range(300):
        damaged = bytearray(image)
        for _dummy in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(image))] ^= 1 << rng.randrange(8)
        try:
            found = read_mapping(bytes_reader(bytes(damaged)), len(damaged))
        except ImageError:
            continue
        last = 0
        for member, _dummy, length in found.pieces(0, 1 << 62):
            assert member >= last >= 0 and length > 0
            last = member + length
        assert last <= len(damaged)


@pytest.mark.parametrize("order", ["straight", "million pieces in reverse"])
def test_a_full_terabyte_in_bounded_memory(order: str) -> None:
    """Tables of a full 1 TiB disk, made up while they are read; the worst that is accepted stays below 100 MiB."""
    code = f"""
import struct
from ansible_collections.kvmops.backup.plugins.module_utils._image.mapping import read_mapping, can_stream_as_raw
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import probe
C, TABLES = 65536, 2048
first_data = 4 + TABLES
size = (first_data + TABLES * 8192) * C
header = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\\xfb", 3, 0, 0, 16, 1 << 40, 0, TABLES, 3 * C, C, 1, 0, 0, 0, 0, 0, 4, 104)
l1 = struct.pack(f">{{TABLES}}Q", *((4 + n) * C for n in range(TABLES)))
def entries(table):
    first = first_data + table * 8192
    if {order!r} == "straight":
        return range(first * C, (first + 8192) * C, C)
    pieces = range(first_data + TABLES * 8192 - table * 8192 - 16, first_data + TABLES * 8192 - (table + 1) * 8192 - 16, -16)
    return [entry for piece in pieces for entry in range(piece * C, (piece + 16) * C, C)]
def read_at(offset, length):
    cluster = offset // C
    if cluster == 0:
        return header.ljust(C, b"\\0")[offset:offset + length]
    if cluster == 3:
        return l1[offset - 3 * C:][:length]
    if 4 <= cluster < first_data:
        return struct.pack(">8192Q", *entries(cluster - 4))
    return bytes(length)
mapping = read_mapping(read_at, size)
assert sum(mapping.counts) == TABLES * 8192
pieces = list(mapping.pieces(first_data * C + 15 * C, first_data * C + 17 * C))
print(len(mapping.members), next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
assert sum(length for _, _, length in pieces) == 2 * C
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs, kib = map(int, done.stdout.split())
    assert runs == (2048 * 512 if order != "straight" else 2048)
    assert kib < 100 << 10


def test_file_sink_leaves_holes(tmp_path: Path) -> None:
    content = os.urandom(4096) + bytes(20 * MIB) + b"x" + bytes(4095) + os.urandom(3) + bytes(10_000)
    (tmp_path / "member").write_bytes(content)
    restore(tmp_path / "member", FileSink(new_file(tmp_path / "disk"), len(content)), seed=1)
    assert (tmp_path / "disk").read_bytes() == content
    assert (tmp_path / "disk").stat().st_blocks * 512 <= 4 * 4096


@settings(max_examples=60, deadline=None, print_blob=True, suppress_health_check=FIXTURES)
@given(
    pieces=st.lists(st.tuples(st.booleans(), st.integers(1, 20_000)), max_size=12),
    chunk=st.sampled_from([4 * MIB, 4096, 5000, 1]),
)
def test_file_sink_is_byte_exact(tmp_path: Path, pieces: list[tuple[bool, int]], chunk: int) -> None:
    content = b"".join(os.urandom(length) if filled else bytes(length) for filled, length in pieces)
    if chunk == 1:
        content = content[-300:]
    (tmp_path / "member").write_bytes(content)
    (tmp_path / "disk").unlink(missing_ok=True)
    restore(tmp_path / "member", FileSink(new_file(tmp_path / "disk"), len(content)), len(content), chunk)
    assert (tmp_path / "disk").read_bytes() == content


def test_errors_name_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_dummy: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sink = FileSink(new_file(tmp_path / "disk"), 100)
    with pytest.raises(ValueError, match="do not fit"):
        sink.write(50, memoryview(bytes(51)))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TargetError, match=rf"{tmp_path / 'disk'}.*durable.*No space left"):
        sink.finish()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TargetError, match=rf"{tmp_path / 'disk'}.*cannot be written.*No space left"):
        sink.write(7, memoryview(b"x"))
    sink.close()
    reading, writing = os.pipe()
    with pytest.raises(TargetError, match="not a regular file"):
        FileSink(writing, 10)
    os.close(reading)
    os.close(writing)


@pytest.fixture(params=["xfs", "btrfs"])
def reflink_directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    image, mount = tmp_path / "fs", tmp_path / "mnt"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    made = subprocess.run([f"mkfs.{request.param}", "-q", str(image)], capture_output=True, text=True, check=False)
    mounted = (
        made.returncode
        or subprocess.run(["mount", "-o", "loop", str(image), str(mount)], capture_output=True, check=False).returncode
    )
    if mounted:
        pytest.skip(f"{request.param} cannot be mounted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def archive_with(member: bytes, path: Path) -> int:
    """A file with the member's bytes at offset 8192; opened for reading."""
    path.write_bytes(os.urandom(8192) + member + b"something behind")
    os.sync()
    return os.open(path, os.O_RDONLY)


def test_clone_file(reflink_directory: Path) -> None:
    content = os.urandom(9 * MIB + 777)
    archive = archive_with(content, reflink_directory / "archive")
    free = os.statvfs(reflink_directory).f_bavail
    sink = FileSink(new_file(reflink_directory / "disk"), len(content))
    done = sink.clone(archive, 8192, len(content))
    assert done == len(content) // 4096 * 4096
    sink.write(done, memoryview(content)[done:])
    sink.finish()
    sink.close()
    os.close(archive)
    assert (reflink_directory / "disk").read_bytes() == content
    used = (free - os.statvfs(reflink_directory).f_bavail) * os.statvfs(reflink_directory).f_frsize
    assert used < 2 * MIB


def test_clone_raw(reflink_directory: Path) -> None:
    make_raw(reflink_directory / "raw", 8 * MIB, seed=4, pieces=10)
    store(RawAsQcow2Source(str(reflink_directory / "raw")), reflink_directory / "q")
    read_at, size = reader(reflink_directory / "q")
    archive = archive_with((reflink_directory / "q").read_bytes(), reflink_directory / "archive")
    sink = RawSink(new_file(reflink_directory / "disk"), 8 * MIB, read_mapping(read_at, size))
    assert sink.clone(archive, 8192, size) == size
    sink.finish()
    sink.close()
    os.close(archive)
    assert (reflink_directory / "disk").read_bytes() == (reflink_directory / "raw").read_bytes()


def test_where_blocks_cannot_be_shared(tmp_path: Path) -> None:
    content = os.urandom(3 * 4096)
    archive = archive_with(content, tmp_path / "archive")
    sink = FileSink(new_file(tmp_path / "disk"), len(content))
    assert sink.clone(archive, 8192 + 512, 4096) == 0
    done = sink.clone(archive, 8192, len(content))
    assert done in (0, len(content))
    sink.write(done, memoryview(content)[done:])
    sink.finish()
    sink.close()
    os.close(archive)
    assert (tmp_path / "disk").read_bytes() == content


def test_a_clone_that_fails_leaves_the_data_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cloned is only what lies before the first run that could not be."""

    def refuse_the_second(fd: int, request: int, argument: bytes) -> None:
        if struct.unpack("=qQQQ", argument)[3] == 3 * CLUSTER:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("fcntl.ioctl", refuse_the_second)
    image = build([4 * CLUSTER, 0], {4: {0: 5 * CLUSTER, 3: 6 * CLUSTER, 5: 7 * CLUSTER}}, 8)
    sink = RawSink(new_file(tmp_path / "disk"), 1 << 30, read_mapping(bytes_reader(image), len(image)))
    assert sink.clone(-1, 4096, len(image)) == 6 * CLUSTER
    assert sink.clone(-1, 512, len(image)) == 5 * CLUSTER
    sink.close()


def test_entries_are_big_endian() -> None:
    assert list(mapping_module._read_entries(bytes_reader(b"\0" * 7 + b"\1\2"), 0, 2)) == list(array("Q", [1, 2 << 56]))
