# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Writes a new archive: a hidden partial file that becomes visible, whole and durable, in one rename.

The tar stream is the same for plain and compressed archives; only where its bytes go differs (PlainFile, PackedFile).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Callable, Optional, TypeVar, Union

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _mounts
from ansible_collections.kvmops.backup.plugins.module_utils._archive import config, digests, frames, names, tar, trash
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES, Configuration, Member
from ansible_collections.kvmops.backup.plugins.module_utils._archive.workers import Workers, thread_count
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import BytesSource, ImageSource
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import zstandard
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress

_Result = TypeVar("_Result")
_MAX_COMPRESSOR_BYTES = 96 * 2**20  # of all threads; high levels take up to 80 MiB each


def _zeros(length: int) -> Union[bytes, memoryview]:
    return digests.ZEROS if length == CHUNK_BYTES else memoryview(digests.ZEROS)[:length]


@dataclass(frozen=True)
class Compression:
    """zstd level of a compressed archive. 2 is 1.6 times as fast as 3 for 2 % more bytes (measured)."""

    level: int = 2


@dataclass(frozen=True)
class PublishedArchive:
    """An archive that is there now and durable; `bytes_written` counts what was really written, clones and holes not."""

    path: str
    size_bytes: int
    bytes_written: int
    configuration: Configuration


class PlainFile:
    """Tar bytes straight into the file: reflinked where the file systems can, else written while they are hashed."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd, self._path = fd, path
        self.written = 0
        self._lock = threading.Lock()

    def clone(self, source: ImageSource, offset: int) -> int:
        """Shares the source's whole 4 KiB blocks with the archive; the number of bytes, 0 where that cannot be."""
        if source.clone_fd is None:
            return 0
        length = source.size_bytes // tar.ALIGN * tar.ALIGN
        return length if _files.clone_range(source.clone_fd, 0, length, self.fd, offset, self._path) else 0

    def put(self, offset: int, data: Union[bytes, memoryview]) -> None:
        written = _files.write_sparse(self.fd, data, offset, self._path)
        _files.start_writing_back(self.fd, offset, len(data))
        with self._lock:
            self.written += written

    def finish(self, size: int) -> None:
        _files.resize(self.fd, size, self._path)


class PackedFile:
    """Tar bytes as independent zstd frames. `compress` runs in worker threads, `put` in order."""

    def __init__(self, fd: int, path: str, level: int) -> None:
        self.fd, self._path, self._level = fd, path, level
        self._zero_frame = b""
        self.written = self.size = 0
        self._frames = array("I")  # compressed and decompressed size of each, by turns
        self._local = threading.local()

    def compress(self, data: Union[bytes, memoryview]) -> bytes:
        if not hasattr(self._local, "compressor"):
            self._local.compressor = zstandard.ZstdCompressor(
                level=self._level, write_checksum=True, write_content_size=True
            )
        if data is digests.ZEROS and self._zero_frame:
            return self._zero_frame
        frame: bytes = self._local.compressor.compress(data)
        if data is digests.ZEROS:
            self._zero_frame = frame
        return frame

    def put(self, frame: bytes, content: int) -> None:
        _files.write_all(self.fd, frame, self.size, self._path)
        _files.start_writing_back(self.fd, self.size, len(frame))
        self._frames.extend((len(frame), content))
        self.size += len(frame)
        self.written += len(frame)

    def finish(self, _size: int) -> None:
        """The end marker's frame and the seek table. The frame begins so that a commit can overwrite its first bytes at once."""
        if self.size % tar.BLOCK > tar.BLOCK - frames.HEADER_BYTES:
            self.put(frames.skippable(0), 0)
        self.put(self.compress(tar.END), len(tar.END))
        table = frames.seek_table(self._frames)
        _files.write_all(self.fd, table, self.size, self._path)
        self.size += len(table)
        self.written += len(table)


def compressor_threads(level: int, threads: int) -> int:
    """As many threads as were asked for, fewer where a level's tables would take too much memory."""
    parameters = zstandard.ZstdCompressionParameters.from_level(level, source_size=CHUNK_BYTES)
    room = _MAX_COMPRESSOR_BYTES // max(1, parameters.estimated_compression_context_size())
    return max(1, min(thread_count(threads), room))


