# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Who is at work on what: kernel locks with an owner record.

The locks are OFD write locks (`_ofd`): no clock and no pid decides whether a holder lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _json, _ofd, _paths, _state_file
from ansible_collections.kvmops.backup.plugins.module_utils._errors import BusyError

POLL_S = 0.1
_UNNAMED = "a process that has not named itself"


@dataclass(frozen=True)
class Holder:
    """A process that works on something; ``start_ticks`` tells it from a later one with the same pid."""

    host: str
    boot_id: str
    pid: int
    start_ticks: int
    what: str

    @classmethod
    def myself(cls, what: str) -> Holder:
        """This process, doing ``what``."""
        return cls(socket.gethostname(), boot_id(), os.getpid(), start_ticks(os.getpid()), what)

    def __str__(self) -> str:
        return f"{self.what} (process {self.pid} on {self.host})"


def boot_id() -> str:
    """The kernel's random name of this boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks after boot (proc(5), field 22); 0 if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def of_vm(uuid: str) -> str:
    """The name of the lock of a VM."""
    return f"vm-{uuid}"


@contextlib.contextmanager
def hold(
    name: str,
    *,
    of: str,
    what: str,
    timeout_s: float = 0,
    on_wait: Callable[[str], None] | None = None,
    transient: bool = False,
) -> Iterator[None]:
    """Hold the lock ``name`` (a plain file name) of this host while the block runs.

    ``of`` is the object that an error names; ``what`` is shown to whoever finds it taken.
    Waits up to ``timeout_s`` seconds; then raises BusyError with the holder. Raises KvmopsError where no file can be made.
    ``on_wait`` is told the holder every POLL_S seconds meanwhile; what it raises ends the wait.
    ``transient``: the lock's file goes with the lock, for names that are used a few times only. Always or never for one name.
    """
    path = _path(name)
    deadline = time.monotonic() + timeout_s
    fd = _open_locked(of, path, deadline, on_wait)
    try:
        with contextlib.suppress(OSError):  # no space: it is a lock all the same, of a holder without a name
            _write(fd, json.dumps(asdict(Holder.myself(what))).encode())
        try:
            yield
        finally:
            if transient:
                os.unlink(path)
            else:
                _write(fd, b"")
    finally:
        os.close(fd)


def _open_locked(of: str, path: str, deadline: float, on_wait: Callable[[str], None] | None) -> int:
    """Descriptor of the lock's file, locked. Raises BusyError after ``deadline``."""
    while True:
        fd = _create(path)
        try:
            while not _ofd.try_lock(fd):
                who = str(_owner(fd) or _UNNAMED)
                if time.monotonic() >= deadline:
                    raise BusyError(
                        of,
                        f"it is held by {who}",
                        "Wait until it has finished, or end that process: its lock goes with it.",
                    )
                if on_wait:
                    on_wait(who)
                time.sleep(POLL_S)
        except BaseException:
            os.close(fd)
            raise
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # the holder before us has removed it meanwhile: another one has its name


def _create(path: str) -> int:
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _state_file.unwritable(path, error) from error


def holder(name: str) -> Holder | None:
    """Who holds the lock ``name`` now; None when it is free. Takes nothing and creates nothing."""
    try:
        fd = os.open(_path(name), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        if not _ofd.is_locked(fd):
            return None
        return _owner(fd) or Holder("unknown", "", 0, 0, _UNNAMED)
    finally:
        os.close(fd)


def _path(name: str) -> str:
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise ValueError(f"not a lock name: {name!r}")
    return os.path.join(_paths.state_dir(), "locks", f"{name}.lock")


def _write(fd: int, data: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


def _owner(fd: int) -> Holder | None:
    try:
        return Holder(**_json.parse(os.pread(fd, 4096, 0)))
    except (ValueError, TypeError):
        return None
