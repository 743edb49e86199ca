# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""A package (an OVA, a directory, or the directory of a lone .ovf), read in place: nothing is unpacked.

Files are opened by plain names below one directory, without following links; an OVA is one open file and offsets in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from enum import Enum

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive import tar
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    DamagedError,
    HostileError,
    KvmopsError,
    SourceError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import manifest, mistaken

_MAX_FILES = 20_000
_MAX_CHUNKS = 10_000
_FRESH_S = 60
_PACK_AGAIN = "Pack it again: tar --format=ustar -cf VM.ova VM.ovf DISK.vmdk. Or name the directory with the files."


class Kind(str, Enum):
    """What a source is."""

    OVA = "ova"
    DIRECTORY = "directory"


class PackageFile:
    """One file of a package, or several in a row: positional reads by several threads. Not a byte outside of it is ever read."""

    def __init__(self, name: str, parts: tuple[tuple[int, int, int], ...]) -> None:
        """``parts``: descriptor, offset and size of each."""
        self.name, self.parts = name, parts
        self.size_bytes = sum(size for _fd, _offset, size in parts)

    @property
    def where(self) -> tuple[tuple[str, int], ...]:
        """Path and offset of each part for another process: of the very file that is open here, whatever its name has become."""
        return tuple((f"/proc/{os.getpid()}/fd/{fd}", offset) for fd, offset, _size in self.parts)

    def read_at(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes, fewer only at the end of the file. Raises SourceError."""
        buffer = bytearray(max(0, min(length, self.size_bytes - offset)))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer. Raises SourceError, also where the file ends before."""
        done = begin = 0
        for fd, start, size in self.parts:
            while done < len(buffer) and begin <= offset + done < begin + size:
                within = offset + done - begin
                try:
                    count = os.preadv(fd, [buffer[done : done + size - within]], start + within)
                except OSError as error:
                    raise self._unreadable(offset + done, error.strerror or str(error)) from error
                if count == 0:
                    raise self._unreadable(offset + done, "it became shorter")
                done += count
            begin += size
        if done < len(buffer):
            raise self._unreadable(offset + done, "the file ends there")

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        """Begin and end of what is allocated, as the file system tells it; what it does not tell is allocated."""
        begin = 0
        for fd, start, size in self.parts:
            position = start
            while position < start + size:
                try:
                    data = min(os.lseek(fd, position, os.SEEK_DATA), start + size)
                    end = min(os.lseek(fd, data, os.SEEK_HOLE), start + size) if data < start + size else data
                except OSError:  # a hole up to the end, or a file system that does not tell
                    data, end = position, start + size
                if data < end:
                    yield begin + data - start, begin + end - start
                position = end
            begin += size

    def _unreadable(self, offset: int, why: str) -> SourceError:
        return SourceError(f"The file {self.name} of the package", f"it cannot be read at offset {offset}: {why}")


class Package:
    """An open package. ``files`` are the names of its files, ``manifest`` None without one. Use as a context manager."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.what = f"package {path}"
        self._fds: dict[int, tuple[int, ...]] = {}
        self._open_files: dict[str, PackageFile] = {}
        self._entries: dict[str, tar.Entry] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Package:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files."""
        for fd in self._fds:
            os.close(fd)
        self._fds = {}

    @property
    def modified(self) -> int:
        """When the descriptor was written, as the package tells it: the same for every copy of an OVA."""
        entry = self._entries.get(self.descriptor_name)
        if entry is not None:
            return entry.mtime
        return int(os.fstat(self._open_files[self.descriptor_name].parts[0][0]).st_mtime)

    def file(self, name: str) -> PackageFile | None:
        """A file of the package by its name; None where there is none."""
        if name not in self._open_files:
            found = self._of_tar(name) if self.kind is Kind.OVA else self._of_directory(name)
            if found is None:
                return None
            self._open_files[name] = found
        return self._open_files[name]

    def chunked(self, name: str, chunk_bytes: int) -> PackageFile | None:
        """A file that was cut into ``NAME.000000000``, ``NAME.000000001``, … of ``chunk_bytes`` each.

        None where there is no such chunk at all. Raises ArchiveError where one is missing or has another size.
        """
        chunks: list[PackageFile] = []
        while len(chunks) < _MAX_CHUNKS:
            found = self.file(f"{name}.{len(chunks):09}")
            if found is None:
                break
            chunks.append(found)
        known = {f"{name}.{number:09}" for number in range(len(chunks))}
        others = [each for each in self.files if each.startswith(f"{name}.0") and each[len(name) + 1 :].isdigit()]
        left = sorted(set(others) - known)
        if left:
            raise ArchiveError(
                self.what, f"{left[0]} is there, but not {name}.{len(chunks):09}", "Copy all chunks of the file."
            )
        if not chunks:
            return None
        wrong = next((each for each in chunks[:-1] if chunk_bytes and each.size_bytes != chunk_bytes), None)
        if wrong is None and chunk_bytes and not 0 < chunks[-1].size_bytes <= chunk_bytes:
            wrong = chunks[-1]
        if wrong is not None:
            raise ArchiveError(
                self.what, f"the chunk {wrong.name} has {wrong.size_bytes} bytes, a chunk has {chunk_bytes}"
            )
        return PackageFile(name, tuple(part for chunk in chunks for part in chunk.parts))

    def check_unchanged(self) -> None:
        """Raises SourceError where somebody has written to a file since it was opened."""
        for fd, before in self._fds.items():
            if before and _evidence(fd) != before:
                raise SourceError(
                    self.what, "it has changed while it was read", "Wait until it is copied, then run the task again."
                )

    def _open(self) -> None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            hint = mistaken.NOT_HERE if error.errno == errno.ENOENT else ""
            raise ArchiveError(self.what, f"it cannot be opened ({error.strerror})", hint) from error
        self._fds[fd] = _evidence(fd)
        mode = os.fstat(fd).st_mode
        lone = ""
        if stat.S_ISREG(mode) and self.path.lower().endswith(".ovf"):
            directory, lone = os.path.split(_filenames.absolute(self.path))
            self.kind = Kind.DIRECTORY
            self.directory = directory
            self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._fds[self._root] = ()
        elif stat.S_ISREG(mode):
            self.kind = Kind.OVA
            self.directory = os.path.dirname(_filenames.absolute(self.path))
            self._root = fd
            self._walk(fd)
        elif stat.S_ISDIR(mode):
            self.kind = Kind.DIRECTORY
            self.directory = _filenames.absolute(self.path)
            self._root = fd
            self._fds[fd] = ()
        else:
            raise ArchiveError(self.what, "it is neither a file nor a directory")
        self.files = list(self._entries) if self.kind is Kind.OVA else self._listed()
        self.descriptor_name = lone or self._descriptor()
        self._open_files.update({lone: self._regular(fd, lone)} if lone else {})
        self.descriptor = self._small(self.descriptor_name, _xml.MAX_XML_BYTES)
        self.manifest_name = self._sibling(".mf")
        self.certificate_name = self._sibling(".cert")
        self.manifest = (
            manifest.parse(self._small(self.manifest_name, manifest.MAX_BYTES), f"manifest {self.manifest_name}")
            if self.manifest_name
            else None
        )

    def _walk(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        known = mistaken.file(self.path, os.pread(fd, tar.BLOCK, 0))
        if known is not None:
            raise ArchiveError(self.what, f"it is no package, but {known[0]}", known[1])

        def fetch(offset: int, length: int) -> bytes:
            return os.pread(fd, length, offset)

        try:
            for entry in tar.Walk(fetch, size).entries():
                self._entries[entry.name] = entry
        except DamagedError as error:
            if not self._entries and "ends" not in error.why:
                raise ArchiveError(
                    self.what, f"it is no OVA: {error.why}", "An OVA is a tar, not compressed. Unpack it with gunzip or the like."
                ) from error
            if "ends" not in error.why:
                raise ArchiveError(self.what, error.why, error.hint) from error
            now = os.fstat(fd)
            growing = now.st_size != size or time.time() - now.st_mtime < _FRESH_S
            state = "it is still being copied" if growing else "it is still being copied, or was cut off"
            raise ArchiveError(
                self.what, f"{state}: {error.why}", "Wait for the copy to end, or copy it again."
            ) from error
        except KvmopsError as error:
            raise HostileError(f"{self.what}, {error.what}", error.why, _PACK_AGAIN) from error

    def _listed(self) -> list[str]:
        found = []
        with os.scandir(self._root) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    found.append(entry.name)
                if len(found) > _MAX_FILES:
                    raise ArchiveError(self.what, f"its directory has more than {_MAX_FILES} files")
        return sorted(found)

    def _descriptor(self) -> str:
        names = [each for each in self.files if each.lower().endswith(".ovf") and not each.startswith("._")]
        if len(names) > 1 and self.kind is Kind.OVA:
            raise HostileError(self.what, f"it has more than one descriptor ({', '.join(names[:5])})")
        if len(names) > 1:
            raise ArchiveError(
                self.what, f"it has {len(names)} descriptors ({', '.join(names[:5])})", "Name one of these files."
            )
        if not names:
            known = mistaken.listed(self.files if self.kind is Kind.OVA else os.listdir(self._root))
            if known is not None:
                raise ArchiveError(self.what, f"no descriptor (.ovf) is in it, but {known[0]}", known[1])
            raise ArchiveError(self.what, "no descriptor (.ovf) is in it", "Name the .ovf, its directory, or an .ova.")
        return names[0]

    def _sibling(self, suffix: str) -> str:
        """The manifest or certificate: that of the descriptor's name, else the only one."""
        names = [each for each in self.files if each.lower().endswith(suffix) and not each.startswith("._")]
        own = os.path.splitext(self.descriptor_name)[0]
        same = [each for each in names if os.path.splitext(each)[0] == own]
        if same:
            return same[0]
        if self.kind is Kind.DIRECTORY:  # the others belong to other descriptors in the directory
            alone = sum(each.lower().endswith(".ovf") for each in self.files) == 1
            return names[0] if len(names) == 1 and alone else ""
        if len(names) > 1:
            raise HostileError(self.what, f"it has more than one {suffix} file ({', '.join(names[:5])})")
        return names[0] if names else ""

    def _small(self, name: str, limit_bytes: int) -> bytes:
        found = self.file(name)
        if found is None:
            raise ArchiveError(self.what, f"{name} cannot be read")
        if found.size_bytes > limit_bytes:
            raise HostileError(
                f"{self.what}, {name}", f"{found.size_bytes} bytes are more than the {limit_bytes} allowed"
            )
        return found.read_at(0, found.size_bytes)

    def _of_tar(self, name: str) -> PackageFile | None:
        entry = self._entries.get(name[2:] if name.startswith("./") else name)
        if entry is None:
            return None
        return PackageFile(entry.name, ((self._root, entry.offset, entry.size_bytes),))

    def _of_directory(self, name: str) -> PackageFile | None:
        *above, base = (name[2:] if name.startswith("./") else name).split("/")
        if not base or any(part in ("", ".", "..") for part in (*above, base)) or "\0" in name:
            return None
        here = self._root
        with contextlib.ExitStack() as stack:
            try:
                for part in above:
                    here = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
                    stack.callback(os.close, here)
                fd = os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=here)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                link = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
                raise HostileError(
                    f"{self.what}, {name}", f"it cannot be opened: {link}", "Copy the file itself."
                ) from error
        self._fds[fd] = _evidence(fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise HostileError(f"{self.what}, {name}", "it is no regular file")
        return self._regular(fd, name)

    @staticmethod
    def _regular(fd: int, name: str) -> PackageFile:
        return PackageFile(name, ((fd, 0, os.fstat(fd).st_size),))


def _evidence(fd: int) -> tuple[int, ...]:
    found = os.fstat(fd)
    return (found.st_size, found.st_mtime_ns, found.st_ino)
