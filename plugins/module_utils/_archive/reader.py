# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Reads an archive: its members, its points, and the checked bytes of both.

What makes a file one of ours: a configuration XML with our element whose digest fits. See docs/FORMAT.md, "Reading safely".
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Callable, Optional, Union

from ansible_collections.kvmops.backup.plugins.module_utils._archive import (
    config,
    digests,
    foreign,
    names,
    salvage,
    tar,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.bytesource import (
    Buffer,
    StreamedBytes,
    open_bytes,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES, Configuration, Member
from ansible_collections.kvmops.backup.plugins.module_utils._archive.tar import Entry, Walk
from ansible_collections.kvmops.backup.plugins.module_utils._archive.workers import Workers
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    DamagedError,
    HostileError,
    KvmopsError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ReadAt
from ansible_collections.kvmops.backup.plugins.module_utils._image.sink import ImageSink
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress

_HEAD_BYTES = 64 * 2**10
_MAX_HEADS_BYTES = 32 * 2**20
_MAX_CONFIGURATIONS = 4096
_OWN_MARK = b"<kvmops:backup"


@dataclass(frozen=True)
class BrokenPoint:
    """A configuration member from which no good point can be made, and why."""

    member: str
    timestamp: int
    error: KvmopsError


class ArchiveReader:
    """An open archive. `points` are the good ones, oldest first; `broken` those that are not, with the reason.

    `entries` are the members in the order of the tar stream, `end` is the offset of its end marker there. `native`: we wrote it.
    `bad_images` says which members of a foreign archive are no images although they are named so, and why.

    `use_salvage`: where the headers are broken, the members are those that the configuration tells, and `structure` is the damage.
    """

    def __init__(self, path: str, *, use_salvage: bool = False) -> None:
        self.path = path
        what = f"archive {path}"
        try:
            # Not blocking: a FIFO must not make us wait for its writer.
            self._file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
        except OSError as error:
            raise ArchiveError(
                what, f"it cannot be opened ({error.strerror})", "Check the path and that it is readable here."
            ) from error
        try:
            status = os.fstat(self._file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArchiveError(what, "it is not a regular file")
            self.size_bytes = status.st_size
            self.bytes, self.compressed = open_bytes(self._file, path)
            self._heads: dict[str, bytes] = {}
            self._heads_bytes = 0
            self.native = False
            self.bad_images: dict[str, str] = {}
            self.structure: Optional[DamagedError] = None
            self._digests: Optional[Mapping[str, memoryview]] = None
            self._find_members(use_salvage)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _find_members(self, use_salvage: bool) -> None:
        damage = None
        try:
            self._set_members(*self._walk())
        except DamagedError as error:
            if not use_salvage:
                raise
            damage = error
        if not use_salvage or (damage is None and (self.points or self.broken)):
            return
        found = () if isinstance(self.bytes, StreamedBytes) else salvage.layout(self.bytes)
        if found:
            self.structure = damage or DamagedError(
                f"archive {self.path}", "zeros stand where a member should be", offset=self.end, length=tar.BLOCK
            )
            for entry in found:
                self._keep_head(entry)
            self._set_members(found, found[-1].end)
        elif damage:
            raise damage

    def _set_members(self, entries: tuple[Entry, ...], end: int) -> None:
        self.entries, self.end = entries, end
        self._by_name = {entry.name: entry for entry in entries}
        self.points, self.broken = self._points()

    def _walk(self) -> tuple[tuple[Entry, ...], int]:
        walk = Walk(self.bytes.fetch, self.bytes.size)
        found = []
        try:
            for entry in walk.entries():
                found.append(entry)
                self._keep_head(entry)
        except DamagedError as error:
            raise DamagedError(
                self._what(error), error.why, error.hint, member=error.member, offset=error.offset, length=error.length
            ) from error
        except HostileError as error:
            raise HostileError(self._what(error), error.why, error.hint) from error
        return tuple(found), walk.end

    def _what(self, error: KvmopsError) -> str:
        return f"archive {self.path}" if error.what.startswith("archive") else f"archive {self.path}, {error.what}"

    def _keep_head(self, entry: Entry) -> None:
        """Reads what will be looked at anyway, while the stream passes by."""
        if entry.name.endswith(".xml"):
            limit = config.MAX_BYTES + 1
        elif not self.bytes.random_access and entry.name.lower().endswith(foreign.IMAGE_SUFFIXES):
            limit = _HEAD_BYTES
        else:
            return
        self._heads[entry.name] = self.bytes.fetch(entry.offset, min(entry.size_bytes, limit))
        self._heads_bytes += len(self._heads[entry.name])
        if self._heads_bytes > _MAX_HEADS_BYTES:
            raise HostileError("archive", f"it has more than {_MAX_HEADS_BYTES} bytes of XML")

    def _points(self) -> tuple[tuple[Configuration, ...], tuple[BrokenPoint, ...]]:
        good: list[Configuration] = []
        broken: list[BrokenPoint] = []
        configurations = [entry for entry in self.entries if entry.name.endswith(".xml")]
        # Signs that do not hang on a byte of the configuration, so that damage to it never makes ours look foreign.
        self.native = any(
            names.is_digests_member(entry.name) or _OWN_MARK in self._heads.get(entry.name, b"")
            for entry in self.entries
        )
        if len(configurations) > (_MAX_CONFIGURATIONS if self.native else foreign.MAX_CONFIGURATIONS):
            raise HostileError(f"archive {self.path}", f"it has {len(configurations)} configurations")
        for entry in configurations:
            try:
                point = config.decode(self._heads[entry.name], entry.name, entry.mtime)
                if point is not None and self.native and not point.format_version:
                    raise DamagedError(
                        f"configuration {entry.name}",
                        "our element is missing in it",
                        member=entry.name,
                        length=entry.size_bytes,
                    )
                if point is not None:
                    good.append(point)
            except KvmopsError as error:
                broken.append(BrokenPoint(entry.name, names.point_of(entry.name) or 0, error))
        if self.native:
            good = self._complete(sorted(good, key=lambda point: point.timestamp), broken)
        else:
            images = foreign.images(self.entries, self.read_at) if good else foreign.Images({}, {})
            self.bad_images = images.bad
            good = [foreign.complete(point, self.entries, images) for point in good]
        return tuple(sorted(good, key=lambda point: point.timestamp)), tuple(broken)

    def _complete(self, points: Sequence[Configuration], broken: list[BrokenPoint]) -> list[Configuration]:
        """Those points whose members are all there, in their size, on the parent that they name."""
        by_time = {point.timestamp: point for point in points}
        tables: dict[str, tuple[int, str]] = {}
        good: list[Configuration] = []
        for point in points:
            parent = by_time.get(point.parent_point)
            missing = [
                m
                for m in point.members
                if m.name not in self._by_name or self._by_name[m.name].size_bytes != m.size_bytes
            ]
            what = f"point {point.timestamp} of archive {self.path}"
            if missing or point.digests_member not in self._by_name:
                name = missing[0].name if missing else point.digests_member
                broken.append(
                    BrokenPoint(
                        point.member_name,
                        point.timestamp,
                        DamagedError(what, f"member {name} is missing or of another size", member=name),
                    )
                )
            elif point.parent_digest and (parent is None or parent.digest != point.parent_digest):
                broken.append(
                    BrokenPoint(
                        point.member_name,
                        point.timestamp,
                        DamagedError(what, f"it stands on another point {point.parent_point} than the one here"),
                    )
                )
            elif good and good[0].digest_algorithm != point.digest_algorithm:
                broken.append(
                    BrokenPoint(
                        point.member_name,
                        point.timestamp,
                        HostileError(
                            what, f"its digests are not of the same algorithm as those of point {good[0].timestamp}"
                        ),
                    )
                )
            elif good and good[-1].timestamp == point.timestamp:
                broken.append(
                    BrokenPoint(
                        point.member_name,
                        point.timestamp,
                        HostileError(what, f"{good[-1].member_name} is of the same time"),
                    )
                )
            elif any(
                tables.setdefault(m.name, (m.size_bytes, m.digest)) != (m.size_bytes, m.digest) for m in point.members
            ):
                broken.append(
                    BrokenPoint(
                        point.member_name,
                        point.timestamp,
                        DamagedError(what, "its member table contradicts an older one"),
                    )
                )
            else:
                good.append(point)
        return good

    def point(self, timestamp: Optional[int] = None) -> Configuration:
        """The point of that unix time, or the newest. Raises ArchiveError naming those that there are."""
        if not self.points:
            why = (
                f"no point in it is whole ({self.broken[0].error})"
                if self.broken
                else "no configuration XML of a VM is in it"
            )
            raise ArchiveError(f"archive {self.path}", why)
        if timestamp is None:
            newest = max((b.timestamp for b in self.broken), default=0)
            if newest > self.points[-1].timestamp:
                raise DamagedError(
                    f"archive {self.path}",
                    f"its newest point {newest} is damaged",
                    f"Name an older one to get that: {self.points[-1].timestamp}.",
                )
            return self.points[-1]
        for point in self.points:
            if point.timestamp == timestamp:
                return point
        known = ", ".join(str(point.timestamp) for point in self.points)
        raise ArchiveError(f"archive {self.path}", f"it has no point {timestamp}", f"It has {known}.")

    def entry(self, name: str) -> Entry:
        """Where a member is. Raises ArchiveError if it is not there."""
        if name not in self._by_name:
            raise ArchiveError(f"archive {self.path}", f"it has no member {name}")
        return self._by_name[name]

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a member, unchecked; fewer only at its end."""
        entry = self.entry(name)
        head = self._heads.get(name, b"")
        if offset + length <= len(head):
            return head[offset : offset + length]
        return self.bytes.fetch(entry.offset + offset, max(0, min(length, entry.size_bytes - offset)))

    def read_at(self, name: str) -> ReadAt:
        """`read` of one member, as a function of offset and length."""
        return lambda offset, length: self.read(name, offset, length)

    def chunk_digests(self) -> Mapping[str, memoryview]:
        """The chunk digests of every member of the good points; empty for a foreign archive.

        Raises DamagedError where a digests member does not fit its point.
        """
        if self._digests is None:
            found: dict[str, memoryview] = {}
            for point in self.points if self.native else ():
                found.update(self.point_digests(point, found))
            self._digests = found
        return self._digests

    def point_digests(self, point: Configuration, known: Mapping[str, memoryview]) -> Mapping[str, memoryview]:
        """The chunk digests of the members that are new at a point, `known` being those of the points before it."""
        new = [member for member in point.members if member.name not in known]
        entry = self.entry(point.digests_member)
        if sum(len(found) for found in known.values()) + entry.size_bytes > digests.MAX_BYTES:
            raise HostileError(f"archive {self.path}", f"it has more than {digests.MAX_BYTES} bytes of digests")
        data = self.read(point.digests_member, 0, entry.size_bytes)
        if self.algorithm.of_chunk(data).hex() != point.digests_digest:
            raise DamagedError(
                f"archive {self.path}",
                f"member {point.digests_member} is damaged",
                member=point.digests_member,
                length=len(data),
            )
        return digests.unpack(data, new, self.algorithm)

    @property
    def algorithm(self) -> digests.Algorithm:
        """That of every digest in a native archive."""
        return digests.ALGORITHMS[self.points[0].digest_algorithm] if self.points else digests.SHA256

    def is_intact(self, chunk_digests: memoryview, offset: int, data: Union[bytes, memoryview]) -> bool:
        """Whether the chunk at `offset` of a member is what was written."""
        begin = offset // CHUNK_BYTES * digests.DIGEST_BYTES
        return self.algorithm.of_chunk(data) == chunk_digests[begin : begin + digests.DIGEST_BYTES]

    def extract(
        self, wanted: Sequence[tuple[Member, ImageSink]], *, threads: int = 0, progress: Optional[Progress] = None
    ) -> int:
        """Hands the bytes of members to their sinks in one pass; the number of bytes.

        Every chunk is checked against its digest before its sink sees it (a clone afterwards); a foreign archive has none.
        A sink does not see chunks of zeros: its file is new.
        Raises DamagedError; what the sinks got until then is worth nothing.
        """
        known = self.chunk_digests()
        report = progress or Progress()
        total = 0
        with Workers(threads) as workers:
            for member, sink in sorted(wanted, key=lambda pair: self.entry(pair[0].name).offset):
                entry = self.entry(member.name)
                if self.native and member.name not in known:
                    raise DamagedError(
                        f"archive {self.path}", f"no digests of member {member.name} are in it", member=member.name
                    )
                report.phase("restore", member.target or member.name, entry.size_bytes)
                cloned = 0 if self.compressed else sink.clone(self.bytes.fd, entry.offset, entry.size_bytes)
                task = self._task(entry, known.get(member.name), sink, cloned)
                for count in workers.ordered(task, self.chunks(entry, skip_holes=not self.native)):
                    report.advance(count)
                    total += count
                sink.finish()
        return total

    def chunks(self, entry: Entry, *, skip_holes: bool = False) -> Iterator[tuple[int, Optional[bytes]]]:
        """(offset, data) of each chunk of a member; data only where one thread has to read them in order."""
        offset = 0
        while offset < entry.size_bytes:
            length = min(CHUNK_BYTES, entry.size_bytes - offset)
            yield offset, None if self.bytes.parallel else self.bytes.fetch(entry.offset + offset, length)
            offset += length
            if skip_holes and offset < entry.size_bytes:
                data = min(self.bytes.next_data(entry.offset + offset) - entry.offset, entry.size_bytes - 1)
                offset += (data - offset) // CHUNK_BYTES * CHUNK_BYTES

    def chunk(self, entry: Entry, offset: int, data: Optional[bytes]) -> Buffer:
        """The bytes of one chunk. Raises DamagedError if there are fewer than there should be."""
        length = min(CHUNK_BYTES, entry.size_bytes - offset)
        found = self.bytes.fetch_chunk(entry.offset + offset, length) if data is None else data
        if len(found) != length:
            raise DamagedError(
                f"archive {self.path}",
                f"member {entry.name} ends at {offset + len(found)} of {entry.size_bytes} bytes",
                member=entry.name,
                offset=offset + len(found),
                length=length - len(found),
            )
        return found

    def _task(
        self,
        entry: Entry,
        chunk_digests: Optional[memoryview],
        sink: ImageSink,
        cloned: int,
    ) -> Callable[[tuple[int, Optional[bytes]]], int]:
        def work(item: tuple[int, Optional[bytes]]) -> int:
            offset, data = item
            found = self.chunk(entry, offset, data)
            if chunk_digests is not None and not self.is_intact(chunk_digests, offset, found):
                raise DamagedError(
                    f"archive {self.path}",
                    f"member {entry.name} is damaged between byte {offset} and {offset + len(found)}",
                    "Restore an older point or another archive; backup_verify lists all damage.",
                    member=entry.name,
                    offset=offset,
                    length=len(found),
                )
            if cloned < offset + len(found) and found is not digests.ZEROS:
                begin = max(0, cloned - offset)
                sink.write(offset + begin, memoryview(found)[begin:])
            return len(found)

        return work


def open_archive(path: str, *, use_salvage: bool = False) -> ArchiveReader:
    """Opens an archive for reading; with `use_salvage` also one whose headers are broken, to say what is damaged.

    Raises ArchiveError (not an archive, not readable), DamagedError (broken structure), HostileError (refused).
    """
    return ArchiveReader(path, use_salvage=use_salvage)
