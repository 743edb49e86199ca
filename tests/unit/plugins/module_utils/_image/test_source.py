# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sources give every byte, never zeros for what could not be read, and a raw disk as a clean qcow2."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from ansible_collections.kvmops.backup.plugins.module_utils._errors import SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError, probe
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import (
    CLUSTER_BYTES,
    BytesSource,
    FileSource,
    HeadSource,
    RawAsQcow2Source,
    plan_layout,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image.sparse import _resident_pages
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._image.image_tools import (
    CHUNK,
    make_raw,
    qemu,
    reader,
    store,
)

MIB = 1 << 20
TIB = 1 << 40
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def assert_same_disk(raw: Path, qcow2: Path) -> None:
    qemu("qemu-img", "check", "-q", "-f", "qcow2", str(qcow2))
    qemu("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", str(raw), str(qcow2))


@settings(max_examples=40, deadline=None, print_blob=True, suppress_health_check=FIXTURES)
@given(size=st.integers(0, 40 * MIB), seed=st.integers(0, 1 << 32), pieces=st.integers(0, 30))
def test_raw_as_qcow2_is_the_same_disk(tmp_path: Path, size: int, seed: int, pieces: int) -> None:
    note(f"size={size} seed={seed} pieces={pieces}")
    make_raw(tmp_path / "raw", size, seed, pieces)
    source = RawAsQcow2Source(str(tmp_path / "raw"))
    assert source.virtual_size_bytes == -(-size // 512) * 512
    store(source, tmp_path / "q")
    assert_same_disk(tmp_path / "raw", tmp_path / "q")
    assert (tmp_path / "q").stat().st_size == source.size_bytes
    assert probe(*reader(tmp_path / "q")).virtual_size_bytes == source.virtual_size_bytes


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 65535, 65536, 65537, 512 * MIB - 1, 512 * MIB, 512 * MIB + 1])
def test_sizes_with_data_at_both_ends(tmp_path: Path, size: int) -> None:
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.write(b"first"[:size])
        file.truncate(size)
        file.seek(max(size - 3, 0))
        file.write(b"end"[: min(size, 3)])
    store(RawAsQcow2Source(str(raw)), tmp_path / "q")
    assert_same_disk(raw, tmp_path / "q")


def test_l1_larger_than_a_cluster(tmp_path: Path) -> None:
    """Beyond 4 TiB the L1 table needs more than one cluster."""
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(9 * TIB + 512)
        for place in (0, 4 * TIB - 5, 4 * TIB + 3 * MIB, 9 * TIB):
            file.seek(place)
            file.write(b"data here")
    store(RawAsQcow2Source(str(raw)), tmp_path / "q")
    assert_same_disk(raw, tmp_path / "q")


