# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the image tests share: disks with known content, and the loops that the archive layer runs around sources and sinks."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ReadAt
from ansible_collections.kvmops.backup.plugins.module_utils._image.sink import ImageSink
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import ImageSource

CHUNK = 4 << 20


def qemu(tool: str, *arguments: str) -> str:
    """Run a QEMU tool and return its output; a failure shows what it said."""
    for _dummy in range(20):
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
        # LUKS is tuned by processor time, which QEMU cannot tell on a busy machine
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, f"{tool} {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def reader(path: Path) -> tuple[ReadAt, int]:
    size = path.stat().st_size

    def read_at(offset: int, length: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    return read_at, size


def bytes_reader(data: bytes) -> ReadAt:
    return lambda offset, length: bytes(data[offset : offset + length])


def make_raw(path: Path, size: int, seed: int, pieces: int = 12) -> None:
    """A sparse raw disk: random data, written zeros and holes at random places, often near cluster boundaries."""
    rng = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(size)
        for _dummy in range(pieces if size else 0):
            start = rng.randrange(size)
            if rng.random() < 0.5:
                start = start // 65536 * 65536 + rng.choice([0, 0, 512, 65535])
            length = rng.choice([1, 512, 4096, 65536, 65537, 200_000, 1 << 20])
            file.seek(min(start, size))
            file.write((bytes(length) if rng.random() < 0.3 else rng.randbytes(length))[: max(size - start, 0)])
        file.truncate(size)


def store(source: ImageSource, path: Path, threads: int = 2) -> None:
    """Write a member as an archive would: early chunks in parallel, late ones in order, zero chunks as holes."""
    local = threading.local()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def copy(offset: int) -> None:
        if not hasattr(local, "buffer"):
            # Not zeros: whatever a source does not fill must show.
            local.buffer = memoryview(bytearray(b"\xaa" * CHUNK))
        buffer = local.buffer[: min(CHUNK, source.size_bytes - offset)]
        if source.read_chunk(offset, buffer):
            os.pwrite(fd, buffer, offset)

    try:
        os.ftruncate(fd, source.size_bytes)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(copy, range(0, source.late_from, CHUNK)))
        for offset in range(source.late_from, source.size_bytes, CHUNK):
            copy(offset)
    finally:
        os.close(fd)
        source.close()


def restore(member: Path, sink: ImageSink, seed: int, chunk: int = CHUNK) -> None:
    """Give a member's bytes to a sink in random order, from two threads."""
    size = member.stat().st_size
    offsets = list(range(0, size, chunk))
    random.Random(seed).shuffle(offsets)
    fd = os.open(member, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda offset: sink.write(offset, memoryview(os.pread(fd, chunk, offset))), offsets))
        sink.finish()
    finally:
        os.close(fd)
        sink.close()


def new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
