# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirtd and virtlogd, started without systemd. Killing them is allowed in a private environment only (see enter)."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import libvirt

from ._run import LabError, run, wait_for

_PRIVATE_MARK = Path("/run/kvmops-lab")
URI = "qemu:///system"


def is_private() -> bool:
    """Whether this process runs in an environment made by ``enter``."""
    return _PRIVATE_MARK.is_dir()


def _pid(daemon: str) -> int | None:
    """Process id of a running daemon, from its pid file."""
    try:
        pid = int(Path(f"/run/{daemon}.pid").read_text())
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None
    return pid if name == daemon else None


def libvirtd_pid() -> int | None:
    """Process id of libvirtd, None when it is not running."""
    return _pid("libvirtd")


def answers() -> bool:
    """Whether libvirt answers on the system URI."""
    try:
        libvirt.open(URI).close()
    except libvirt.libvirtError:
        return False
    return True


def start(timeout_s: float = 180) -> None:
    """Starts what is not running and waits until libvirt answers. Does nothing when it answers already."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    if answers():
        return
    for daemon in ("virtlogd", "libvirtd"):
        if _pid(daemon) is None:
            run(daemon, "-d")
    wait_for("libvirtd to answer", answers, timeout_s)


def _end(signal_number: int) -> None:
    if not is_private():
        raise LabError("libvirtd is ended in a private environment only; run this through tests/lab/enter")
    pid = libvirtd_pid()
    if pid is None:
        raise LabError("libvirtd is not running")
    os.kill(pid, signal_number)
    wait_for(f"libvirtd (pid {pid}) to end", lambda: libvirtd_pid() != pid, timeout_s=120, every_s=0.01)


def kill() -> None:
    """SIGKILL for libvirtd; QEMU processes live on. Returns when it is gone."""
    _end(signal.SIGKILL)


@contextmanager
def killed_in_rename_to(paths: Sequence[str]) -> Iterator[None]:
    """libvirtd gets SIGKILL when it gives a file that it has written one of these names, before it has it."""
    with _renames(paths, "signal=SIGKILL"):
        yield


@contextmanager
def killed_in_rename_of(path: str, is_meant: Callable[[str], bool]) -> Iterator[None]:
    """libvirtd gets SIGKILL when it has written a new text for the file that is the one meant, before the file has it."""
    fresh = Path(f"{path}.new")
    left = threading.Event()

    def watch() -> None:
        while not left.wait(0.01):
            try:
                text = fresh.read_text()
            except FileNotFoundError:
                continue
            if is_meant(text):
                kill()
                return

    watcher = threading.Thread(target=watch)
    with _renames([path], "delay_enter=500ms"):  # time to read what is in it, on a busy host too
        watcher.start()
        try:
            yield
        finally:
            left.set()
            watcher.join()


@contextmanager
def killed_in_unlink_of(paths: Sequence[str]) -> Iterator[None]:
    """libvirtd gets SIGKILL when it removes the last of these files in one call, before it is gone."""
    with _injected(f"unlink:signal=SIGKILL:when={len(paths)}", paths):
        yield


def _renames(paths: Sequence[str], injected: str) -> AbstractContextManager[None]:
    """What strace shall inject whenever libvirtd gives a file that it has written one of these names."""
    return _injected(f"rename:{injected}", [f"{path}.new" for path in paths])  # strace sees the first name only


@contextmanager
def _injected(what: str, paths: Sequence[str]) -> Iterator[None]:
    """What strace shall inject into libvirtd's system calls on one of these files."""
    pid = libvirtd_pid()
    if pid is None or not is_private():
        raise LabError("a running libvirtd in a private environment is needed; run this through tests/lab/enter")
    filters = [argument for path in paths for argument in ("-P", path)]
    argv = ["strace", "-f", "-p", str(pid), "-o", "/dev/null", *filters, "-e", f"inject={what}"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as tracer:
        try:
            for line in tracer.stderr or ():
                if "attached" in line:
                    break
            yield
        finally:
            tracer.terminate()


def stop() -> None:
    """SIGTERM for libvirtd; QEMU processes live on. Returns when it is gone."""
    _end(signal.SIGTERM)


if __name__ == "__main__":
    start()