def test_more_than_one_refcount_block(tmp_path: Path) -> None:
    """2.1 GiB of written zeros: members of this size need a second refcount block, and hold no data cluster but two."""
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2100 * MIB)
        file.write(b"first")
        file.seek(2100 * MIB - 4)
        file.write(b"last")
    qemu("qemu-io", "-f", "raw", "-c", f"write -q -P 7 {1000 * MIB} 128k", str(raw))
    source = RawAsQcow2Source(str(raw))
    if source.size_bytes < 2000 * MIB:
        # This file system tells unwritten ranges as holes; then the layout is forced to think otherwise.
        source._layout = plan_layout(2100 * MIB, [(0, 2100 * MIB)])
        source.size_bytes = source._layout.clusters * CLUSTER_BYTES
        source.late_from = source._layout.l2_at * CLUSTER_BYTES // CHUNK * CHUNK
        source._used = bytearray(-(-source._layout.clusters // 8))
        source._mark_used([0, *range(source._layout.l2_at, source._layout.clusters)])
        source._unread_clusters = source._layout.l2_at - 1
    store(source, tmp_path / "q")
    assert_same_disk(raw, tmp_path / "q")


def test_zero_clusters_are_dropped(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes((b"x" * 65536 + bytes(65536 * 3)) * 40)
    store(RawAsQcow2Source(str(raw)), tmp_path / "q")
    assert_same_disk(raw, tmp_path / "q")
    zeros = [line for line in qemu("qemu-img", "map", str(tmp_path / "q")).splitlines()[1:] if line]
    assert sum(int(line.split()[1], 16) for line in zeros) == 40 * 65536


def test_fragmented_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[RawAsQcow2Source.__module__]
    monkeypatch.setattr(module, "plan_layout", functools.partial(plan_layout, max_runs=10))
    make_raw(tmp_path / "raw", 60 * MIB, seed=5, pieces=120)
    source = RawAsQcow2Source(str(tmp_path / "raw"))
    assert len(source._layout.run_guest) <= 10
    store(source, tmp_path / "q")
    assert_same_disk(tmp_path / "raw", tmp_path / "q")


@settings(max_examples=200, deadline=None, print_blob=True)
@given(
    st.lists(st.tuples(st.integers(0, 30_000_000_000), st.integers(1, 3_000_000_000)), max_size=30),
    st.integers(1, 40),
)
def test_layout_places_nothing_twice(pieces: list[tuple[int, int]], max_runs: int) -> None:
    extents, at = [], 0
    for gap, length in pieces:
        extents.append((at + gap, at + gap + length))
        at += gap + length
    layout = plan_layout(at, extents, max_runs=max_runs)
    runs = list(zip(layout.run_guest, layout.run_count, layout.run_member))
    assert len(runs) <= max_runs
    assert (
        1 + sum(count for _dummy, count, _dummy in runs)
        == layout.l2_at
        <= layout.l1_at
        < layout.table_at
        < layout.blocks_at
    )
    for (guest, count, member), (next_guest, _dummy, next_member) in zip(runs, runs[1:]):
        assert guest + count <= next_guest and member + count == next_member
    for start, end in extents:
        assert any(g <= start // CLUSTER_BYTES and -(-end // CLUSTER_BYTES) <= g + c for g, c, _dummy in runs)
    tables = {cluster // 8192 for guest, count, _dummy in runs for cluster in (guest, guest + count - 1)}
    assert tables <= set(layout.l2_indexes) and list(layout.l2_indexes) == sorted(set(layout.l2_indexes))
    assert (layout.clusters - layout.blocks_at) * 32768 >= layout.clusters
    assert (layout.blocks_at - layout.table_at) * 8192 >= layout.clusters - layout.blocks_at


def test_too_large_for_qcow2() -> None:
    with pytest.raises(ImageError, match="more than a qcow2"):
        plan_layout(3 << 50, [])


def test_late_chunks_cannot_come_early(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"x" * 20 * MIB)
    source = RawAsQcow2Source(str(tmp_path / "raw"))
    last = (source.size_bytes - 1) // CHUNK * CHUNK
    assert last >= source.late_from > 0
    with pytest.raises(RuntimeError, match="before"):
        source.read_chunk(last, memoryview(bytearray(source.size_bytes - last)))
    with pytest.raises(ValueError, match="whole clusters"):
        source.read_chunk(100, memoryview(bytearray(CLUSTER_BYTES)))
    source.close()


@settings(max_examples=30, deadline=None, print_blob=True, suppress_health_check=FIXTURES)
@given(size=st.integers(0, 20 * MIB), seed=st.integers(0, 1 << 32), pieces=st.integers(0, 60))
def test_file_source_is_byte_exact(tmp_path: Path, size: int, seed: int, pieces: int) -> None:
    note(f"size={size} seed={seed} pieces={pieces}")
    make_raw(tmp_path / "raw", size, seed, pieces)
    store(FileSource(str(tmp_path / "raw")), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "raw").read_bytes()


def test_first_bytes_only(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(os.urandom(3 * MIB))
    source = FileSource(str(tmp_path / "raw"), size_bytes=2 * MIB + 5)
    assert source.clone_fd is not None and source.late_from == source.size_bytes == 2 * MIB + 5
    store(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "raw").read_bytes()[: 2 * MIB + 5]
    with pytest.raises(SourceError, match="were expected"):
        FileSource(str(tmp_path / "raw"), size_bytes=4 * MIB)


def test_bytes_source() -> None:
    source = BytesSource(b"abc" + bytes(100))
    buffer = memoryview(bytearray(3))
    assert source.read_chunk(0, buffer) and bytes(buffer) == b"abc"
    assert not source.read_chunk(3, memoryview(bytearray(100)))
    assert (source.size_bytes, source.clone_fd, source.late_from) == (103, None, 103)


@pytest.mark.parametrize("kind", [FileSource, RawAsQcow2Source])
def test_unreadable_sector_is_an_error_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[FileSource] | type[RawAsQcow2Source]
) -> None:
    path = tmp_path / "raw"
    path.write_bytes(os.urandom(6 * MIB))
    real, bad = os.preadv, 5 * MIB + 4096

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= bad < offset + len(buffers[0]):
            if offset == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, [buffers[0][: bad - offset]], offset)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(SourceError, match=rf"{path}.*offset {bad}: Input/output error"):
        store(kind(str(path)), tmp_path / "out")


@pytest.mark.parametrize("kind", [FileSource, RawAsQcow2Source])
@pytest.mark.parametrize("hole_at_end", [False, True])
def test_a_file_that_shrinks_is_an_error(
    tmp_path: Path, kind: type[FileSource] | type[RawAsQcow2Source], hole_at_end: bool
) -> None:
    path = tmp_path / "raw"
    path.write_bytes(os.urandom(6 * MIB))
    if hole_at_end:
        os.truncate(path, 30 * MIB)
    source = kind(str(path))
    os.truncate(path, 2 * MIB)
    with pytest.raises(SourceError, match=r"were expected|became shorter"):
        store(source, tmp_path / "out")


def test_not_a_disk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", "fifo", "."):
        with pytest.raises(SourceError):
            FileSource(str(tmp_path / name))


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    backing = tmp_path / "backing"
    make_raw(backing, 24 * MIB, seed=9, pieces=20)
    done = subprocess.run(["losetup", "-f", "--show", str(backing)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device here: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    yield device
    subprocess.run(["losetup", "-d", str(device)], check=True)


def test_block_device(tmp_path: Path, loop_device: Path) -> None:
    source = RawAsQcow2Source(str(loop_device))
    assert source.virtual_size_bytes == 24 * MIB
    store(source, tmp_path / "q")
    assert_same_disk(tmp_path / "backing", tmp_path / "q")
    plain = FileSource(str(loop_device))
    assert plain.clone_fd is None
    store(plain, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "backing").read_bytes()


def test_page_cache_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(os.urandom(96 * MIB))
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if any(_resident_pages(fd, 0, 96 * MIB)):
            pytest.skip("this file system keeps its pages")
        hot = os.pread(fd, 4 * MIB, 40 * MIB)
        before = _resident_pages(fd, 0, 96 * MIB)
        source = FileSource(str(path))
        buffer = memoryview(bytearray(CHUNK))
        for offset in range(0, 96 * MIB, CHUNK):
            assert source.read_chunk(offset, buffer)
            assert offset != 40 * MIB or bytes(buffer) == hot
        source.close()
        after = _resident_pages(fd, 0, 96 * MIB)
    finally:
        os.close(fd)
    lost = sum(1 for was, still in zip(before, after) if was and not still)
    added = sum(1 for was, still in zip(before, after) if still and not was)
    assert lost == 0
    # What shares a block of 1 MiB with pages that were there stays as well.
    assert added * 4096 <= 4 * MIB


@pytest.mark.parametrize("kind", ["FileSource", "RawAsQcow2Source"])
def test_a_terabyte_of_holes_takes_seconds_and_little_memory(tmp_path: Path, kind: str) -> None:
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(TIB)
        for part in range(50):
            file.seek(part * TIB // 50 + 12345)
            file.write(b"data" * 3000)
    code = f"""
import time
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import {kind}
begin, found = time.monotonic(), 0
source = {kind}({str(raw)!r})
buffer = memoryview(bytearray({CHUNK}))
for offset in range(0, source.size_bytes, {CHUNK}):
    found += source.read_chunk(offset, buffer[:min({CHUNK}, source.size_bytes - offset)])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(found, time.monotonic() - begin, peak)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, seconds, kib = done.stdout.split()
    assert int(found) == (50 if kind == "FileSource" else 2)
    assert float(seconds) < 20
    assert int(kib) < 100 << 10


@pytest.mark.parametrize("data", [bytes(3 * MIB), bytes(range(256)) * 12288])
def test_a_file_with_another_head(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    source = HeadSource(str(tmp_path / "file"), b"head" * 500_000)  # ends within a chunk
    assert source.clone_fd is None and source.size_bytes == len(data)
    found = b""
    for offset in range(0, len(data), MIB):
        buffer = bytearray(MIB)
        found += bytes(buffer) if source.read_chunk(offset, memoryview(buffer)) else bytes(MIB)
    source.close()
    assert found == b"head" * 500_000 + data[2_000_000:]
