# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a running operation has put into the world, so that the next run can take it out again.

One file per operation, ``<state>/journal/<token>.json``: JSON objects, one per line, later facts over earlier ones; the first line
says besides whose journal it is. It is only ever appended to, and the holder keeps an OFD lock on it: a journal whose lock is free
was left behind by a dead run.

The facts of an operation are a frozen dataclass, of strings, numbers, enums, further dataclasses, tuples and mappings of these.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import enum
import json
import os
import secrets
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _json, _locks, _ofd, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError

Facts_co = TypeVar("Facts_co", covariant=True)
NewFacts = TypeVar("NewFacts")


class JournalError(KvmopsError):
    """A journal that this release cannot read: another one has left it."""


@dataclass(frozen=True)
class JournalHead:
    """Whose journal it is: ``key`` is the object (`vm_key`, a directory), ``operation`` its name, as in "a run of …"."""

    key: str
    operation: str
    holder: _locks.Holder


def vm_key(uuid: str) -> str:
    """The key of journals about one VM."""
    return f"vm-{uuid}"


class Remains:
    """A journal as its file has it: its head, and facts that nobody has made values of yet."""

    def __init__(self, path: str, head: JournalHead, values: Mapping[str, Any]) -> None:
        self.path, self.head, self._values = path, head, values

    def facts(self, kind: type[Facts_co]) -> Facts_co:
        """The facts as this dataclass. Raises JournalError where they are no such facts."""
        try:
            return _decoded(kind, self._values)  # type: ignore[no-any-return]
        except (TypeError, ValueError) as error:
            raise JournalError(
                f"The journal {self.path}",
                f"this release cannot read what a run of {self.head.operation} has noted ({error})",
                "Run the task with the release that has left it, or remove the journal if nothing of that run is there.",
            ) from error


