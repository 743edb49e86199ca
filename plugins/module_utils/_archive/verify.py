# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Checks every byte of an archive and names what is damaged and which points are lost with it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

from ansible_collections.kvmops.backup.plugins.module_utils._archive import digests, frames, tar
from ansible_collections.kvmops.backup.plugins.module_utils._archive.bytesource import FramedBytes, StreamedBytes
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES, Damage
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import (
    ArchiveReader,
    BrokenPoint,
    open_archive,
    written_since,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.workers import Workers
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, DamagedError
from ansible_collections.kvmops.backup.plugins.module_utils._image.zero import is_zero
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress

FULL, PARTIAL, STRUCTURE = "full", "partial", "structure"


@dataclass(frozen=True)
class VerifyReport:
    """`ok`: no damage was found. `coverage`: full (every byte has a digest that fits), partial (some members have none, or only
    zstd's checksums), structure (headers only: foreign archives). `checked_bytes` and `unchecked_bytes` count member bytes.
    `notices`: what is no damage but worth saying, as the remains of an interrupted append."""

    ok: bool
    coverage: str
    checked_bytes: int
    unchecked_bytes: int
    damage: tuple[Damage, ...]
    notices: tuple[Notice, ...] = ()


def verify_file(path: str, *, progress: Optional[Progress] = None, threads: int = 0, attempts: int = 3) -> VerifyReport:
    """Verifies an archive file. Never raises for damage, however grave; raises ArchiveError for a file that cannot be opened
    or is no archive, HostileError for what is refused. `attempts`: where points are added to the archive meanwhile."""
    begin = time.time_ns()
    try:
        reader = open_archive(path, use_salvage=True)
    except DamagedError as error:
        return VerifyReport(False, PARTIAL, 0, 0, (Damage(error.member, error.offset, error.length, (), str(error)),))
    with reader:
        report = verify(reader, progress=progress, threads=threads)
    if attempts > 1 and not report.ok and not any(item.member for item in report.damage) and written_since(path, begin):
        # Perhaps a point was added meanwhile, and what looked like damage between or behind the members was its commit.
        return verify_file(path, progress=progress, threads=threads, attempts=attempts - 1)
    return report


def verify(reader: ArchiveReader, *, progress: Optional[Progress] = None, threads: int = 0) -> VerifyReport:
    """As `verify_file`, for an archive that is open."""
    return _Verification(reader, progress or Progress(), threads).run()


class _Verification:
    def __init__(self, reader: ArchiveReader, progress: Progress, threads: int) -> None:
        self._reader, self._progress, self._threads = reader, progress, threads
        self._damage: list[Damage] = []
        self._checked = self._unchecked = 0
        self._own_layout = reader.native and all(
            tar.is_own_name(entry.name)
            and (entry.offset == tar.data_offset(entry.header_offset) or entry.name.endswith(".digests"))
            for entry in reader.entries
        )

    def run(self) -> VerifyReport:
        reader = self._reader
        self._progress.phase("verify", bytes_total=sum(entry.size_bytes for entry in reader.entries))
        for broken in reader.broken:
            if broken.member and not broken.cause:
                size = reader.entry(broken.member).size_bytes
                self._damage.append(Damage(broken.member, 0, size, self._with_followers(broken), str(broken.error)))
        if not reader.points and not reader.broken:
            self._stream(0, reader.end, "no configuration of a VM is in it")
        with Workers(self._threads) as workers:
            if reader.native:
                self._native(workers)
            else:
                self._foreign(workers)
        notices = [f"behind its end: {reader.pending}"] if reader.pending else []
        found = len(self._damage)
        self._tail()
        if reader.changed():  # what is behind the end, and the end frame itself, are then those of an append
            del self._damage[found:]
            notices = ["a point was added while it was verified; what stands behind its end was not looked at"]
        if reader.structure and (not self._damage or any(not broken.member for broken in reader.broken)):
            self._damage.append(Damage("", reader.structure.offset, reader.structure.length, (), str(reader.structure)))
        if not reader.native:
            coverage = PARTIAL if self._unchecked == 0 and reader.entries else STRUCTURE
        else:
            coverage = FULL if self._unchecked == 0 else PARTIAL
        damage = tuple(_merged(self._damage))
        told = tuple(Notice(Code.NOT_COVERED, text) for text in notices)
        return VerifyReport(not damage, coverage, self._checked, self._unchecked, damage, told)

    def _with_followers(self, broken: BrokenPoint) -> tuple[int, ...]:
        """A broken point and those that stand on it, and on them."""
        found = [broken.timestamp]
        for other in sorted(self._reader.broken, key=lambda b: b.timestamp):
            if other.cause in found and other.timestamp not in found:
                found.append(other.timestamp)
        return tuple(found)

    def _lost(self, member: str) -> tuple[int, ...]:
        """The points that need a member, or the digests in it."""
        needed = {member}
        for point in self._reader.points:
            if member == point.digests_member:
                needed |= {m.name for m in self._reader.new_members(point)}
        return tuple(
            p.timestamp
            for p in self._reader.points
            if member in (p.digests_member, p.member_name) or any(m.name in needed for m in p.members)
        )

    def _member(self, member: str, offset: int, length: int, reason: str) -> None:
        """Damage to the bytes of a member."""
        self._damage.append(Damage(member, offset, length, self._lost(member), reason))

    def _stream(self, offset: int, length: int, reason: str, points: tuple[int, ...] = ()) -> None:
        """Damage to what stands between members; named by its place in the file."""
        source = self._reader.bytes
        if isinstance(source, FramedBytes):
            offset, length = source.index.extent(offset, length)
        self._damage.append(Damage("", offset, length, points, reason))

    def _native(self, workers: Workers) -> None:
        reader = self._reader
        known = self._digests()
        table = {member.name: member.digest for point in reader.points for member in point.members}
        covered = {point.member_name for point in reader.points} | {point.digests_member for point in reader.points}
        covered |= {broken.member for broken in reader.broken}
        for entry in reader.entries:
            if self._own_layout:
                self._header(entry)
            chunk_digests = known.get(entry.name)
            digest = table.get(entry.name, "") if chunk_digests is None else ""
            if chunk_digests is not None or digest or entry.name in covered:
                self._checked += entry.size_bytes
            else:
                self._unchecked += entry.size_bytes
            damage = list(self._chunks(workers, entry, chunk_digests, digest))
            for offset, length, reason in damage:
                self._member(entry.name, offset, length, reason)
            self._fill(entry)

    def _digests(self) -> dict[str, memoryview]:
        """Chunk digests of all members; where a digests member is damaged, its points' members have none."""
        known: dict[str, memoryview] = {}
        for point in self._reader.points:
            try:
                known.update(self._reader.point_digests(point))
            except ArchiveError as error:
                self._member(point.digests_member, 0, self._reader.entry(point.digests_member).size_bytes, str(error))
        return known

    def _header(self, entry: tar.Entry) -> None:
        """Our headers are known to the byte, the parts without meaning too. A broken one hides the points behind it."""
        expected = [tar.header(entry.name, entry.size_bytes, entry.mtime, entry.header_offset)]
        if entry.name.endswith(".digests"):
            expected.append(tar.bare_header(entry.name, entry.size_bytes, entry.mtime))
        length = entry.offset - entry.header_offset
        reader = self._reader
        behind = (p.timestamp for p in reader.points if reader.entry(p.member_name).offset > entry.header_offset)
        lost = tuple(behind) if reader.structure else ()
        try:
            if self._reader.bytes.fetch(entry.header_offset, length) in expected:
                return
            reason = f"the tar header of {entry.name} is not as it was written"
        except ArchiveError as error:
            reason = f"the tar header of {entry.name} cannot be read: {error}"
        self._stream(entry.header_offset, length, reason, lost)

    def _fill(self, entry: tar.Entry) -> None:
        begin = entry.offset + entry.size_bytes
        try:
            if any(self._reader.bytes.fetch(begin, entry.end - begin)):
                self._stream(begin, entry.end - begin, f"the zeros behind {entry.name} are not zero")
        except ArchiveError as error:
            if not any(item.member == entry.name for item in self._damage):
                self._stream(begin, entry.end - begin, str(error))

    def _chunks(
        self, workers: Workers, entry: tar.Entry, chunk_digests: Optional[memoryview], digest: str = ""
    ) -> Iterator[tuple[int, int, str]]:
        """(offset, length, reason) of each chunk that cannot be read or is not what was written.

        `digest` is that of the whole member, where its chunks have none.
        """

        algorithm = self._reader.algorithm

        def work(item: tuple[int, Optional[bytes]]) -> tuple[int, str, bytes]:
            offset, data = item
            length = min(CHUNK_BYTES, entry.size_bytes - offset)
            try:
                found = self._reader.chunk(entry, offset, data)
            except ArchiveError as error:
                return length, str(error), b""
            finally:
                self._progress.advance(length)
            if chunk_digests is not None and not self._reader.is_intact(chunk_digests, offset, found):
                return length, "its digest does not fit", b""
            return length, "", algorithm.of_chunk(found) if digest else b""

        unread: list[ArchiveError] = []

        def chunks() -> Iterator[tuple[int, Optional[bytes]]]:
            try:  # where one thread reads, that is done here and not by `work`
                yield from self._reader.chunks(entry)
            except ArchiveError as error:
                unread.append(error)

        offset, parts, whole = 0, [], True
        for length, reason, part in workers.ordered(work, chunks()):
            if reason:
                yield offset, length, reason
                whole = False
            parts.append(part)
            offset += length
        if unread:
            yield offset, entry.size_bytes - offset, str(unread[0])
        elif digest and whole and algorithm.of_member(b"".join(parts)) != digest:
            yield 0, entry.size_bytes, "its digest does not fit"

    def _foreign(self, workers: Workers) -> None:
        source = self._reader.bytes
        for name, why in self._reader.images.bad.items():
            self._member(name, 0, self._reader.entry(name).size_bytes, why)
        checksums = self._reader.compressed
        if not checksums:
            self._unchecked += sum(entry.size_bytes for entry in self._reader.entries)
            return
        end = 0
        try:
            for frame in frames.scan(source.fd, self._reader.size_bytes):
                checksums = checksums and frame.checksum
                end = frame.end
        except frames.FrameError as error:
            if isinstance(source, StreamedBytes):  # the index of a sought file knows it, see _tail
                self._damage.append(Damage("", end, self._reader.size_bytes - end, (), str(error)))
        except frames.NotSeekableError:
            checksums = False
        for entry in self._reader.entries:
            for offset, length, reason in self._chunks(workers, entry, None):
                self._member(entry.name, offset, length, reason)
            self._checked += entry.size_bytes if checksums else 0
            self._unchecked += 0 if checksums else entry.size_bytes

    def _tail(self) -> None:
        """Behind the end marker there is nothing but zeros, and a compressed archive ends with its seek table."""
        reader, source = self._reader, self._reader.bytes
        if reader.structure and any(not broken.member for broken in reader.broken):
            return  # where the members end is not known
        position = reader.end
        ours = bool(reader.pending)
        try:
            while not ours and (data := source.fetch_chunk(source.next_data(position), CHUNK_BYTES)):
                position = source.next_data(position)
                if data is not digests.ZEROS and not is_zero(memoryview(data)):
                    reason = reader.remains.text or "there are bytes behind the end of the archive"
                    self._stream(position, len(data), reason, reader.remains.lost)
                position += len(data)
        except ArchiveError as error:
            self._stream(position, 0, str(error))
        else:
            size = position if source.size is None else source.size
            missing = reader.end + (len(tar.END) if self._own_layout else 2 * tar.BLOCK) - size
            if reader.native and missing > 0:
                self._stream(reader.end, size - reader.end, f"{missing} bytes of its end marker are missing")
        if isinstance(source, FramedBytes):
            self._frames(source)

    def _frames(self, source: FramedBytes) -> None:
        """What is between and behind the frames: those that other tools skip, and the seek table."""
        index, size = source.index, self._reader.size_bytes
        for number in index.skips:
            begin, end = index.file_offsets[number], index.file_offsets[number + 1]
            if os.pread(source.fd, frames.HEADER_BYTES, begin) != frames.skippable(end - begin - frames.HEADER_BYTES):
                reason = "the header that lets other tools skip these bytes is damaged"
                self._damage.append(Damage("", begin, frames.HEADER_BYTES, (), reason))
        if index.problem:
            self._damage.append(Damage("", index.end, size - index.end, (), index.problem))
        elif self._own_frames(source) and not index.by_table:
            begin = index.file_offsets[-2]
            self._damage.append(Damage("", begin, size - begin, (), "the seek table is damaged or missing"))

    def _own_frames(self, source: FramedBytes) -> bool:
        """Whether the frames are cut as we cut them; other tools that compressed our archive anew write no seek table."""
        return (
            self._own_layout
            and len(self._reader.entries) > 0
            and (source.index.stream_offsets[1] == self._reader.entries[0].offset)
        )


def _merged(damage: list[Damage]) -> Iterator[Damage]:
    """Adjacent damaged chunks of one member as one extent."""
    last: Optional[Damage] = None
    for item in damage:
        if (
            last
            and item.member
            and last.member == item.member
            and last.offset + last.length == item.offset
            and last.reason == item.reason
        ):
            last = Damage(last.member, last.offset, last.length + item.length, last.points, last.reason)
            continue
        if last:
            yield last
        last = item
    if last:
        yield last
