# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What really is on a disk, found out without any code of the collection: qemu-img, e2fsprogs and sha256."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ._run import LabError, run

_BLOCK = 65536
_ZEROS = bytes(_BLOCK)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, holes read as zeros."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Offset and end of every extent with data, widened to whole blocks."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        stop = os.lseek(fd, start, os.SEEK_HOLE)
        start = max(end, start // _BLOCK * _BLOCK)
        end = min(size, -(-stop // _BLOCK) * _BLOCK)
        yield start, end


def raw_sha256(path: str | Path) -> str:
    """Digest of a raw image's content: its size and every 64 KiB block that is not all zeros, with its offset.

    The same for a sparse and a full copy, and quick for a terabyte of nothing. Not the plain SHA-256 of the file.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        for start, end in _data_extents(file.fileno(), size):
            for offset in range(start, end, _BLOCK):
                block = os.pread(file.fileno(), min(_BLOCK, end - offset), offset)
                if block != _ZEROS[: len(block)]:
                    digest.update(offset.to_bytes(8, "little") + block)
    return digest.hexdigest()


def to_raw(path: str | Path, image_format: str, raw: str | Path, in_use: bool = False) -> Path:
    """Writes the virtual content of an image (with its backing files) to a sparse raw file.

    ``in_use`` reads an image that a running QEMU holds; for files that are frozen.
    """
    sharing = ["-U"] if in_use else []
    run("qemu-img", "convert", *sharing, "-f", image_format, "-O", "raw", str(path), str(raw))
    return Path(raw)


def content_sha256(path: str | Path, image_format: str, in_use: bool = False) -> str:
    """``raw_sha256`` of the virtual content of an image with its backing files."""
    if image_format == "raw" and not in_use:
        return raw_sha256(path)
    with tempfile.TemporaryDirectory(prefix="truth-") as directory:
        return raw_sha256(to_raw(path, image_format, Path(directory) / "raw", in_use))


def assert_clean_ext4(raw: str | Path) -> None:
    """LabError unless the ext4 in a raw image is clean without a replay of its journal."""
    features = run("dumpe2fs", "-h", str(raw))
    if "needs_recovery" in features:
        raise LabError(f"{raw}: the journal needs recovery")
    run("e2fsck", "-f", "-n", str(raw))


def read_ext4_file(raw: str | Path, path: str) -> str:
    """Content of a file of the ext4 in a raw image, e.g. ``/log``."""
    return run("debugfs", "-R", f"cat {path}", str(raw))
