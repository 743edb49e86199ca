# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""VMDKs become what a guest sees of them, whoever wrote them; those made to deceive are refused in bounded memory and time."""

from __future__ import annotations

import os
import struct
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _libraries
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import AsQcow2Source
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import vmdk
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.package import PackageFile
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._ovf import packages

GRAIN = packages.GRAIN_BYTES
DATA = packages.content((5 << 20) + 512 * 3, grains=(0, 1, 5, 40, 80))


class Opened:
    """A file of a package at an offset of another file."""

    def __init__(self, path: Path, data: bytes, offset: int = 1536) -> None:
        path.write_bytes(b"\xff" * offset + data + b"\xff" * 700)
        self.fd = os.open(path, os.O_RDONLY)
        self.file = PackageFile("disk1.vmdk", ((self.fd, offset, len(data)),))

    def __enter__(self) -> PackageFile:
        return self.file

    def __exit__(self, *_exception: object) -> None:
        os.close(self.fd)


def seen(disk: vmdk.SparseVmdk, step: int = 4 << 20) -> bytes:
    """What a guest sees, read in steps."""
    out = bytearray(disk.size_bytes)
    for begin, end in disk.data_ranges(0, disk.size_bytes):
        for offset in range(begin, end, step):
            part = memoryview(bytearray(min(step, end - offset)))
            if disk.fill(offset, part):
                out[offset : offset + len(part)] = part
    return bytes(out)


def as_qcow2(source: AsQcow2Source, path: Path) -> None:
    with open(path, "wb") as file:
        for offset in range(0, source.size_bytes, 4 << 20):
            buffer = memoryview(bytearray(min(4 << 20, source.size_bytes - offset)))
            file.seek(offset)
            file.write(buffer if source.read_chunk(offset, buffer) else bytes(len(buffer)))


@pytest.mark.parametrize("step", [4 << 20, 64 << 10, 3 * 512])
@pytest.mark.parametrize(
    "make", [packages.stream_vmdk, packages.sparse_vmdk, lambda data: packages.sparse_vmdk(data, shuffled=True)]
)
def test_content(make: Callable[[bytes], bytes], step: int, tmp_path: Path) -> None:
    with Opened(tmp_path / "file", make(DATA)) as file:
        assert seen(vmdk.SparseVmdk(file), step) == DATA