class LeftBehind(Remains):
    """A journal of a dead run, locked by the caller, until it is taken over by `journal` or given back by `close`."""

    def __init__(self, path: str, head: JournalHead, values: Mapping[str, Any], fd: int, length: int) -> None:
        super().__init__(path, head, values)
        self._fd, self._length = fd, length

    @property
    def is_empty(self) -> bool:
        """Whether it has no whole line."""
        return not self._length

    def journal(self, kind: type[Facts_co]) -> Journal[Facts_co]:
        """To go on with. Raises JournalError, see facts()."""
        journal = Journal(self.path, self._fd, self.head, self.facts(kind), self._length)
        self._fd = -1
        return journal

    def close(self) -> None:
        """Leave it to the next run, unless it was taken over."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Journal(Generic[Facts_co]):
    """The journal of one operation on one object; see the module's text."""

    def __init__(self, path: str, fd: int, head: JournalHead, facts: Facts_co, length: int) -> None:
        self.path, self.head, self.facts = path, head, facts
        self._fd, self._length = fd, length

    @staticmethod
    def open(key: str, operation: str, facts: NewFacts) -> Journal[NewFacts]:
        """Start the journal of ``operation`` on the object ``key``; durable when it returns."""
        directory = _directory()
        os.makedirs(directory, mode=0o700, exist_ok=True)
        path = os.path.join(directory, f"{secrets.token_hex(8)}.json")
        head = JournalHead(key, operation, _locks.Holder.myself(operation))
        with _directory_lock():
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            journal = Journal(path, fd, head, facts, 0)
            try:
                if not _ofd.try_lock(fd):
                    raise KvmopsError(f"The journal {path}", "somebody else has locked a file that was just created")
                journal._append({"head": head, "facts": facts})
                _files.sync_directory(directory)
            except BaseException:
                os.unlink(path)
                os.close(fd)
                raise
        return journal

    @staticmethod
    def left_behind(matches: Callable[[Remains], bool]) -> list[LeftBehind]:
        """Those journals of dead runs, oldest first, each now locked by the caller: take them over, or close() them."""
        with _directory_lock():
            return [each for each in _readable(take=True) if _keep(each, matches)]

    @staticmethod
    def peek(matches: Callable[[Remains], bool]) -> list[Remains]:
        """The same, but nothing is locked or changed."""
        found = _readable(take=False)
        for each in found:
            each.close()
        return [each for each in found if each.head.key and matches(each)]

    def record(self, **changes: Any) -> None:
        """Change these facts; they are on the disk when this returns. A failed write leaves the journal as it was."""
        facts = dataclasses.replace(self.facts, **changes)  # type: ignore[type-var]
        self._append(changes)
        self.facts = facts

    def _append(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(values, ensure_ascii=True, sort_keys=True, default=asdict).encode() + b"\n"
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

    def done(self) -> None:
        """Everything named here is gone or finished: remove the journal, durably."""
        os.unlink(self.path)
        _files.sync_directory(os.path.dirname(self.path))
        self.close()

    def close(self) -> None:
        """Let go of the journal but leave it for the next run."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _readable(*, take: bool) -> list[LeftBehind]:
    """Journals of dead runs, oldest first; with ``take`` each is locked."""
    directory = _directory()
    found = []
    for name in sorted(os.listdir(directory) if os.path.isdir(directory) else ()):
        path = os.path.join(directory, name)
        if not name.endswith(".json") or os.path.islink(path) or not os.path.isfile(path):
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        alive = not _ofd.try_lock(fd) if take else _ofd.is_locked(fd)
        # a finished run unlinks its journal before it lets go of the lock
        if alive or os.fstat(fd).st_nlink == 0:
            os.close(fd)
            continue
        head, values, length = _load(fd)
        found.append((os.fstat(fd).st_mtime_ns, path, LeftBehind(path, head, values, fd, length)))
    return [each for _dummy, _path, each in sorted(found, key=lambda each: each[:2])]


def _directory_lock() -> contextlib.AbstractContextManager[None]:
    """Held for the moments between the birth of a journal and its lock."""
    return _locks.hold("journal", of="The directory of the journals", what="opening a journal", timeout_s=10)


def _keep(found: LeftBehind, matches: Callable[[Remains], bool]) -> bool:
    if found.is_empty:  # killed before the first line was durable: nothing had been touched
        os.unlink(found.path)
        _files.sync_directory(os.path.dirname(found.path))
    elif found.head.key and matches(found):
        return True
    found.close()
    return False


_NO_HEAD = JournalHead("", "", _locks.Holder("", "", 0, 0, ""))


def _load(fd: int) -> tuple[JournalHead, dict[str, Any], int]:
    """Head and facts of all complete lines, and their length; a torn last line was never acknowledged.

    Without a head that can be read it is nobody's, and stays.
    """
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    values: dict[str, Any] = {}
    head, length = _NO_HEAD, 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            found = _json.parse(line)
            if not length:
                head, found = _decoded(JournalHead, found["head"]), found["facts"]
            values.update(found)
        except (ValueError, TypeError, KeyError):
            return head, values, length or len(line)
        length += len(line)
    return head, values, length


def _decoded(kind: Any, value: Any) -> Any:
    """The value of this type behind what JSON has made of it. Raises TypeError or ValueError where it is none."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Union:  # of something and None
        return None if value is None else _decoded(inner[0], value)
    if dataclasses.is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
        unknown = _of(dict, value).keys() - kinds.keys()
        if unknown:
            raise TypeError(f"unknown: {', '.join(sorted(unknown))}")
        return kind(**{name: _decoded(kinds[name], each) for name, each in value.items()})  # type: ignore[operator]
    if origin is tuple:
        kinds_of_items = inner if inner[-1] is not Ellipsis else inner[:1] * len(_of(list, value))
        if len(kinds_of_items) != len(_of(list, value)):
            raise TypeError(f"{value!r} has not {len(kinds_of_items)} items")
        return tuple(_decoded(each_kind, each) for each_kind, each in zip(kinds_of_items, value))
    if origin is collections.abc.Mapping:
        return {name: _decoded(inner[1], each) for name, each in _of(dict, value).items()}
    if issubclass(kind, enum.Enum):
        return kind(value)
    return _of(kind, value)


def _of(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _directory() -> str:
    return os.path.join(_paths.state_dir(), "journal")
