# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Whether a disk's EFI system partition has the loader that firmware without boot entries starts. Reads hostile disks, bounded."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ansible_collections.kvmops.backup.plugins.module_utils._image.source import GuestDisk

LOADER = ("EFI", "BOOT", "BOOTX64.EFI")
_SECTOR = 512
_ESP = bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b")
_MAX_ENTRIES = 256
_MAX_DIRECTORY_BYTES = 1 << 20
_DIRECTORY = 0x10
_LONG_NAME = 0x0F


def has_fallback_loader(disk: GuestDisk) -> bool | None:
    """Whether ``EFI/BOOT/BOOTX64.EFI`` is on the disk's ESP; None where no ESP is found or it cannot be read."""
    found: bool | None = None
    for start in _partitions(disk):
        try:
            here = _Fat(disk, start).has(LOADER)
        except (ValueError, struct.error):
            continue
        found = bool(found) or here
    return found


def _read(disk: GuestDisk, offset: int, length: int) -> bytes:
    if offset < 0 or length < 0 or offset + length > disk.size_bytes:
        raise ValueError("outside of the disk")
    buffer = bytearray(length)
    return bytes(buffer) if length and disk.fill(offset, memoryview(buffer)) else bytes(length)


def _partitions(disk: GuestDisk) -> Iterator[int]:
    """Offsets of the EFI system partitions in the partition table."""
    try:
        first, header = _read(disk, 0, _SECTOR), _read(disk, _SECTOR, _SECTOR)
        if header[:8] == b"EFI PART":
            at, count, size = struct.unpack_from("<QII", header, 72)
            if not 128 <= size <= 4096:
                return
            table = _read(disk, at * _SECTOR, min(count, _MAX_ENTRIES) * size)
            for begin in range(0, len(table), size):
                if table[begin : begin + 16] == _ESP:
                    yield struct.unpack_from("<Q", table, begin + 32)[0] * _SECTOR
        elif first[510:512] == b"\x55\xaa":
            for begin in range(446, 510, 16):
                if first[begin + 4] == 0xEF:
                    yield struct.unpack_from("<I", first, begin + 8)[0] * _SECTOR
    except (ValueError, struct.error):
        return


class _Fat:
    """A FAT file system at an offset of a disk."""

    def __init__(self, disk: GuestDisk, start: int) -> None:
        self._disk, self._start = disk, start
        boot = _read(disk, start, _SECTOR)
        (self._sector, per_cluster, reserved, fats, self._root_entries, small, _media, fat_small) = struct.unpack_from(
            "<HBHBHHBH", boot, 11
        )
        large, fat_large = struct.unpack_from("<I", boot, 32)[0], struct.unpack_from("<I", boot, 36)[0]
        if self._sector not in (512, 1024, 2048, 4096) or not per_cluster or not fats or not reserved:
            raise ValueError("no FAT")
        self._cluster = per_cluster * self._sector
        self._fat = reserved * self._sector
        fat_sectors = fat_small or fat_large
        self._root = self._fat + fats * fat_sectors * self._sector
        self._data = self._root + -(-self._root_entries * 32 // self._sector) * self._sector
        clusters = ((small or large) * self._sector - self._data) // self._cluster
        self._bits = 12 if clusters < 4085 else 16 if clusters < 65525 else 32
        self._root_cluster = struct.unpack_from("<I", boot, 44)[0] if self._bits == 32 else 0

    def has(self, path: tuple[str, ...]) -> bool:
        cluster = self._root_cluster
        for depth, name in enumerate(path):
            found = self._find(self._directory(cluster, root=depth == 0), name)
            if found is None:
                return False
            cluster, is_directory = found
            if (depth < len(path) - 1) != is_directory:
                return False
        return True

    def _directory(self, cluster: int, root: bool) -> bytes:
        if root and self._bits != 32:
            return _read(self._disk, self._start + self._root, self._root_entries * 32)
        data = b""
        while 2 <= cluster < 0x0FFFFFF0 and len(data) < _MAX_DIRECTORY_BYTES:
            data += _read(self._disk, self._start + self._data + (cluster - 2) * self._cluster, self._cluster)
            cluster = self._next(cluster)
        return data

    def _next(self, cluster: int) -> int:
        """The cluster that follows; a large number at the end."""
        if self._bits == 12:
            pair: int = struct.unpack("<H", _read(self._disk, self._start + self._fat + cluster * 3 // 2, 2))[0]
            value, end = (pair >> 4 if cluster & 1 else pair & 0xFFF), 0xFF0
        else:
            size = self._bits // 8
            value = int.from_bytes(_read(self._disk, self._start + self._fat + cluster * size, size), "little")
            value, end = (value & 0x0FFFFFFF, 0x0FFFFFF0) if size == 4 else (value, 0xFFF0)
        return value if value < end else 0x0FFFFFFF

    @staticmethod
    def _find(directory: bytes, name: str) -> tuple[int, bool] | None:
        """First cluster of a short name, and whether it is a directory."""
        stem, _dot, suffix = name.partition(".")
        wanted = f"{stem:8}{suffix:3}".encode()
        for begin in range(0, len(directory) - 31, 32):
            entry = directory[begin : begin + 32]
            if entry[0] == 0:
                return None
            if entry[:11].upper() == wanted and entry[11] & _LONG_NAME != _LONG_NAME:
                high, low = struct.unpack_from("<H", entry, 20)[0], struct.unpack_from("<H", entry, 26)[0]
                return high << 16 | low, bool(entry[11] & _DIRECTORY)
        return None
