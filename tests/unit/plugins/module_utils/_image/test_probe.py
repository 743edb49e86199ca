# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Headers of real images are described rightly; hostile ones are refused in bounded time and memory."""

from __future__ import annotations

import errno
import os
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._image import layers
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import (
    ImageError,
    ImageInfo,
    check_archive_image,
    probe,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import layers as snapshot_layers
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._image.image_tools import (
    bytes_reader,
    qemu,
    reader,
)

GIB = 1 << 30


def make(path: Path, *options: str, fmt: str = "qcow2", size: str = "1G") -> ImageInfo:
    qemu("qemu-img", "create", "-q", "-f", fmt, *options, str(path), size)
    return probe(*reader(path))


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", [512, 65536, 2 << 20])
def test_plain_qcow2(tmp_path: Path, compat: str, cluster: int) -> None:
    info = make(tmp_path / "a", "-o", f"compat={compat},cluster_size={cluster}")
    assert info == ImageInfo("qcow2", GIB, "", "", "", False, 0, False, False, cluster)


@pytest.mark.parametrize("size", ["0", "512", "1T", "64T"])
def test_sizes_that_qemu_makes(tmp_path: Path, size: str) -> None:
    info = make(tmp_path / "a", size=size)
    assert info.virtual_size_bytes == {"0": 0, "512": 512, "1T": 1 << 40, "64T": 64 << 40}[size]


@pytest.mark.parametrize("option", ["extended_l2=on", "compression_type=zstd", "lazy_refcounts=on", "refcount_bits=1"])
def test_known_features(tmp_path: Path, option: str) -> None:
    assert make(tmp_path / "a", "-o", option).format == "qcow2"


def test_backing_and_data_file(tmp_path: Path) -> None:
    make(tmp_path / "base")
    over = make(tmp_path / "over", "-b", str(tmp_path / "base"), "-F", "qcow2")
    assert (over.backing_file, over.backing_format) == (str(tmp_path / "base"), "qcow2")
    outside = make(tmp_path / "a", "-o", f"data_file={tmp_path / 'data'},data_file_raw=on")
    assert outside.data_file == str(tmp_path / "data")


def test_encrypted(tmp_path: Path) -> None:
    secret = ("--object", "secret,id=s,data=geheim")
    info = make(tmp_path / "a", *secret, "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10")
    assert info.encrypted
    check_archive_image(info, allowed_backing=None)


def test_internal_snapshots(tmp_path: Path) -> None:
    make(tmp_path / "a")
    for name in ("one", "z" * 200, "three"):
        qemu("qemu-img", "snapshot", "-c", name, str(tmp_path / "a"))
    assert probe(*reader(tmp_path / "a")).internal_snapshots == 3


@pytest.mark.parametrize(
    ("fmt", "name"),
    [("vmdk", "vmdk"), ("vdi", "vdi"), ("vhdx", "vhdx"), ("vpc", "vhd"), ("qed", "qed"), ("qcow", "qcow")],
)
def test_foreign_formats(tmp_path: Path, fmt: str, name: str) -> None:
    info = make(tmp_path / "a", fmt=fmt, size="64M")
    assert info.format == name
    with pytest.raises(ImageError, match=name):
        check_archive_image(info, allowed_backing=None)


def test_fixed_vhd_luks_iso_and_text_vmdk(tmp_path: Path) -> None:
    assert make(tmp_path / "fixed", "-o", "subformat=fixed", fmt="vpc", size="4M").format == "vhd"
    luks = ("--object", "secret,id=s,data=geheim", "-o", "key-secret=s,iter-time=10")
    assert make(tmp_path / "luks", *luks, fmt="luks", size="4M").format == "luks"
    iso = bytes(32769) + b"CD001" + bytes(4096)
    assert probe(bytes_reader(iso), len(iso)).format == "iso"
    for text in (b"# Disk DescriptorFile\nversion=1\n", b"\n # x\n\nversion=1\n", b"version=3\n"):
        assert probe(bytes_reader(text), len(text)).format == "vmdk"


@pytest.mark.parametrize("data", [b"", b"QFI", b"version", b"hello\nversion=1\n", bytes(100_000)])
def test_anything_else_is_raw(data: bytes) -> None:
    info = probe(bytes_reader(data), len(data))
    assert (info.format, info.virtual_size_bytes) == ("raw", len(data))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small qcow2 with everything a header can point at: backing file, snapshot, bitmap."""
    path = tmp_path_factory.mktemp("probe") / "a"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", str(path), "4M")
    qemu("qemu-img", "bitmap", "--add", str(path), "b0")
    qemu("qemu-img", "snapshot", "-c", "one", str(path))
    qemu("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "/base.qcow2", "-F", "qcow2", str(path))
    data = path.read_bytes()
    assert probe(bytes_reader(data), len(data)).backing_file == "/base.qcow2"
    return data


HOSTILE = {
    "version 1000": (4, ">I", 1000),
    "backing name outside the first cluster": (8, ">Q", 4090),
    "backing name behind the file": (8, ">Q", 1 << 40),
    "backing name in the header": (8, ">Q", 80),
    "backing name too long": (16, ">I", 1024),
    "backing name empty": (16, ">I", 0),
    "clusters of 256 bytes": (20, ">I", 8),
    "clusters of 4 MiB": (20, ">I", 22),
    "absurd cluster bits": (20, ">I", 0xFFFFFFFF),
    "virtual size beyond its L1": (24, ">Q", 1 << 40),
    "virtual size absurd": (24, ">Q", (1 << 64) - 1),
    "encryption unknown": (32, ">I", 3),
    "LUKS without a header": (32, ">I", 2),
    "L1 absurd": (36, ">I", 0xFFFFFFFF),
    "L1 empty": (36, ">I", 0),
    "L1 outside": (40, ">Q", 1 << 40),
    "L1 on the header": (40, ">Q", 0),
    "L1 unaligned": (40, ">Q", 4097),
    "L1 wraps": (40, ">Q", (1 << 64) - 4096),
    "refcount table outside": (48, ">Q", 1 << 50),
    "refcount table unaligned": (48, ">Q", 4104),
    "refcount table absurd": (56, ">I", 0x7FFFFFFF),
    "refcount table missing": (56, ">I", 0),
    "too many snapshots": (60, ">I", 65537),
    "snapshots run out of the file": (60, ">I", 65536),
    "snapshots outside": (64, ">Q", 1 << 45),
    "snapshots unaligned": (64, ">Q", 4100),
    "unknown incompatible feature": (72, ">Q", 1 << 5),
    "another unknown incompatible feature": (72, ">Q", 1 << 63),
    "compression type missing": (72, ">Q", 8),
    "refcounts of 128 bits": (96, ">I", 7),
    "header shorter than itself": (100, ">I", 96),
    "header length odd": (100, ">I", 106),
    "header longer than the cluster": (100, ">I", 8192),
    "header length absurd": (100, ">I", 0xFFFFFFF8),
    "compression type unknown": (104, ">B", 7),
    "extension runs away": (116, ">I", 0x7FFFFFFF),
    "extension runs into the backing name": (116, ">I", 4000),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(image: bytes, case: str) -> None:
    offset, layout, value = HOSTILE[case]
    hostile = bytearray(image)
    struct.pack_into(layout, hostile, offset, value)
    with pytest.raises(ImageError):
        probe(bytes_reader(bytes(hostile)), len(hostile))


def test_dirty_corrupt_and_unnamed_data_file(image: bytes) -> None:
    for bit, attribute in ((1, "dirty"), (2, "corrupt")):
        changed = bytearray(image)
        changed[79] |= bit
        assert getattr(probe(bytes_reader(bytes(changed)), len(changed)), attribute)
    changed = bytearray(image)
    changed[79] |= 4
    assert probe(bytes_reader(bytes(changed)), len(changed)).data_file


def consistent_or_refused(data: bytes) -> bool:
    """Probe with every read counted; True when it was accepted."""
    asked = 0

    def read_at(offset: int, length: int) -> bytes:
        nonlocal asked
        assert offset >= 0 and 0 <= length <= 2 << 20, "a read beyond all bounds"
        asked += length
        return data[offset : offset + length]

    try:
        info = probe(read_at, len(data))
    except ImageError:
        return False
    finally:
        assert asked < 80 << 20
    if info.format == "qcow2":
        assert 512 <= info.cluster_bytes <= 2 << 20
        assert info.internal_snapshots * 40 <= len(data)
        assert "\0" not in info.backing_file and len(info.backing_file) <= 1023
        assert info.virtual_size_bytes <= len(data) * info.cluster_bytes
    return True


def test_every_flipped_bit(image: bytes) -> None:
    end = image.index(b"/base.qcow2") + 20
    accepted = refused = 0
    for position in range(end):
        for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            flipped = bytearray(image)
            flipped[position] ^= mask
            if consistent_or_refused(bytes(flipped)):
                accepted += 1
            else:
                refused += 1
    # Names, feature table texts, compatible features, refcount width and the like may change; pointers may not.
    assert refused > 300, (accepted, refused)


def test_every_truncation(image: bytes) -> None:
    for length in range(4, 4096):
        assert not consistent_or_refused(image[:length]), length
    for length in range(4096, len(image), 97):
        consistent_or_refused(image[:length])


@pytest.mark.parametrize("seed", range(20))
def test_random_damage(image: bytes, seed: int) -> None:
    rng = random.Random(seed)
    for _dummy in range(200):
        damaged = bytearray(image)
        for _dummy in range(rng.randint(1, 12)):
            damaged[rng.randrange(8, rng.choice([112, 600, len(image)]))] = rng.choice(
                [0, 1, 0x7F, 0xFF, rng.randrange(256)]
            )
        consistent_or_refused(bytes(damaged))


def test_many_snapshots_are_walked_in_windows() -> None:
    """65536 entries that are honest but for the last one: found, in a few reads."""
    cluster = 65536
    table = struct.pack(">QIHHIIQII", cluster, 1, 0, 0, 0, 0, 0, 0, 0) * 65535
    table += struct.pack(">QIHHIIQII", 1 << 50, 1, 0, 0, 0, 0, 0, 0, 0)
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, 512, 0, 1, cluster, 2 * cluster, 1, 65536, 3 * cluster
    )
    data = header.ljust(3 * cluster, b"\0") + table
    reads: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        reads.append(length)
        return data[offset : offset + length]

    with pytest.raises(ImageError, match="65536"):
        probe(read_at, len(data))
    assert len(reads) < 10


def test_what_an_archive_may_not_bring() -> None:
    good = ImageInfo("qcow2", GIB, "", "", "", False, 0, False, False, 65536)
    check_archive_image(good, allowed_backing=None)
    check_archive_image(replace(good, encrypted=True, dirty=True), allowed_backing=None)
    check_archive_image(replace(good, backing_file="/etc/shadow"), allowed_backing="vda_0.qcow2")
    for bad in (
        replace(good, data_file="/etc/shadow"),
        replace(good, backing_file="/etc/shadow"),
        replace(good, corrupt=True),
        replace(good, format="vmdk"),
    ):
        with pytest.raises(ImageError):
            check_archive_image(bad, allowed_backing=None)
    with pytest.raises(ImageError):
        check_archive_image(replace(good, data_file="x"), allowed_backing="vda_0.qcow2")


def test_storage_that_does_not_give_its_bytes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an error without a name, nor an image that passes for raw: it would stand on nothing."""
    path = tmp_path / "disk.qcow2"
    make(path)

    def failing(_fd: int, _length: int, _offset: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    assert snapshot_layers._probed_format(str(path)) == "qcow2"
    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(ImageError, match=rf"{path}: it cannot be read \(Input/output error\)"):
        snapshot_layers._probed_format(str(path))
    for read in (layers.header, layers.has_data):
        with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
            read(str(path))
