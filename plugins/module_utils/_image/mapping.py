# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which bytes of a qcow2 file are which bytes of the disk: from hostile tables, in bounded memory."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import (
    DATA_FILE,
    EXTENDED_L2,
    ImageError,
    ImageInfo,
    Qcow2Header,
    ReadAt,
    read_header,
)

#: Mappings beyond these (20 bytes per run and a byte per cluster while reading) go through qemu-img instead.
MAX_RUNS = 1 << 20
MAX_CLUSTERS = 64 << 20
MAX_TABLES = 1 << 17
_L1_STEP = 8192

_OFFSET = 0x00FFFFFFFFFFFE00
_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_ZERO = 1


@dataclass(frozen=True)
class Mapping:
    """Runs of clusters in the order of the member.

    Run i maps ``counts[i]`` clusters from member cluster ``members[i]`` to guest cluster ``guests[i]``.
    """

    cluster_bytes: int
    virtual_size_bytes: int
    members: array[int]
    guests: array[int]
    counts: array[int]

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """``(member_offset, guest_offset, length)`` of the data between two member offsets, ascending."""
        cluster = self.cluster_bytes
        for run in range(max(bisect_right(self.members, start // cluster) - 1, 0), len(self.members)):
            run_start = self.members[run] * cluster
            if run_start >= end:
                return
            first = max(run_start, start)
            last = min(run_start + self.counts[run] * cluster, end)
            if first < last:
                yield first, self.guests[run] * cluster + first - run_start, last - first


class NotStreamableError(ImageError):
    """An honest image that cannot be mapped cluster by cluster: convert it with qemu-img instead."""


def can_stream_as_raw(info: ImageInfo, read_at: ReadAt) -> bool:
    """Whether read_mapping() applies: a self-contained qcow2 of plain clusters that is not too fragmented.

    False (backing or data file, encryption, compressed clusters, subclusters): write the qcow2 first and convert it
    with qemu-img. Reads the L1 and all L2 tables; raises ImageError when they are inconsistent.
    """
    if info.format != "qcow2":
        return False
    try:
        runs = 0
        for _dummy, guest, _dummy in _runs(read_at, _streamable_header(read_at, sys.maxsize), sys.maxsize):
            if guest >= 0:
                _check_count(runs)
                runs += 1
    except NotStreamableError:
        return False
    return True


def read_mapping(read_at: ReadAt, size_bytes: int) -> Mapping:
    """Read where the data of a qcow2 member of ``size_bytes`` bytes goes, all of it checked before anything is written.

    Raises ImageError when tables point out of the file or two of anything (headers, tables, data) share a cluster,
    NotStreamableError when can_stream_as_raw() would be False.
    """
    header = _streamable_header(read_at, size_bytes)
    cluster = header.cluster_bytes
    total = -(-size_bytes // cluster)
    if total > MAX_CLUSTERS:
        raise NotStreamableError("qcow2 image", f"{total} clusters are too many to be mapped")
    taken = bytearray(total)
    taken[0] = 1
    _take(taken, header.l1_offset // cluster, -(-header.l1_entries * 8 // cluster))
    members, guests, counts = array("Q"), array("Q"), array("I")
    for member, guest, count in _runs(read_at, header, size_bytes):
        _take(taken, member, count)
        if guest >= 0:
            _check_count(len(members))
            members.append(member)
            guests.append(guest)
            counts.append(count)
    del taken
    if any(members[index] > members[index + 1] for index in range(len(members) - 1)):
        # One integer per run takes half the memory of indexes sorted by key.
        order = array("Q", sorted(member * MAX_RUNS + index for index, member in enumerate(members)))
        members, guests, counts = (
            array(values.typecode, (values[each % MAX_RUNS] for each in order)) for values in (members, guests, counts)
        )
    return Mapping(cluster, header.virtual_size_bytes, members, guests, counts)


def _bad(why: str) -> ImageError:
    return ImageError("qcow2 tables", why, "The file is damaged or made to deceive; it is refused.")


def _streamable_header(read_at: ReadAt, size_bytes: int) -> Qcow2Header:
    header = read_header(read_at, size_bytes)
    if header.backing_file or header.crypt_method or header.incompatible & (DATA_FILE | EXTENDED_L2):
        raise NotStreamableError("qcow2 image", "its data is not plain clusters of its own file")
    return header


def _check_count(runs: int) -> None:
    if runs >= MAX_RUNS:
        raise NotStreamableError("qcow2 image", f"it is fragmented into more than {MAX_RUNS} pieces")


def _take(taken: bytearray, first: int, count: int) -> None:
    if taken.find(1, first, first + count) >= 0 or first + count > len(taken):
        raise _bad(f"cluster {first} or one of the {count - 1} behind it is used twice")
    taken[first : first + count] = b"\1" * count


def _runs(read_at: ReadAt, header: Qcow2Header, size_bytes: int) -> Iterator[tuple[int, int, int]]:
    """``(member_cluster, guest_cluster, count)`` in guest order; an L2 table is a run of one with guest cluster -1."""
    per_table = header.cluster_bytes // 8
    for index, offset in _l2_offsets(read_at, header, size_bytes):
        yield offset // header.cluster_bytes, -1, 1
        table = _read_entries(read_at, offset, per_table)
        if any(table):
            yield from _runs_of_table(table, index * per_table, header, size_bytes)


def _l2_offsets(read_at: ReadAt, header: Qcow2Header, size_bytes: int) -> Iterator[tuple[int, int]]:
    """L1 index and offset of each L2 table. A table that is named twice would be read again and again: refused."""
    cluster = header.cluster_bytes
    needed = -(-header.virtual_size_bytes // (cluster * (cluster // 8)))
    seen: set[int] = set()
    for step in range(0, needed, _L1_STEP):
        entries = _read_entries(read_at, header.l1_offset + step * 8, min(_L1_STEP, needed - step))
        for index, entry in enumerate(entries, step):
            if entry == 0:
                continue
            offset = entry & _OFFSET
            if entry & ~(_OFFSET | _COPIED) or offset % cluster or not 0 < offset < size_bytes or offset in seen:
                raise _bad(f"L1 entry {index} ({entry:#x}) is impossible")
            if len(seen) >= MAX_TABLES:
                raise NotStreamableError("qcow2 image", f"it has more than {MAX_TABLES} L2 tables")
            seen.add(offset)
            yield index, offset


def _runs_of_table(
    table: array[int], first_guest: int, header: Qcow2Header, size_bytes: int
) -> Iterator[tuple[int, int, int]]:
    cluster = header.cluster_bytes
    start, first_entry, expected = 0, 0, -1
    for index, entry in enumerate(table):
        if entry == expected:
            expected += cluster
            continue
        if first_entry:
            yield (first_entry & _OFFSET) // cluster, first_guest + start, index - start
        first_entry, expected = 0, -1
        if entry and _is_data(entry, header, size_bytes):
            start, first_entry, expected = index, entry, entry + cluster
    if first_entry:
        yield (first_entry & _OFFSET) // cluster, first_guest + start, len(table) - start


def _is_data(entry: int, header: Qcow2Header, size_bytes: int) -> bool:
    if entry & _COMPRESSED:
        raise NotStreamableError("qcow2 image", "it has compressed clusters")
    offset = entry & _OFFSET
    if entry & ~(_OFFSET | _COPIED | _ZERO) or (entry & _ZERO and header.version < 3):
        raise _bad(f"L2 entry {entry:#x} has unknown bits")
    if offset % header.cluster_bytes or offset >= size_bytes:
        raise _bad(f"L2 entry {entry:#x} points outside the file or between clusters")
    return offset > 0 and not entry & _ZERO


def _read_entries(read_at: ReadAt, offset: int, count: int) -> array[int]:
    """``count`` big-endian 64-bit entries; what lies behind the end of the file is zero, as for QEMU."""
    entries = array("Q", read_at(offset, count * 8).ljust(count * 8, b"\0"))
    if sys.byteorder == "little":
        entries.byteswap()
    return entries
