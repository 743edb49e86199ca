# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""VMDK without QEMU: streamOptimized and monolithicSparse at any offset of a file, flat ones in a directory.

Trusts nothing: every table and grain is bounded before it is read, and no file is opened because an image names it, except the
extents of a flat disk by plain names in the same package. Source of the numbers: VMware's "Virtual Disk Format 5.0".
"""

from __future__ import annotations

import re
import struct
import sys
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Callable

from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError
from ansible_collections.kvmops.backup.plugins.module_utils._image.zero import zero_fill
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import inflate
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.package import PackageFile

SECTOR = 512
MAGIC = b"KDMV"
MAX_CAPACITY_BYTES = 64 << 40  # vSphere ends at 62 TiB
MAX_DESCRIPTOR_BYTES = 1 << 20
_MIN_GRAIN, _MAX_GRAIN = 8, 2048  # sectors
_MAX_TABLE_ENTRIES = 512
_MAX_DIRECTORY_ENTRIES = 4 << 20
_MAX_EXTENTS = 1024
_SCRATCH_STEP_BYTES = 1 << 20
_AT_END = 0xFFFFFFFFFFFFFFFF
_COMPRESSED, _MARKERS = 1 << 16, 1 << 17
_HEADER = struct.Struct("<4sIIQQQQIQQQBccccH")
_GRAIN_MARKER = struct.Struct("<QI")
_EXTENT = re.compile(r'(RW|RDONLY|NOACCESS)\s+(\d{1,15})\s+([A-Z]+)(?:\s+"([^"]*)"(?:\s+(\d{1,15}))?)?')
_MADE_TO_DECEIVE = "The image is damaged or made to deceive; it is refused."
_CONVERT_FIRST = "Export the VM as an OVA, whose disks are streamOptimized."


@dataclass(frozen=True)
class Extent:
    """One line of a disk's own descriptor."""

    kind: str
    sectors: int
    name: str
    offset_sectors: int = 0


@dataclass(frozen=True)
class Text:
    """The descriptor of a disk: its type and extents, checked to stand on no other disk."""

    type: str
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class _Header:
    version: int
    flags: int
    capacity: int
    grain: int
    descriptor_at: int
    descriptor_sectors: int
    per_table: int
    directory_at: int
    compression: int


def is_text(head: bytes) -> bool:
    """Whether a file begins as the descriptor of a disk whose data is in other files."""
    return head.lstrip()[:21].lower() == b"# disk descriptorfile"


def parse_text(data: bytes, what: str) -> Text:
    """A disk's own descriptor. Raises ImageError for disks that stand on another one, and for what makes no sense."""
    values: dict[str, str] = {}
    extents = []
    for line in data.split(b"\0", 1)[0].decode("utf-8", "replace").splitlines():
        text = line.strip()
        match = _EXTENT.match(text)
        if match:
            extents.append(Extent(match[3], int(match[2]), match[4] or "", int(match[5] or 0)))
            continue
        key, is_value, value = text.partition("=")
        if is_value and not text.startswith("#"):
            values.setdefault(key.strip().lower(), value.strip().strip('"'))
    if "parentfilenamehint" in values or values.get("parentcid", "ffffffff").lower() not in (
        "ffffffff",
        "fffffffe",
        "0",
    ):
        raise ImageError(
            what, "it stands on another disk (a snapshot or a linked clone)", "Export the VM without snapshots."
        )
    if len(extents) > _MAX_EXTENTS:
        raise ImageError(what, f"it has {len(extents)} extents", _MADE_TO_DECEIVE)
    return Text(values.get("createtype", ""), tuple(extents))


