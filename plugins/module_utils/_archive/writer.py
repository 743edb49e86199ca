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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Callable, Optional, TypeVar, Union

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._archive import config, digests, frames, names, tar
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
        self._frames: list[tuple[int, int]] = []
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
        self._frames.append((len(frame), content))
        self.size += len(frame)

    def finish(self) -> None:
        table = frames.seek_table(self._frames)
        _files.write_all(self.fd, table, self.size, self._path)
        self.size += len(table)
        self.written = self.size


def compressor_threads(level: int, threads: int) -> int:
    """As many threads as were asked for, fewer where a level's tables would take too much memory."""
    parameters = zstandard.ZstdCompressionParameters.from_level(level, source_size=CHUNK_BYTES)
    room = _MAX_COMPRESSOR_BYTES // max(1, parameters.estimated_compression_context_size())
    return max(1, min(thread_count(threads), room))


class ArchiveWriter:
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
    ) -> None:
        self.path = os.path.join(directory, name)
        self._directory, self._timestamp = directory, timestamp
        self._progress = progress or Progress()
        self._limit = _files.RateLimit(bandwidth)
        self.partial = os.path.join(directory, names.partial_name(name, secrets.token_hex(6)))
        on_partial(self.partial)
        self._fd = _files.create(self.partial)
        self._plain = PlainFile(self._fd, self.partial) if compression is None else None
        self._packed = PackedFile(self._fd, self.partial, compression.level) if compression else None
        self._workers = Workers(compressor_threads(compression.level, threads) if compression else threads)
        self._scratch = threading.local()
        self._position = 0
        self._algorithm = digests.fastest()
        self._digests: list[bytes] = []
        self._members: list[Member] = []
        self._open = True

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.abort()

    def abort(self) -> None:
        """Removes the partial file; nothing after `publish`."""
        if not self._open:
            return
        self._close()
        with contextlib.suppress(OSError):  # its name is in the journal
            os.unlink(self.partial)

    def _close(self) -> None:
        self._open = False
        self._workers.close()
        os.close(self._fd)

    def add(self, member: Member, source: ImageSource) -> Member:
        """Writes one member, hashing its chunks on the way; the member with its size and digest.

        The caller closes the source and knows whether somebody wrote to it meanwhile.
        """
        done = replace(member, size_bytes=source.size_bytes)
        if any(done.name == other.name for other in self._members):
            raise ValueError(f"member {done.name} is in the archive already")
        if digests.room([*self._members, done]) > digests.MAX_BYTES:
            raise RefusedError(
                f"The archive {self.path}",
                f"with {done.former_path or done.name} it would be larger than readers take (16 TiB)",
                "Back up the VM with fewer disks attached.",
            )
        self._progress.phase("copy", member.target or member.name, source.size_bytes)
        chunks = self._write_member(done.name, source)
        joined = b"".join(chunks)
        self._digests.append(joined)
        self._members.append(replace(done, digest=self._algorithm.of_member(joined)))
        return self._members[-1]

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
        digests_name = names.digests_member(configuration.timestamp)
        self._write_member(digests_name, BytesSource(blob))
        member_name = names.configuration_member(configuration.timestamp, configuration.vm_name)
        configuration = replace(
            configuration,
            digest_algorithm=self._algorithm.name,
            digests_member=digests_name,
            digests_digest=self._algorithm.of_chunk(blob).hex(),
        )
        xml, digest = config.encode(configuration)
        read_back = config.decode(xml, member_name)  # raises where readers would refuse it
        if read_back is None or (read_back.digest, read_back.members) != (digest, configuration.members):
            raise ValueError("the configuration does not read back")
        self._write_member(member_name, BytesSource(xml))
        self._write_end()
        _files.sync(self._fd, self.partial)
        size = os.fstat(self._fd).st_size
        written = (self._plain or self._packed).written  # type: ignore[union-attr]
        _files.publish(self.partial, self.path)
        self._close()
        return PublishedArchive(
            self.path, size, written, replace(configuration, member_name=member_name, digest=digest)
        )

    def _write_member(self, name: str, source: ImageSource) -> list[bytes]:
        data_at = tar.data_offset(self._position)
        self._write_header(tar.header(name, source.size_bytes, self._timestamp, self._position))
        self._position = tar.round_up(data_at + source.size_bytes, tar.BLOCK)
        if self._plain:
            return self._write_plain(self._plain, source, data_at)
        if self._packed:
            return self._write_packed(self._packed, source)
        raise AssertionError("an archive is plain or compressed")

    def _write_header(self, header: bytes) -> None:
        if self._plain:
            self._plain.put(self._position, header)
        elif self._packed:
            self._packed.put(self._packed.compress(header), len(header))

    def _write_end(self) -> None:
        if self._plain:
            self._plain.finish(self._position + len(tar.END))
        elif self._packed:
            self._packed.put(self._packed.compress(tar.END), len(tar.END))
            self._packed.finish()

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
        return chunks

    def _in_order(self, source: ImageSource, work: Callable[[int], _Result]) -> Iterator[_Result]:
        """The chunks of a source through the workers; those that depend on all earlier ones only after these are done."""
        offsets = range(0, source.size_bytes, CHUNK_BYTES)
        early = len(offsets) if source.late_from >= source.size_bytes else source.late_from // CHUNK_BYTES
        for part in (offsets[:early], offsets[early:]):
            for offset, result in zip(part, self._workers.ordered(work, part)):
                self._progress.advance(min(CHUNK_BYTES, source.size_bytes - offset))
                yield result
