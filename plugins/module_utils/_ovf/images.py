# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What the disk files of a package are, told by their bytes, and how they become members of an archive. Only gzip is unpacked."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Callable
from urllib.parse import unquote

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    HostileError,
    RefusedError,
    TargetError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image import probe, qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError
from ansible_collections.kvmops.backup.plugins.module_utils._image.served import ServedImage
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import AsQcow2Source, GuestDisk, ImageSource
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import descriptor as ovf
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import vmdk
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.package import Kind, Package, PackageFile

MAX_BYTES = 16 << 40  # of one disk: what an archive takes
_GZIP = b"\x1f\x8b"
_STEP_BYTES = 1 << 20
_GZIP_SLACK_BYTES = 64 << 20
_CONNECTIONS = 8
_QEMU = {"vhd": "vpc", "vhdx": "vhdx"}
_REFUSED = {
    "vdi": "a VirtualBox disk (VDI)",
    "qcow": "a qcow image of version 1",
    "qed": "a QED image",
    "luks": "an encrypted disk (LUKS)",
    "parallels": "a Parallels disk",
    "bochs": "a Bochs disk",
}


@dataclass(frozen=True)
class Located:
    """A file of the references and where it is: `file` as its bytes are used (joined, still packed), `parts` as they lie there."""

    row: ovf.File
    file: PackageFile
    parts: tuple[PackageFile, ...]

    @property
    def packed(self) -> bool:
        """Whether it is compressed with gzip."""
        return self.row.compression == "gzip" or (
            self.row.href.lower().endswith(".gz") and self.file.read_at(0, 2) == _GZIP
        )


def locate(package: Package, row: ovf.File) -> Located:
    """Finds a file: by its name as it is written, then with percent escapes decoded. Raises ArchiveError where it is missing."""
    what = f"{package.what}, file {row.href}"
    if row.compression not in ("", "identity", "gzip"):
        raise ArchiveError(what, f"its compression {row.compression[:40]!r} is not known")
    for name in dict.fromkeys((row.href, unquote(row.href))):
        if "://" in name or name.startswith("\\\\") or name.lower().startswith("file:"):
            raise RefusedError(
                what, "it is not in the package but somewhere else", "Download it, and export the VM as an OVA."
            )
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise HostileError(what, "it lies outside of the package")
        found = package.file(name)
        if found is not None:
            return Located(row, found, (found,))
        joined = package.chunked(name, row.chunk_bytes)
        if joined is not None:
            parts = []
            for number in range(len(joined.parts)):
                part = package.file(f"{name}.{number:09}")
                parts += [part] if part else []
            return Located(row, joined, tuple(parts))
    where = "in the package" if package.kind is Kind.OVA else f"in {package.directory}"
    raise ArchiveError(what, f"it is not {where}", "Copy the whole package, under the names that its descriptor has.")