class SparseVmdk:
    """A streamOptimized or monolithicSparse disk: a GuestDisk. ``file`` stays the caller's.

    Memory does not grow with the disk: only the grain directory is kept, grain tables are read as they are needed.
    """

    def __init__(self, file: PackageFile, *, reached: Callable[[int], None] = lambda _offset: None) -> None:
        """``reached`` is told up to which offset of the file has been read."""
        self._file, self._reached = file, reached
        self.what = f"VMDK {file.name}"
        header = self._header(0)
        self._text = self._descriptor(header)
        if header.directory_at == _AT_END:
            header = self._footer(header)
        self._header_ = header
        self.size_bytes = header.capacity * SECTOR
        self._grain_bytes = header.grain * SECTOR
        self._grains = -(-header.capacity // header.grain)
        self._compressed = bool(header.flags & _COMPRESSED)
        if self._compressed and header.compression != 1:
            raise ImageError(self.what, f"its compression {header.compression} is unknown")
        if self._compressed != (self._text.type.lower() == "streamoptimized"):
            raise ImageError(self.what, f"its header does not fit its type {self._text.type}", _MADE_TO_DECEIVE)
        self._directory = self._read_directory(header)
        self._inflated = inflate.best()
        self._scratch = threading.local()

    @property
    def type(self) -> str:
        """streamOptimized or monolithicSparse."""
        return self._text.type

    def close(self) -> None:
        """Nothing is its own."""

    # what is where

    def _header(self, at: int) -> _Header:
        data = self._file.read_at(at, SECTOR)
        if len(data) < SECTOR or data[:4] != MAGIC:
            why = "it has no header" if at == 0 else "it is cut off: the second header at its end is missing"
            raise ImageError(self.what, why, "Copy the package again.")
        (_magic, version, flags, capacity, grain, descriptor_at, descriptor_sectors, per_table, _second, directory_at,
         _overhead, _unclean, _a, _b, _c, _d, compression) = _HEADER.unpack_from(data)  # fmt: skip
        if version not in (1, 2, 3):
            raise ImageError(self.what, f"version {version} of the format is unknown")
        if capacity == 0:
            raise ImageError(self.what, "its header gives it no capacity", _MADE_TO_DECEIVE)
        if capacity * SECTOR > MAX_CAPACITY_BYTES:
            raise ImageError(
                self.what, f"a disk of {capacity * SECTOR} bytes is larger than any VMDK can be", _MADE_TO_DECEIVE
            )
        if not _MIN_GRAIN <= grain <= _MAX_GRAIN or grain & (grain - 1):
            raise ImageError(self.what, f"a grain of {grain} sectors is impossible", _MADE_TO_DECEIVE)
        if not 1 <= per_table <= _MAX_TABLE_ENTRIES:
            raise ImageError(self.what, f"a grain table of {per_table} entries is impossible", _MADE_TO_DECEIVE)
        return _Header(
            version, flags, capacity, grain, descriptor_at, descriptor_sectors, per_table, directory_at, compression
        )

    def _footer(self, header: _Header) -> _Header:
        end = -(-self._file.size_bytes // SECTOR) * SECTOR
        footer = self._header(max(end - 2 * SECTOR, 0))
        same = ("version", "flags", "capacity", "grain", "per_table", "compression")
        different = next((name for name in same if getattr(header, name) != getattr(footer, name)), "")
        if different or footer.directory_at == _AT_END:
            raise ImageError(
                self.what, f"its two headers contradict each other ({different or 'directory'})", _MADE_TO_DECEIVE
            )
        return footer

    def _descriptor(self, header: _Header) -> Text:
        length = header.descriptor_sectors * SECTOR
        if not header.descriptor_at or not length:
            raise ImageError(self.what, "it has no descriptor: it is one of several parts of a disk", _CONVERT_FIRST)
        if length > MAX_DESCRIPTOR_BYTES or header.descriptor_at * SECTOR >= self._file.size_bytes:
            raise ImageError(self.what, "its descriptor lies outside of it", _MADE_TO_DECEIVE)
        text = parse_text(self._file.read_at(header.descriptor_at * SECTOR, length), self.what)
        if text.type.lower() not in ("streamoptimized", "monolithicsparse"):
            raise ImageError(self.what, f"its type {text.type or '(none)'} does not fit its header", _MADE_TO_DECEIVE)
        if len(text.extents) != 1 or text.extents[0].kind != "SPARSE" or re.search(r"[/\\]", text.extents[0].name):
            raise ImageError(self.what, "its descriptor names other files than itself", _MADE_TO_DECEIVE)
        return text

    def _read_directory(self, header: _Header) -> array[int]:
        """The sectors of the grain tables, checked to lie in the file, apart from each other."""
        count = -(-self._grains // header.per_table)
        if count > _MAX_DIRECTORY_ENTRIES:
            raise ImageError(self.what, f"a grain directory of {count} entries is more than is read", _MADE_TO_DECEIVE)
        directory = self._numbers(header.directory_at, count, "grain directory")
        size = -(-header.per_table * 4 // SECTOR)
        taken = sorted(entry for entry in directory if entry)
        here = sorted([*taken, header.directory_at])
        end = self._file.size_bytes // SECTOR
        for entry, following in zip(here, [*here[1:], end]):
            length = -(-count * 4 // SECTOR) if entry == header.directory_at else size
            if entry + length > following and not (entry == header.directory_at == 0):
                raise ImageError(
                    self.what, f"the grain table at sector {entry} overlaps another or the end", _MADE_TO_DECEIVE
                )
        return directory

    def _numbers(self, sector: int, count: int, of: str) -> array[int]:
        if sector * SECTOR + count * 4 > self._file.size_bytes or sector == 0:
            raise ImageError(self.what, f"the {of} at sector {sector} lies outside of the file", _MADE_TO_DECEIVE)
        found = array("I", self._file.read_at(sector * SECTOR, count * 4))
        if sys.byteorder == "big":
            found.byteswap()
        return found

    def _table(self, number: int) -> array[int] | None:
        at = self._directory[number]
        return self._numbers(at, self._header_.per_table, "grain table") if at else None

    def _entries(self, first: int, count: int) -> list[int]:
        """Sectors of grains; 0 and 1 stand for zeros."""
        per_table, found = self._header_.per_table, list[int]()
        while count:
            number, within = divmod(first, per_table)
            here = min(count, per_table - within)
            at = self._directory[number]
            if at:
                found.extend(self._table(number)[within : within + here])  # type: ignore[index]
            else:
                found.extend([0] * here)
            first, count = first + here, count - here
        return found

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As GuestDisk; also refuses a disk with more grains than its file has room for."""
        grain, per_table = self._grain_bytes, self._header_.per_table
        room = self._file.size_bytes // (SECTOR if self._compressed else grain) + 1
        seen = 0
        for number in range(start // (grain * per_table), len(self._directory)):
            table = self._table(number)
            first = number * per_table
            if first * grain >= end:
                return
            if table is None or not any(table):
                continue
            count = min(per_table, self._grains - first)
            begin = -1
            for index in range(count + 1):
                present = index < count and table[index] > 1
                if present and begin < 0:
                    begin = index
                elif not present and begin >= 0:
                    seen += index - begin
                    if seen > room:
                        raise ImageError(
                            self.what, f"it names {seen} grains, more than its file can hold", _MADE_TO_DECEIVE
                        )
                    low, high = max((first + begin) * grain, start), min((first + index) * grain, end, self.size_bytes)
                    if low < high:
                        yield low, high
                    begin = -1

    # the data

    def fill(self, offset: int, buffer: memoryview) -> bool:
        """As GuestDisk. Raises ImageError for a grain that is not what its table says."""
        grain = self._grain_bytes
        first = offset // grain
        entries = self._entries(first, (offset + len(buffer) - 1) // grain - first + 1)
        present = [index for index, entry in enumerate(entries) if entry > 1]
        if not present:
            return False
        (self._inflate if self._compressed else self._copy)(first, entries, present, offset, buffer)
        return True

    def _place(self, number: int, offset: int, buffer: memoryview) -> tuple[memoryview, int]:
        """The part of the buffer that a grain fills, and where it begins within the grain."""
        begin = number * self._grain_bytes
        low, high = max(begin, offset), min(begin + self._grain_bytes, offset + len(buffer))
        return buffer[low - offset : high - offset], low - begin

    def _copy(self, first: int, entries: Sequence[int], _present: list[int], offset: int, buffer: memoryview) -> None:
        grain, index = self._header_.grain, 0
        while index < len(entries):
            entry, end = entries[index], index + 1
            follow = 0 if entry <= 1 else grain
            while end < len(entries) and (
                entries[end] == entry + follow * (end - index) if follow else entries[end] <= 1
            ):
                end += 1
            low, within = self._place(first + index, offset, buffer)
            last, _within = self._place(first + end - 1, offset, buffer)
            start = max((first + index) * self._grain_bytes - offset, 0)
            length = len(low) + (0 if end == index + 1 else (end - index - 2) * self._grain_bytes + len(last))
            part = buffer[start : start + length]
            if not follow:
                zero_fill(part)
            else:
                at = entry * SECTOR + within
                if at + len(part) > self._file.size_bytes:
                    raise ImageError(
                        self.what, f"the grain at sector {entry} lies outside of the file", _MADE_TO_DECEIVE
                    )
                self._file.read_into(at, part)
                self._reached(at + len(part))
            index = end

    def _inflate(self, first: int, entries: Sequence[int], present: list[int], offset: int, buffer: memoryview) -> None:
        lowest = min(entries[index] for index in present)
        highest = max(entries[index] for index in present)
        tail = self._grain_bytes + 2 * SECTOR  # hardly a grain is longer
        span = (highest - lowest) * SECTOR + tail
        # grains that lie together, as a rule, are read at once
        block = self._read(lowest * SECTOR, span) if span <= 2 * len(buffer) + tail else None
        for index, entry in enumerate(entries):
            part, within = self._place(first + index, offset, buffer)
            if entry <= 1:
                zero_fill(part)
                continue
            data = block[(entry - lowest) * SECTOR :] if block is not None else self._read(entry * SECTOR, tail)
            if len(part) == self._grain_bytes:
                self._grain(first + index, entry, data, part)
            else:  # at the end of the disk, or for a caller with small steps
                grain = memoryview(bytearray(self._grain_bytes))
                self._grain(first + index, entry, data, grain)
                part[:] = grain[within : within + len(part)]
        self._reached((highest + 1) * SECTOR)

    def _read(self, at: int, length: int) -> memoryview:
        """Bytes of the file, fewer at its end, in a buffer of the calling thread: good until the thread reads again."""
        length = max(0, min(length, self._file.size_bytes - at))
        buffer: bytearray = getattr(self._scratch, "buffer", bytearray())
        if len(buffer) < length:  # kept: a new one for each read costs page faults
            self._scratch.buffer = buffer = bytearray(-(-length // _SCRATCH_STEP_BYTES) * _SCRATCH_STEP_BYTES)
        part = memoryview(buffer)[:length]
        self._file.read_into(at, part)
        return part

    def _grain(self, number: int, sector: int, data: memoryview, grain: memoryview) -> None:
        """Inflates one grain, which may be shorter than `grain`. ``data``: the file from its marker on."""
        if len(data) <= _GRAIN_MARKER.size:
            raise ImageError(self.what, f"the grain at sector {sector} lies outside of the file", _MADE_TO_DECEIVE)
        lba, size = _GRAIN_MARKER.unpack_from(data)
        if lba != number * self._header_.grain:
            raise ImageError(
                self.what,
                f"the grain at sector {sector} says that it is another one (sector {lba} of the disk)",
                _MADE_TO_DECEIVE,
            )
        if not 0 < size <= 2 * self._grain_bytes:
            raise ImageError(self.what, f"the grain at sector {sector} has {size} compressed bytes", _MADE_TO_DECEIVE)
        end = _GRAIN_MARKER.size + size
        if end > len(data):
            data = memoryview(bytearray(self._file.read_at(sector * SECTOR, end)))
        if end > len(data):
            raise ImageError(self.what, f"the grain at sector {sector} is cut off", _MADE_TO_DECEIVE)
        try:
            length = self._inflated(data[_GRAIN_MARKER.size : end], grain)
        except inflate.InflateError as error:
            raise ImageError(
                self.what, f"the grain at sector {sector} cannot be inflated: {error}", "Copy the package again."
            ) from error
        zero_fill(grain[length:])


class JoinedDisk:
    """Stretches of files one after the other, None for zeros: a flat disk. A GuestDisk."""

    def __init__(
        self,
        parts: Sequence[tuple[PackageFile | None, int, int]],
        *,
        reached: Callable[[int], None] = lambda _offset: None,
    ) -> None:
        """``parts``: file, offset in it, and length."""
        self._parts, self._reached = list(parts), reached
        self.size_bytes = sum(length for _file, _at, length in self._parts)

    def close(self) -> None:
        """Nothing is its own."""

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As GuestDisk."""
        begin = 0
        for file, at, length in self._parts:
            for low, high in file.data_ranges() if file is not None else ():
                low, high = max(low, at), min(high, at + length)
                first, last = max(begin + low - at, start), min(begin + high - at, end)
                if low < high and first < last:
                    yield first, last
            begin += length

    def fill(self, offset: int, buffer: memoryview) -> bool:
        """As GuestDisk."""
        begin = 0
        for file, at, length in self._parts:
            low, high = max(begin, offset), min(begin + length, offset + len(buffer))
            if low < high:
                part = buffer[low - offset : high - offset]
                if file is None:
                    zero_fill(part)
                else:
                    file.read_into(at + low - begin, part)
                    self._reached(at + high - begin)
            begin += length
        return True
