# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Finding archives, and what they say: without unpacking, without libvirt."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _trust
from ansible_collections.kvmops.backup.plugins.module_utils._archive import config, names, sidecars
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Conversion
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import index, shown, verified
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView, points_of
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress

SUFFIXES = (names.PLAIN_SUFFIX, names.COMPRESSED_SUFFIX)


def find(directories: Iterable[str]) -> list[str]:
    """Paths of the files in the directories (not below) that are named like archives: no hidden and no partial ones.

    Raises ArchiveError for a directory that cannot be read: nothing found is not the same as nothing there.
    """
    found = set()
    for directory in directories:
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or not entry.name.endswith(SUFFIXES):
                        continue
                    if entry.is_file(follow_symlinks=False):
                        found.add(entry.path)
        except OSError as error:
            raise ArchiveError(
                f"Directory {directory}",
                f"it cannot be listed ({error.strerror})",
                "Check that it exists, is mounted and readable.",
            ) from error
    return sorted(found)


def look(path: str, *, refresh: bool = False) -> ArchiveView:
    """Reads an archive, another product's package or a bare domain XML. `refresh`: read a foreign compressed archive again, which
    takes its whole length.

    Raises ArchiveError (not readable, not an archive, no good point), DamagedError, HostileError.
    """
    if names.is_package(path):
        return _look_at_package(path)
    if path.lower().endswith(".xml"):
        return _look_at_xml(path)
    try:
        known = None if refresh or not _filenames.is_there(path) else _line(path, os.stat(path))
        return (_of_index(path) if known and known.slow else None) or _look_at_archive(path)
    except FileNotFoundError as error:  # retention has removed it while it was read
        raise ArchiveError(f"archive {path}", "it is not there any more") from error
    except (SourceError, OSError) as error:
        why = error.why if isinstance(error, SourceError) else f"it cannot be looked at ({error.strerror})"
        raise ArchiveError(f"archive {path}", why) from error


def glance(path: str, progress: Progress | None = None) -> ArchiveView:
    """As look, but from the index where it knows the file as it is now. For lists; whoever changes or removes anything looks.

    The progress says what is read. Raises CancelledError too.
    """
    report = progress or Progress()
    view = _of_index(path)
    if view:
        report.check()
        return view
    report.phase("read", path)
    return look(path)


def surely_of_others(path: str, uuid: str) -> bool:
    """Whether the index knows the file as it is now, and as an archive of another VM than this."""
    try:
        known = _line(path, os.stat(path))
    except OSError:
        return False
    return known is not None and known.vm_uuid not in ("", uuid)


def _line(path: str, status: os.stat_result) -> index.Line | None:
    return _index(os.path.dirname(path)).line(status)


@functools.lru_cache(maxsize=64)  # of one run
def _index(directory: str) -> index.Index:
    return index.Index(directory)


@functools.lru_cache(maxsize=1)  # of one run; what is opened is asked about anew
def _doubts() -> _trust.Doubts:
    return _trust.Doubts()


def _of_index(path: str) -> ArchiveView | None:
    try:
        status = os.stat(path)
    except OSError:
        return None  # look says why
    known = _line(path, status)
    view = known.view(path, status) if known else None
    if view is None:
        return None
    found = verified.last(path, view.points)
    return replace(
        view,
        damaged=view.damaged or (found is not None and not found.ok),
        found=found,
        distrust=_doubts().of(path, status) if view.native else "",
    )


def _look_at_archive(path: str) -> ArchiveView:
    begin = time.time_ns()
    with open_archive(path) as reader:
        broken = tuple(map(str, reader.broken))
        if reader.pending:
            broken += (f"behind its end: {reader.pending}",)
        if not reader.points:
            reader.point()  # raises, with the reason
        view = ArchiveView(
            path,
            reader.size_bytes,
            reader.compressed,
            reader.native,
            points_of(reader.points),
            broken,
            damaged=bool(reader.broken),
            shown=shown.of_point(reader.points[-1]),
        )
        now = os.stat(path)
        if not reader.changed() and os.path.samestat(now, reader.status):
            _index(os.path.dirname(path)).keep(view, now, begin)
        found = verified.last(path, view.points)
        damaged = view.damaged or (found is not None and not found.ok)
        return replace(view, damaged=damaged, found=found, distrust=reader.distrust if reader.native else "")


