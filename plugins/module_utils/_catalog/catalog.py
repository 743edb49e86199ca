# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Finding archives, and what they say: without unpacking, without libvirt."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive import config, names, sidecars
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Conversion,
    Role,
    chain_of,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import cache, verified
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import boot_files, domain
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import archive as packages

SUFFIXES = (names.PLAIN_SUFFIX, names.COMPRESSED_SUFFIX)
CONVERTED = "it was converted from another product's package and is no backup of a VM"


@dataclass(frozen=True)
class View:
    """What a file says: its good points, oldest first. `native`: in the form that this collection gives it; `distrust`: why its
    file is not ours to trust, "" if it is. `broken`: why other points are not good, and what an append has left. `damaged`:
    there are such points, or the last verification has found damage; `found` is what it has found. `files`: those that a package
    names, whether each is there now, and its size."""

    path: str
    size_bytes: int
    compressed: bool
    native: bool
    points: tuple[Configuration, ...]
    broken: tuple[str, ...] = ()
    damaged: bool = False
    found: verified.Verified | None = None
    distrust: str = ""
    files: tuple[tuple[str, bool, int], ...] = ()

    @property
    def not_ours(self) -> str:
        """Why it counts for nothing here; "" for ours, the backups that this collection made and nobody else can have written."""
        if not self.native:
            return "it was not made by this collection"
        return self.distrust or (CONVERTED if self.newest.conversion else "")

    @property
    def ours(self) -> bool:
        """Whether it counts."""
        return not self.not_ours

    @property
    def identity(self) -> tuple[tuple[int, str], ...]:
        """The same for an archive and its compressed form, different for any two others of this collection."""
        return tuple((point.timestamp, point.digest) for point in self.points)

    @property
    def good(self) -> bool:
        """Whether a VM can be restored from it as far as is known: what "the last good archive" counts. Only of ours."""
        return self.ours and not self.damaged

    @property
    def good_points(self) -> tuple[Configuration, ...]:
        """The points that no verification has found lost."""
        lost = self.found.lost if self.found else ()
        return tuple(point for point in self.points if point.timestamp not in lost)

    @property
    def newest(self) -> Configuration:
        """The newest good point."""
        return self.points[-1]

    def point(self, timestamp: int | None) -> Configuration:
        """The point of that unix time, the newest for None. Raises ArchiveError naming those that there are."""
        if timestamp is None:
            return self.newest
        for point in self.points:
            if point.timestamp == timestamp:
                return point
        known = ", ".join(str(point.timestamp) for point in self.points)
        raise ArchiveError(f"Archive {self.path}", f"it has no point {timestamp}", f"It has {known}.")


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


def look(path: str, *, refresh: bool = False) -> View:
    """Reads an archive, another product's package or a bare domain XML. `refresh`: read a foreign compressed archive again in full.

    Raises ArchiveError (not readable, not an archive, no good point), DamagedError, HostileError.
    """
    if packages.is_package(path):
        return _look_at_package(path)
    if path.lower().endswith(".xml"):
        return _look_at_xml(path)
    try:
        return _look_at_archive(path, refresh)
    except FileNotFoundError as error:  # retention has removed it while it was read
        raise ArchiveError(f"archive {path}", "it is not there any more") from error


def _look_at_archive(path: str, refresh: bool) -> View:
    kept = None if refresh or not os.path.exists(path) else cache.load(path)
    if kept:
        found = verified.last(path, kept)
        damaged = found is not None and not found.ok
        size = os.stat(path).st_size
        return View(path, size, compressed=True, native=False, points=kept, damaged=damaged, found=found)
    with open_archive(path) as reader:
        key = _files.evidence(path)
        broken = tuple(map(str, reader.broken))
        if reader.pending:
            broken += (f"behind its end: {reader.pending}",)
        if not reader.points:
            reader.point()  # raises, with the reason
        if reader.compressed and not reader.native:
            cache.store(path, key, reader.points)
        found = verified.last(path, reader.points)
        damaged = bool(reader.broken) or (found is not None and not found.ok)
        distrust = reader.distrust if reader.native else ""
        return View(
            path, reader.size_bytes, reader.compressed, reader.native, reader.points, broken, damaged, found, distrust
        )


def _look_at_package(path: str) -> View:
    if not os.path.lexists(path):
        raise ArchiveError(path, "there is no such file")
    point, size, files = packages.view(path)
    return View(path, size, compressed=False, native=False, points=(point,), files=tuple(files))


def _look_at_xml(path: str) -> View:
    point, size_bytes = config.of_file(path)
    return View(path, size_bytes, compressed=False, native=False, points=(point,))


def describe(path: str, *, point: int | None = None, refresh: bool = False) -> dict[str, Any]:
    """An archive as ``backup_info`` returns it; `point` selects whose configuration is shown (None: the newest).

    Raises what `look` raises, and ArchiveError where there is no such point.
    """
    return entry(look(path, refresh=refresh), point)


