# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""A VM in a package, opened: its definition, its disks as members of an archive to be written, and what its files must hash to."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    DamagedError,
    HostileError,
    KvmopsError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import ImageSource
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import descriptor as ovf
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import esp, hardware, hashing, images, vmdk
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.manifest import Digest
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.package import Package

#: What a disk's size in the descriptor and in the image may differ by without a word: rounding to whole units.
_ROUNDING_BYTES = 1 << 20


@dataclass(frozen=True)
class Choice:
    """What of a package is meant, and what becomes of it."""

    system: str = ""
    configuration: str = ""
    options: hardware.Options = field(default_factory=hardware.Options)


@dataclass(frozen=True)
class Described:
    """A VM as the package's descriptor has it; its files have not been looked at."""

    package: Package
    descriptor: ovf.Descriptor
    hardware: hardware.Hardware
    descriptor_digest: str
    modified: int


@dataclass(frozen=True)
class OpenDrive:
    """A disk or CD of the VM as a member: what it is made from, and the files that are read for it.

    `least_bytes`: what it takes in a plain archive in any case; it may have zeros besides, which take nothing.
    """

    member: Member
    source: ImageSource
    hashed: tuple[hashing.Wanted, ...]
    reached: images.Reached
    least_bytes: int = 0


@dataclass(frozen=True)
class Opened:
    """A VM with its files open. `others`: what the manifest names besides; `warnings` are in the order of their discovery."""

    described: Described
    drives: tuple[OpenDrive, ...]
    others: tuple[hashing.Wanted, ...]
    warnings: tuple[Notice, ...]


def describe(package: Package, choice: Choice) -> Described:
    """Reads the descriptor. Raises DamagedError where it is not what the manifest says, and as `ovf.parse` and `hardware.plan`."""
    data = package.descriptor
    if package.manifest is not None:
        _check_descriptor(package, data)
    what = f"{package.what}, descriptor {package.descriptor_name}"
    described = ovf.parse(data, what, system=choice.system, configuration=choice.configuration)
    made = hardware.plan(described, data, what, choice.options)
    return Described(package, described, made, hashlib.sha256(data).hexdigest(), package.modified)


def _check_descriptor(package: Package, data: bytes) -> None:
    expected = (package.manifest or {}).get(package.descriptor_name)
    if expected is None:
        raise DamagedError(
            package.what,
            f"its manifest does not name the descriptor {package.descriptor_name}",
            "Ask for a complete manifest.",
        )
    found = Digest(expected.algorithm, hashlib.new(expected.algorithm, data, usedforsecurity=False).hexdigest())
    if found != expected:
        raise hashing.mismatch(package, package.descriptor_name, found, expected)


def check_manifest(package: Package) -> None:
    """Raises DamagedError where the manifest names a file that is not there."""
    for name in package.manifest or {}:
        if package.file(name) is None:
            raise DamagedError(
                package.what, f"its manifest names {name}, which is not there", "Copy the whole package.", member=name
            )


@contextlib.contextmanager
def opened(described: Described, scratch: str) -> Iterator[Opened]:
    """Opens the disks. ``scratch``: directory for what has to be unpacked from gzip.

    Raises ArchiveError for files that are missing, ImageError for disks that are damaged, hostile or not read.
    """
    package, made = described.package, described.hardware
    check_manifest(package)
    warnings: list[Notice] = []
    located = [_locate(described, drive) for drive in made.drives]  # all of them, before anything is read
    drives = []
    with contextlib.ExitStack() as stack:
        for drive, file in zip(made.drives, located):
            drives.append(_open(described, drive, file, scratch, stack, warnings))
        known = {wanted.file.name for drive in drives for wanted in drive.hashed} | {package.descriptor_name}
        others = [_wanted(package, name) for name in package.manifest or {} if name not in known]
        if package.certificate_name:
            text = f"the signature in {package.certificate_name} is not checked, only the digests of the manifest are"
            warnings.append(Notice(Code.NOT_COVERED, text))
        yield Opened(described, tuple(drives), tuple(filter(None, others)), tuple(dict.fromkeys(warnings)))


def _locate(described: Described, drive: hardware.Drive) -> images.Located | None:
    if not drive.file:
        return None
    row = described.descriptor.files[drive.file]
    found = images.locate(described.package, row)
    manifest = described.package.manifest
    for part in found.parts if manifest is not None and found.file.name not in manifest else ():
        if manifest is not None and part.name not in manifest:
            raise DamagedError(
                described.package.what,
                f"its manifest does not name {part.name}",
                "Ask for a complete manifest.",
                member=part.name,
            )
    return found


def _wanted(package: Package, name: str) -> hashing.Wanted | None:
    file, expected = package.file(name), (package.manifest or {}).get(name)
    return hashing.Wanted(file, expected.algorithm, expected) if file is not None and expected is not None else None


def _hashed(package: Package, located: images.Located) -> tuple[hashing.Wanted, ...]:
    """What of the files of a disk is hashed: against the manifest where there is one, else to know them again."""
    manifest = package.manifest or {}
    if located.file.name in manifest:
        expected = manifest[located.file.name]
        return (hashing.Wanted(located.file, expected.algorithm, expected),)
    found = []
    for part in (*located.parts, *images.extents(package, located.file)):
        expected_part = manifest.get(part.name)
        found.append(
            hashing.Wanted(part, expected_part.algorithm if expected_part else hashing.fastest(), expected_part)
        )
    return tuple(found)