def test_grains_in_any_order(tmp_path: Path) -> None:
    """A streamOptimized disk that others have written to has its grains where there was room."""
    data = packages.content(8 << 20, grains=range(100))
    made = packages.stream_vmdk(data)
    with Opened(tmp_path / "file", made) as file:
        assert seen(vmdk.SparseVmdk(file)) == data
    # the first grain once more at the end, far from its neighbours
    at = GRAIN  # of the first grain
    size = struct.unpack_from("<QI", made, at)[1]
    moved = made + made[at : at + 12 + size].ljust(-(-(12 + size) // 512) * 512, b"\0")
    table_at = made.rindex(struct.pack("<I", at // 512))
    moved = bytearray(moved)
    struct.pack_into("<I", moved, table_at, len(made) // 512)
    footer = made[-1024:-512]
    moved = bytes(moved) + footer + bytes(512)
    with Opened(tmp_path / "file", moved) as file:
        assert seen(vmdk.SparseVmdk(file)) == data


@pytest.mark.parametrize("subformat", ["streamOptimized", "monolithicSparse"])
@pytest.mark.parametrize("isal", [False, True])
def test_as_qemu_has_it(subformat: str, isal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by qemu-img, read by us, the same to qemu-img. With another library for zlib's work, as isal is."""
    if isal:
        monkeypatch.setattr(_libraries, "isal_zlib", zlib, raising=False)
    (tmp_path / "raw").write_bytes(DATA)
    subprocess.run(
        [
            "qemu-img",
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            f"subformat={subformat}",
            tmp_path / "raw",
            tmp_path / "vmdk",
        ],
        check=True,
    )
    with Opened(tmp_path / "file", (tmp_path / "vmdk").read_bytes()) as file:
        source = AsQcow2Source(vmdk.SparseVmdk(file))
        as_qcow2(source, tmp_path / "qcow2")
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", tmp_path / "qcow2"], check=True)
    subprocess.run(
        ["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", tmp_path / "raw", tmp_path / "qcow2"], check=True
    )


def test_zero_grains_are_dropped(tmp_path: Path) -> None:
    data = bytes(GRAIN) + b"x" * GRAIN + bytes(2 * GRAIN)
    made = bytearray(packages.sparse_vmdk(b"y" * GRAIN + data[GRAIN:]))
    made[made.index(b"y" * 512) : made.index(b"y" * 512) + GRAIN] = bytes(GRAIN)  # a grain that is there, and all zeros
    with Opened(tmp_path / "file", bytes(made)) as file:
        source = AsQcow2Source(vmdk.SparseVmdk(file))
        as_qcow2(source, tmp_path / "qcow2")
    shown = subprocess.run(
        ["qemu-img", "map", "--output=json", "-f", "qcow2", tmp_path / "qcow2"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert shown.count('"data": true') == 1


def over(entries: list[list[int]], first: int) -> list[list[int]]:
    return [[first if entry else 0 for entry in table] for table in entries]


SECTORS = len(DATA) // 512
HOSTILE = {
    "1 text with extents": packages.text("monolithicFlat", 1, extents='RW 1 FLAT "/etc/passwd" 0').ljust(1024, b"\n"),
    "2 no capacity": packages.stream_vmdk(DATA, first={"capacity": 0}),
    "2 no capacity, flat": packages.stream_vmdk(
        DATA, first={"capacity": 0}, own_text=packages.text("monolithicFlat", 1, extents='RW 1 FLAT "/etc/passwd" 0')
    ),
    "3 parent": packages.stream_vmdk(
        DATA, own_text=packages.text("streamOptimized", 1, 'parentFileNameHint="/etc/passwd"')
    ),
    "4 parent of a sparse one": packages.sparse_vmdk(
        DATA, own_text=packages.text("monolithicSparse", 1, 'parentFileNameHint="x"')
    ),
    "4 parent by id": packages.stream_vmdk(
        DATA, own_text=packages.text("streamOptimized", 1).replace(b"ffffffff", b"0badcafe")
    ),
    "8 several extents": packages.stream_vmdk(
        DATA, own_text=packages.text("streamOptimized", 1, extents='RW 1 SPARSE "a"\nRW 1 SPARSE "b"')
    ),
    "8 flat extent": packages.stream_vmdk(
        DATA, own_text=packages.text("streamOptimized", 1, extents='RW 1 FLAT "disk1.vmdk" 0')
    ),
    "9 extent elsewhere": packages.stream_vmdk(
        DATA, own_text=packages.text("streamOptimized", 1, extents='RW 1 SPARSE "../a"')
    ),
    "10 1 PiB": packages.stream_vmdk(DATA, first={"capacity": 2**41}, last={"capacity": 2**41}),
    "10 60 TiB": packages.stream_vmdk(DATA, first={"capacity": 60 * 2**31}, last={"capacity": 60 * 2**31}),
    "11 footer with another capacity": packages.stream_vmdk(DATA, last={"capacity": SECTORS + 128}),
    "11 footer with another grain": packages.stream_vmdk(DATA, last={"grain": 64}),
    "11 footer without a directory": packages.stream_vmdk(DATA, last={"directory_at": 2**64 - 1}),
    "12 cut off": packages.stream_vmdk(DATA)[:-2048],
    "12 cut off in the header": packages.stream_vmdk(DATA)[:300],
    "12 directory outside": packages.stream_vmdk(DATA, last={"directory_at": 2**40}),
    "no descriptor": packages.stream_vmdk(DATA, first={"text_at": 0, "text_sectors": 0}),
    "descriptor outside": packages.stream_vmdk(DATA, first={"text_at": 2**50}),
    "huge descriptor": packages.stream_vmdk(DATA, first={"text_sectors": 2**60}),
    "another type": packages.stream_vmdk(DATA, own_text=packages.text("monolithicSparse", 1)),
    "vmfs": packages.stream_vmdk(DATA, own_text=packages.text("vmfs", 1)),
    "unknown compression": packages.stream_vmdk(DATA, first={"compression": 7}, last={"compression": 7}),
    "version 9": packages.stream_vmdk(DATA, first={"version": 9}, last={"version": 9}),
    "grain of 2^40": packages.stream_vmdk(DATA, first={"grain": 2**40}, last={"grain": 2**40}),
    "grain of 3": packages.stream_vmdk(DATA, first={"grain": 3}, last={"grain": 3}),
    "no grain": packages.stream_vmdk(DATA, first={"grain": 0}, last={"grain": 0}),
    "tables of 2^31 entries": packages.stream_vmdk(DATA, first={"per_table": 2**31}, last={"per_table": 2**31}),
    "marker of another grain": packages.stream_vmdk(DATA, marker=lambda lba: lba + 128),
    "all entries name one grain": packages.stream_vmdk(DATA, tables=lambda tables: over(tables, 128)),
    "entries outside": packages.stream_vmdk(DATA, tables=lambda tables: over(tables, 2**31)),
    "table outside": packages.stream_vmdk(DATA, directory=lambda entries: [2**31 for _each in entries]),
    "table in the header": packages.stream_vmdk(
        b"x" * (65 << 20), directory=lambda entries: [1, 1, 1], deflate=lambda grain: b""
    ),
    "grain that inflates to 1 GiB": packages.stream_vmdk(
        DATA, deflate=lambda grain: zlib.compress(bytes(100 << 20), 9)
    ),
    "grain that inflates to a little more": packages.stream_vmdk(
        DATA, deflate=lambda grain: zlib.compress(grain + b"x")
    ),
    "grain that is cut off": packages.stream_vmdk(DATA, deflate=lambda grain: zlib.compress(grain)[:-9]),
    "grain of garbage": packages.stream_vmdk(DATA, deflate=lambda grain: b"\xff" * 100),
    "empty grain": packages.stream_vmdk(DATA, deflate=lambda grain: b""),
    "grain without an end": packages.stream_vmdk(DATA, deflate=lambda grain: zlib.compress(os.urandom(GRAIN * 3))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    with Opened(tmp_path / "file", HOSTILE[name]) as file, pytest.raises(ImageError) as error:
        seen(vmdk.SparseVmdk(file))
    assert time.monotonic() - begin < 10
    assert len(str(error.value)) > 20


def test_overlapping_tables(tmp_path: Path) -> None:
    """Two entries of the directory with the same table, or with one that begins in the other, would read grains again and again."""
    data = b"x" * GRAIN + bytes(64 << 20)
    for change in (lambda entries: [entries[0]] * len(entries), lambda entries: [entries[0], entries[0] + 1, 0]):
        made = packages.stream_vmdk(data, directory=change)
        with Opened(tmp_path / "file", made) as file, pytest.raises(ImageError, match="overlaps"):
            seen(vmdk.SparseVmdk(file))


def test_more_grains_than_bytes(tmp_path: Path) -> None:
    """A sparse disk whose table names one grain for all: gigabytes from a small file."""
    made = bytearray(packages.sparse_vmdk(packages.content(20 << 20, grains=[0])))
    first = 2 * packages.GRAIN
    table = made.index(struct.pack("<I", first), len(made) - 4096 - 512)
    made[table : table + 320 * 4] = struct.pack("<I", first) * 320
    with Opened(tmp_path / "file", bytes(made)) as file, pytest.raises(ImageError, match="more than its file can hold"):
        seen(vmdk.SparseVmdk(file))
