# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What ``ova_convert`` does: a VM in a package becomes a native archive in one pass, without a temporary image."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass, replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import (
    _capabilities,
    _filenames,
    _files,
    _journal,
    _json,
    _locks,
    _mounts,
    _paths,
    _version,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive import names, partials, reader
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Conversion
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import (
    ArchiveWriter,
    Compression,
    PublishedArchive,
)
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    KvmopsError,
    TargetError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection, storage
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import hardware, hashing, images, mistaken, opened
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.archive import conversion_of
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.manifest import Digest
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.package import Package
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.report import lines
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.request import ConvertRequest
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress

OPERATION = "ova_convert"
_OVERHEAD_BYTES = 1 << 20


def convert(request: ConvertRequest, context: Context) -> dict[str, Any]:
    """The result of ``ova_convert``. Raises KvmopsError; nothing that is visible has changed then."""
    source = _filenames.absolute(request.source)
    context.progress.about(os.path.basename(source))
    directory = _target(request, source)
    partials.settle(OPERATION, context, check_mode=request.check_mode)
    with Package(source) as package:
        described = opened.describe(package, request.choice)
        key = hashlib.sha256(f"{described.descriptor_digest}\n{directory}\n{request.told}".encode()).hexdigest()[:32]
        with contextlib.ExitStack() as stack:
            if not request.check_mode:
                stack.enter_context(_locks.hold(f"convert-{key}", of=f"Package {source}", what=f"converting {source}"))
            there = _existing(described, directory, request, context.progress)
            if there is not None:
                return _unchanged(there, context)
            made = stack.enter_context(opened.opened(described, directory))
            result = (
                _predicted(made, directory, request)
                if request.check_mode
                else _write(made, directory, request, context)
            )
    report = described.hardware.report
    for notice in (*report.warnings, *made.warnings, hardware.CHECK):
        context.warn(notice)
    if request.diff:
        result["diff"] = {
            "before": "",
            "after": "\n".join([described.hardware.domain_xml, *lines(report), ""]),
        }
    return {**result, "replaced": report.replaced, "ignored": report.ignored}


def _target(request: ConvertRequest, source: str) -> str:
    """The directory that takes the archive. Raises TargetError, for the source's own with the way out."""
    try:
        conn = connection.connect(request.uri)
    except KvmopsError:
        if request.pool:
            raise
        conn = None
    if request.pool or request.path:
        path = _filenames.absolute(request.path) if request.path else ""
        return storage.resolve_target(conn, pool=request.pool, path=path).path
    own = source if os.path.isdir(source) else os.path.dirname(source)
    if not os.path.lexists(source):
        raise ArchiveError(f"package {request.source}", "there is no such file", mistaken.NOT_HERE)
    try:
        return storage.resolve_target(conn, path=own).path
    except TargetError as error:
        raise TargetError(
            f"The directory {own}",
            f"it holds the source, and cannot take the archive: {error.why}",
            "Name a target with 'pool' or 'path'.",
        ) from error


# what is there already


@dataclass(frozen=True)
class _There:
    """An archive that this very conversion has made earlier."""

    view: ArchiveView
    conversion: Conversion


def _existing(
    described: opened.Described, directory: str, request: ConvertRequest, progress: Progress
) -> _There | None:
    """The archive that this conversion would make again, told by content; the newest of several."""
    found = []
    for path in catalog.find([directory]):
        if request.compress is not None and path.endswith(names.COMPRESSED_SUFFIX) != request.compress:
            continue
        if not reader.begins_as_ours(path):  # one of others may have to be read as a whole to know what is in it
            continue
        with contextlib.suppress(ArchiveError):
            view = catalog.look(path)
            conversion = view.newest.conversion
            if (
                conversion is not None
                and not view.damaged
                and not view.distrust
                and (conversion.descriptor, conversion.options) == (described.descriptor_digest, request.told)
                and _same_files(described.package, conversion, progress)
            ):
                found.append(_There(view, conversion))
    return max(found, key=lambda each: each.view.newest.timestamp, default=None)


def _same_files(package: Package, conversion: Conversion, progress: Progress) -> bool:
    wanted = []
    for name, algorithm, digest in conversion.files:
        file = package.file(name)
        if file is None or not hashing.is_known(algorithm):
            return False
        wanted.append((hashing.Wanted(file, algorithm), Digest(algorithm, digest)))
    known = _Known(package)
    for each, expected in wanted:
        found = known.get(each) or hashing.of_files(package, [each], progress)[each.file.name]
        known.put(each, found)
        if found != expected:
            return False
    return True


class _Known:
    """Digests of files that were read before and have not changed since, kept under the cache directory."""

    def __init__(self, package: Package) -> None:
        self._path = os.path.join(_paths.cache_dir(), "packages.json")
        self._package = package

    def get(self, wanted: hashing.Wanted) -> Digest | None:
        found = self._load().get(self._key(wanted))
        return Digest(wanted.algorithm, found) if isinstance(found, str) else None

    def put(self, wanted: hashing.Wanted, digest: Digest) -> None:
        """Remembers a digest; the file of the cache is replaced as a whole."""
        known = self._load()
        if known.get(self._key(wanted)) == digest.hex:
            return
        known[self._key(wanted)] = digest.hex
        with contextlib.suppress(OSError):
            partial = f"{self._path}.{os.getpid()}"
            with open(partial, "w", encoding="ascii") as file:
                json.dump(dict(list(known.items())[-1000:]), file)
            os.replace(partial, self._path)

    def _load(self) -> dict[str, Any]:
        try:
            known = _json.parse(_files.read_kept(self._path))
            return known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            return {}

    @staticmethod
    def _key(wanted: hashing.Wanted) -> str:
        evidence = [(*_status(fd), offset, size) for fd, offset, size in wanted.file.parts]
        return json.dumps([wanted.algorithm, evidence])


