# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Reads an archive: its members, its points, and the checked bytes of both.

What makes a file one of ours: a configuration XML with our element whose digest fits. See docs/FORMAT.md, "Reading safely".
"""

from __future__ import annotations

import functools
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Callable, Optional, Union

from ansible_collections.kvmops.backup.plugins.module_utils import _trust
from ansible_collections.kvmops.backup.plugins.module_utils._archive import (
    config,
    digests,
    foreign,
    names,
    salvage,
    tar,
    trailing_data,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.bytesource import (
    Buffer,
    StreamedBytes,
    open_bytes,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES, Configuration, Member
from ansible_collections.kvmops.backup.plugins.module_utils._archive.tar import Entry, Walk
from ansible_collections.kvmops.backup.plugins.module_utils._archive.trailing_data import TrailingData
from ansible_collections.kvmops.backup.plugins.module_utils._archive.workers import Workers
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    DamagedError,
    HostileError,
    KvmopsError,
    RefusedError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ReadAt
from ansible_collections.kvmops.backup.plugins.module_utils._image.sink import ImageSink
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import ImageSource
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress

_HEAD_BYTES = 64 * 2**10
MAX_CONFIGURATION_BYTES = 32 * 2**20  # of all points together
MAX_CONFIGURATIONS = 4096
_OWN_MARK = b"<kvmops:backup"
_ATTEMPTS = 5  # to open an archive whose end is being written
_CLOCK_NS = 10**9


@dataclass(frozen=True)
class BrokenPoint:
    """A configuration member from which no good point can be made, and why.

    `cause`: the point is whole itself, but stands on this one, which is not. `member` "" and `timestamp` 0: all that came behind
    a broken header.
    """

    member: str
    timestamp: int
    error: KvmopsError
    cause: int = 0

    def __str__(self) -> str:
        return f"{f'point {self.timestamp}' if self.member else 'what comes behind it'} cannot be used: {self.error}"


class ArchiveReader:
    """An open archive. `points` are the good ones, oldest first; `broken` those that are not, with the reason.

    `entries` are the members in the order of the tar stream, `end` is the offset of its end marker there. `native`: we wrote it.
    Of a foreign one, `images` are the disk images, and `undecided` says why it is not known which are whose, by the member name of
    the point.

    Where a header behind a whole point is broken, `structure` is the damage and the points before it are there.
    `use_salvage`: where the headers are broken, the members are those that the configuration tells.
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
            self.status = status  # when it was opened
            self.bytes, self.compressed = open_bytes(self._file, path)
            self._heads: dict[str, bytes] = {}
            self.heads_bytes = 0
            self._bad_heads: dict[str, DamagedError] = {}
            self.native = False
            self.images = foreign.Images({}, {})
            self.undecided: dict[str, str] = {}
            self.structure: Optional[DamagedError] = None
            self._digests: Optional[Mapping[str, memoryview]] = None
            self._bad_digests: dict[str, DamagedError] = {}
            self._decoded: list[Configuration] = []
            self._find_members(use_salvage)
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise ArchiveError(what, f"it cannot be read ({error.strerror})") from error
            raise

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @functools.cached_property
    def distrust(self) -> str:
        """Why the file that was opened is not ours to trust, "" if it is; whether we wrote what is in it is `native`."""
        return _trust.doubt(self.path, os.fstat(self._file.fileno()))

    @property
    def random_access(self) -> bool:
        """Whether a member can be read in pieces without reading everything before it."""
        return self.bytes.random_access

    def changed(self) -> bool:
        """Whether somebody has written to the file since it was opened."""
        status = os.fstat(self._file.fileno())
        return (status.st_size, status.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns)

    @functools.cached_property
    def remains(self) -> TrailingData:
        """What stands behind the end of a native archive; nothing is known where a broken header hides the end."""
        if not self.native or self.structure:
            return TrailingData()
        found = trailing_data.find(self.bytes, self.end, self.size_bytes)
        # What changes while it is looked at can only be an append.
        return found if found.ours or not self.changed() else TrailingData("an append under way")

    @property
    def pending(self) -> str:
        """What an interrupted append has left, or one under way has written so far; "" for nothing. Readers need not mind."""
        return self.remains.text if self.remains.ours else ""

    def _find_members(self, use_salvage: bool) -> None:
        entries, end, damage = self._walk()
        self._set_members(entries, end)
        whole = damage is None and self.remains.ours and bool(self.points or self.broken)
        found = () if whole or not use_salvage or isinstance(self.bytes, StreamedBytes) else salvage.layout(self.bytes)
        if len(found) > len(entries):
            self.structure = damage or DamagedError(
                f"archive {self.path}", "zeros stand where a member should be", offset=self.end, length=tar.BLOCK
            )
            self._heads, self.heads_bytes = {}, 0
            for entry in found:
                self._keep_head(entry)
            self._set_members(found, found[-1].end)
        elif damage:
            if not (self.native and self.points):
                raise damage
            self.structure = damage
            self.broken += (BrokenPoint("", 0, damage),)
        elif self.points:
            self.broken += tuple(self._lost_points())

    def _lost_points(self) -> Iterator[BrokenPoint]:
        """Points of which parts are there, but nothing says where their configuration is: zeros stand in place of a header."""
        times = {names.point_of(entry.name) for entry in self.entries}
        for entry in self.entries:
            if self.native and names.is_digests_member(entry.name) and names.digests_time(entry.name) not in times:
                error = DamagedError(
                    f"archive {self.path}", f"the configuration that belongs to {entry.name} is missing"
                )
                yield BrokenPoint(entry.name, names.digests_time(entry.name), error)
        if self.remains.lost:
            error = DamagedError(f"archive {self.path}", self.remains.text, offset=self.end, length=tar.BLOCK)
            yield BrokenPoint("", 0, error)

    def _set_members(self, entries: tuple[Entry, ...], end: int) -> None:
        self.entries, self.end = entries, end
        self.__dict__.pop("remains", None)  # it is what stands behind that end
        self._by_name = {entry.name: entry for entry in entries}
        self.points, self.broken = self._points()

    def _walk(self) -> tuple[tuple[Entry, ...], int, Optional[DamagedError]]:
        """The members up to the end marker or the first broken header, the offset of that, and the damage."""
        walk = Walk(self.bytes.fetch, self.bytes.size)
        found: list[Entry] = []
        try:
            for entry in walk.entries():
                self._keep_head(entry)
                found.append(entry)
        except DamagedError as error:
            damage = DamagedError(
                self._what(error), error.why, error.hint, member=error.member, offset=error.offset, length=error.length
            )
            return tuple(found), found[-1].end if found else 0, damage
        except HostileError as error:
            raise HostileError(self._what(error), error.why, error.hint) from error
        return tuple(found), walk.end, None

    def _what(self, error: KvmopsError) -> str:
        return f"archive {self.path}" if error.what.startswith("archive") else f"archive {self.path}, {error.what}"

    def _keep_head(self, entry: Entry) -> None:
        """Reads what will be looked at anyway, while the stream passes by."""
        if entry.name.endswith(".xml"):
            limit = config.MAX_BYTES + 1
        elif not self.bytes.random_access and foreign.is_image(entry.name, lambda: self.bytes.fetch(entry.offset, 4)):
            limit = _HEAD_BYTES
        else:
            return
        try:
            self._heads[entry.name] = self.bytes.fetch(entry.offset, min(entry.size_bytes, limit))
        except DamagedError as error:
            if not self.bytes.random_access:
                raise
            # Where the next member is does not hang on the bytes of this one.
            self._heads[entry.name], self._bad_heads[entry.name] = b"", error
        self.heads_bytes += len(self._heads[entry.name])
        if self.heads_bytes > MAX_CONFIGURATION_BYTES:
            raise HostileError("archive", f"it has more than {MAX_CONFIGURATION_BYTES} bytes of XML")

    def _points(self) -> tuple[tuple[Configuration, ...], tuple[BrokenPoint, ...]]:
        good: list[Configuration] = []
        broken: list[BrokenPoint] = []
        configurations = [entry for entry in self.entries if entry.name.endswith(".xml")]
        # Signs that do not hang on a byte of the configuration, so that damage to it never makes ours look foreign.
        self.native = any(
            names.is_digests_member(entry.name) or _OWN_MARK in self._heads.get(entry.name, b"")
            for entry in self.entries
        )
        if len(configurations) > (MAX_CONFIGURATIONS if self.native else foreign.MAX_CONFIGURATIONS):
            raise HostileError(f"archive {self.path}", f"it has {len(configurations)} configurations")
        for entry in configurations:
            try:
                if entry.name in self._bad_heads:
                    raise self._bad_heads[entry.name]
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
            self._decoded = sorted(good, key=lambda point: point.timestamp)
            good = self._complete(self._decoded, broken)
        else:
            images = foreign.images(self.entries, self.read_at) if good else foreign.Images({}, {})
            self.images = images
            good = [self._completed(point, good) for point in good]
        return tuple(sorted(good, key=lambda point: point.timestamp)), tuple(broken)

    def _completed(
        self, point: Configuration, all_points: Sequence[Configuration], said: Optional[Mapping[str, str]] = None
    ) -> Configuration:
        newest = point.timestamp == max(each.timestamp for each in all_points)
        completed = foreign.complete(point, self.entries, self.images, newest=newest, said=said)
        self.undecided[point.member_name] = completed.undecided
        return completed.point

    def with_images(self, point: Configuration, said: Mapping[str, str]) -> Configuration:
        """A point of a foreign archive with the images that the user names for its disks, by target; "" leaves a disk out.

        Raises RefusedError for what cannot be.
        """
        if self.native:
            why = "an archive of this collection says itself which image is which disk's"
            raise RefusedError("Option disk_images", why, "Leave the option out.")
        return self._completed(point, self.points, said)

    def _complete(self, points: Sequence[Configuration], broken: list[BrokenPoint]) -> list[Configuration]:
        """Those points whose members are all there, in their size, on the parent that they name."""
        tables: dict[str, tuple[int, str]] = {}
        good: list[Configuration] = []
        for point in points:
            error = self._fault(point, good, tables)
            if error is None:
                good.append(point)
                continue
            cause = point.parent_point if any(b.timestamp == point.parent_point for b in broken) else 0
            broken.append(BrokenPoint(point.member_name, point.timestamp, error, cause))
        return good

    def _fault(
        self, point: Configuration, good: Sequence[Configuration], tables: dict[str, tuple[int, str]]
    ) -> Optional[KvmopsError]:
        """Why a point is not good, `good` being those before it; None if it is. `tables`: size and digest of the members so far."""
        what = f"point {point.timestamp} of archive {self.path}"
        needed = [(m.name, m.size_bytes) for m in point.members]
        missing = [n for n, size in needed if n not in self._by_name or self._by_name[n].size_bytes != size]
        missing += [point.digests_member] if point.digests_member not in self._by_name else []
        if missing:
            return DamagedError(what, f"member {missing[0]} is missing or of another size", member=missing[0])
        if point.parent_digest and not any(
            (p.timestamp, p.digest) == (point.parent_point, point.parent_digest) for p in good
        ):
            known = any((p.timestamp, p.digest) == (point.parent_point, point.parent_digest) for p in self._decoded)
            why = "which is not good" if known else "than the one here"
            return DamagedError(what, f"it stands on {'' if known else 'another '}point {point.parent_point} {why}")
        if good and good[0].digest_algorithm != point.digest_algorithm:
            return HostileError(what, f"its digests are not of the same algorithm as those of {good[0].timestamp}")
        if good and good[-1].timestamp == point.timestamp:
            return HostileError(what, f"{good[-1].member_name} is of the same time")
        if any(tables.setdefault(m.name, (m.size_bytes, m.digest)) != (m.size_bytes, m.digest) for m in point.members):
            return DamagedError(what, "its member table contradicts an older one")
        return None

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
            newest = max(self.broken, key=lambda broken: broken.timestamp, default=None)
            behind = next((b for b in self.broken if not b.member), None)
            if behind or (newest and newest.timestamp > self.points[-1].timestamp):
                raise DamagedError(
                    f"archive {self.path}",
                    f"it is damaged behind point {self.points[-1].timestamp} ({behind.error})"
                    if behind
                    else f"its newest point {newest.timestamp if newest else ''} is damaged",
                    f"To have the newest good one, use point: {self.points[-1].timestamp}.",
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
        """The chunk digests of the members of the good points; without those whose digests member is damaged."""
        if self._digests is None:
            found: dict[str, memoryview] = {}
            for point in self.points if self.native else ():
                try:
                    found.update(self.point_digests(point))
                except DamagedError as error:
                    self._bad_digests.update({member.name: error for member in self.new_members(point)})
            self._digests = found
        return self._digests

    def new_members(self, point: Configuration) -> list[Member]:
        """The members of a point that none of the points before it has."""
        older = {m.name for p in self._decoded if p.timestamp < point.timestamp for m in p.members}
        return [member for member in point.members if member.name not in older]

    def point_digests(self, point: Configuration) -> Mapping[str, memoryview]:
        """The chunk digests of the members that are new at a point. Raises DamagedError where they do not fit it."""
        entry = self.entry(point.digests_member)
        if sum(self.entry(p.digests_member).size_bytes for p in self.points) > digests.MAX_BYTES:
            raise HostileError(f"archive {self.path}", f"it has more than {digests.MAX_BYTES} bytes of digests")
        digests.require_library(self.algorithm, f"archive {self.path}")
        data = self.read(point.digests_member, 0, entry.size_bytes)
        if self.algorithm.of_chunk(data).hex() != point.digests_digest:
            raise DamagedError(
                f"archive {self.path}",
                f"member {point.digests_member} is damaged",
                member=point.digests_member,
                length=len(data),
            )
        return digests.unpack(data, self.new_members(point), self.algorithm)

    @property
    def algorithm(self) -> digests.Algorithm:
        """That of every digest in a native archive."""
        return digests.ALGORITHMS[self.points[0].digest_algorithm] if self.points else digests.SHA256

    def is_intact(self, chunk_digests: memoryview, offset: int, data: Union[bytes, memoryview]) -> bool:
        """Whether the chunk at `offset` of a member is what was written."""
        length = self.algorithm.digest_bytes
        begin = offset // CHUNK_BYTES * length
        return self.algorithm.of_chunk(data) == chunk_digests[begin : begin + length]

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
                    raise self._bad_digests.get(member.name) or DamagedError(
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

    def matches(
        self, member: Member, source: ImageSource, *, threads: int = 0, progress: Optional[Progress] = None
    ) -> bool:
        """Whether a source has exactly the bytes of a member; False at the first chunk that differs.

        Raises SourceError where it cannot be read, DamagedError where the archive has no digests of the member.
        """
        report = progress or Progress()
        if source.size_bytes != member.size_bytes:
            return False
        known = self.chunk_digests().get(member.name)
        if known is None:
            raise self._bad_digests.get(member.name) or DamagedError(
                f"archive {self.path}", f"no digests of member {member.name} are in it", member=member.name
            )
        report.phase("compare", member.target or member.name, member.size_bytes)
        scratch = threading.local()

        def same(offset: int) -> tuple[bool, int]:
            if not hasattr(scratch, "view"):
                scratch.view = memoryview(bytearray(CHUNK_BYTES))
            view: memoryview = scratch.view[: min(CHUNK_BYTES, member.size_bytes - offset)]
            found = view if source.read_chunk(offset, view) else memoryview(digests.ZEROS)[: len(view)]
            return self.is_intact(known, offset, found), len(view)

        with Workers(threads) as workers:
            for equal, length in workers.over(source, same):
                if not equal:
                    return False
                report.advance(length)
        return True

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
    begin, last = time.time_ns(), ""
    for _attempt in range(_ATTEMPTS):
        reader, damage = None, None
        try:
            reader = ArchiveReader(path, use_salvage=use_salvage)
            damage = reader.structure
        except DamagedError as error:
            damage = error
        if damage and str(damage) != last and written_since(path, begin):
            last = str(damage)  # perhaps the last write of an append was caught
            if reader:
                reader.close()
        elif reader:
            return reader
        elif damage:
            raise damage
    return ArchiveReader(path, use_salvage=use_salvage)


def is_damaged_native(path: str) -> bool:
    """Whether a file surely began as an archive of ours, and damage to its bytes is why it has no good point.

    False for an archive that can be read, and where nothing is sure: other files, a newer format, bytes that cannot be read.
    """
    try:
        with ArchiveReader(path) as reader:
            all_damage = all(isinstance(broken.error, DamagedError) for broken in reader.broken)
            return reader.native and not reader.points and all_damage
    except DamagedError:
        return begins_as_ours(path)
    except ArchiveError:
        return False


def begins_as_ours(path: str) -> bool:
    """Whether its first bytes are those of our archives; a few are read."""
    try:
        with open(path, "rb") as file:
            return tar.begins_as_ours(open_bytes(file, path)[0].fetch(0, tar.ALIGN))
    except (ArchiveError, OSError):
        return False


def written_since(path: str, begin_ns: int) -> bool:
    """Whether a file was written to after, or not much before that time: file systems know it to 10 ms, servers have clocks."""
    try:
        return os.stat(path).st_mtime_ns > begin_ns - _CLOCK_NS
    except OSError:
        return False


def why_full(reader: ArchiveReader) -> str:
    """Why a native archive takes no more points, "" while it does: whose it is, or its configurations.

    Readers hold these in memory, and each has all snapshots that the VM had, so that a chain without end gets there. The next
    one is taken to be at most twice as large as the newest.
    """
    if reader.distrust:
        return f"it is not trusted: {reader.distrust}"
    newest = reader.entry(reader.points[-1].member_name).size_bytes
    if len(reader.points) < MAX_CONFIGURATIONS and reader.heads_bytes + 2 * newest <= MAX_CONFIGURATION_BYTES:
        return ""
    return f"it has {len(reader.points)} points, and there is no room for the configuration of one more"
