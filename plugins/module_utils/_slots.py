# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""How many backups are at work on one target at once, over all processes and all hosts that share it.

One hidden file in the target: byte 0 is the gate, held while somebody counts; every backup at work locks one of the bytes
behind it. The locks are the kernel's (OFD): those of a dead process are free at once. The file goes with the last backup.
Each backup says there how much it will write, so that two do not reckon with the same free space.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _json, _locks, _ofd, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import BusyError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context

NAME = ".kvmops-backup-slots"
POLL_S = 0.5
_GATE_POLL_S = 0.02
_GATE_TIMEOUT_S = 30.0
_RECORD_BYTES = 2048  # slot i is told at i * 2048, and locked at byte i
_MOST_SLOTS = 1000
# What these tell a client to do with locks never reaches the server, or the server forgets it.
_LOCAL_LOCKS = frozenset({"9p", "virtiofs", "fuse.sshfs"})


class _NotOursError(OSError):
    """The file of slots is none that a backup has made: others may be able to write to the directory."""


def why_not_shared(fs_type: str, options: frozenset[str]) -> str:
    """Why other hosts do not see the locks of a file system; "" where they do or where there are no others. Pure."""
    if fs_type in _LOCAL_LOCKS:
        return f"{fs_type} does not pass locks on to the server"
    switches = {"nfs": ("nolock", "local_lock=all", "local_lock=posix"), "cifs": ("nobrl",)}
    switches["nfs4"], switches["smb3"] = switches["nfs"], switches["cifs"]
    found = sorted(options.intersection(switches.get(fs_type, ())))
    return f"it is mounted with {found[0]}" if found else ""


@dataclass(frozen=True)
class _Record:
    """What a backup at work tells the others: who it is, how much it is about to write, and into which file of the directory.

    `claimed_bytes` of blocks will be added to the file `name` ("": it is not there yet), which had `had_bytes` before.
    """

    who: str
    claimed_bytes: int = 0
    name: str = ""
    had_bytes: int = 0

    def outstanding_bytes(self, directory: str) -> int:
        """What of the claim is not written yet; nothing where the file is gone, as it is when it has got its final name."""
        if not self.name:
            return self.claimed_bytes
        try:
            written = _blocks(os.path.join(directory, self.name)) - self.had_bytes
        except OSError:
            return 0
        return max(0, self.claimed_bytes - max(0, written))


class Slot:
    """One backup at work in a directory, among the others."""

    def __init__(self, fd: int, directory: str, number: int, who: str) -> None:
        self._fd, self._directory, self._number, self._record = fd, directory, number, _Record(who)

    def claim(self, wanted_bytes: int) -> None:
        """Tells the others how many bytes of blocks this backup is about to write. Do it before you ask what is free."""
        self._tell(_Record(self._record.who, wanted_bytes))

    def writes(self, path: str) -> None:
        """Tells the others which file of the directory, which is there by now, grows by that."""
        with contextlib.suppress(OSError):
            self._tell(_Record(self._record.who, self._record.claimed_bytes, os.path.basename(path), _blocks(path)))

    def others_bytes(self) -> int:
        """What the others at work here will still write."""
        with _gate(self._fd):
            records = [_read(self._fd, slot) for slot in _busy(self._fd) if slot != self._number]
        return sum(each.outstanding_bytes(self._directory) for each in records)

    def _tell(self, record: _Record) -> None:
        """No reason to fail: without it the others reckon with too much, and find out when they write."""
        self._record = record
        with contextlib.suppress(OSError, BusyError), _gate(self._fd):
            # The release of the gate is what makes clients of a network file system pass the record on.
            _write(self._fd, self._number, record)


@contextlib.contextmanager
def hold(directory: str, limit: int, *, what: str, timeout_s: float, context: Context) -> Iterator[Slot]:
    """Counts as a backup at work in `directory` while the block runs; before that waits until fewer than `limit` are (0: never).

    `what` is shown to those who wait. Raises BusyError after `timeout_s`, naming who is at work.
    """
    who = str(_locks.Holder.myself(what))
    deadline = time.monotonic() + timeout_s
    fd, path = _place(directory, limit, context)
    slot = 0
    try:
        while not slot:
            fd = _through_gate(fd, path, context)
            try:
                busy = _busy(fd)
                if not limit or len(busy) < limit:
                    slot = _take(fd, busy, who)
            finally:
                _ofd.unlock(fd, 0, 1)
            if not slot:
                _wait(fd, directory, busy, limit, deadline, context)
        yield Slot(fd, directory, slot, who)
    finally:
        _leave(fd, path, slot)


def _place(directory: str, limit: int, context: Context) -> tuple[int, str]:
    """The file with the slots, opened: in the directory, or on this host where that cannot be."""
    path = os.path.join(directory, NAME)
    not_shared = why_not_shared(*_mount(directory))
    try:
        fd = _open(path)
        try:
            _ofd.is_locked(fd, 0, 1)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        not_shared = error.strerror or str(error)
        if isinstance(error, _NotOursError):
            text = f"{path} is not used to count backups at work, as {not_shared}. Remove it."
            context.warn(Notice(Code.ONE_HOST_ONLY, text))
        status = os.stat(directory)
        locks = os.path.join(_paths.state_dir(), "locks")
        os.makedirs(locks, mode=0o700, exist_ok=True)
        path = os.path.join(locks, f"slots-{status.st_dev:x}-{status.st_ino:x}")
        fd = _open(path)
    if not_shared and limit:
        text = f"max_parallel counts the backups of this host only: no locks can be shared in {directory} ({not_shared})"
        context.warn(Notice(Code.ONE_HOST_ONLY, text))
    return fd, path


