# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Digests of the files of a package, computed beside the conversion that reads them, so that each byte comes from the disk once."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._errors import DamagedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import xxhash
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.manifest import Digest
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.package import Package, PackageFile
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress

_XXH3 = "xxh3-128"
_STEP_BYTES = 1 << 20
#: How far it may be ahead of the conversion, which finds in the page cache what it has read.
_AHEAD_BYTES = 64 << 20


def fastest() -> str:
    """For files that no manifest names: their digests only tell a package from another one."""
    return _XXH3 if xxhash is not None else "sha256"


def is_known(algorithm: str) -> bool:
    """Whether this host can compute it."""
    return xxhash is not None if algorithm == _XXH3 else algorithm in hashlib.algorithms_available


def _new(algorithm: str) -> Any:
    return xxhash.xxh3_128() if algorithm == _XXH3 else hashlib.new(algorithm, usedforsecurity=False)


@dataclass(frozen=True)
class Wanted:
    """A file, and what it must hash to; `expected` None: nobody says."""

    file: PackageFile
    algorithm: str
    expected: Digest | None = None


class Hashing:
    """Hashes files one after the other in a thread. `reached`: how far the conversion has read them, joined as one."""

    def __init__(self, package: Package, wanted: Sequence[Wanted]) -> None:
        self._package, self._wanted = package, wanted
        self._found: dict[str, Digest] = {}
        self._error: BaseException | None = None
        self._allowed = _AHEAD_BYTES
        self._stopped = False
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hashing", daemon=True)

    def __enter__(self) -> Hashing:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify_all()
        self._thread.join()

    def reached(self, offset: int) -> None:
        """The conversion has read up to this offset; of several threads the furthest counts."""
        if offset + _AHEAD_BYTES > self._allowed + _STEP_BYTES:
            with self._moved:
                self._allowed = max(self._allowed, offset + _AHEAD_BYTES)
                self._moved.notify_all()

    def finish(self) -> dict[str, Digest]:
        """The digests by file name, once all is read. Raises DamagedError where a file does not fit the manifest."""
        with self._moved:
            self._allowed = 1 << 63
            self._moved.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def _run(self) -> None:
        try:
            done = 0
            for wanted in self._wanted:
                digest = _new(wanted.algorithm)
                for piece in self._pieces(wanted.file, done):
                    digest.update(piece)
                done += wanted.file.size_bytes
                if self._stopped:
                    return
                found = Digest(wanted.algorithm, digest.hexdigest())
                if wanted.expected is not None and found != wanted.expected:
                    raise mismatch(self._package, wanted.file.name, found, wanted.expected)
                self._found[wanted.file.name] = found
        except BaseException as error:  # raised again by `finish`
            self._error = error

    def _pieces(self, file: PackageFile, before: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(_STEP_BYTES))
        for offset in range(0, file.size_bytes, _STEP_BYTES):
            with self._moved:
                while before + offset > self._allowed and not self._stopped:
                    self._moved.wait()
            if self._stopped:
                return
            piece = buffer[: min(_STEP_BYTES, file.size_bytes - offset)]
            file.read_into(offset, piece)
            yield piece


def mismatch(package: Package, name: str, found: Digest, expected: Digest) -> DamagedError:
    """The error for a file that is not what the manifest says."""
    return DamagedError(
        package.what,
        f"{name} is not what its manifest says: its {found.algorithm} is {found.hex}, not {expected.hex}",
        "Copy or download the package again.",
        member=name,
    )


def of_files(package: Package, wanted: Sequence[Wanted], progress: Progress) -> dict[str, Digest]:
    """Digests of files that nothing else reads. Raises DamagedError as `Hashing.finish`."""
    found: dict[str, Digest] = {}
    for each in wanted:
        progress.phase("check", each.file.name, each.file.size_bytes)
        digest = _new(each.algorithm)
        buffer = memoryview(bytearray(_STEP_BYTES))
        for offset in range(0, each.file.size_bytes, _STEP_BYTES):
            piece = buffer[: min(_STEP_BYTES, each.file.size_bytes - offset)]
            each.file.read_into(offset, piece)
            digest.update(piece)
            progress.advance(len(piece))
        found[each.file.name] = Digest(each.algorithm, digest.hexdigest())
        if each.expected is not None and found[each.file.name] != each.expected:
            raise mismatch(package, each.file.name, found[each.file.name], each.expected)
    return found


@contextlib.contextmanager
def beside(package: Package, wanted: Sequence[Wanted]) -> Iterator[Hashing]:
    """Hashing beside a conversion; what fails in it is told by `finish`."""
    with Hashing(package, wanted) as hashing:
        yield hashing