def entry(view: View, timestamp: int | None = None) -> dict[str, Any]:
    """A view in the shape of INTERFACE.md's ``archives``."""
    shown = view.point(timestamp)
    return {
        "path": view.path,
        "vm": {"name": view.newest.vm_name, "uuid": view.newest.vm_uuid},
        "size": view.size_bytes,
        "compressed": view.compressed,
        # Whether a chain still stands is for the VM's host to say; what never was made incrementable is known anywhere.
        "incrementable": None if view.newest.incrementable else False,
        "incrementable_reason": "",
        "template": view.newest.template,
        "requires": _required(shown),
        "protected": sidecars.is_protected(view.path),
        "notes": sidecars.notes(view.path),
        "points": _points(view),
        "digest": view.newest.digest or None,
        "digest_algorithm": view.newest.digest_algorithm if view.newest.digest else None,
        "verified": _verified(view.found),
        "config": _config(shown),
        "snapshots": [
            {"name": state.name, "parent": state.parent, "current": state.current} for state in shown.snapshots
        ],
        "not_ours": view.not_ours,
        "conversion": _conversion(view.newest.conversion),
        "files": [{"name": name, "present": present, "size": size} for name, present, size in view.files],
        "warnings": [
            *([f"not ours: {view.distrust}"] if view.distrust else []),
            *view.broken,
            *_found(view.found),
            *_warnings(shown),
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


def _required(point: Configuration) -> dict[str, str] | None:
    return {"uuid": point.requires.uuid, "name": point.requires.name} if point.requires else None


def _points(view: View) -> list[dict[str, Any]]:
    rows = []
    known: set[str] = set()
    for point in view.points:
        new = [member for member in point.members if member.name not in known]
        known.update(member.name for member in new)
        rows.append(
            {
                "point": point.timestamp,
                "time": iso_time(point.timestamp),
                "mode": point.mode,
                "consistency": point.consistency.value if point.format_version else None,
                "size": sum(member.size_bytes for member in new),
            }
        )
    return rows


def _config(point: Configuration) -> dict[str, Any]:
    view = domain.parse(point.domain_xml)
    disks = [disk for disk in view.disks if disk.device != "cdrom"]
    held = {member.former_path: member.name for member in point.members if member.role is Role.BOOT}
    return {
        "point": point.timestamp,
        "name": view.name,
        "uuid": view.uuid,
        "memory": view.memory_bytes,
        "vcpus": view.vcpus,
        "machine": view.machine,
        "arch": view.arch,
        "firmware": view.firmware,
        "disks": [_disk(disk, point) for disk in disks],
        "cds": [
            {"target": disk.target, "path": disk.path, "members": _isos(point, disk)}
            for disk in view.disks
            if disk.device == "cdrom"
        ],
        "nics": [{"mac": nic.mac, "type": nic.type, "source": nic.source, "model": nic.model} for nic in view.nics],
        "boot_files": [
            {"path": path, "kind": kind, "member": held.get(path)} for path, kind in _boot_files(point).items()
        ],
        "hostdevs": [f"{hostdev.kind} {hostdev.description}".strip() for hostdev in view.hostdevs],
    }


def _boot_files(point: Configuration) -> dict[str, str]:
    """What QEMU loads for the VM besides disks: kind by path."""
    root = _xml.parse(point.domain_xml, "The domain XML")
    return {each.path: each.kind.name for each in boot_files.named(root)}


def _disk(disk: domain.Disk, point: Configuration) -> dict[str, Any]:
    chain = chain_of(point, disk.target)
    top = chain[0] if chain else None
    return {
        "target": disk.target,
        "path": disk.path or (top.former_path if top else "") or disk.network,
        "pool": disk.pool or (top.pool if top else ""),
        "format": disk.format or (top.original_format if top else ""),
        "bus": disk.bus,
        "size": top.virtual_size_bytes if top else None,
        "members": [member.name for member in reversed(chain)],
    }


def _isos(point: Configuration, drive: domain.Disk) -> list[str]:
    """The image of a drive; one that is in two drives is in the archive once."""
    images = [member for member in point.members if member.role is Role.ISO]
    own = [member.name for member in images if member.target == drive.target]
    return own or [member.name for member in images if drive.path and member.former_path == drive.path]


def _warnings(point: Configuration) -> list[str]:
    """What the point lacks, what was noted when it was made, and what only a host can tell."""
    view = domain.parse(point.domain_xml)
    told = [
        *point.warnings,
        *(f"{skipped.device} is not in the archive: {skipped.reason}" for skipped in point.skipped),
    ]
    skipped_devices = {skipped.device for skipped in point.skipped}
    # A foreign archive's reader has told what it could not match; a bare XML has no members by nature.
    for disk in view.disks if point.format_version else ():
        held = _isos(point, disk) if disk.device == "cdrom" else chain_of(point, disk.target)
        if not held and disk.target not in skipped_devices and (disk.path or disk.volume or disk.network):
            told.append(f"{disk.name} is not in the archive")
    for hostdev in view.hostdevs:
        told.append(f"host device {hostdev.kind} {hostdev.description}: not checked here whether this host has it")
    return told
