# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a running operation has put into the world, so that the next run can take it out again.

One file per operation, ``<state>/journal/<token>.json``: JSON objects, one per line, later facts over earlier ones. It is only
ever appended to, and the holder keeps an OFD lock on it: a journal whose lock is free was left behind by a dead run.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _json, _locks, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError

Facts = dict[str, Any]


def vm_key(uuid: str) -> str:
    """The key of journals about one VM."""
    return f"vm-{uuid}"


class Journal:
    """The journal of one operation on one object; see the module's text."""

    def __init__(self, path: str, fd: int, facts: Facts, length: int) -> None:
        self.path = path
        self.facts = facts
        self._fd = fd
        self._length = length

    @classmethod
    def open(cls, key: str, operation: str, facts: Facts) -> Journal:
        """Start the journal of ``operation`` on the object ``key`` (a VM's uuid, a directory); durable when it returns."""
        directory = _directory()
        path = os.path.join(directory, f"{secrets.token_hex(8)}.json")
        with _directory_lock():
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            journal = cls(path, fd, {}, 0)
            try:
                if not _locks.try_lock(fd):
                    raise KvmopsError(f"The journal {path}", "somebody else has locked a file that was just created")
                journal.record(key=key, operation=operation, holder=asdict(_locks.Holder.myself(operation)), **facts)
                _sync_directory(directory)
            except BaseException:
                os.unlink(path)
                os.close(fd)
                raise
        return journal

    @classmethod
    def left_behind(cls, matches: Callable[[Facts], bool]) -> list[Journal]:
        """Journals of dead runs whose facts match, oldest first, each now locked by the caller: end them with done() or close()."""
        with _directory_lock():
            return [journal for journal in cls._readable(take=True) if _keep(journal, matches)]

    @classmethod
    def peek(cls, matches: Callable[[Facts], bool]) -> list[Facts]:
        """Facts of journals of dead runs that match, oldest first; takes no lock and changes nothing."""
        found = []
        for journal in cls._readable(take=False):
            if journal.facts and matches(journal.facts):
                found.append(journal.facts)
            journal.close()
        return found

    def record(self, **facts: Any) -> None:
        """Add facts (JSON values); they are on the disk when this returns. A failed write leaves the journal as it was."""
        line = json.dumps(facts, ensure_ascii=True, sort_keys=True).encode() + b"\n"
        try:
            written = os.pwrite(self._fd, line, self._length)
            if written != len(line):
                raise OSError(f"short write: {written} of {len(line)} bytes")
            os.fdatasync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self._length)
            raise KvmopsError(
                f"The journal {self.path}", str(error), "Free space on the file system of the state directory."
            ) from error
        self._length += len(line)
        self.facts = {**self.facts, **facts}

    def done(self) -> None:
        """Everything named here is gone or finished: remove the journal, durably."""
        os.unlink(self.path)
        _sync_directory(os.path.dirname(self.path))
        self.close()

    def close(self) -> None:
        """Let go of the journal but leave it for the next run."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @classmethod
    def _readable(cls, *, take: bool) -> list[Journal]:
        directory = _directory()
        journals = []
        for name in sorted(os.listdir(directory)):
            if not name.endswith(".json"):
                continue
            path = os.path.join(directory, name)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            alive = not _locks.try_lock(fd) if take else _locks.is_locked(fd)
            # a finished run unlinks its journal before it lets go of the lock
            if alive or os.fstat(fd).st_nlink == 0:
                os.close(fd)
                continue
            facts, length = _load(fd)
            journals.append((os.fstat(fd).st_mtime_ns, path, fd, facts, length))
        return [
            cls(path, fd, facts, length)
            for _dummy, path, fd, facts, length in sorted(journals, key=lambda each: each[:2])
        ]


def _directory_lock() -> contextlib.AbstractContextManager[None]:
    """Held for the moments between the birth of a journal and its lock."""
    return _locks.hold("journal", of="The directory of the journals", what="opening a journal", timeout_s=10)


def _keep(journal: Journal, matches: Callable[[Facts], bool]) -> bool:
    if not journal.facts:  # killed before the first fact was durable: nothing had been touched
        journal.done()
        return False
    if matches(journal.facts):
        return True
    journal.close()
    return False


def _load(fd: int) -> tuple[Facts, int]:
    """Facts of all complete lines and their length; a torn last line was never acknowledged."""
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    facts: Facts = {}
    length = 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            facts.update(_json.parse(line))
        except (ValueError, TypeError):
            break
        length += len(line)
    return facts, length


def _directory() -> str:
    directory = os.path.join(_paths.state_dir(), "journal")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    return directory


def _sync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
