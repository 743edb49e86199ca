# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirtd SIGKILLed at a certain moment that it comes to by itself: it waits there, so nothing is a matter of time."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import daemons
from ._run import wait_for

TIMEOUT_S = 180


@contextmanager
def killed_before_cpus_of(name: str) -> Iterator[None]:
    """libvirtd gets SIGKILL when it has noted that the VM's QEMU runs, and not yet started the CPUs; restarts it at first."""
    daemons.stop()
    hook = Path("/etc/libvirt/hooks/qemu")
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"""#!/bin/sh\n[ "$1 $2" != {shlex.quote(name + " started")} ] || kill -KILL "$PPID"\n""")
    hook.chmod(0o755)
    try:
        daemons.start()
        yield
    finally:
        hook.unlink()


@contextmanager
def killed_in_writing(path: str) -> Iterator[None]:
    """libvirtd gets SIGKILL when it writes PATH.new, which shall become that file: there is a pipe of that name, and it is full."""
    pipe = Path(f"{path}.new")
    os.mkfifo(pipe)
    fd = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(fd, bytes(4096))

    def end() -> None:
        wait_for(f"libvirtd to write {pipe}", lambda: _has_open(str(pipe)), TIMEOUT_S, every_s=0.01)
        daemons.kill()

    killer = threading.Thread(target=end)
    killer.start()
    try:
        yield
    finally:
        killer.join()
        os.close(fd)
        pipe.unlink()


def _has_open(path: str) -> bool:
    files = Path(f"/proc/{daemons.libvirtd_pid()}/fd")
    for each in files.iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(each) == path:
                return True
    return False
