# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""A copy of a disk image that nobody writes to: blocks shared where the file system can, holes kept, durable."""

from __future__ import annotations

import errno
import os

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._image import probe
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

_PIECE_BYTES = 4 * 2**20


def copy(source: str, target: str, progress: Progress) -> None:
    """Copy ``source`` to the new file ``target``. Raises TargetError where there is no room."""
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target_fd = _files.create(target)
        try:
            size = os.fstat(source_fd).st_size
            if not _files.clone_range(source_fd, 0, size, target_fd, 0, target):
                _require_room(source_fd, target)
                _copy_data(source_fd, source, target_fd, size, target, progress)
            _files.resize(target_fd, size, target)
            _files.sync(target_fd, target)
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)
    _files.sync_directory(os.path.dirname(target))


def sync(path: str) -> None:
    """What was written to a file, and its name, are durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _files.sync(fd, path)
    finally:
        os.close(fd)
    _files.sync_directory(os.path.dirname(path))


def _require_room(source_fd: int, target: str) -> None:
    need = os.fstat(source_fd).st_blocks * 512
    figures = os.statvfs(os.path.dirname(target))
    free = figures.f_bavail * figures.f_frsize
    if need > free:
        raise TargetError(
            target, f"{human_bytes(need)} are needed and {human_bytes(free)} are free", "Free space there."
        )


def _copy_data(source_fd: int, source: str, target_fd: int, size: int, target: str, progress: Progress) -> None:
    read = probe.reads(source_fd, source)
    progress.phase("copy", os.path.basename(target), os.fstat(source_fd).st_blocks * 512)
    end = 0
    while end < size:
        try:
            begin = os.lseek(source_fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # only a hole is left
        end = os.lseek(source_fd, begin, os.SEEK_HOLE)
        for offset in range(begin, end, _PIECE_BYTES):
            data = read(offset, min(_PIECE_BYTES, end - offset))
            _files.write_all(target_fd, data, offset, target)
            progress.advance(len(data))
