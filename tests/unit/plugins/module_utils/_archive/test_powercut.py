# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Power cuts while a point is added, on real file systems: what is on the disk at any moment is the old archive or the new one.

The disk is a loop device; a cut is a copy of its backing file while it is mounted, mounted again. A run cuts at a sample of the
system calls, chosen by a seed that is printed; KVMOPS_BACKUP_EXHAUSTIVE=1 cuts at every one, several times with other write-backs.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive import append
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive.watching import (
    after_every_change,
    tool_views,
)

pytestmark = pytest.mark.sweep

SEED = int(os.environ.get("KVMOPS_BACKUP_SEED", "0")) or random.randrange(2**32)
EXHAUSTIVE = os.environ.get("KVMOPS_BACKUP_EXHAUSTIVE", "")
CUTS = 4
_LIBC = ctypes.CDLL(None, use_errno=True)
LAYER, MEMORY = archives.noise(3 * 2**20 + 5, 31), archives.noise(70_000, 32)
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


class Disk:
    """A file system on a loop device, and cuts of its power."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.image, self.mount, self.cut = directory / "disk.img", directory / "disk", directory / "cut"
        self.options = "loop,nouuid" if kind == "xfs" else "loop"
        self.mount.mkdir()
        self.cut.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(320 * 2**20)
        subprocess.run([*MAKE[kind], self.image], check=True, capture_output=True)
        done = subprocess.run(["mount", "-o", self.options, self.image, self.mount], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no loop devices here, power cuts are not tested: {done.stderr.decode()}")

    def close(self) -> None:
        subprocess.run(["umount", self.mount], check=True)

    def after_a_cut(self) -> Iterator[Path]:
        """What the disk would hold if the power went now, mounted."""
        copy = self.image.with_name("copy.img")
        subprocess.run(["cp", "--sparse=always", self.image, copy], check=True)
        subprocess.run(["mount", "-o", self.options, copy, self.cut], check=True)
        try:
            yield self.cut
        finally:
            subprocess.run(["umount", self.cut], check=True)
            copy.unlink()


@pytest.fixture(params=MAKE)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() or not shutil.which(MAKE[request.param][0]):
        pytest.skip(f"cannot make {request.param} here")
    disk = Disk(request.param, tmp_path)
    try:
        yield disk
    finally:
        disk.close()


@pytest.mark.parametrize("form", ["plain", "compressed"])
def test_power_cuts(disk: Disk, form: str) -> None:
    print(f"KVMOPS_BACKUP_SEED={SEED}")
    chance = random.Random(f"{SEED} {form} {disk.options}")
    layer = disk.mount / "layer"
    layer.write_bytes(LAYER)  # on the same file system: shared where it can be
    for number in range(5 if EXHAUSTIVE else 1):
        name = f"{number}.tar" if form == "plain" else f"{number}.tar.zst"
        path = Path(archives.write(disk.mount, archives.SMALL, compressed=form == "compressed", name=name).path)
        calls = _calls(disk, path, layer)
        chosen = range(calls) if EXHAUSTIVE else sorted({*chance.sample(range(calls), CUTS - 1), calls - 1})
        states = _append_with_cuts(disk, path, layer, chosen, chance)
        print(f"{len(states)} cuts at {list(chosen)} of {calls}: {states}")
        assert len(states) == len(chosen) and states == sorted(states)
        for cut in disk.after_a_cut():  # the append has returned, so it is durable
            assert _is_new(cut / path.name)


def _calls(disk: Disk, path: Path, layer: Path) -> int:
    """How many system calls that change the file an append makes."""
    count = 0

    def look(*_call: object) -> None:
        nonlocal count
        count += 1

    trial = Path(shutil.copy(path, path.with_name("trial")))
    with after_every_change(trial, look):
        _append(trial, layer)
    trial.unlink()
    os.sync()
    return count


def _append(path: Path, layer: Path) -> None:
    new: dict[str, bytes | Path] = {"vda_1.snapshot": layer, f"{archives.TIMESTAMP + 1}_0.memory": MEMORY}
    archives.append(path, new, threads=1, cover_bytes=2 * 2**20)


def _write_back(fd: int, data: bytes, offset: int) -> None:
    """Brings the pages of one write to the disk, and no others of the file."""
    begin = offset // 4096 * 4096
    flags = 7  # SYNC_FILE_RANGE_WAIT_BEFORE, WRITE, WAIT_AFTER
    assert not _LIBC.sync_file_range(fd, ctypes.c_int64(begin), ctypes.c_int64(offset + len(data) - begin), flags)


def _append_with_cuts(
    disk: Disk, path: Path, layer: Path, chosen: Collection[int], chance: random.Random
) -> list[bool]:
    states, count = [], 0

    def look(*call: object) -> None:
        nonlocal count
        if count in chosen:
            # The kernel may write back at any time, and in any order: the commit before all that is not durable yet.
            choice = "this" if count == max(chosen) else chance.choice(["nothing", "this", "all"])
            if choice == "all":
                os.sync()
            elif choice == "this" and call[0] == "pwrite":
                _write_back(*call[1:])
            for cut in disk.after_a_cut():
                states.append(_is_new(cut / path.name))
        count += 1

    with after_every_change(path, look):
        _append(path, layer)
    return states


def _is_new(path: Path) -> bool:
    """Whether the new point is there; the archive is whole in any case, and takes the point now if it has not got it."""
    report = verify_file(str(path), threads=1)
    assert report.ok and report.coverage == "full", report
    with open_archive(str(path)) as reader:
        assert not reader.broken
        new = len(reader.points) == 2
    assert archives.extract(path, timestamp=archives.TIMESTAMP) == archives.SMALL
    if not new:
        append.settle(str(path))
        assert len({tuple(view) for view in tool_views(path).values()}) == 1
        archives.append(path, {"vda_1.snapshot": LAYER, f"{archives.TIMESTAMP + 1}_0.memory": MEMORY})
    found = archives.extract(path)
    assert found["vda_1.snapshot"] == LAYER and found[f"{archives.TIMESTAMP + 1}_0.memory"] == MEMORY
    return new
