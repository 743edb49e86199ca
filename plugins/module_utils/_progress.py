# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Progress of a long operation: a status file for whoever watches, and the way to ask the operation to stop.

The status file is one JSON object, replaced atomically: ``{schema, phase, vm, disk, bytes_done, bytes_total, percent,
rate_bps, eta_s, updated_at, pid}``; ``percent`` and ``eta_s`` are null where the total is unknown. It is read by the
action plugins (live progress in the play's output) and by people (``cat /run/kvmops-backup/status/*``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ansible_collections.kvmops.backup.plugins.module_utils import _paths, _text
from ansible_collections.kvmops.backup.plugins.module_utils._errors import CancelledError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice, Warn

SCHEMA = 1
# The directory that the action plugin shares with the module: `status.json`, `cancel`, `heartbeat`
# (plugins/plugin_utils/_progress_action.py); of several VMs at once see also _backup_results.
CONTROL_VARIABLE = "KVMOPS_BACKUP_CONTROL"
# Those that ask an operation to stop.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
INTERVAL_S = 0.5
# The action plugin beats every two seconds at the slowest; a lost connection that comes back in this time does no harm.
HEARTBEAT_LIMIT_S = 90.0
# The rate is that of the last seconds, so that the ETA follows a disk that becomes slower.
_RATE_WINDOW_S = 10.0


class Progress:
    """Where an operation stands; safe to be used by several threads. `Progress()` reports to nobody.

    `phase`, `advance` and `check` raise CancelledError when the cancel file exists, when the controller has not touched
    the heartbeat file for HEARTBEAT_LIMIT_S (only once it has been seen), or after `cancel()`. The files are looked at
    once in INTERVAL_S. A status file that cannot be written never stops the operation.
    """

    def __init__(
        self,
        status_path: str = "",
        vm: str = "",
        cancel_path: str = "",
        heartbeat_path: str = "",
        *,
        parent: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._status_path = status_path
        self._vm = vm
        self._cancel_path = cancel_path
        self._heartbeat_path = heartbeat_path
        self._parent = parent  # the process that has forked this one and looks after the control directory; 0: none
        self._clock = clock
        self._lock = threading.Lock()
        self.merge_bps = 0  # how many bytes a second the merges of a VM may write; 0: no limit
        self.merge_within_s = 0.0  # the limit is raised so that they end in about this time; 0: not for that
        self._phase = self._disk = ""
        self._done_bytes = self._total_bytes = 0
        self._samples: list[tuple[float, int]] = [(clock(), 0)]
        self._next_write = self._next_look = clock()
        self._heartbeat: tuple[int, float] | None = None  # mtime as last seen, and when it was first seen with it
        # Apart, so that a signal handler and a thread that looks at the files never overwrite each other.
        self._asked = self._seen = ""

    def about(self, vm: str) -> None:
        """From the next phase on it is about this VM (or archive)."""
        with self._lock:
            self._vm = vm

    def phase(self, name: str, disk: str = "", bytes_total: int = 0) -> None:
        """A new phase begins (of one disk, where one is named); written to the status file at once."""
        with self._lock:
            self._phase, self._disk, self._done_bytes, self._total_bytes = name, disk, 0, bytes_total
            self._samples = [(self._clock(), 0)]
            self._write(self._clock())
        self.check()

    def advance(self, count: int) -> None:
        """`count` more bytes of the phase are done."""
        with self._lock:
            self._done_bytes += count
            now = self._clock()
            if now >= self._next_write:
                self._write(now)
        self.check()

    def check(self) -> None:
        """Raise CancelledError if the operation shall stop."""
        with self._lock:
            now = self._clock()
            if not self._seen and now >= self._next_look:
                self._next_look = now + INTERVAL_S
                self._seen = self._look(now)
            reason = self._asked or self._seen
        if reason:
            raise CancelledError(self._vm or "The operation", f"stopped: {reason}", "Run the task again.")

    def cancel(self, reason: str) -> None:
        """The next `phase`, `advance` or `check` of any thread raises. Takes no lock: fit for a signal handler."""
        self._asked = reason

    def close(self) -> None:
        """The operation has ended: the status file goes, and the control directory of a controller that is gone."""
        with self._lock:
            if self._status_path:
                with contextlib.suppress(OSError):
                    os.unlink(self._status_path)
                self._status_path = ""
            if self._seen and self._heartbeat_path and not self._parent:
                shutil.rmtree(os.path.dirname(self._heartbeat_path), ignore_errors=True)

    def _look(self, now: float) -> str:
        if self._parent and os.getppid() != self._parent:
            return "the process that started it has ended"
        if self._cancel_path and os.path.lexists(self._cancel_path):
            return "cancelled by the controller"
        if self._heartbeat_path:
            try:
                mtime_ns = os.stat(self._heartbeat_path).st_mtime_ns
            except OSError:
                mtime_ns = -1  # not there yet, or gone with the rest of the control directory
            if self._heartbeat is None and mtime_ns < 0:
                return ""
            if self._heartbeat is None or (mtime_ns >= 0 and mtime_ns != self._heartbeat[0]):
                self._heartbeat = (mtime_ns, now)
            elif now - self._heartbeat[1] > HEARTBEAT_LIMIT_S:
                return f"no sign of life from the controller for {now - self._heartbeat[1]:.0f} s"
        return ""

    def _write(self, now: float) -> None:
        if not self._status_path:
            return
        self._next_write = now + INTERVAL_S
        self._samples.append((now, self._done_bytes))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _RATE_WINDOW_S:
            del self._samples[0]
        (then, before), total = self._samples[0], self._total_bytes
        rate = (self._done_bytes - before) / (now - then) if now > then else 0.0
        done = min(self._done_bytes, total) if total else self._done_bytes
        status = {
            "schema": SCHEMA,
            "phase": self._phase,
            "vm": self._vm,
            "disk": _text.shown(self._disk),
            "bytes_done": done,
            "bytes_total": total,
            "percent": round(100 * done / total, 1) if total else None,
            "rate_bps": int(rate),
            "eta_s": round((total - done) / rate) if total and rate > 0 else None,
            "updated_at": round(time.time(), 3),
            "pid": os.getpid(),
        }
        partial = f"{self._status_path}.{os.getpid()}"
        # A full /run is no reason to lose a backup.
        with contextlib.suppress(OSError):
            with open(partial, "w", encoding="utf-8") as stream:
                stream.write(json.dumps(status) + "\n")
            os.replace(partial, self._status_path)


@dataclass(frozen=True)
class Context:
    """What an operation needs from whoever runs it: where progress goes, and where a degraded result is told.

    ``settled``: what dead runs left and this one has put right; the task has changed something then.
    """

    progress: Progress
    warn: Warn
    settled: list[str] = field(default_factory=list)

    def put_right(self, text: str) -> None:
        """Something that a dead run left has been put right."""
        self.settled.append(text)
        self.warn(Notice(Code.PUT_RIGHT, f"left by an earlier run and put right: {text}"))


def remove_left_behind() -> None:
    """Remove the status files of processes that are no more."""
    directory = _status_directory()
    for name in os.listdir(directory):
        owner = re.search(r"-(\d+)\.json", name)
        if owner and not os.path.exists(f"/proc/{owner.group(1)}"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, name))


def _dismiss_watcher() -> None:
    """Ends the process that Ansible's async wrapper keeps beside the module, and does its only useful work here.

    It writes a line into the host's log every five seconds, for hours, to end the module after a year; at last it removes the
    directory that the module came in. The module's parent, which waits for the result, is another process of the wrapper.
    """
    parent = os.getppid()
    watcher = _parent(parent)
    command = _command(watcher)  # PYTHON …/async_wrapper.py JOB LIMIT …, to its end different from release to release
    if len(command) < 6 or os.path.basename(command[1]) != "async_wrapper.py" or command != _command(parent):
        return
    with contextlib.suppress(OSError):
        os.kill(watcher, signal.SIGTERM)
    directory = os.path.dirname(command[1])
    kept = "-preserve_tmp" in command or command[4].lower() == "true"
    if os.path.basename(directory).startswith("ansible-tmp-") and not kept:
        shutil.rmtree(directory, ignore_errors=True)


def _parent(pid: int) -> int:
    """Process id of a process's parent (proc(5), stat, field 4); 0 if there is none."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[1])
    return 0


def _command(pid: int) -> list[str]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="surrogateescape") as file:
        return file.read().rstrip("\0").split("\0")
    return []


def for_module(vm: str) -> Progress:
    """The progress of a module run on this host.

    The status file is ``<run directory>/status/<vm>-<process id>.json``. Under our action plugin a link to it, the
    cancel file and the heartbeat lie in the control directory that the plugin names in the environment.
    """
    directory = _status_directory()
    os.makedirs(directory, mode=0o700, exist_ok=True)
    remove_left_behind()
    status_path = _status_path(directory, vm)
    control = control_directory()
    if not control:
        return Progress(status_path, vm)
    _dismiss_watcher()
    os.makedirs(control, mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.symlink(status_path, os.path.join(control, "status.json"))
    # The first beat is the module's own: a controller that dies before its first look is missed as well.
    with open(os.path.join(control, "heartbeat"), "w", encoding="utf-8"):
        pass
    return Progress(status_path, vm, *_signs(control))


def for_child(vm: str, link: str, parent: int) -> Progress:
    """The progress of a process that the module `parent` has forked for one of its VMs; it stops when the module stops or ends.

    As for_module, but the link to the status file is `link` in the control directory.
    """
    status_path = _status_path(_status_directory(), vm)
    control = control_directory()
    if not control:
        return Progress(status_path, vm, parent=parent)
    with contextlib.suppress(OSError):
        os.symlink(status_path, os.path.join(control, link))
    return Progress(status_path, vm, *_signs(control), parent=parent)


def control_directory() -> str:
    """The directory that is shared with the action plugin; "" where there is none."""
    return os.path.expanduser(os.environ.get(CONTROL_VARIABLE, ""))


def _signs(control: str) -> tuple[str, str]:
    return os.path.join(control, "cancel"), os.path.join(control, "heartbeat")


def _status_directory() -> str:
    return os.path.join(_paths.run_dir(), "status")


def _status_path(directory: str, vm: str) -> str:
    name = re.sub(r"[^\w.-]", "_", vm, flags=re.ASCII).lstrip(".")[:100]
    return os.path.join(directory, f"{name or 'operation'}-{os.getpid()}.json")
