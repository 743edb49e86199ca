# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The data that is measured: one disk, raw and qcow2, a third incompressible, and archives of sparse disks."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

SEED = 20261122
_BLOCK = 256 << 10
_STRETCH = 16 << 20
_POOL = 64 << 20

DOMAIN_XML = """<domain type='qemu'>
  <name>benchmark</name>
  <uuid>9a3e7c52-5b0e-4d0c-8f55-6b8a4c1d2e3f</uuid>
  <memory unit='MiB'>256</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/var/lib/libvirt/images/benchmark.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
"""


def make_raw(path: Path, allocated_bytes: int) -> None:
    """A sparse raw disk: 16 MiB of data, 16 MiB of hole, and so on. Every third 256 KiB of data are random, the others text."""
    rng = random.Random(SEED)
    pool = _text(rng, min(allocated_bytes, _POOL))
    with open(path, "wb") as file:
        for number in range(allocated_bytes // _BLOCK):
            if number % 3 == 0:
                block = rng.randbytes(_BLOCK)
            else:
                begin = rng.randrange(len(pool) - _BLOCK)
                block = pool[begin : begin + _BLOCK]
            file.seek(number * _BLOCK // _STRETCH * _STRETCH * 2 + number * _BLOCK % _STRETCH)
            file.write(block)
        file.truncate(2 * allocated_bytes)


def _text(rng: random.Random, size_bytes: int) -> bytes:
    """Lines of a log: words with the frequencies of a language, and numbers."""
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkqjxz", k=rng.randint(2, 10))) for _dummy in range(8000)]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    lines, size = [], 0
    while size < size_bytes:
        line = f"{rng.randrange(1 << 40)} host{rng.randrange(40):02} " + " ".join(
            rng.choices(words, cum_weights=weights, k=60)
        )
        lines.append(line)
        size += len(line) + 1
    return "\n".join(lines).encode()


def make_qcow2(raw: Path, path: Path) -> None:
    """The same disk as qcow2, its clusters in the order of the guest."""
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)], check=True)


def make_sparse_archive(directory: Path, name: str, size_bytes: int, level: int = 0) -> Path:
    """An archive of an empty disk of that size: as many members, chunks and frames as a full one has."""
    disk, xml = directory / "sparse.disk", directory / "sparse.xml"
    with open(disk, "wb") as file:
        file.truncate(size_bytes)
    xml.write_text(DOMAIN_XML)
    archive = directory / name
    subprocess.run([*driver(), "pack", str(disk), str(xml), str(archive), *([str(level)] if level else [])], check=True)
    disk.unlink()
    return archive


def driver() -> tuple[str, ...]:
    """The beginning of the driver's command line."""
    return (sys.executable, "-m", "ansible_collections.kvmops.backup.benchmarks.driver")
