# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""File systems that lack what local ones have: sshfs to a server on this host, and bindfs, which can also go away."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._run import run, wait_for

_SFTP_SERVER = "/usr/lib/openssh/sftp-server"


@contextmanager
def bindfs(far: Path, near: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """``far`` seen at ``near``, without renames that do not replace. Kill the process, and the file system is gone."""
    with subprocess.Popen(["bindfs", "-f", *options, str(far), str(near)]) as process, _mounted(near, process):
        yield process


@contextmanager
def sshfs(far: Path, near: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """``far`` seen at ``near`` through SFTP: hard links have inodes of their own; ``disable_hardlink``: there are none."""
    ours, theirs = socket.socketpair()
    command = ["sshfs", f":{far}", str(near), "-f", "-o", ",".join(("passive", "allow_other", *options))]
    with ours, theirs, subprocess.Popen([_SFTP_SERVER], stdin=ours.fileno(), stdout=ours.fileno()) as server:
        try:
            with subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno()) as process, _mounted(near, process):
                yield process
        finally:
            server.terminate()


@contextmanager
def _mounted(near: Path, process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        wait_for(f"{near} to be mounted", lambda: os.path.ismount(near) or process.poll() is not None, 60)
        yield
    finally:
        run("umount", "--lazy", str(near), ok=(0, 1, 32))  # also one that has gone away
        process.terminate()
        process.wait(60)
