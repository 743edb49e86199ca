# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""A package as if it were an archive made elsewhere: what ``vm_restore`` and ``backup_info`` read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Optional

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    CHUNK_BYTES,
    Configuration,
    Conversion,
    Member,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.workers import Workers
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ReadAt
from ansible_collections.kvmops.backup.plugins.module_utils._image.sink import ImageSink
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import descriptor, hardware, hashing, images, opened
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.package import Package
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress

NO_KVM = Notice(
    Code.OTHER_HARDWARE,
    "This host has no KVM: the VM is emulated (type qemu), which is slow. Restore it again where there is KVM.",
)


def choice(name: str = "", system: str = "", configuration: str = "") -> opened.Choice:
    """What a restore makes of a package, with the usual mapping. ``name``: what the VM shall be called, "" for its own."""
    return opened.Choice(system, configuration, hardware.Options(name=name))


def point_of(
    described: opened.Described, drives: Sequence[opened.OpenDrive], warnings: Sequence[Notice] = ()
) -> Configuration:
    """The one point of a package, as of an archive made elsewhere."""
    vm = described.hardware
    return Configuration(
        timestamp=described.modified,
        domain_xml=vm.domain_xml,
        vm_name=vm.name,
        vm_uuid=vm.uuid,
        members=tuple(drive.member for drive in drives),
        warnings=tuple(dict.fromkeys((*vm.report.warnings, *warnings, hardware.CHECK))),
        format_version=0,
        conversion=conversion_of(described),
    )


def conversion_of(described: opened.Described, options: str = "") -> Conversion:
    """What became of the hardware, as archives keep it."""
    report = described.hardware.report
    return Conversion(
        source=os.path.basename(described.package.path.rstrip("/")),
        descriptor=described.descriptor_digest,
        options=options,
        replaced=tuple((row["from"], row["to"], row["note"]) for row in report.replaced),
        ignored=tuple((row["item"], row["note"]) for row in report.ignored),
    )


def for_host(point: Configuration, *, kvm: bool) -> Configuration:
    """A converted VM as this host can run it: emulated where there is no KVM (see NO_KVM)."""
    if kvm or point.conversion is None or _xml.parse(point.domain_xml, "the definition").get("type") != "kvm":
        return point
    return replace(point, domain_xml=hardware.emulated(point.domain_xml))


class PackageArchive:
    """A VM in a package in the place of an archive reader, for a restore. ``native`` and digests: none."""

    distrust = ""
    random_access = False

    def __init__(self, made: opened.Opened) -> None:
        self._made = made
        self.path = made.described.package.path
        self._drives = {drive.member.name: drive for drive in opened.unique(made.drives)}
        self.configuration = point_of(made.described, tuple(self._drives.values()), made.warnings)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Nothing that is read in pieces is in a package."""
        raise ArchiveError(f"package {self.path}", f"{name} cannot be read in pieces")

    def read_at(self, name: str) -> ReadAt:
        """As `read`."""
        return lambda offset, length: self.read(name, offset, length)

    def extract(
        self, wanted: Sequence[tuple[Member, ImageSink]], *, threads: int = 0, progress: Optional[Progress] = None
    ) -> int:
        """Hands the bytes of members to their sinks; the number of bytes. Raises DamagedError where a file is not what the manifest
        says, and what its images raise; what the sinks got until then is worth nothing."""
        report, package = progress or Progress(), self._made.described.package
        total = 0
        for member, sink in wanted:
            drive = self._drives[member.name]
            report.phase("restore", member.target or member.name, member.size_bytes)
            with hashing.beside(package, drive.hashed) as beside:
                drive.reached.tell = beside.reached
                total += _copy(drive, sink, threads, report)
                beside.finish()
                drive.reached.tell = images.nobody
            sink.finish()
        hashing.of_files(package, self._made.others, report)
        package.check_unchanged()
        return total


def _copy(drive: opened.OpenDrive, sink: ImageSink, threads: int, progress: Progress) -> int:
    source = drive.source

    def copy(offset: int) -> int:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, source.size_bytes - offset)))
        if source.read_chunk(offset, buffer):
            sink.write(offset, buffer)
        return len(buffer)

    total = 0
    with Workers(threads) as workers:
        for count in workers.over(source, copy):
            progress.advance(count)
            total += count
    return total


@contextlib.contextmanager
def open_package(path: str, chosen: opened.Choice, scratch: str) -> Iterator[PackageArchive]:
    """A package for a restore; ``scratch``: where gzip is unpacked."""
    with Package(path) as package, opened.opened(opened.describe(package, chosen), scratch) as made:
        yield PackageArchive(made)


def without_disks(path: str, chosen: opened.Choice) -> Configuration:
    """The definition in a package, whose disks are not looked at."""
    with Package(path) as package:
        return point_of(opened.describe(package, chosen), ())


def view(path: str) -> tuple[Configuration, int, list[tuple[str, bool, int]]]:
    """The point of a package, its size in bytes, and its files: name, whether it is there now, size. Nothing large is read.

    Of several virtual systems the first is shown, and a warning names all.
    """
    with Package(path) as package:
        systems = descriptor.systems(package.descriptor, package.what)
        described = opened.describe(package, choice(system=systems[0] if len(systems) > 1 else ""))
        files = opened.files_there(described)
        text = f"it describes {len(systems)} virtual systems ({', '.join(systems)}); the first is shown"
        more = [Notice(Code.LEFT_OUT, text)] if len(systems) > 1 else []
        return point_of(described, opened.peek(described), more), os.stat(path).st_size, files
