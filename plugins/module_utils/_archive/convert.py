# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Compresses and uncompresses an archive: the same tar stream, cut into frames or not.

The old file goes when the new one is durable and was read back.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import Callable, Optional

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _mounts
from ansible_collections.kvmops.backup.plugins.module_utils._archive import (
    archive_locks,
    digests,
    names,
    sidecars,
    tar,
    trash,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.bytesource import open_bytes
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import ArchiveReader, open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify
from ansible_collections.kvmops.backup.plugins.module_utils._archive.workers import Workers
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import (
    Compression,
    PackedFile,
    PlainFile,
    compressor_threads,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import DamagedError, RefusedError, TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress

OnPartial = Callable[[str], None]
_Segment = tuple[int, int]


def compress(
    path: str,
    level: int = 2,
    *,
    threads: int = 0,
    progress: Optional[Progress] = None,
    on_partial: OnPartial = lambda _path: None,
    trust: bool = False,
) -> str:
    """Replaces a plain archive by a compressed one; the new path. ``trust``: also one that is not ours to trust.

    Raises DamagedError if the archive is damaged (nothing is changed then), TargetError where the place cannot take the new one,
    RefusedError where it would become ours by that.
    """
    return _convert(path, Compression(level), threads, progress or Progress(), on_partial, trust)


def uncompress(
    path: str,
    *,
    threads: int = 0,
    progress: Optional[Progress] = None,
    on_partial: OnPartial = lambda _path: None,
    trust: bool = False,
) -> str:
    """Replaces a compressed archive by a plain one; the new path. As `compress`."""
    return _convert(path, None, threads, progress or Progress(), on_partial, trust)


def not_ours(path: str, distrust: str) -> RefusedError:
    """Why an archive is not converted; the result would belong to whoever runs, as if it had always done so."""
    return RefusedError(
        f"Archive {path}", f"it is not trusted: {distrust}", "Its other form would be. If you trust it: 'trust: true'."
    )


def converted_path(path: str, compressed: bool) -> str:
    """The path of an archive after it was compressed or uncompressed."""
    base = path
    for suffix in (names.COMPRESSED_SUFFIX, names.PLAIN_SUFFIX):
        if base.endswith(suffix):
            base = base[: -len(suffix)]
            break
    return base + (names.COMPRESSED_SUFFIX if compressed else names.PLAIN_SUFFIX)


def rewrite(path: str, level: int, *, threads: int, progress: Progress, on_partial: OnPartial) -> None:
    """Cuts an archive that other tools compressed into frames of ours, under its name. The caller is its one writer.

    Raises as `compress`.
    """
    path = os.path.realpath(path)
    with open_archive(path) as reader:
        _refuse_damaged(reader, threads, progress)
        with _written(reader, path, Compression(level), threads, progress, on_partial) as partial:
            os.replace(partial, path)
    _files.sync_directory(os.path.dirname(path))


def _convert(
    path: str, compression: Optional[Compression], threads: int, progress: Progress, on_partial: OnPartial, trust: bool
) -> str:
    new = converted_path(path, compression is not None)
    if os.path.lexists(new):
        raise TargetError(new, "a file of that name is there already and is never overwritten", "Move it elsewhere.")
    with archive_locks.writing(path, f"{'compressing' if compression else 'uncompressing'} {path}"):
        with archive_locks.alone(path):
            pass  # who restores from it now would keep it from going in the end; who begins meanwhile is not stopped
        with open_archive(path) as reader:
            if reader.native and reader.distrust and not trust:
                raise not_ours(path, reader.distrust)
            _refuse_damaged(reader, threads, progress)
            with _written(reader, new, compression, threads, progress, on_partial) as partial:
                _files.publish(partial, new)
        sidecars.move(path, new)
        trash.remove(path)
    return new


@contextlib.contextmanager
def _written(
    reader: ArchiveReader,
    new: str,
    compression: Optional[Compression],
    threads: int,
    progress: Progress,
    on_partial: OnPartial,
) -> Iterator[str]:
    """The partial file with the other form of an archive, durable and read back; it is removed if the block fails."""
    partial = os.path.join(os.path.dirname(new), names.partial_name(os.path.basename(new), secrets.token_hex(6)))
    place = _mounts.identity(os.path.dirname(new))
    on_partial(partial)
    fd = _files.create(partial, os.fstat(reader.bytes.fd).st_mode & 0o755)  # nobody else may write to it
    try:
        sums = _copy(reader, fd, partial, compression, threads, progress)
        _files.sync(fd, partial)
        _read_back(partial, reader, sums, threads, progress)
        yield partial
    except BaseException:
        trash.remove_partial(partial, place)
        raise
    finally:
        os.close(fd)


def _refuse_damaged(reader: ArchiveReader, threads: int, progress: Progress) -> None:
    report = verify(reader, progress=progress, threads=threads)
    if not report.ok:
        first = report.damage[0]
        raise DamagedError(
            f"archive {reader.path}",
            f"it is damaged ({first.member or 'archive'} at {first.offset}: {first.reason})",
            "It stays as it is; backup_verify lists all damage.",
            member=first.member,
            offset=first.offset,
            length=first.length,
        )


def _segments(reader: ArchiveReader) -> Iterator[_Segment]:
    """The tar stream up to its end marker in pieces of at most 4 MiB, none of which holds data of two members."""
    cuts = sorted(
        {0, reader.end, *(entry.header_offset for entry in reader.entries), *(entry.offset for entry in reader.entries)}
    )
    for begin, end in zip(cuts, cuts[1:]):
        for offset in range(begin, end, CHUNK_BYTES):
            yield offset, min(CHUNK_BYTES, end - offset)


def _copy(
    reader: ArchiveReader, fd: int, partial: str, compression: Optional[Compression], threads: int, progress: Progress
) -> list[bytes]:
    """Writes the stream of `reader` into `fd`; the digest of each segment."""
    progress.phase("compress" if compression else "uncompress", bytes_total=reader.end)
    packed = PackedFile(fd, partial, compression.level) if compression else None
    plain = PlainFile(fd, partial)
    source = reader.bytes

    def work(item: tuple[_Segment, Optional[bytes]]) -> tuple[bytes, bytes, int]:
        (offset, length), data = item
        found = source.fetch_chunk(offset, length) if data is None else data
        if packed is None and found is not digests.ZEROS:
            plain.put(offset, found)
        return digests.fastest().of_chunk(found), packed.compress(found) if packed else b"", length

    sums = []
    with Workers(compressor_threads(compression.level, threads) if compression else threads) as workers:
        items = ((segment, None if source.parallel else source.fetch(*segment)) for segment in _segments(reader))
        for digest, frame, length in workers.ordered(work, items):
            if packed:
                packed.put(frame, length)
            sums.append(digest)
            progress.advance(length)
        (packed or plain).finish(reader.end + len(tar.END))
    return sums


def _read_back(partial: str, reader: ArchiveReader, sums: list[bytes], threads: int, progress: Progress) -> None:
    """The new file holds the same stream. Raises DamagedError: memory and compressors fail too, and the old file goes next."""
    progress.phase("read back", bytes_total=reader.end)
    with open(partial, "rb") as file, Workers(threads) as workers:
        source, _compressed = open_bytes(file, partial)

        def work(segment: _Segment) -> tuple[bytes, int]:
            return digests.fastest().of_chunk(source.fetch_chunk(*segment)), segment[1]

        for expected, (found, length) in zip(sums, workers.ordered(work, _segments(reader))):
            progress.advance(length)
            if found != expected:
                raise DamagedError(
                    f"archive {partial}",
                    "what was written does not read back",
                    "Check memory and storage of this host.",
                )
