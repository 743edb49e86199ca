# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Peak memory stays below 300 MiB whatever the size of a disk and the number of threads; holes cost seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives

pytestmark = pytest.mark.sweep

HERE = Path(__file__).parent
LIMIT_KIB = 300 * 1024
EXHAUSTIVE = bool(os.environ.get("KVMOPS_BACKUP_EXHAUSTIVE"))
SIZE_BYTES = (100 if EXHAUSTIVE else 8) * 2**30


def peak_kib(threads: int, operation: str, *arguments: str | Path) -> int:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(HERE / "driver.py"), operation, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "THREADS": str(threads), "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)])},
    )
    assert done.returncode == 0 and "Error" not in done.stdout, (done.stdout, done.stderr[-1000:])
    peak = int(done.stdout.split()[-1])
    print(f"{operation}, {threads} threads: {peak // 1024} MiB, {time.monotonic() - begin:.1f} s")
    return peak


@pytest.mark.parametrize("threads", [1, 2, 16] if EXHAUSTIVE else [16])
def test_peak_memory(threads: int, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with open(disk, "wb") as file:
        file.truncate(SIZE_BYTES)
        for number in range(10):  # 160 MiB that cannot be compressed, so that all threads have something in their hands
            file.seek(number * SIZE_BYTES // 10)
            file.write(archives.noise(16 * 2**20, number))
    (tmp_path / "out").mkdir()
    (tmp_path / "packed").mkdir()
    path = tmp_path / "a.tar"
    peaks = {
        "write": peak_kib(threads, "write_file", tmp_path, disk),
        "verify": peak_kib(threads, "read", path),
        "extract": peak_kib(threads, "extract", path, tmp_path / "out"),
        "compress": peak_kib(threads, "compress", path),
    }
    (tmp_path / "out" / "vda_0.qcow2").unlink()
    packed = tmp_path / "a.tar.zst"
    peaks["verify packed"] = peak_kib(threads, "read", packed)
    peaks["extract packed"] = peak_kib(threads, "extract", packed, tmp_path / "out")
    peaks["uncompress"] = peak_kib(threads, "uncompress", packed)
    peaks["write packed"] = peak_kib(threads, "write_file", tmp_path / "packed", disk, "compressed")
    peaks["append packed"] = peak_kib(threads, "append", tmp_path / "packed" / "a.tar.zst", disk)
    peaks["append"] = peak_kib(threads, "append", path, disk)
    assert max(peaks.values()) < LIMIT_KIB, peaks
    assert (tmp_path / "out" / "vda_0.qcow2").stat().st_blocks * 512 < 200 * 2**20
