# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What was read of the archives of a directory, so that the next run need not open them all. A cache and nothing more.

One file per directory under the cache directory, shared by all runs of a user: a line for each time that an archive was read,
the last one counts. A line is for the file that has this device, inode, size, mtime and ctime. Lines that are torn, of another
version or of a file that has changed are not used. Whoever changes or removes something looks into the archive.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import astuple, dataclass, field, fields
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _json
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    FORMAT_VERSION,
    Conversion,
    TemplateDisk,
    TemplateRequirement,
)
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import cache
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView, Point

_VERSION = f"1/{FORMAT_VERSION}".encode()
_MAX_FILES = 200
_SLACK_LINES = 200
_MAX_BYTES = 64 * 2**20  # 5000 archives have a tenth of that
# What was written so shortly before it was read may have been written to again within one tick of the clock of file times.
_FRESH_NS = 10**9
_FIELDS = tuple(each.name for each in fields(Point))
_PLAIN_TYPES = [int, str, str, str, str, int, bool, bool, str, str]  # of the first fields
_SHOWN_TYPES = {"config": dict, "snapshots": list, "warnings": list}
_PLAIN = re.compile(r"[0-9A-Za-z-]{1,64}")


@dataclass(frozen=True)
class Line:
    """What the index says of a file without being parsed. `vm_uuid`: "" where that is not so simple; `slow`: it has to be read
    in full to be listed, and is nobody's here."""

    vm_uuid: str
    slow: bool
    rest: bytes = field(repr=False)

    def view(self, path: str, status: os.stat_result) -> ArchiveView | None:
        """What was read, without what is never taken from here: whose the file is, and what verifications have found."""
        try:
            compressed, native, damaged, broken, points, shown = _json.parse(self.rest)
            if not points or {name: type(shown[name]) for name in _SHOWN_TYPES} != _SHOWN_TYPES:
                return None
            return ArchiveView(
                path,
                status.st_size,
                compressed is True,
                native is True,
                tuple(map(_point, points)),
                tuple(map(str, broken)),
                damaged is True,
                shown={"requires": None, **shown},
                glanced=True,
            )
        except (ValueError, TypeError, KeyError, IndexError):
            return None


class Index:
    """The index of one directory as it was when the run began, and what the run has added to it."""

    def __init__(self, directory: str) -> None:
        self._path = ""
        self._lines: dict[bytes, bytes] = {}
        with contextlib.suppress(OSError):
            name = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:32]
            self._path = os.path.join(cache.directory("index"), name)
            self._read(directory)

    def line(self, status: os.stat_result) -> Line | None:
        """What is known of the file that has this status now."""
        key = _key(status)
        found = self._lines.get(key)
        if found is None:
            return None
        try:
            uuid, slow, rest = found[len(key) :].split(b" ", 2)
            return Line("" if uuid == b"?" else uuid.decode("ascii"), slow == b"1", rest)
        except ValueError:
            return None

    def keep(self, view: ArchiveView, status: os.stat_result, begin_ns: int) -> None:
        """Adds what was read from `begin_ns` on of a file that had this status before and after. That may fail: it is a cache."""
        if not self._path or max(status.st_mtime_ns, status.st_ctime_ns) > begin_ns - _FRESH_NS:
            return
        uuid = view.newest.vm_uuid if _PLAIN.fullmatch(view.newest.vm_uuid) else "?"
        slow = view.compressed and not view.native
        told = [view.compressed, view.native, view.damaged, view.broken, list(map(_row, view.points)), view.shown]
        rest = json.dumps(told, separators=(",", ":"))
        line = _key(status) + f"{uuid} {slow:d} {rest}\n".encode()
        with contextlib.suppress(OSError):
            is_new = not self._lines and not os.path.exists(self._path)
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            try:
                os.write(fd, line)
            finally:
                os.close(fd)
            self._lines[_key(status)] = line
            if is_new:
                cache.remove_oldest(os.path.dirname(self._path), _MAX_FILES)

    def _read(self, directory: str) -> None:
        try:
            if os.lstat(self._path).st_uid not in (0, os.geteuid()):
                return
            data = _files.read_kept(self._path, _MAX_BYTES)
        except FileNotFoundError:
            return
        except OSError:
            os.unlink(self._path)  # no file of ours, or a damaged one: the next lines begin a new one
            return
        first, *lines = data.split(b"\n") or [b""]
        # The first line says how many there were when the file was last tidied, unless it is one of an archive.
        tidied = int(first) if first.isdigit() else 0
        for line in lines if first.isdigit() else [first, *lines]:
            key = line[: _end_of_key(line)]
            if key.startswith(_VERSION):
                self._lines[key] = line
        if len(lines) > 2 * tidied + _SLACK_LINES:
            self._tidy(directory)

    def _tidy(self, directory: str) -> None:
        """Writes the file anew with what is still there. What others add meanwhile is lost, and will be read again."""
        there = set()
        with os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    there.add(_key(entry.stat(follow_symlinks=False)))
        self._lines = {key: line for key, line in self._lines.items() if key in there}
        cache.replace_file(self._path, b"\n".join([str(len(self._lines)).encode(), *self._lines.values(), b""]))


def _key(status: os.stat_result) -> bytes:
    numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _VERSION + b" %d %d %d %d %d " % numbers


def _end_of_key(line: bytes) -> int:
    end = 0
    for _field in range(6):
        end = line.find(b" ", end) + 1
        if not end:
            return 0
    return end


def _row(point: Point) -> list[Any]:
    required = point.requires
    kept = {
        **vars(point),
        "requires": [required.uuid, required.name, _disks(required.disks)] if required else None,
        "provides": _disks(point.provides),
        "conversion": astuple(point.conversion) if point.conversion else None,
    }
    return [kept[name] for name in _FIELDS]


def _disks(disks: tuple[TemplateDisk, ...]) -> list[Any]:
    return [[disk.target, disk.virtual_size_bytes, disk.digest] for disk in disks]


def _point(row: list[Any]) -> Point:
    kept = dict(zip(_FIELDS, row))
    if [type(value) for value in row[: len(_PLAIN_TYPES)]] != _PLAIN_TYPES or len(row) != len(_FIELDS):
        raise ValueError(row)
    required = kept["requires"]
    kept["requires"] = TemplateRequirement(str(required[0]), str(required[1]), _disks_of(required[2])) if required else None
    kept["provides"], kept["snapshots"] = _disks_of(kept["provides"]), tuple(map(str, kept["snapshots"]))
    kept["conversion"] = _conversion(*kept["conversion"]) if kept["conversion"] else None
    return Point(**kept)


def _conversion(source: str, descriptor: str, options: str, *rows: Any) -> Conversion:
    files, replaced = (tuple((str(one), str(two), str(three)) for one, two, three in each) for each in rows[:2])
    ignored = tuple((str(item), str(note)) for item, note in rows[2])
    return Conversion(str(source), str(descriptor), str(options), files, replaced, ignored)


def _disks_of(rows: Any) -> tuple[TemplateDisk, ...]:
    return tuple(TemplateDisk(str(target), _json.whole(size), str(digest)) for target, size, digest in rows)
