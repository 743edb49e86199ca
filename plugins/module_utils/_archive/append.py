# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Adds a point to an archive, in place. Until one small write, the commit, every reader sees exactly the old archive.

See docs/FORMAT.md, "Appending, plain" and "Appending, compressed", for the order of the writes; it is what makes a crash harmless.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Callable, Optional, Union

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._archive import (
    archive_locks,
    convert,
    digests,
    frames,
    names,
    tar,
    trailing_data,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.bytesource import FramedBytes
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import (
    MAX_CONFIGURATION_BYTES,
    MAX_CONFIGURATIONS,
    ArchiveReader,
    open_archive,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import (
    MemberWriter,
    PackedFile,
    PlainFile,
    PublishedArchive,
    compressor_threads,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    DamagedError,
    KvmopsError,
    RefusedError,
    SourceError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import BytesSource, ImageSource
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress

MAX_COVER_BYTES = 2**32 - tar.ALIGN
_SPARE_BYTES = 16 * 2**20  # headers and the configuration, in the guess how much will be written
_FULL = "Make a full backup; the points that are good can be restored from this archive."

Facts = dict[str, Union[str, int]]


def next_timestamp(reader: ArchiveReader, now: int) -> int:
    """The time of a point to be added: `now`, or one above the newest in the archive where the clock has stepped back."""
    return max(now, 1 + max(_timestamps(reader), default=0))


def _timestamps(reader: ArchiveReader) -> Iterable[int]:
    """Every unix time that a member's name claims."""
    for entry in reader.entries:
        point = names.point_of(entry.name)
        if point is not None:
            yield point
        elif names.is_digests_member(entry.name):
            yield names.digests_time(entry.name)


def settle(path: str) -> str:
    """Cuts off what a dead append has left behind the end of an archive; what it was, "" for nothing.

    Raises BusyError while somebody writes to the archive, ArchiveError and DamagedError where it cannot be read,
    TargetError where it cannot be written to.
    """
    with archive_locks.writing(path, f"removing the remains of an append from {path}"):
        return _settle(path)


def _settle(path: str) -> str:
    with open_archive(path) as reader:
        found = reader.pending
        if found:
            fd = _files.open_existing(path)
            try:
                _Archive.of(reader).cut_off(fd)
            finally:
                os.close(fd)
    return found


@dataclass(frozen=True)
class _Archive:
    """An archive as it is before the append, and the way back to that.

    `tar_end`: offset of the end marker in the tar stream. `index`: the frames of a compressed archive. `known`: size and digest
    of every member of its points; `names` are those of all members. `configuration_bytes`, `digests_bytes`: what readers hold
    in memory.
    """

    path: str
    compressed: bool
    tar_end: int
    index: Optional[frames.FrameIndex]
    newest: Configuration
    known: Mapping[str, tuple[int, str]]
    names: AbstractSet[str]
    configuration_bytes: int
    digests_bytes: int

    @classmethod
    def of(cls, reader: ArchiveReader) -> _Archive:
        return cls(
            reader.path,
            reader.compressed,
            reader.end,
            reader.bytes.index if isinstance(reader.bytes, FramedBytes) else None,
            reader.points[-1],
            {m.name: (m.size_bytes, m.digest) for point in reader.points for m in point.members},
            {entry.name for entry in reader.entries},
            reader.heads_bytes,
            sum(reader.entry(point.digests_member).size_bytes for point in reader.points),
        )

    @property
    def end(self) -> int:
        """Size of the file. Behind a foreign `tar -r` the end marker begins at any multiple of 512."""
        return self.index.end if self.index else tar.round_up(self.mark_at + tar.BLOCK, tar.ALIGN)

    @property
    def mark_at(self) -> int:
        """Where in a plain archive the mark of an append stands."""
        return self.tar_end + trailing_data.COMMIT_BYTES

    @property
    def commit_at(self) -> int:
        """Offset in the file of the bytes that the commit overwrites."""
        return self.index.file_offsets[-2] if self.index else self.tar_end

    def cut_off(self, fd: int) -> None:
        """Truncates the file to its end, durably. What is left of the remains is known by their mark until it is the last."""
        if self.index is None:
            _files.write_all(fd, trailing_data.mark(0), self.mark_at, self.path)
            _files.sync(fd, self.path)
        _files.resize(fd, self.end, self.path)
        if self.index is None:
            behind = self.mark_at + tar.BLOCK
            _files.write_all(fd, bytes(self.end - behind), behind, self.path)
            _files.sync(fd, self.path)
            _files.write_all(fd, bytes(tar.BLOCK), self.mark_at, self.path)
        _files.sync(fd, self.path)

    def has_own_frames(self) -> bool:
        """Whether it ends with an end frame of ours, whose first bytes are in one sector, and the seek table."""
        index = self.index
        return (
            index is not None
            and index.by_table
            and index.stream_offsets[-2] == self.tar_end < index.stream_offsets[-1]
            and index.file_offsets[-2] % tar.BLOCK <= tar.BLOCK - frames.HEADER_BYTES
        )


class _HeldFile(PlainFile):
    """A plain archive that grows. One block is kept back: the mark of the append stands there until everything else is durable."""

    def __init__(self, fd: int, path: str, held_at: int) -> None:
        super().__init__(fd, path)
        self._held_at, self._held = held_at, bytearray(tar.BLOCK)

    def put(self, offset: int, data: Union[bytes, memoryview]) -> None:
        begin, end = max(offset, self._held_at), min(offset + len(data), self._held_at + tar.BLOCK)
        if begin >= end:
            super().put(offset, data)
            return
        view = memoryview(data)
        self._held[begin - self._held_at : end - self._held_at] = view[begin - offset : end - offset]
        for at, part in ((offset, view[: begin - offset]), (end, view[end - offset :])):
            if len(part):
                super().put(at, part)

    def write(self, data: bytes, offset: int) -> None:
        """Writes these bytes, zeros too, and makes everything durable."""
        _files.write_all(self.fd, data, offset, self._path)
        self.written += len(data)
        _files.sync(self.fd, self._path)

    def release(self) -> None:
        """Replaces the mark by the block that was kept back."""
        self.write(bytes(self._held), self._held_at)


class _CoveredFile(PackedFile):
    """A compressed archive that grows: the new frames are inside skippable frames, the covers, until the commit."""

    def __init__(
        self, fd: int, path: str, level: int, index: frames.FrameIndex, timestamp: int, expected: int, limit: int
    ) -> None:
        super().__init__(fd, path, level)
        self._trailer = frames.trailer(index.end, timestamp)
        self._room = min(expected, limit)
        # After the commit the old end frame, the old seek table and the header of the first cover are one skipped frame.
        self._frames = frames.listed_sizes(fd, index)[:-2]
        self._frames.extend((index.end + frames.HEADER_BYTES - index.file_offsets[-2], 0))
        self._begin = self._end = index.end
        self._cover(0)

    def put(self, frame: bytes, content: int) -> None:
        self._reserve(len(frame))
        super().put(frame, content)

    def finish(self, size: int) -> None:
        table_bytes = len(frames.seek_table(self._frames)) + 8 * frames.HEADER_BYTES
        self._reserve(frames.HEADER_BYTES + len(self.compress(tar.END)) + table_bytes)
        super().finish(size)
        # The trailer tells readers where the archive ends; it goes when the seek table, which tells the same, is durable.
        _files.sync(self.fd, self._path)
        self._write(frames.skippable(self.size - self._begin - frames.HEADER_BYTES), self._begin)
        _files.resize(self.fd, self.size, self._path)
        _files.sync(self.fd, self._path)

    def _reserve(self, length: int) -> None:
        """Begins another cover where this one has no room for so many bytes, a skippable frame behind them and the trailer."""
        if self.size + length + frames.HEADER_BYTES + frames.TRAILER_BYTES <= self._end:
            return
        rest, at, boundary = self._end - frames.HEADER_BYTES - self.size, self.size, self._end
        self._cover(length)
        # After the commit these skip the room that is left, and the header of the new cover.
        self._write(frames.skippable(rest - frames.HEADER_BYTES), at)
        self._write(frames.skippable(frames.HEADER_BYTES), boundary - frames.HEADER_BYTES)
        self._frames.extend((rest, 0, 2 * frames.HEADER_BYTES, 0))

    def _cover(self, length: int) -> None:
        """Grows the file by a cover with room for so many bytes, durably."""
        room = max(self._room, length + 2 * frames.HEADER_BYTES + frames.TRAILER_BYTES)
        self._begin, self._end = self._end, self._end + frames.HEADER_BYTES + room
        self._write(self._trailer, self._end - frames.TRAILER_BYTES)
        self._write(frames.skippable(room), self._begin)
        _files.sync(self.fd, self._path)
        self.size = self._begin + frames.HEADER_BYTES

    def _write(self, data: bytes, offset: int) -> None:
        _files.write_all(self.fd, data, offset, self._path)
        self.written += len(data)


class ArchiveAppender(MemberWriter):
    """`add` members, then `publish`; leaving the context without that leaves the archive as it was.

    `sizes` are those of the members to come, in order. `newest` is the point that the new one stands on. `on_growth` is told what
    the archive was before the first byte is written, and the path of the partial file if it has to be written anew.
    Raises RefusedError for archives that are not ours and times that are not new, DamagedError for archives without a good newest
    point, ArchiveError where there is no room for one more, BusyError, TargetError, SourceError.
    """

    def __init__(
        self,
        path: str,
        *,
        timestamp: int,
        sizes: Sequence[int],
        compression_level: int = 2,
        threads: int = 0,
        progress: Optional[Progress] = None,
        on_growth: Callable[[Facts], None] = lambda _facts: None,
        bandwidth: int = 0,
        cover_bytes: int = MAX_COVER_BYTES,
    ) -> None:
        report = progress or Progress()
        self._sizes = tuple(sizes)
        self._overwritten: Optional[bytes] = None  # by the commit
        self._published = False
        what = f"adding a point to {path}"
        with contextlib.ExitStack() as stack:
            stack.enter_context(archive_locks.writing(path, what))
            _settle(path)
            archive = _fit(path, timestamp)
            if archive.compressed and not archive.has_own_frames():
                convert.rewrite(
                    path,
                    compression_level,
                    threads=threads,
                    progress=report,
                    on_partial=lambda partial: on_growth({"partial": partial}),
                )
                stack.enter_context(archive_locks.writing(path, what))
                archive = _fit(path, timestamp)
            self._archive, self.newest = archive, archive.newest
            algorithm = digests.ALGORITHMS[archive.newest.digest_algorithm]
            digests.require_library(algorithm, what)
            self._digests_bytes = digests.room(sizes, algorithm)
            on_growth({"archive": path, "old_size_bytes": os.stat(path).st_size, "point": timestamp})
            self._fd = _files.open_existing(path)
            stack.callback(os.close, self._fd)
            stack.callback(self._take_back)
            if archive.index:
                expected = sum(sizes) + sum(sizes) // 128 + self._digests_bytes + _SPARE_BYTES
                target: Union[_HeldFile, _CoveredFile] = _CoveredFile(
                    self._fd, path, compression_level, archive.index, timestamp, expected, cover_bytes
                )
                position = archive.tar_end
            else:
                target = _HeldFile(self._fd, path, archive.mark_at)
                target.write(trailing_data.mark(timestamp), archive.mark_at)
                position = archive.tar_end + tar.BLOCK + tar.round_up(self._digests_bytes, tar.BLOCK)
            super().__init__(
                path,
                target,
                timestamp=timestamp,
                threads=compressor_threads(compression_level, threads) if archive.index else threads,
                progress=report,
                bandwidth=bandwidth,
                algorithm=algorithm,
                position=position,
            )
            stack.callback(self._workers.close)
            self._stack = stack.pop_all()

    def __enter__(self) -> ArchiveAppender:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.abort()

    def abort(self) -> None:
        """Leaves the archive as it was before; nothing after `publish`. What cannot be cut off now is left to the next run."""
        with contextlib.suppress(OSError):  # the error that led here says more
            self._stack.close()

    def _take_back(self) -> None:
        if self._published:
            return
        with contextlib.suppress(KvmopsError):
            if self._overwritten is not None:
                # Nobody knows whether the commit is durable; the new bytes may go only when the old ones are.
                _files.write_all(self._fd, self._overwritten, self._archive.commit_at, self.path)
                _files.sync(self._fd, self.path)
            self._archive.cut_off(self._fd)

    def add(self, member: Member, source: ImageSource) -> Member:
        """Writes one member, hashing its chunks on the way; the member with its size and digest. Raises SourceError for another
        size than the one planned; the caller closes the source and knows whether somebody wrote to it meanwhile."""
        if member.name in self._archive.names or any(member.name == other.name for other in self._members):
            raise ValueError(f"member {member.name} is in the archive already")
        planned = self._sizes[len(self._members)]
        if source.size_bytes != planned:
            raise SourceError(
                f"Member {member.name}",
                f"{member.former_path or 'its source'} has {source.size_bytes} bytes, it had {planned} when the backup was planned",
                "Run the backup again.",
            )
        return self._add(member, source, self._archive.digests_bytes + self._digests_bytes)

    def publish(self, configuration: Configuration) -> PublishedArchive:
        """Writes digests, configuration and end, then commits: the point is there and durable when this returns.

        `configuration.members`: rows of older points as they are there, then the members that were added, in that order.
        """
        self._progress.phase("publish")
        self._check_members(configuration)
        blob = digests.pack(self._digests)
        configuration, xml = self._encode(
            replace(
                configuration,
                mode="incremental",
                parent_point=self.newest.timestamp,
                parent_digest=self.newest.digest,
            ),
            blob,
        )
        if self._archive.configuration_bytes + len(xml) > MAX_CONFIGURATION_BYTES:
            raise ArchiveError(
                f"The archive {self.path}",
                f"with one more point its configurations would have more than {MAX_CONFIGURATION_BYTES} bytes",
                "Make a full backup.",
            )
        target = self._target
        if isinstance(target, _HeldFile):
            self._write_member(configuration.member_name, BytesSource(xml))
            target.put(self._archive.mark_at, blob[len(digests.HEAD) :])
            target.finish(self._position + len(tar.END))
            _files.sync(self._fd, self.path)
            target.release()
            commit = tar.bare_header(configuration.digests_member, len(blob), self._timestamp)
        else:
            self._write_member(configuration.digests_member, BytesSource(blob))
            self._write_member(configuration.member_name, BytesSource(xml))
            target.finish(self._position + len(tar.END))
            commit = frames.skippable(self._archive.end - self._archive.commit_at)
        self._commit(commit)
        result = PublishedArchive(self.path, os.fstat(self._fd).st_size, target.written + len(commit), configuration)
        self._stack.close()
        return result

    def _commit(self, data: bytes) -> None:
        at = self._archive.commit_at
        self._overwritten = os.pread(self._fd, len(data), at)
        _files.write_all(self._fd, data, at, self.path)
        _files.sync(self._fd, self.path)
        self._published = True

    def _check_members(self, configuration: Configuration) -> None:
        if configuration.timestamp != self._timestamp or len(self._members) != len(self._sizes):
            raise ValueError("the configuration is of another time, or not all members were added")
        rows = [(m.name, m.size_bytes, m.digest) for m in configuration.members]
        added = [(m.name, m.size_bytes, m.digest) for m in self._members]
        old = rows[: len(rows) - len(added)]
        if rows[len(old) :] != added or any(self._archive.known.get(name) != (size, d) for name, size, d in old):
            raise ValueError("the configuration does not list members of older points and then those that were added")


def _fit(path: str, timestamp: int) -> _Archive:
    """The archive, if a point of that time can be added to it."""
    with open_archive(path) as reader:
        what = f"Archive {path}"
        if not reader.native:
            raise RefusedError(what, "it was not made by this collection, so nothing is added to it", _FULL)
        if reader.distrust:
            raise RefusedError(what, f"it is not trusted: {reader.distrust}", _FULL)
        reader.point()  # raises where the newest one is not good
        if reader.remains.text:
            raise DamagedError(what, f"there are {reader.remains.text}, which no append has left", _FULL)
        first = next_timestamp(reader, 0)
        if timestamp < first:
            raise RefusedError(what, f"a point of the time {timestamp} would not be its newest", f"{first} is free.")
        if len(reader.points) >= MAX_CONFIGURATIONS:
            raise ArchiveError(what, f"it has {len(reader.points)} points, more are not read", "Make a full backup.")
        return _Archive.of(reader)
