# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Checks every byte of an archive and names what is damaged and which points are lost with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

from ansible_collections.kvmops.backup.plugins.module_utils._archive import frames, tar
from ansible_collections.kvmops.backup.plugins.module_utils._archive.bytesource import FramedBytes
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES, Damage
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import ArchiveReader, matches, open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.workers import Workers
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, DamagedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import zstandard
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress

_FRAME_HEADER_BYTES = 18
FULL, PARTIAL, STRUCTURE = "full", "partial", "structure"


@dataclass(frozen=True)
class Report:
    """`ok`: no damage was found. `coverage`: full (every byte has a digest that fits), partial (some members have none, or only
    zstd's checksums), structure (headers only: foreign archives). `checked_bytes` and `unchecked_bytes` count member bytes."""

    ok: bool
    coverage: str
    checked_bytes: int
    unchecked_bytes: int
    damage: tuple[Damage, ...]


def verify_file(path: str, *, progress: Optional[Progress] = None, threads: int = 0) -> Report:
    """Verifies an archive file. Never raises for damage, however grave; raises ArchiveError for a file that cannot be opened
    or is no archive, HostileError for what is refused."""
    try:
        reader = open_archive(path)
    except DamagedError as error:
        return Report(False, PARTIAL, 0, 0, (Damage(error.member, error.offset, error.length, (), str(error)),))
    with reader:
        return verify(reader, progress=progress, threads=threads)


def verify(reader: ArchiveReader, *, progress: Optional[Progress] = None, threads: int = 0) -> Report:
    """As `verify_file`, for an archive that is open."""
    return _Verification(reader, progress or Progress(), threads).run()


