# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Several pieces of work side by side, each in a child process forked for it. What kills one child hurts no other.

The parent must have neither threads nor connections: it imports, forks, and waits. A child hands its value over in a file
without a name, so that a full disk loses none. It ends by itself when the parent is gone (_progress: `parent`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _json
from ansible_collections.kvmops.backup.plugins.module_utils._progress import STOP_SIGNALS

_WAITED_FOR = {signal.SIGCHLD, *STOP_SIGNALS}
_LOOK_S = 0.5
_TOLD_BYTES = 1000
# More at once would take as long, and every guest would stand on its snapshot for longer.
_LEAST, _FOR_EACH_CORE, _BYTES_FOR_EACH = 8, 4, 128 << 20


@dataclass(frozen=True)
class End:
    """How the work of that number ended: with a value, or without one, and why; `cancelled`: it was not begun, as asked.

    `pid`: which process it was, 0 for none.
    """

    number: int
    value: dict[str, Any] | None
    why: str = ""
    cancelled: bool = False
    pid: int = 0


@dataclass(frozen=True)
class _Child:
    number: int
    pid: int
    value_fd: int
    output_fd: int

    def close(self) -> None:
        """Of the descriptors here, not of the child's."""
        os.close(self.value_fd)
        os.close(self.output_fd)


def bearable() -> int:
    """How many children this host bears at once, by its cores and the memory that is free."""
    with open("/proc/meminfo", encoding="ascii") as file:
        free = next((int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:")), 0)
    return max(2, min(max(_LEAST, _FOR_EACH_CORE * len(os.sched_getaffinity(0))), free // _BYTES_FOR_EACH))


def side_by_side(
    count: int, work: Callable[[int], dict[str, Any]], *, at_once: int, stopped: Callable[[], str]
) -> Iterator[End]:
    """`work(number)` for each number below `count` in a child of its own, at most `at_once` at a time; yields as they end.

    A signal that asks this process to end is passed on to the children, which stop at their next step. After that, or once
    `stopped()`, asked every now and then, gives a reason, no child is begun any more; the work left ends with that reason.
    """
    waiting, children = deque(range(count)), dict[int, _Child]()
    reason = ""
    gc.freeze()  # what was imported stays shared with the children
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    try:
        while True:
            reason = reason or stopped()
            while waiting and len(children) < at_once and not reason:
                try:
                    child = _fork(waiting[0], work, mask, children)
                except OSError as error:  # too many processes or files, or too little memory, at this moment
                    if not children:
                        yield End(waiting.popleft(), None, f"no process could be started for it: {error.strerror}")
                    break
                waiting.popleft()
                children[child.pid] = child
            if not children and (reason or not waiting):
                break
            if children:
                received = signal.sigtimedwait(_WAITED_FOR, _LOOK_S)
                if received and received.si_signo in STOP_SIGNALS:
                    reason = f"signal {signal.Signals(received.si_signo).name}"
                    _signal(children, received.si_signo)
            for pid, status in _ended():
                child = children.pop(pid)
                end = _end(child, status)
                child.close()
                yield end
        for number in waiting:
            yield End(number, None, f"stopped before it began: {reason}", cancelled=True)
    finally:
        # only where whoever asked for the ends has gone
        _signal(children, signal.SIGTERM)
        for child in children.values():
            os.waitpid(child.pid, 0)
            child.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _fork(number: int, work: Callable[[int], dict[str, Any]], mask: Any, others: dict[int, _Child]) -> _Child:
    """Raises OSError."""
    value_fd = os.memfd_create("value")
    try:
        output_fd = os.memfd_create("output")
        try:
            pid = os.fork()
        except OSError:
            os.close(output_fd)
            raise
    except OSError:
        os.close(value_fd)
        raise
    child = _Child(number, pid, value_fd, output_fd)
    if not pid:
        _be_child(child, work, mask, others)
    return child


def _be_child(child: _Child, work: Callable[[int], dict[str, Any]], mask: Any, others: dict[int, _Child]) -> None:
    """Does the work and never comes back: what the parent would clean up at its end is the parent's."""
    code = 1
    try:
        null_fd = os.open(os.devnull, os.O_RDWR)
        for fd, stream in ((null_fd, 0), (child.output_fd, 1), (child.output_fd, 2)):
            os.dup2(fd, stream)
        for other in others.values():
            other.close()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        data = memoryview(json.dumps(work(child.number)).encode())
        while data:
            data = data[os.write(child.value_fd, data) :]
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)


def _signal(children: dict[int, _Child], number: int) -> None:
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _ended() -> Iterator[tuple[int, int]]:
    """Process id and status of each child that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, status


def _end(child: _Child, status: int) -> End:
    if status == 0:
        value = _json.parse(os.pread(child.value_fd, os.fstat(child.value_fd).st_size, 0).decode())
        return End(child.number, value, pid=child.pid)
    why = f"its process was ended by signal {_name(os.WTERMSIG(status))}"
    if not os.WIFSIGNALED(status):
        why = f"its process ended with code {os.WEXITSTATUS(status)}"
    size = os.fstat(child.output_fd).st_size
    said = os.pread(child.output_fd, _TOLD_BYTES, max(0, size - _TOLD_BYTES)).decode(errors="replace").strip()
    last = said.rpartition("\n")[2]
    return End(child.number, None, f"{why}, after it had said: {last}" if last else why, pid=child.pid)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return str(number)
