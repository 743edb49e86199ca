# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The files that an image stands on, read from headers without QEMU."""

from __future__ import annotations

import os
import stat
import sys
from array import array
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _json
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._image import probe

_MAX_LAYERS = 200
_L1_STEP_BYTES = 2**16
_OFFSET = 0x00FFFFFFFFFFFE00
_PAGE_BYTES = 4096
_SECTOR_BYTES = 512  # QEMU rounds a raw file up to whole ones
_FILE_DRIVERS = {"qcow2", "raw", "file", "host_device"}


def below(path: str) -> list[str]:
    """The file and what it stands on, nearest first, by their real paths; what cannot be read ends the chain.

    The last one need not exist. ``path`` as QEMU is given it: beside that, not beside what it links to, lies what its header names.
    """
    return [_filenames.real(name) for name in names_below(path)]


def names_below(path: str) -> list[str]:
    """The same files by the names that QEMU opens them by."""
    found: dict[str, str] = {}
    while path and _filenames.real(path) not in found and len(found) < _MAX_LAYERS:
        found[_filenames.real(path)] = path
        backing = _backing_file(path)
        path = _filenames.beside(path, backing) if backing else ""
    return list(found.values())


def named_file(name: str) -> str:
    """The file that QEMU opens for a backing file name: also an absolute path spelled ``file:…`` or ``json:{…}``.

    Other protocols, and slices of a file, come back as they are.
    """
    if name.startswith("file:/"):
        return name[len("file:") :]
    if not name.startswith("json:"):
        return name
    try:
        options = _flat(_json.parse(name[len("json:") :]))
    except (ValueError, RecursionError):
        return name
    files = [value for key, value in options.items() if key.split(".")[-1] == "filename"]
    drivers = {value for key, value in options.items() if key.split(".")[-1] == "driver"}
    sliced = {"offset", "size"} & {key.split(".")[-1] for key in options}
    if len(files) != 1 or not drivers <= _FILE_DRIVERS or sliced or not files[0].startswith("/"):
        return name
    return files[0]


def _flat(options: Any, prefix: str = "") -> dict[str, str]:
    """QEMU takes nested options and dotted ones: ``{"file": {"filename": …}}`` is ``{"file.filename": …}``."""
    if not isinstance(options, dict):
        return {prefix[:-1]: str(options)}
    found: dict[str, str] = {}
    for key, value in options.items():
        found.update(_flat(value, f"{prefix}{key}."))
    return found


def _backing_file(path: str) -> str:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return ""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        info = _probe(fd, path)
    except (KvmopsError, OSError):
        return ""
    finally:
        os.close(fd)
    return named_file(info.backing_file)


def header(path: str) -> probe.ImageInfo:
    """What a qcow2 or a raw file says about itself; also of an image in use. Raises ImageError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise probe.ImageError(f"disk image {path}", f"it cannot be opened: {error.strerror}") from error
    try:
        return _probe(fd, path)
    finally:
        os.close(fd)


def _probe(fd: int, path: str) -> probe.ImageInfo:
    size = os.fstat(fd).st_size
    try:
        return probe.probe(probe.reads(fd, path), size)
    finally:
        # a page that was read counts as data where the file system has only set its place aside, which estimates would see
        os.posix_fadvise(fd, max(0, size - 1) // _PAGE_BYTES * _PAGE_BYTES, 0, os.POSIX_FADV_DONTNEED)


def size_bytes(path: str, image_format: str) -> int:
    """How large a guest sees the image, qcow2 or raw (a file or a block device); also of one in use. Raises ImageError."""
    if image_format == "qcow2":
        return header(path).virtual_size_bytes
    with open(path, "rb") as file:
        return -(-file.seek(0, os.SEEK_END) // _SECTOR_BYTES) * _SECTOR_BYTES


def has_data(path: str) -> bool:
    """Whether anything was ever written to this qcow2 itself, whatever it stands on; also of an image in use. Raises ImageError.

    By its own tables: what qemu-img maps of a large disk below is gigabytes of text.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise probe.ImageError(f"disk image {path}", f"it cannot be opened: {error.strerror}") from error
    try:
        read = probe.reads(fd, path)
        header = probe.read_header(read, os.fstat(fd).st_size)
        for at in range(0, header.l1_entries * 8, _L1_STEP_BYTES):
            entries = array("Q", read(header.l1_offset + at, min(_L1_STEP_BYTES, header.l1_entries * 8 - at)))
            if sys.byteorder == "little":
                entries.byteswap()
            if any(any(read(entry & _OFFSET, header.cluster_bytes)) for entry in entries if entry):
                return True
    finally:
        os.close(fd)
    return False