def _open(
    described: Described,
    drive: hardware.Drive,
    located: images.Located | None,
    scratch: str,
    stack: contextlib.ExitStack,
    warnings: list[Notice],
) -> OpenDrive:
    capacity, reached = drive.disk.capacity_bytes, images.Reached()
    if located is None:
        image = images.empty(capacity or 0)
        stack.callback(image.source.close)
        warnings.append(Notice(Code.ODD_PACKAGE, f"the disk {drive.target} has no file in the package; it is new and empty"))
        return OpenDrive(_disk_member(drive, image), image.source, (), reached)
    row, size = located.row, located.file.size_bytes
    if row.size_bytes is not None and row.size_bytes != size:
        text = f"{row.href} has {size} bytes, the descriptor says {row.size_bytes}; the file counts"
        warnings.append(Notice(Code.ODD_PACKAGE, text))
    file = stack.enter_context(images.unpacked(located, scratch, capacity))
    hashed = _hashed(described.package, located)
    if drive.device == "cdrom":
        source = images.WindowSource(file, reached)
        name = os.path.basename(row.href)
        member = Member(
            f"1_{names.stem(name)[:80]}" if name.lower().endswith(".iso") else f"1_{names.stem(name)[:76]}.iso",
            Role.ISO, file.size_bytes, target=drive.target, image_format="raw", original_format="raw", active=True,
        )  # fmt: skip
        return OpenDrive(member, source, hashed, reached)
    image = images.open_image(described.package, file, drive.disk, reached)
    stack.callback(image.source.close)
    virtual = image.virtual_size_bytes
    if capacity is not None and abs(virtual - capacity) >= _ROUNDING_BYTES:
        text = f"{row.href} is a disk of {virtual} bytes, the descriptor says {capacity}; the image counts"
        warnings.append(Notice(Code.ODD_PACKAGE, text))
    if (
        drive.boots
        and described.hardware.efi
        and image.disk is not None
        and esp.has_fallback_loader(image.disk) is False
    ):
        text = (
            f"the EFI system partition of {drive.target} has no fallback loader EFI/BOOT/BOOTX64.EFI, and the boot entries of the "
            "original are not taken over: choose the loader once in the firmware's menu (Boot Maintenance Manager, Boot From "
            "File), and have the guest add an entry (efibootmgr, bcdboot)"
        )
        warnings.append(Notice(Code.OTHER_HARDWARE, text))
    # a sparse image has no grain without data, as a rule
    least = image.source.size_bytes if isinstance(image.disk, vmdk.SparseVmdk) or image.disk is None else 0
    return OpenDrive(_disk_member(drive, image), image.source, hashed, reached, least)


def _disk_member(drive: hardware.Drive, image: images.DiskImage) -> Member:
    return Member(
        f"{drive.target}_0.qcow2",
        Role.DISK,
        image.source.size_bytes,
        target=drive.target,
        virtual_size_bytes=image.virtual_size_bytes,
        image_format="qcow2",
        original_format="qcow2",
        active=True,
    )


def unique(drives: Sequence[OpenDrive]) -> tuple[OpenDrive, ...]:
    """With members of different names: one CD image may be in two drives, and others may be called alike."""
    seen: set[str] = set()
    found = []
    for number, drive in enumerate(drives, 1):
        name = drive.member.name
        if name in seen:
            name = f"{number}_{name.partition('_')[2]}"
            if name in seen:
                raise HostileError("the package", f"two of its files are called {drive.member.name}")
        seen.add(name)
        found.append(replace(drive, member=replace(drive.member, name=name)))
    return tuple(found)


def peek(described: Described) -> tuple[OpenDrive, ...]:
    """The disks as far as they are told by the descriptor and their headers, for people. What cannot be read has no size."""
    drives = []
    for drive in described.hardware.drives:
        size = drive.disk.capacity_bytes or 0
        with contextlib.suppress(KvmopsError):
            located = _locate(described, drive)
            if located is not None and not located.packed and drive.device == "disk":
                size = images.look(described.package, located.file, drive.disk, images.Reached())[1] or size
        role = Role.DISK if drive.device == "disk" else Role.ISO
        name = (
            f"{drive.target}_0.qcow2"
            if role is Role.DISK
            else os.path.basename(described.descriptor.files[drive.file].href)
        )
        member = Member(name, role, 0, target=drive.target, virtual_size_bytes=size, image_format="qcow2", active=True)
        drives.append(OpenDrive(member, images.empty(0).source, (), images.Reached()))
    return tuple(drives)


def files_there(described: Described) -> list[tuple[str, bool, int]]:
    """Name of each file of the references, whether it is there now, and its size (0 if not)."""
    rows = []
    for row in described.descriptor.files.values():
        try:
            found = images.locate(described.package, row)
            rows.append((row.href, True, found.file.size_bytes))
        except ArchiveError:
            rows.append((row.href, False, 0))
    return rows