class _Verification:
    def __init__(self, reader: ArchiveReader, progress: Progress, threads: int) -> None:
        self._reader, self._progress, self._threads = reader, progress, threads
        self._damage: list[Damage] = []
        self._checked = self._unchecked = 0

    def run(self) -> Report:
        self._progress.phase("verify", bytes_total=sum(entry.size_bytes for entry in self._reader.entries))
        with Workers(self._threads) as workers:
            if self._reader.native:
                self._native(workers)
            else:
                self._foreign(workers)
        self._tail()
        if not self._reader.native:
            coverage = PARTIAL if self._unchecked == 0 else STRUCTURE
        else:
            coverage = FULL if self._unchecked == 0 else PARTIAL
        return Report(not self._damage, coverage, self._checked, self._unchecked, tuple(_merged(self._damage)))

    def _lost(self, member: str) -> tuple[int, ...]:
        """The points that need a member."""
        return tuple(
            p.timestamp
            for p in self._reader.points
            if member in (p.digests_member, p.member_name) or any(m.name == member for m in p.members)
        )

    def _found(self, member: str, offset: int, length: int, reason: str) -> None:
        self._damage.append(Damage(member, offset, length, self._lost(member) if member else (), reason))

    def _native(self, workers: Workers) -> None:
        for broken in self._reader.broken:
            self._damage.append(
                Damage(
                    broken.member,
                    0,
                    self._reader.entry(broken.member).size_bytes,
                    (broken.timestamp,),
                    str(broken.error),
                )
            )
        known = self._digests()
        own_layout = all(
            entry.offset == tar.data_offset(entry.header_offset) or entry.name.endswith(".digests")
            for entry in self._reader.entries
        )
        configurations = {point.member_name for point in self._reader.points} | {
            broken.member for broken in self._reader.broken
        }
        for entry in self._reader.entries:
            if own_layout:
                self._header(entry)
            chunk_digests = known.get(entry.name)
            checked = (
                chunk_digests is not None
                or entry.name in configurations
                or entry.name in {p.digests_member for p in self._reader.points}
            )
            self._checked += entry.size_bytes if checked else 0
            self._unchecked += 0 if checked else entry.size_bytes
            for offset, length, reason in self._chunks(workers, entry, chunk_digests):
                self._found(entry.name, offset, length, reason)
            self._fill(entry)

    def _digests(self) -> dict[str, bytes]:
        """Chunk digests of all members; where a digests member is damaged, its points' members have none."""
        known: dict[str, bytes] = {}
        for point in self._reader.points:
            try:
                known.update(self._reader.point_digests(point, known))
            except ArchiveError as error:
                self._found(point.digests_member, 0, self._reader.entry(point.digests_member).size_bytes, str(error))
        return known

    def _header(self, entry: tar.Entry) -> None:
        """Our headers are known to the byte, the parts without meaning too."""
        expected = [tar.header(entry.name, entry.size_bytes, entry.mtime, entry.header_offset)]
        if entry.name.endswith(".digests"):
            expected.append(tar.bare_header(entry.name, entry.size_bytes, entry.mtime))
        length = entry.offset - entry.header_offset
        try:
            if self._reader.bytes.fetch(entry.header_offset, length) not in expected:
                self._found("", entry.header_offset, length, f"the tar header of {entry.name} is not as it was written")
        except ArchiveError as error:
            self._found("", entry.header_offset, length, str(error))

    def _fill(self, entry: tar.Entry) -> None:
        begin = entry.offset + entry.size_bytes
        try:
            if any(self._reader.bytes.fetch(begin, entry.end - begin)):
                self._found("", begin, entry.end - begin, f"the zeros behind {entry.name} are not zero")
        except ArchiveError as error:
            self._found("", begin, entry.end - begin, str(error))

    def _chunks(
        self, workers: Workers, entry: tar.Entry, chunk_digests: Optional[bytes]
    ) -> Iterator[tuple[int, int, str]]:
        """(offset, length, reason) of each chunk that cannot be read or is not what was written."""

        def work(item: tuple[int, Optional[bytes]]) -> Optional[tuple[int, int, str]]:
            offset, data = item
            length = min(CHUNK_BYTES, entry.size_bytes - offset)
            try:
                found = self._reader.chunk(entry, offset, data)
            except ArchiveError as error:
                return offset, length, str(error)
            finally:
                self._progress.advance(length)
            if chunk_digests is not None and not matches(chunk_digests, offset, found):
                return offset, length, "its digest does not fit"
            return None

        for result in workers.ordered(work, self._reader.chunks(entry)):
            if result:
                yield result

    def _foreign(self, workers: Workers) -> None:
        source = self._reader.bytes
        checksums = (
            self._reader.compressed
            and zstandard.get_frame_parameters(os.pread(source.fd, _FRAME_HEADER_BYTES, 0)).has_checksum
        )
        for entry in self._reader.entries:
            if self._reader.compressed:
                for offset, length, reason in self._chunks(workers, entry, None):
                    self._found(entry.name, offset, length, reason)
            if checksums:
                self._checked += entry.size_bytes
            else:
                self._unchecked += entry.size_bytes

    def _tail(self) -> None:
        """Behind the end marker there is nothing but zeros, and a compressed archive ends with its seek table."""
        source = self._reader.bytes
        position = self._reader.end
        try:
            while data := source.fetch(position, CHUNK_BYTES):
                if data.count(0) != len(data):
                    self._found("", position, len(data), "there are bytes behind the end of the archive")
                position += len(data)
        except ArchiveError as error:
            self._found("", position, 0, str(error))
        if isinstance(source, FramedBytes):
            if source.index.problem:
                self._found("", source.index.end, self._reader.size_bytes - source.index.end, source.index.problem)
            elif (
                self._reader.native
                and len(source.index.stream_offsets) > 2
                and not frames.read_seek_table(source.fd, self._reader.size_bytes)
            ):
                self._found(
                    "",
                    source.index.file_offsets[-2],
                    self._reader.size_bytes - source.index.file_offsets[-2],
                    "the seek table is damaged or missing",
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
