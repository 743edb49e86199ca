# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Digests of what guests see of a template's disks, the same for raw and qcow2, kept until a file of theirs changes."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _json, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._archive.digests import SHA256
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES
from ansible_collections.kvmops.backup.plugins.module_utils._errors import SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers, qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._image.served import ServedImage
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress

_VERSION = 1
# A write within one tick of a file system's clock leaves ctime as it is: a file as young as that is read again next time.
_TICK_S = 2.5
_ATTEMPTS = 4  # libvirt changes the owner, and so the ctime, of a template's disks when a clone starts


def cached(path: str, fmt: str) -> str | None:
    """The digest of a disk if it is known of its files as they are now; None: `of_disk` would have to read them."""
    try:
        kept = _json.parse(_files.read_kept(_file(path)))
        if (kept["version"], kept["format"], kept["evidence"]) == (_VERSION, fmt, _evidence(path)):
            return str(kept["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def of_disk(path: str, fmt: str, progress: Progress, *, threads: int = 0) -> str:
    """The digest of a disk: read on all cores (`threads` 0) where it is not known.

    Raises SourceError where the disk changes meanwhile, ImageError where it cannot be read.
    """
    known = cached(path, fmt)
    if known is not None:
        return known
    for _attempt in range(_ATTEMPTS):
        before, began = _evidence(path), time.time()
        digest = read(path, fmt, progress, threads=threads)
        after = _evidence(path)
        if after == before:
            if all(int(each[-1]) / 1e9 < began - _TICK_S for each in before):
                _keep(path, fmt, before, digest)
            return digest
        if [each[:-1] for each in after] != [each[:-1] for each in before]:
            break
    raise SourceError(f"The disk {path}", "it was written to while it was read", "Shut down the VM that uses it.")


def read(path: str, fmt: str, progress: Progress, *, threads: int = 0) -> str:
    """The digest of a disk, by reading all of it that is not a hole. Raises ImageError."""
    count = threads or os.cpu_count() or 1
    ranges = qemu_img.data_ranges(path, fmt)
    chunks = sorted({n for at, length in ranges for n in range(at // CHUNK_BYTES, -(-(at + length) // CHUNK_BYTES))})
    progress.phase("template", os.path.basename(path), len(chunks) * CHUNK_BYTES)
    with ServedImage(path, fmt, connections=count) as image:
        total, last = divmod(image.size_bytes, CHUNK_BYTES)
        digests = [SHA256.of_chunk(bytes(CHUNK_BYTES))] * total + [SHA256.of_chunk(bytes(last))] * bool(last)
        todo, lock = iter(chunks), threading.Lock()

        def work(connection: int) -> None:
            buffer = memoryview(bytearray(CHUNK_BYTES))
            while True:
                with lock:
                    number = next(todo, None)
                if number is None:
                    return
                data = buffer[: min(CHUNK_BYTES, image.size_bytes - number * CHUNK_BYTES)]
                image.read(connection, number * CHUNK_BYTES, data)
                digests[number] = SHA256.of_chunk(data)
                progress.advance(len(data))

        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(work, connection) for connection in range(count)]:
                done.result()
    return SHA256.of_member(b"".join(digests))


def _evidence(path: str) -> list[list[str | int]]:
    """What changes when one of the disk's files is replaced or written to. Raises OSError."""
    found: list[list[str | int]] = []
    for name in layers.below(path):
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)  # makes NFS ask its server
        try:
            at = os.fstat(fd)
        finally:
            os.close(fd)
        found.append([name, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns])
    return found


def _keep(path: str, fmt: str, evidence: list[list[str | int]], digest: str) -> None:
    partial = f"{_file(path)}.{os.getpid()}"
    kept = {"version": _VERSION, "format": fmt, "evidence": evidence, "digest": digest}
    with suppress(OSError):  # no room for a cache is no error
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump(kept, stream)
        os.replace(partial, _file(path))


def _file(path: str) -> str:
    directory = os.path.join(_paths.cache_dir(), "templates")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    return os.path.join(directory, hashlib.sha256(os.fsencode(path)).hexdigest()[:32] + ".json")