def _mount(directory: str) -> tuple[str, frozenset[str]]:
    """File system type and mount options of a directory; see proc(5), mountinfo."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _dummy, right = line.rstrip("\n").partition(" - ")
            fields, tail = left.split(" "), right.split(" ")
            if fields[2] == wanted:
                return tail[0], frozenset(f"{fields[5]},{tail[-1]}".split(","))
    return "", frozenset()


def _open(path: str) -> int:
    """The file, made if need be. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        why = _why_not_ours(os.fstat(fd), path)
        if why:
            raise _NotOursError(errno.EINVAL, why, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _why_not_ours(status: os.stat_result, path: str) -> str:
    if not stat.S_ISREG(status.st_mode):
        return "it is no regular file"
    if status.st_nlink > 1:
        return "it has another name, too"
    if status.st_size > (_MOST_SLOTS + 1) * _RECORD_BYTES:
        return "it is larger than it can be"
    if status.st_uid not in (0, os.geteuid()) and status.st_uid != _maker(path):
        return f"it belongs to the user {status.st_uid}"
    return ""


def _maker(path: str) -> int:
    """Whose the files are that this process makes there: on NFS with root_squash somebody else's than its own."""
    probe = f"{path}-{secrets.token_hex(8)}"
    fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        return os.fstat(fd).st_uid
    finally:
        os.close(fd)
        os.unlink(probe)


def _through_gate(fd: int, path: str, context: Context) -> int:
    """Holds the gate of the file that has the name now; the descriptor to go on with."""
    deadline = time.monotonic() + _GATE_TIMEOUT_S
    while True:
        if not _ofd.try_lock(fd, 0, 1):
            if time.monotonic() >= deadline:
                raise BusyError(
                    f"The file {path}", "its gate has been held for too long", "Look for a stopped process."
                )
            context.progress.check()
            time.sleep(_GATE_POLL_S)
            continue
        try:
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                return fd
        except FileNotFoundError:
            pass
        gone, fd = fd, _open(path)  # the last one before us has removed it meanwhile
        os.close(gone)


def _busy(fd: int) -> list[int]:
    """The slots that are held; the file reaches over all that ever were."""
    return [slot for slot in range(1, os.fstat(fd).st_size // _RECORD_BYTES) if _ofd.is_locked(fd, slot, 1)]


def _take(fd: int, busy: list[int], who: str) -> int:
    slot = next(each for each in range(1, len(busy) + 2) if each not in busy)
    if slot > _MOST_SLOTS:
        raise BusyError(
            "The directory of the backup", f"{len(busy)} backups are at work there", "Wait until some have finished."
        )
    _ofd.try_lock(fd, slot, 1)
    os.ftruncate(fd, max(os.fstat(fd).st_size, (slot + 1) * _RECORD_BYTES))  # a hole: needs no space
    _write(fd, slot, _Record(who))
    return slot


def _write(fd: int, slot: int, record: _Record) -> None:
    text = json.dumps([record.claimed_bytes, record.had_bytes, record.name, record.who[:300]], ensure_ascii=False)
    with contextlib.suppress(OSError):  # it is only told: no reason to fail where there is no room
        os.pwrite(
            fd,
            text.encode("utf-8", "surrogateescape")[:_RECORD_BYTES].ljust(_RECORD_BYTES, b"\0"),
            slot * _RECORD_BYTES,
        )


def _read(fd: int, slot: int) -> _Record:
    """What somebody has written there; no claim where that cannot be understood."""
    text = os.pread(fd, _RECORD_BYTES, slot * _RECORD_BYTES).rstrip(b"\0").decode("utf-8", "replace")
    try:
        claimed, had, name, who = _json.parse(text)
        record = _Record(str(who), _json.whole(claimed), os.path.basename(str(name)), _json.whole(had))
    except (ValueError, TypeError):
        return _Record("")
    makes_sense = min(record.claimed_bytes, record.had_bytes) >= 0 and "\0" not in record.name
    return record if makes_sense else _Record(record.who)


def _blocks(path: str) -> int:
    return os.stat(path).st_blocks * 512


@contextlib.contextmanager
def _gate(fd: int) -> Iterator[None]:
    """The gate for who has a slot already, so that the file is not removed."""
    deadline = time.monotonic() + _GATE_TIMEOUT_S
    while not _ofd.try_lock(fd, 0, 1):
        if time.monotonic() >= deadline:
            raise BusyError(
                "The count of backups at work", "its gate has been held for too long", "Look for a stopped process."
            )
        time.sleep(_GATE_POLL_S)
    try:
        yield
    finally:
        _ofd.unlock(fd, 0, 1)


def _wait(fd: int, directory: str, busy: list[int], limit: int, deadline: float, context: Context) -> None:
    if time.monotonic() >= deadline:
        told = (_read(fd, slot).who for slot in busy)
        raise BusyError(
            f"The directory {directory}",
            f"{len(busy)} backups are at work there and max_parallel is {limit}: {'; '.join(filter(None, told))}",
            "Wait until one has finished, or give more wait_timeout.",
        )
    context.progress.phase(f"wait for a slot ({len(busy)} at work, max_parallel {limit})")
    time.sleep(POLL_S)


def _leave(fd: int, path: str, slot: int) -> None:
    """Gives the slot back; the last one takes the file along. A file system that has gone away has forgotten it."""
    with contextlib.suppress(OSError):
        try:
            if slot:
                _ofd.unlock(fd, slot, 1)
            if _ofd.try_lock(fd, 0, 1) and not _busy(fd) and os.path.samestat(os.stat(path), os.fstat(fd)):
                os.unlink(path)
        finally:
            os.close(fd)
