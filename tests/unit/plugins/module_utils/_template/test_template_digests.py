# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The digest of what a guest sees: the same in every layout, and never an old one."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._image.served import ServedImage
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._template import digests

CHUNK = 4 << 20
SIZE = 2 * CHUNK + CHUNK // 2 + 512


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run_dir", "cache_dir"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(_paths, name, lambda path=tmp_path / name: str(path))


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Data at the front and in the last chunk, a hole between, and zeros that were written."""
    seed = random.randrange(2**32)
    print("seed", seed)
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.write(random.Random(seed).randbytes(100_000))
        file.write(bytes(200_000))
        file.seek(2 * CHUNK + 1000)
        file.write(random.Random(seed + 1).randbytes(3000))
        file.truncate(SIZE)
    return path


def expected(raw: Path) -> str:
    data = raw.read_bytes()
    chunks = [hashlib.sha256(data[at : at + CHUNK]).digest() for at in range(0, len(data), CHUNK)]
    return hashlib.sha256(b"".join(chunks)).hexdigest()


def read(path: Path, fmt: str) -> str:
    return digests.read(str(path), fmt, Progress(), threads=2)


def test_the_layout_does_not_matter(raw: Path, tmp_path: Path) -> None:
    want = expected(raw)
    assert read(raw, "raw") == want
    for number, options in enumerate([["-o", "cluster_size=4k"], ["-c"], ["-S", "0"], ["-o", "preallocation=full"]]):
        made = tmp_path / f"{number}.qcow2"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, made)
        assert read(made, "qcow2") == want, options


@pytest.mark.parametrize("size", [512, CHUNK, SIZE])
def test_a_hole_at_the_end_counts_as_zeros(tmp_path: Path, size: int) -> None:
    path = tmp_path / "empty.raw"
    with open(path, "wb") as file:
        file.truncate(size)
    assert read(path, "raw") == expected(path)


def test_a_disk_of_several_layers_is_what_the_guest_sees(raw: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", raw, top)
    assert read(top, "qcow2") == expected(raw)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 4096 512", str(top)], check=True, capture_output=True)
    changed = tmp_path / "changed.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", top, changed)
    assert read(top, "qcow2") == expected(changed) != expected(raw)


@pytest.mark.parametrize("at", [0, CHUNK + 17, SIZE - 1])
def test_one_byte_changes_it(raw: Path, at: int) -> None:
    before = read(raw, "raw")
    with open(raw, "r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))
    assert read(raw, "raw") != before


def test_it_is_read_once_and_again_after_a_write_that_hides(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_TICK_S", 0.0)
    reads: list[str] = []
    really = digests.read

    def counted(path: str, fmt: str, progress: Progress, *, threads: int = 0) -> str:
        reads.append(path)
        return really(path, fmt, progress, threads=threads)

    monkeypatch.setattr(digests, "read", counted)
    assert digests.cached(str(raw), "raw") is None
    first = digests.of_disk(str(raw), "raw", Progress())
    assert digests.of_disk(str(raw), "raw", Progress()) == first == digests.cached(str(raw), "raw")
    assert len(reads) == 1
    status = os.stat(raw)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and os.stat(raw).st_ctime_ns == status.st_ctime_ns:
        with open(raw, "r+b") as file:
            file.write(b"changed behind our back")
        os.utime(raw, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(raw).st_mtime_ns == status.st_mtime_ns
    assert digests.cached(str(raw), "raw") is None
    assert digests.of_disk(str(raw), "raw", Progress()) == expected(raw) != first


def test_a_change_of_the_owner_while_it_is_read_is_no_write(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt gives a template's disks to QEMU when another clone starts."""
    really = digests.read
    disturbances = [os.chmod, lambda path, _mode: Path(path).write_bytes(b"written")]

    def disturbed(path: str, fmt: str, progress: Progress, *, threads: int = 0) -> str:
        digest = really(path, fmt, progress, threads=threads)
        if disturbances:
            disturbances.pop(0)(path, 0o640)
        return digest

    monkeypatch.setattr(digests, "read", disturbed)
    last = disturbances.pop()
    assert digests.of_disk(str(raw), "raw", Progress()) == expected(raw)
    disturbances.append(last)
    with pytest.raises(SourceError, match="it was written to while it was read"):
        digests.of_disk(str(raw), "raw", Progress())


def test_a_write_to_a_lower_layer_is_seen(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_TICK_S", 0.0)
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", raw, top)
    digests.of_disk(str(top), "qcow2", Progress())
    assert digests.cached(str(top), "qcow2")
    with open(raw, "r+b") as file:
        file.write(b"x")
    assert digests.cached(str(top), "qcow2") is None


def test_a_file_that_was_just_written_is_not_believed_next_time(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_TICK_S", 600.0)
    os.utime(raw)
    digests.of_disk(str(raw), "raw", Progress())
    assert digests.cached(str(raw), "raw") is None


def test_the_reason_of_qemu_nbd_is_told(tmp_path: Path) -> None:
    with pytest.raises(KvmopsError, match="No such file"), ServedImage(str(tmp_path / "none"), "raw", connections=2):
        pass