def _status(fd: int) -> tuple[int, ...]:
    status = os.fstat(fd)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _unchanged(there: _There, context: Context) -> dict[str, Any]:
    with open_archive(there.view.path) as reader:
        for notice in reader.point().warnings:
            context.warn(notice)
    conversion = there.conversion
    return {
        "changed": False,
        "archive": {"path": there.view.path, "size": there.view.size_bytes, "compressed": there.view.compressed},
        "point": there.view.newest.timestamp,
        "vm": {"name": there.view.newest.vm_name, "uuid": there.view.newest.vm_uuid},
        "replaced": [{"from": former, "to": here, "note": note} for former, here, note in conversion.replaced],
        "ignored": [{"item": item, "note": note} for item, note in conversion.ignored],
    }


# the conversion


def _name(made: opened.Opened, request: ConvertRequest, timestamp: int) -> str:
    hardware_ = made.described.hardware
    return names.archive_name(hardware_.name, timestamp, hardware_.uuid, bool(request.compress))


def _needed_bytes(made: opened.Opened, request: ConvertRequest) -> int:
    """What the archive takes at most; a compressed one is only known once it is written."""
    return 0 if request.compress else sum(drive.member.size_bytes for drive in made.drives) + _OVERHEAD_BYTES


def _predicted(made: opened.Opened, directory: str, request: ConvertRequest) -> dict[str, Any]:
    path = os.path.join(directory, _name(made, request, int(time.time())))
    vm = made.described.hardware
    return {
        "changed": True,
        "archive": {"path": path, "size": None, "compressed": bool(request.compress)},
        "estimated_bytes": _needed_bytes(made, request),
        "vm": {"name": vm.name, "uuid": vm.uuid},
    }


def _write(made: opened.Opened, directory: str, request: ConvertRequest, context: Context) -> dict[str, Any]:
    begin, timestamp = time.monotonic(), int(time.time())
    _capabilities.probe(directory)
    least, free = sum(drive.least_bytes for drive in made.drives), _files.free_bytes(directory)
    if least > free and not request.compress:
        raise TargetError(
            directory, f"the archive takes {least} bytes, and {free} are free", "Name a target with 'pool' or 'path'."
        )
    archive = _name(made, request, timestamp)
    while os.path.lexists(os.path.join(directory, archive)):
        timestamp += 1
        archive = _name(made, request, timestamp)
    journal = _journal.Journal.open(directory, OPERATION, partials.PartialFacts(os.path.join(directory, archive)))

    def on_partial(partial: str) -> None:
        journal.record(partial=partial, place=_mounts.identity(os.path.dirname(partial)))

    try:
        with ArchiveWriter(
            directory,
            archive,
            compression=Compression(request.compress_level) if request.compress else None,
            timestamp=timestamp,
            threads=request.threads,
            progress=context.progress,
            on_partial=on_partial,
        ) as writer:
            published = _fill(writer, made, request, timestamp, context.progress)
    finally:
        journal.done()
    vm = made.described.hardware
    return {
        "changed": True,
        "archive": {"path": published.path, "size": published.size_bytes, "compressed": bool(request.compress)},
        "point": timestamp,
        "vm": {"name": vm.name, "uuid": vm.uuid},
        "bytes_written": published.bytes_written,
        "duration": round(time.monotonic() - begin, 3),
    }


def _fill(
    writer: ArchiveWriter, made: opened.Opened, request: ConvertRequest, timestamp: int, progress: Progress
) -> PublishedArchive:
    package, vm = made.described.package, made.described.hardware
    members, digests = [], dict[str, Digest]()
    for drive in opened.unique(made.drives):
        with hashing.beside(package, drive.hashed) as beside:
            drive.reached.tell = beside.reached
            members.append(writer.add(drive.member, drive.source))
            digests.update(beside.finish())
            drive.reached.tell = images.nobody
    hashing.of_files(package, made.others, progress)
    package.check_unchanged()
    report = vm.report
    known = _Known(package)
    for drive in made.drives:
        for wanted in drive.hashed:
            known.put(wanted, digests[wanted.file.name])
    conversion = replace(
        conversion_of(made.described, request.told),
        files=tuple((name, digest.algorithm, digest.hex) for name, digest in sorted(digests.items())),
    )
    return writer.publish(
        Configuration(
            timestamp=timestamp,
            domain_xml=vm.domain_xml,
            vm_name=vm.name,
            vm_uuid=vm.uuid,
            members=tuple(members),
            warnings=tuple(dict.fromkeys((*report.warnings, *made.warnings, hardware.CHECK))),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp)),
            tool_version=_version.VERSION,
            conversion=conversion,
        )
    )