class MemberWriter:
    """Writes members into a tar stream, from the offset `position` on; what a new archive and an append have in common."""

    def __init__(
        self,
        path: str,
        target: Union[PlainFile, PackedFile],
        *,
        timestamp: int,
        threads: int,
        progress: Progress,
        bandwidth: int,
        algorithm: digests.Algorithm,
        position: int = 0,
    ) -> None:
        self.path = path
        self._target, self._timestamp, self._algorithm = target, timestamp, algorithm
        self._progress = progress
        self._limit = _files.RateLimit(bandwidth, progress.check)
        self._workers = Workers(threads)
        self._scratch = threading.local()
        self._position = position
        self._digests: list[bytes] = []
        self._members: list[Member] = []

    def _add(self, member: Member, source: ImageSource, digests_bytes: int) -> Member:
        """One member; `digests_bytes` are those of all members of the archive, this one included."""
        if digests_bytes > digests.MAX_BYTES:
            raise RefusedError(
                f"The archive {self.path}",
                f"with {member.former_path or member.name} it would be larger than readers take (16 TiB)",
                "Back up the VM with fewer disks attached.",
            )
        self._progress.phase("copy", member.target or member.name, source.size_bytes)
        joined = b"".join(self._write_member(member.name, source))
        self._digests.append(joined)
        self._members.append(replace(member, size_bytes=source.size_bytes, digest=self._algorithm.of_member(joined)))
        return self._members[-1]

    def _encode(self, configuration: Configuration, blob: bytes) -> tuple[Configuration, bytes]:
        """The configuration as it will be in the archive, and its member's bytes; `blob` is the digests member."""
        configuration = replace(
            configuration,
            digest_algorithm=self._algorithm.name,
            digests_member=names.digests_member(configuration.timestamp),
            digests_digest=self._algorithm.of_chunk(blob).hex(),
            member_name=names.configuration_member(configuration.timestamp, configuration.vm_name),
        )
        xml, digest = config.encode(configuration)
        read_back = config.decode(xml, configuration.member_name)  # raises where readers would refuse it
        if read_back is None or (read_back.digest, read_back.members) != (digest, configuration.members):
            raise ValueError("the configuration does not read back")
        return replace(configuration, digest=digest), xml

    def _write_member(self, name: str, source: ImageSource) -> list[bytes]:
        data_at = tar.data_offset(self._position)
        header = tar.header(name, source.size_bytes, self._timestamp, self._position)
        at, self._position = self._position, tar.round_up(data_at + source.size_bytes, tar.BLOCK)
        if isinstance(self._target, PlainFile):
            self._target.put(at, header)
            return self._write_plain(self._target, source, data_at)
        self._target.put(self._target.compress(header), len(header))
        return self._write_packed(self._target, source)

    def _read(self, source: ImageSource, offset: int) -> Optional[memoryview]:
        """One chunk in the calling thread's buffer; None for zeros."""
        if not hasattr(self._scratch, "view"):
            self._scratch.view = memoryview(bytearray(CHUNK_BYTES + tar.BLOCK))
        view: memoryview = self._scratch.view[: min(CHUNK_BYTES, source.size_bytes - offset)]
        return view if source.read_chunk(offset, view) else None

    def _write_plain(self, plain: PlainFile, source: ImageSource, data_at: int) -> list[bytes]:
        cloned = plain.clone(source, data_at)

        def work(offset: int) -> tuple[bytes, int]:
            data = self._read(source, offset)
            length = min(CHUNK_BYTES, source.size_bytes - offset)
            rest = max(0, cloned - offset)
            if data is None:
                return self._algorithm.of_chunk(_zeros(length)), 0
            if rest < length:
                plain.put(data_at + offset + rest, data[rest:])
            return self._algorithm.of_chunk(data), max(0, length - rest)

        chunks = []
        for digest, written in self._in_order(source, work):
            chunks.append(digest)
            self._limit.spend(written)
            self._progress.check()  # the workers are ahead of a limited rate, perhaps at their end
        return chunks

    def _write_packed(self, packed: PackedFile, source: ImageSource) -> list[bytes]:
        def work(offset: int) -> tuple[bytes, bytes, int]:
            data = self._read(source, offset)
            length = min(CHUNK_BYTES, source.size_bytes - offset)
            padded = tar.round_up(length, tar.BLOCK)
            if data is None:
                return self._algorithm.of_chunk(_zeros(length)), packed.compress(_zeros(padded)), padded
            buffer: memoryview = self._scratch.view
            buffer[length:padded] = bytes(padded - length)
            return self._algorithm.of_chunk(data), packed.compress(buffer[:padded]), padded

        chunks = []
        for digest, frame, content in self._in_order(source, work):
            packed.put(frame, content)
            chunks.append(digest)
            self._limit.spend(len(frame))
            self._progress.check()
        return chunks

    def _in_order(self, source: ImageSource, work: Callable[[int], _Result]) -> Iterator[_Result]:
        """The chunks of a source through the workers, with progress."""
        done = 0
        for result in self._workers.over(source, work):
            length = min(CHUNK_BYTES, source.size_bytes - done)
            done += length
            self._progress.advance(length)
            yield result


