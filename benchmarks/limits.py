# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the machine can do at best: no job is faster than these allow."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import zstandard

_BYTES = 4 << 20
_TIMES = 16
_FILE_BYTES = 512 << 20


def limits(directory: Path) -> Iterator[str]:
    """Speeds of one thread, the best of several tries, and of a file system, each as a line."""
    data, copy = memoryview(bytearray(os.urandom(_BYTES))), memoryview(bytearray(_BYTES))

    def copied() -> None:
        copy[:] = data

    instructions = "with" if " sha_ni" in Path("/proc/cpuinfo").read_text() else "without"
    yield (
        f"one thread: SHA-256 {_fastest(lambda: hashlib.sha256(data).digest()):.2f} GB/s ({instructions} SHA instructions), "
        f"BLAKE2b {_fastest(lambda: hashlib.blake2b(data).digest()):.2f} GB/s, memory copy {_fastest(copied):.1f} GB/s"
    )
    yield f"new file of {_FILE_BYTES >> 20} MiB, written and fsynced: {_written(directory / 'limits', data):.2f} GB/s"


def compressing_alone(path: Path, level: int) -> str:
    """How long the processors need to compress a file in frames of 4 MiB, as we do, from memory to memory."""
    data, local = memoryview(path.read_bytes()), threading.local()

    def frame(offset: int) -> None:
        if not hasattr(local, "compressor"):
            local.compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
        local.compressor.compress(data[offset : offset + _BYTES])

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as executor:
        begin, used = time.perf_counter(), time.process_time()
        list(executor.map(frame, range(0, len(data), _BYTES)))
        taken, used = time.perf_counter() - begin, time.process_time() - used
    what = f"compressing alone at level {level}, {threads} threads, from memory to memory"
    return f"{what}: {taken:.2f} s ({used:.2f} s of processor time)"


def _fastest(work: Callable[[], object]) -> float:
    """GB per second of processor time of `work` on _BYTES bytes."""
    times = []
    for _dummy in range(_TIMES):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return _BYTES / min(times) / 1e9


def _written(path: Path, data: memoryview) -> float:
    os.sync()
    begin = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _dummy in range(_FILE_BYTES // len(data)):
            file.write(data)
        os.fsync(file.fileno())
    taken = time.perf_counter() - begin
    path.unlink()
    return _FILE_BYTES / taken / 1e9