def _look_at_package(path: str) -> ArchiveView:
    if not os.path.lexists(path):
        raise ArchiveError(path, "there is no such file")
    # Rarely asked for, and a package's reader is as large as that of archives.
    from ansible_collections.kvmops.backup.plugins.module_utils._ovf import archive as packages

    point, size, files = packages.view(path)
    told = shown.of_point(point)
    return ArchiveView(
        path, size, compressed=False, native=False, points=points_of((point,)), files=tuple(files), shown=told
    )


def _look_at_xml(path: str) -> ArchiveView:
    point, size_bytes = config.of_file(path)
    told = shown.of_point(point)
    return ArchiveView(path, size_bytes, compressed=False, native=False, points=points_of((point,)), shown=told)


def describe(path: str, *, point: int | None = None, refresh: bool = False) -> dict[str, Any]:
    """An archive as ``backup_info`` returns it; `point` selects whose configuration is shown (None: the newest).

    Raises what `look` raises, and ArchiveError where there is no such point.
    """
    return entry(look(path, refresh=refresh), point)


def entry(view: ArchiveView, timestamp: int | None = None) -> dict[str, Any]:
    """A view in the shape of INTERFACE.md's ``archives``."""
    told = _shown(view, timestamp)
    return {
        "path": view.path,
        "vm": {"name": view.newest.vm_name, "uuid": view.newest.vm_uuid},
        "size": view.size_bytes,
        "compressed": view.compressed,
        # Whether a chain still stands is for the VM's host to say; what never was made incrementable is known anywhere.
        "incrementable": None if view.newest.incrementable else False,
        "incrementable_reason": "",
        "template": view.newest.template,
        "requires": told["requires"],
        "protected": sidecars.is_protected(view.path),
        "notes": sidecars.notes(view.path),
        "points": _points(view),
        "digest": view.newest.digest or None,
        "digest_algorithm": view.newest.digest_algorithm if view.newest.digest else None,
        "verified": _verified(view.found),
        "config": told["config"],
        "snapshots": told["snapshots"],
        "not_ours": view.not_ours,
        "conversion": _conversion(view.newest.conversion),
        "files": [{"name": name, "present": present, "size": size} for name, present, size in view.files],
        "warnings": [
            *([f"not trusted: {view.distrust}"] if view.distrust else []),
            *view.broken,
            *_found(view.found),
            *told["warnings"],
        ],
    }


def _verified(found: verified.Verified | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "time": iso_time(found.at),
        "ok": found.ok,
        "coverage": found.coverage,
        "points": list(found.points),
        "lost": list(found.lost),
        "current": found.current,
    }


def _conversion(made: Conversion | None) -> dict[str, Any] | None:
    if made is None:
        return None
    return {
        "source": made.source,
        "replaced": [{"from": former, "to": here, "note": note} for former, here, note in made.replaced],
        "ignored": [{"item": item, "note": note} for item, note in made.ignored],
    }


def _found(found: verified.Verified | None) -> list[str]:
    if found is None or found.ok:
        return []
    lost = f"; lost: points {', '.join(map(str, found.lost))}" if found.lost else ""
    return [f"the verification of {iso_time(found.at)} has found damage{lost}"]


def unreadable(path: str, reason: str) -> dict[str, Any]:
    """The same shape for a file that could not be read."""
    try:
        size = os.stat(path).st_size
    except OSError:
        size = 0
    return {
        "path": path,
        "vm": None,
        "size": size,
        "compressed": None,
        "incrementable": None,
        "incrementable_reason": "",
        "template": False,
        "requires": None,
        "protected": sidecars.is_protected(path),
        "notes": sidecars.notes(path),
        "points": [],
        "digest": None,
        "digest_algorithm": None,
        "verified": None,
        "config": None,
        "snapshots": [],
        "not_ours": "",
        "conversion": None,
        "files": [],
        "warnings": [reason],
    }


def iso_time(timestamp: int) -> str:
    """Unix time as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp))


def _points(view: ArchiveView) -> list[dict[str, Any]]:
    return [
        {
            "point": point.timestamp,
            "time": iso_time(point.timestamp),
            "mode": point.mode,
            "consistency": point.consistency or None,
            "size": point.size_bytes,
        }
        for point in view.points
    ]


def _shown(view: ArchiveView, timestamp: int | None) -> Mapping[str, Any]:
    point = view.point(timestamp)
    if point is view.newest:
        return view.shown
    with open_archive(view.path) as reader:
        return shown.of_point(reader.point(point.timestamp))