class ArchiveWriter(MemberWriter):
    """`add` members, then `publish`; leaving the context without that removes the partial file.

    `on_partial` is told the partial file's path before the file exists; `bandwidth` limits bytes written per second (0: no limit).
    Raises TargetError where the place cannot take the bytes (full, read-only, gone), SourceError where a source cannot be read.
    """

    def __init__(
        self,
        directory: str,
        name: str,
        *,
        compression: Optional[Compression],
        timestamp: int,
        threads: int = 0,
        progress: Optional[Progress] = None,
        on_partial: Callable[[str], None] = lambda _path: None,
        bandwidth: int = 0,
        algorithm: Optional[digests.Algorithm] = None,
    ) -> None:
        self.partial = os.path.join(directory, names.partial_name(name, secrets.token_hex(6)))
        self._place = _mounts.identity(directory)
        on_partial(self.partial)
        self._fd = _files.create(self.partial)
        super().__init__(
            os.path.join(directory, name),
            PackedFile(self._fd, self.partial, compression.level) if compression else PlainFile(self._fd, self.partial),
            timestamp=timestamp,
            threads=compressor_threads(compression.level, threads) if compression else threads,
            progress=progress or Progress(),
            bandwidth=bandwidth,
            algorithm=algorithm or digests.fastest(),
        )
        self._published = False

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.abort()

    def abort(self) -> None:
        """Removes the partial file, now or, where its file system has gone away, with the next run; nothing after `publish`."""
        if self._published:
            return
        with contextlib.suppress(OSError):  # the error that led here says more
            self._close()
        trash.remove_partial(self.partial, self._place)

    def _close(self) -> None:
        self._workers.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def add(self, member: Member, source: ImageSource) -> Member:
        """Writes one member, hashing its chunks on the way; the member with its size and digest.

        The caller closes the source and knows whether somebody wrote to it meanwhile.
        """
        done = replace(member, size_bytes=source.size_bytes)
        if any(done.name == other.name for other in self._members):
            raise ValueError(f"member {done.name} is in the archive already")
        sizes = [each.size_bytes for each in (*self._members, done)]
        return self._add(done, source, digests.room(sizes, self._algorithm))

    def publish(self, configuration: Configuration) -> PublishedArchive:
        """Writes digests, configuration and end, and makes the archive visible and durable.

        `configuration.members` must be the members that were added, in that order.
        """
        self._progress.phase("publish")
        if [(m.name, m.size_bytes, m.digest) for m in configuration.members] != [
            (m.name, m.size_bytes, m.digest) for m in self._members
        ]:
            raise ValueError("the configuration does not list the members that were added")
        blob = digests.pack(self._digests)
        configuration, xml = self._encode(configuration, blob)
        self._write_member(configuration.digests_member, BytesSource(blob))
        self._write_member(configuration.member_name, BytesSource(xml))
        self._target.finish(self._position + len(tar.END))
        _files.sync(self._fd, self.partial)
        size = os.fstat(self._fd).st_size
        try:
            self._close()  # some network file systems tell of lost bytes only here
        except OSError as error:
            raise _files.target_error(self.partial, error, "cannot be made durable") from error
        _files.publish(self.partial, self.path)
        self._published = True
        return PublishedArchive(self.path, size, self._target.written, configuration)
