# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The byte sources an archive member is made from."""

from __future__ import annotations

import struct
import sys
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ansible_collections.kvmops.backup.plugins.module_utils._errors import SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import MAX_L1_BYTES, QCOW2_MAGIC, ImageError
from ansible_collections.kvmops.backup.plugins.module_utils._image.sparse import SparseFile
from ansible_collections.kvmops.backup.plugins.module_utils._image.zero import is_zero, zero_fill

__all__ = [
    "AsQcow2Source",
    "BytesSource",
    "FileSource",
    "GuestDisk",
    "HeadSource",
    "ImageSource",
    "RawAsQcow2Source",
    "SourceError",
]


class ImageSource(Protocol):
    """Bytes of one member, read in chunks by several threads."""

    @property
    def size_bytes(self) -> int:
        """Size of the member that results."""

    @property
    def clone_fd(self) -> int | None:
        """A descriptor whose bytes 0 to ``size_bytes`` are the member, for reflinks; None without such a file."""

    @property
    def late_from(self) -> int:
        """From this offset on chunks can be read only after every earlier one was; ``size_bytes``: none is late."""

    def read_chunk(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` completely with the bytes at ``offset``. False: all are zeros and ``buffer`` is undefined.

        Raises SourceError naming disk and offset when bytes cannot be read.
        """

    def close(self) -> None: ...


class BytesSource:
    """A member made from bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.size_bytes = self.late_from = len(data)
        self.clone_fd: int | None = None

    def read_chunk(self, offset: int, buffer: memoryview) -> bool:
        part = self._data[offset : offset + len(buffer)]
        buffer[:] = part
        return not is_zero(part)

    def close(self) -> None:
        self._data.release()


class FileSource:
    """The first ``size_bytes`` bytes (default: all) of a file or block device, byte for byte; holes are not read."""

    def __init__(self, path: str, *, size_bytes: int | None = None) -> None:
        self._file = SparseFile(path, size_bytes)
        self.size_bytes = self.late_from = self._file.size_bytes
        self.clone_fd = self._file.fd if self._file.is_regular else None

    def read_chunk(self, offset: int, buffer: memoryview) -> bool:
        return self._file.fill(offset, buffer) and not is_zero(buffer)

    def close(self) -> None:
        self._file.close()
        self.clone_fd = None


class HeadSource(FileSource):
    """A file with other first bytes."""

    def __init__(self, path: str, head: bytes) -> None:
        super().__init__(path)
        self._head = memoryview(head)
        self.clone_fd = None

    def read_chunk(self, offset: int, buffer: memoryview) -> bool:
        data = super().read_chunk(offset, buffer)
        if offset >= len(self._head):
            return data
        if not data:
            buffer[:] = bytes(len(buffer))
        part = self._head[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return not is_zero(buffer)


CLUSTER_BITS = 16
CLUSTER_BYTES = 1 << CLUSTER_BITS
_L2_ENTRIES = CLUSTER_BYTES // 8
_REFCOUNTS_PER_BLOCK = CLUSTER_BYTES // 2
_COPIED = 1 << 63
#: Chunks are asked for in steps of this size, so a chunk with any late cluster is late as a whole.
_CHUNK_BYTES = 4 << 20
#: More runs than this are joined across small holes: bounded memory for any fragmentation.
_MAX_RUNS = 1 << 17
#: Eight refcounts of 16 bits, big endian, for each byte of the bitmap of used clusters (bit 0 first).
_REFCOUNTS = [b"".join(b"\0\1" if value >> bit & 1 else b"\0\0" for bit in range(8)) for value in range(256)]


class GuestDisk(Protocol):
    """What a guest sees of a disk, read by several threads, whatever it is stored in."""

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Begin and end of what may not be zeros between two offsets, ascending."""

    def fill(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with the bytes at ``offset``; False (``buffer`` undefined): all of them are zeros. Raises KvmopsError."""

    def close(self) -> None: ...


class AsQcow2Source:
    """A disk as a qcow2 v3 image, laid out in one streaming pass without a temporary file. Closes the disk.

    The image is: header, the clusters of the allocated ranges in guest order, and at the end L2 tables, L1 table,
    refcount table and refcount blocks. All places are fixed when the source is opened. Clusters inside an allocated
    range that turn out to be zeros get no L2 entry and refcount 0 (which is why the tables are late).
    """

    def __init__(self, disk: GuestDisk) -> None:
        self._file = disk
        try:
            self._layout = plan_layout(self._file.size_bytes, self._file.data_ranges(0, self._file.size_bytes))
        except BaseException:
            self._file.close()
            raise
        layout = self._layout
        self.virtual_size_bytes = layout.virtual_size_bytes
        self.size_bytes = layout.clusters * CLUSTER_BYTES
        self.late_from = layout.l2_at * CLUSTER_BYTES // _CHUNK_BYTES * _CHUNK_BYTES
        self.clone_fd: int | None = None
        self._lock = threading.Lock()
        self._unread_clusters = layout.l2_at - 1
        self._used = bytearray(-(-layout.clusters // 8))
        self._mark_used([0, *range(layout.l2_at, layout.clusters)])

    def read_chunk(self, offset: int, buffer: memoryview) -> bool:
        """As ImageSource; ``offset`` and length are multiples of the cluster size of 64 KiB."""
        if offset % CLUSTER_BYTES or len(buffer) % CLUSTER_BYTES or offset + len(buffer) > self.size_bytes:
            raise ValueError(f"chunk {offset}+{len(buffer)} is not made of whole clusters")
        first = offset // CLUSTER_BYTES
        end = first + len(buffer) // CLUSTER_BYTES
        data_first, data_end = max(first, 1), min(end, self._layout.l2_at)
        any_data = False
        if first == 0:
            buffer[:CLUSTER_BYTES] = self._header()
            any_data = True
        if data_first < data_end:
            data = buffer[(data_first - first) * CLUSTER_BYTES : (data_end - first) * CLUSTER_BYTES]
            any_data = self._read_data(data_first, data) or any_data
        for cluster in range(max(first, self._layout.l2_at), end):
            table = self._table(cluster)
            buffer[(cluster - first) * CLUSTER_BYTES : (cluster - first + 1) * CLUSTER_BYTES] = table
            any_data = any_data or not is_zero(memoryview(table))
        return any_data

    def close(self) -> None:
        self._file.close()

    def _read_data(self, first: int, buffer: memoryview) -> bool:
        """Read whole clusters of the data area, note which are not zeros; True when there are any."""
        layout = self._layout
        cluster, end = first, first + len(buffer) // CLUSTER_BYTES
        used: list[int] = []
        while cluster < end:
            run = bisect_right(layout.run_member, cluster) - 1
            into = cluster - layout.run_member[run]
            count = min(layout.run_count[run] - into, end - cluster)
            part = buffer[(cluster - first) * CLUSTER_BYTES : (cluster - first + count) * CLUSTER_BYTES]
            guest_offset = (layout.run_guest[run] + into) * CLUSTER_BYTES
            # The last cluster of the disk may be unfinished.
            present = min(len(part), self._file.size_bytes - guest_offset)
            if self._file.fill(guest_offset, part[:present]):
                zero_fill(part[present:])
                used.extend(
                    cluster + index
                    for index in range(count)
                    if not is_zero(part[index * CLUSTER_BYTES : (index + 1) * CLUSTER_BYTES])
                )
            else:
                zero_fill(part)
            cluster += count
        with self._lock:
            self._mark_used(used)
            self._unread_clusters -= end - first
        return bool(used)

    def _mark_used(self, clusters: Iterable[int]) -> None:
        used = self._used
        for cluster in clusters:
            used[cluster >> 3] |= 1 << (cluster & 7)

    def _header(self) -> bytes:
        layout = self._layout
        return struct.pack(
            ">4sIQIIQIIQQIIQQQQIIQ",
            QCOW2_MAGIC,
            3,  # version
            0,  # backing file
            0,
            CLUSTER_BITS,
            layout.virtual_size_bytes,
            0,  # encryption
            layout.l1_entries,
            layout.l1_at * CLUSTER_BYTES,
            layout.table_at * CLUSTER_BYTES,
            layout.blocks_at - layout.table_at,
            0,  # internal snapshots
            0,
            0,  # incompatible, compatible, autoclear features
            0,
            0,
            4,  # refcounts of 2^4 bits
            112,  # header length
            0,  # compression type
        ).ljust(CLUSTER_BYTES, b"\0")

    def _table(self, cluster: int) -> bytes:
        layout = self._layout
        if self._unread_clusters > 0:
            raise RuntimeError(
                f"cluster {cluster} was asked for before {self._unread_clusters} data clusters were read"
            )
        if cluster < layout.l1_at:
            return self._l2_table(layout.l2_indexes[cluster - layout.l2_at])
        if cluster < layout.table_at:
            return self._l1_part(cluster - layout.l1_at)
        if cluster < layout.blocks_at:
            first = (cluster - layout.table_at) * _L2_ENTRIES
            blocks = range(layout.blocks_at + first, min(layout.blocks_at + first + _L2_ENTRIES, layout.clusters))
            return _big_endian(array("Q", [block * CLUSTER_BYTES for block in blocks]))
        first = (cluster - layout.blocks_at) * _REFCOUNTS_PER_BLOCK // 8
        bitmap = self._used[first : first + _REFCOUNTS_PER_BLOCK // 8]
        return b"".join(map(_REFCOUNTS.__getitem__, bitmap)).ljust(CLUSTER_BYTES, b"\0")

    def _l2_table(self, index: int) -> bytes:
        layout, used = self._layout, self._used
        table = array("Q", bytes(CLUSTER_BYTES))
        first, end = index * _L2_ENTRIES, (index + 1) * _L2_ENTRIES
        for run in range(max(bisect_right(layout.run_guest, first) - 1, 0), len(layout.run_guest)):
            guest = layout.run_guest[run]
            if guest >= end:
                break
            start, stop = max(guest, first), min(guest + layout.run_count[run], end)
            to_member = layout.run_member[run] - guest
            for member in range(start + to_member, stop + to_member):
                if used[member >> 3] >> (member & 7) & 1:
                    table[member - to_member - first] = member << CLUSTER_BITS | _COPIED
        return _big_endian(table)

    def _l1_part(self, part: int) -> bytes:
        layout = self._layout
        entries = array("Q", bytes(CLUSTER_BYTES))
        for position, index in enumerate(layout.l2_indexes):
            if index // _L2_ENTRIES == part:
                entries[index % _L2_ENTRIES] = (layout.l2_at + position) << CLUSTER_BITS | _COPIED
        return _big_endian(entries)


class RawAsQcow2Source(AsQcow2Source):
    """A raw disk (file or block device) as a qcow2 image."""

    def __init__(self, path: str, *, size_bytes: int | None = None) -> None:
        super().__init__(SparseFile(path, size_bytes))


@dataclass(frozen=True)
class Qcow2Layout:
    """Where everything goes, in clusters of 64 KiB.

    Run i: the ``run_count[i]`` guest clusters from ``run_guest[i]`` lie at ``run_member[i]``.
    """

    virtual_size_bytes: int
    run_guest: array[int]
    run_count: array[int]
    run_member: array[int]
    l2_indexes: array[int]
    l1_entries: int
    l2_at: int
    l1_at: int
    table_at: int
    blocks_at: int
    clusters: int


def plan_layout(raw_bytes: int, extents: Iterable[tuple[int, int]], *, max_runs: int = _MAX_RUNS) -> Qcow2Layout:
    """Lay out a raw disk of ``raw_bytes`` with the allocated byte ranges ``extents`` (ascending).

    Raises ImageError when it is larger than qcow2 can be.
    """
    virtual_size = -(-raw_bytes // 512) * 512
    guest, count = _cluster_runs(extents, max_runs)
    member, indexes, at = array("Q"), array("Q"), 1
    for first, clusters in zip(guest, count):
        member.append(at)
        at += clusters
        start = first // _L2_ENTRIES
        if indexes and indexes[-1] == start:
            start += 1
        indexes.extend(range(start, (first + clusters - 1) // _L2_ENTRIES + 1))
    l1_entries = max(1, -(-virtual_size // (CLUSTER_BYTES * _L2_ENTRIES)))
    if l1_entries * 8 > MAX_L1_BYTES:
        raise ImageError("raw disk", f"{raw_bytes} bytes are more than a qcow2 image can hold")
    l1_at = at + len(indexes)
    table_at = l1_at + -(-l1_entries * 8 // CLUSTER_BYTES)
    blocks = table_clusters = 1
    while blocks * _REFCOUNTS_PER_BLOCK < table_at + table_clusters + blocks:
        blocks = -(-(table_at + table_clusters + blocks) // _REFCOUNTS_PER_BLOCK)
        table_clusters = -(-blocks * 8 // CLUSTER_BYTES)
    return Qcow2Layout(
        virtual_size_bytes=virtual_size,
        run_guest=guest,
        run_count=count,
        run_member=member,
        l2_indexes=indexes,
        l1_entries=l1_entries,
        l2_at=at,
        l1_at=l1_at,
        table_at=table_at,
        blocks_at=table_at + table_clusters,
        clusters=table_at + table_clusters + blocks,
    )


def _cluster_runs(extents: Iterable[tuple[int, int]], max_runs: int) -> tuple[array[int], array[int]]:
    """First clusters and lengths of the runs that ``extents`` touch, joined across small holes when too many."""
    starts, ends, gap = array("Q"), array("Q"), 0

    def add(start: int, end: int) -> None:
        if ends and start <= ends[-1] + gap:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)

    for first_byte, end_byte in extents:
        add(first_byte // CLUSTER_BYTES, -(-end_byte // CLUSTER_BYTES))
        while len(starts) > max_runs:
            gap = gap * 2 or 1
            runs = list(zip(starts, ends))
            del starts[:], ends[:]
            for start, end in runs:
                add(start, end)
    return starts, array("Q", [end - start for start, end in zip(starts, ends)])


def _big_endian(values: array[int]) -> bytes:
    """``values`` as one cluster of big-endian 64-bit numbers."""
    if sys.byteorder == "little":
        values.byteswap()
    return values.tobytes().ljust(CLUSTER_BYTES, b"\0")