@contextlib.contextmanager
def unpacked(located: Located, directory: str, capacity_bytes: int | None) -> Iterator[PackageFile]:
    """The file without gzip: as it is, or from a nameless temporary file in ``directory``, which takes no more than the disk can.

    Raises HostileError for what grows beyond that, TargetError where there is no room.
    """
    if not located.packed:
        yield located.file
        return
    what = f"file {located.row.href}"
    limit = min(MAX_BYTES, (capacity_bytes or MAX_BYTES) * 17 // 16 + _GZIP_SLACK_BYTES)
    fd = _nameless(directory)
    try:
        size = _inflate(located.file, fd, limit, directory, what)
        yield PackageFile(located.file.name, ((fd, 0, size),))
    finally:
        os.close(fd)


def _nameless(directory: str) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        path = os.path.join(directory, names.partial_name("unpacked", secrets.token_hex(6)))
        fd = _files.create(path)
        os.unlink(path)
        return fd


def _inflate(file: PackageFile, fd: int, limit: int, directory: str, what: str) -> int:
    inflater, size, offset = zlib.decompressobj(31), 0, 0
    pending = b""
    free = _files.free_bytes(directory)
    while True:
        if not pending:
            pending = file.read_at(offset, _STEP_BYTES)
            offset += len(pending)
            if not pending:
                break
        try:
            data = inflater.decompress(pending, _STEP_BYTES)
        except zlib.error as error:
            raise ArchiveError(what, f"it cannot be unpacked ({error})", "Copy it again.") from error
        pending = inflater.unconsumed_tail or inflater.unused_data
        if size + len(data) > limit:
            raise HostileError(what, f"it unpacks to more than {limit} bytes, which is more than its disk can have")
        if size + len(data) > free:
            raise TargetError(directory, f"{what} does not fit while it is unpacked: {free} bytes are free")
        _files.write_sparse(fd, data, size, directory)
        size += len(data)
        if inflater.eof:
            if not pending and offset >= file.size_bytes:
                break
            inflater = zlib.decompressobj(31)  # gzip files may follow each other
            if pending and not pending.startswith(_GZIP):
                break  # padding
    if not inflater.eof and size + offset:
        raise ArchiveError(what, "it is cut off", "Copy it again.")
    _files.resize(fd, size, directory)
    return size


@dataclass(frozen=True)
class DiskImage:
    """A disk file that was looked at: `kind` for people; `disk` what a guest sees, None for what is taken byte for byte."""

    kind: str
    virtual_size_bytes: int
    source: ImageSource
    disk: GuestDisk | None = None


class Reached:
    """Passes on how far a file has been read, once somebody wants to know."""

    def __init__(self) -> None:
        self.tell: Callable[[int], None] = nobody

    def __call__(self, offset: int) -> None:
        self.tell(offset)


def nobody(_offset: int) -> None:
    """Nobody wants to know."""


def look(package: Package, file: PackageFile, row: ovf.DiskRow, reached: Reached) -> tuple[str, int]:
    """What a disk file is and its virtual size, without laying anything out. Raises as `open_image`."""
    info = _probe(package, file, row)
    if info.format == "vmdk" and not vmdk.is_text(file.read_at(0, 512)):
        disk = vmdk.SparseVmdk(file, reached=reached)
        return f"VMDK ({disk.type})", disk.size_bytes
    if info.format in _QEMU:
        return info.format.upper(), row.capacity_bytes or 0
    return info.format, info.virtual_size_bytes


def open_image(package: Package, file: PackageFile, row: ovf.DiskRow, reached: Reached) -> DiskImage:
    """Makes a qcow2 member of a disk file. Raises ImageError for images that are damaged, hostile or of a kind that is not read."""
    what = f"disk image {file.name}"
    info = _probe(package, file, row)
    if info.format == "qcow2":
        probe.check_archive_image(info, allowed_backing=None)
        if info.encrypted:
            raise ImageError(what, "it is encrypted, and its key is not in the package")
        _check_qcow2(file)
        return DiskImage("qcow2", info.virtual_size_bytes, WindowSource(file, reached))
    disk: GuestDisk
    kind = info.format
    if info.format == "vmdk":
        disk = _open_vmdk(package, file, reached)
        kind = f"VMDK ({disk.type})" if isinstance(disk, vmdk.SparseVmdk) else "VMDK (flat)"
    elif info.format in _QEMU:
        disk, kind = ServedDisk(file, _QEMU[info.format], reached), info.format.upper()
    else:
        disk = vmdk.JoinedDisk([(file, 0, file.size_bytes)], reached=reached)
    try:
        if disk.size_bytes > MAX_BYTES:
            raise ImageError(
                what, f"a disk of {disk.size_bytes} bytes is larger than the {MAX_BYTES} that an archive takes"
            )
        return DiskImage(kind, -(-disk.size_bytes // 512) * 512, AsQcow2Source(disk), disk)
    except BaseException:
        disk.close()
        raise


def _probe(package: Package, file: PackageFile, row: ovf.DiskRow) -> probe.ImageInfo:
    what = f"disk image {file.name}"
    if file.size_bytes == 0:
        raise ImageError(what, "it is empty")
    head = file.read_at(0, 4)
    info = probe.probe(file.read_at, file.size_bytes)
    if info.format in _REFUSED or head == b"COWD":
        kind = _REFUSED.get(info.format, "a disk of an ESX host (vmfsSparse)")
        raise ImageError(what, f"it is {kind}, which is not read", "Export the VM as an OVA.")
    if info.format in ("raw", "iso") and "vmdk" in row.format.lower():
        raise ImageError(
            what, f"it is no VMDK, as which the descriptor has it; it begins with {head!r}", "Copy the package again."
        )
    return info


def _check_qcow2(file: PackageFile) -> None:
    """Its tables, by qemu-img with bounded memory and time."""
    if len(file.where) != 1:
        raise ImageError(f"disk image {file.name}", "a qcow2 image in chunks is not read", "Join the chunks.")
    path, offset = file.where[0]
    result = qemu_img.check(path, "qcow2", untrusted=True, window=(offset, -(-file.size_bytes // 512) * 512))
    if result.errors or result.corruptions:
        raise ImageError(
            f"disk image {file.name}", f"it is damaged: qemu-img finds {result.errors + result.corruptions} errors"
        )


def _open_vmdk(package: Package, file: PackageFile, reached: Reached) -> GuestDisk:
    if not vmdk.is_text(file.read_at(0, 512)):
        if file.read_at(0, 4) != vmdk.MAGIC:
            raise ImageError(
                f"disk image {file.name}", "it is a kind of VMDK that is not read", "Export the VM as an OVA."
            )
        return vmdk.SparseVmdk(file, reached=reached)
    what = f"VMDK {file.name}"
    if package.kind is Kind.OVA:
        raise HostileError(
            what, "it is only the description of a disk, whose data would be in other files", "Export the VM again."
        )
    if file.size_bytes > vmdk.MAX_DESCRIPTOR_BYTES:
        raise HostileError(what, f"{file.size_bytes} bytes of description are too many")
    text = vmdk.parse_text(file.read_at(0, file.size_bytes), what)
    parts: list[tuple[PackageFile | None, int, int]] = []
    for extent in text.extents:
        length, at = extent.sectors * vmdk.SECTOR, extent.offset_sectors * vmdk.SECTOR
        if extent.kind == "ZERO":
            parts.append((None, 0, length))
            continue
        if extent.kind not in ("FLAT", "VMFS"):
            raise ImageError(
                what, f"it has an extent of the kind {extent.kind}, which is not read", "Export the VM as an OVA."
            )
        if not extent.name or "/" in extent.name or "\\" in extent.name or extent.name in (".", ".."):
            raise HostileError(what, f"its extent {extent.name[:80]!r} is not a file of the package")
        data = package.file(extent.name)
        if data is None:
            raise ArchiveError(
                what, f"its data is in {extent.name}, which is not in the package", "Copy the whole package."
            )
        if at + length > data.size_bytes:
            raise ImageError(what, f"{extent.name} has {data.size_bytes} bytes, {at + length} are needed")
        parts.append((data, at, length))
    if not parts or sum(length for _file, _at, length in parts) > MAX_BYTES:
        raise ImageError(what, "it has no extents, or such that make no sense")
    return vmdk.JoinedDisk(parts)


def extents(package: Package, file: PackageFile) -> Sequence[PackageFile]:
    """The files besides it in which a flat disk has its data."""
    if (
        package.kind is Kind.OVA
        or not vmdk.is_text(file.read_at(0, 512))
        or file.size_bytes > vmdk.MAX_DESCRIPTOR_BYTES
    ):
        return ()
    text = vmdk.parse_text(file.read_at(0, file.size_bytes), f"VMDK {file.name}")
    found = (package.file(extent.name) for extent in text.extents if extent.name and "/" not in extent.name)
    return [each for each in found if each is not None]


class WindowSource:
    """A file of a package as it is: an ImageSource."""

    def __init__(self, file: PackageFile, reached: Reached) -> None:
        self._file, self._reached = file, reached
        self.size_bytes = self.late_from = file.size_bytes
        self.clone_fd: int | None = None

    def read_chunk(self, offset: int, buffer: memoryview) -> bool:
        """As ImageSource."""
        self._file.read_into(offset, buffer)
        self._reached(offset + len(buffer))
        return True

    def close(self) -> None:
        """The file stays the package's."""


class ServedDisk:
    """A disk of a format that QEMU reads (VHD, VHDX), through a qemu-nbd with bounded memory and time: a GuestDisk."""

    def __init__(self, file: PackageFile, driver: str, reached: Reached) -> None:
        if len(file.where) != 1:
            raise ImageError(
                f"disk image {file.name}", "an image of this kind in chunks is not read", "Join the chunks."
            )
        self._reached = reached
        path, offset = file.where[0]
        size = -(-file.size_bytes // 512) * 512
        self._served = ServedImage(path, driver, connections=_CONNECTIONS, window=(offset, size), untrusted=True)
        self._file_bytes = file.size_bytes
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for connection in range(_CONNECTIONS):
            self._free.put(connection)
        self.size_bytes = self._served.size_bytes

    def close(self) -> None:
        """Ends qemu-nbd."""
        self._served.close()

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As GuestDisk; what is zero is found out when it is read."""
        yield start, end

    def fill(self, offset: int, buffer: memoryview) -> bool:
        """As GuestDisk."""
        connection = self._free.get()
        try:
            self._served.read(connection, offset, buffer)
        finally:
            self._free.put(connection)
        self._reached(min(self._file_bytes, offset + len(buffer)))
        return True


class EmptyDisk:
    """A disk without anything on it: a GuestDisk."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = -(-size_bytes // 512) * 512

    def close(self) -> None:
        """Nothing is open."""

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As GuestDisk: nothing."""
        return iter(())

    def fill(self, offset: int, buffer: memoryview) -> bool:
        """As GuestDisk: zeros."""
        return False


def empty(size_bytes: int) -> DiskImage:
    """A new, empty disk."""
    if size_bytes > MAX_BYTES:
        raise ArchiveError("an empty disk", f"{size_bytes} bytes are more than the {MAX_BYTES} that an archive takes")
    disk = EmptyDisk(size_bytes)
    return DiskImage("empty", disk.size_bytes, AsQcow2Source(disk), disk)
