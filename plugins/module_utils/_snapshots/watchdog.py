# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""A process of its own that thaws the guest when the worker, or libvirtd under it, dies while the guest is frozen.

It is a fresh interpreter in its own session: no lock, journal or connection of the worker lives on in it, and Ansible does
not wait for it. It holds one pipe: "watch" on it is the beginning; "done", or nothing to thaw after its end, and the watchdog
ends too.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from types import TracebackType

from ansible_collections.kvmops.backup.plugins.module_utils import _locks
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import agent, connection

LOOK_S = 0.5
LOCK_TIMEOUT_S = 15.0
START_TIMEOUT_S = 30.0
# a libvirtd that outlives the worker may still be about to freeze
QUIET_S = 2.0
# counted from libvirtd's first answer: an agent that says nothing for so long has gone with its guest
GIVE_UP_S = 300.0
_WATCH, _DONE = b"watch\n", b"done\n"


class Watchdog:
    """``with Watchdog(uri, uuid):`` around what freezes the guest; it is at work when the block begins.

    Its process starts at once and does nothing until then, so it can be made before the last checks. `close` it if the block may
    never begin.
    """

    def __init__(self, uri: str, uuid: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, uri, uuid],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            cwd="/",
            start_new_session=True,
        )

    def __enter__(self) -> Watchdog:
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        if stdin is None or stdout is None or stderr is None:
            raise AssertionError("all three are pipes")
        with contextlib.suppress(BrokenPipeError):  # it has ended, and has said why
            stdin.write(_WATCH)
        if not select.select([stdout], [], [], START_TIMEOUT_S)[0]:
            self._process.kill()
        if stdout.readline() != b"ready\n":
            raise KvmopsError("The watchdog that thaws the guest", self._failure(), "Nothing was frozen; run it again.")
        stdout.close()
        stderr.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._process.stdin:
            # leave the thawing to it: it looks whether there is anything to do
            self._process.stdin.close()

    def _failure(self) -> str:
        """Why it ended, as far as it said so."""
        reason = self._process.communicate(_DONE)[1].decode(errors="replace").strip().rpartition("\n")[2]
        return f"it did not start: {reason}" if reason else f"it did not start within {START_TIMEOUT_S:.0f} s"

    def close(self) -> None:
        """The guest is known to be thawed, or was never frozen. Nothing where the thawing was left to the process."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.communicate(_DONE)


def watch(uri: str, uuid: str, pipe: int) -> None:
    """Look after one guest from "watch" until "done" on the pipe; thaw it when the other end or libvirtd is gone."""
    if os.read(pipe, len(_WATCH)) != _WATCH:
        return
    # two of them never overlap: the one of a dead run must not thaw what a new run has frozen
    with _locks.hold(
        f"thaw-{uuid}", of=f"The VM {uuid}", what="watching over a frozen guest", timeout_s=LOCK_TIMEOUT_S
    ):
        domain = connection.find_domain(connection.connect(uri), uuid)
        os.write(1, b"ready\n")
        devnull = os.open(os.devnull, os.O_RDWR)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        if not _is_done(domain, pipe):
            _thaw(uri, uuid)


def _is_done(domain: connection.Domain, pipe: int) -> bool:
    """Wait for "done"; False when the worker or libvirtd is gone first."""
    while True:
        if select.select([pipe], [], [], LOOK_S)[0]:
            return os.read(pipe, 16).startswith(_DONE)
        try:
            domain.isActive()
        except connection.libvirt.libvirtError:
            return False


def _thaw(uri: str, uuid: str) -> None:
    """Reconnect until libvirtd answers, thaw if frozen, until the guest has been seen thawed for QUIET_S."""
    give_up = thawed_since = None
    while give_up is None or time.monotonic() < give_up:
        try:
            domain = connection.find_domain(connection.connect(uri), uuid)
            give_up = give_up or time.monotonic() + GIVE_UP_S
            if not domain.isActive():
                return
            frozen = agent.freeze_status(domain, timeout_s=2)
            if frozen:
                agent.thaw(domain)
            thawed_since = None if frozen is None else thawed_since or time.monotonic()
            if thawed_since and time.monotonic() - thawed_since > QUIET_S:
                return
        except (KvmopsError, connection.libvirt.libvirtError):
            thawed_since = None
        time.sleep(LOOK_S)


if __name__ == "__main__":
    watch(sys.argv[1], sys.argv[2], 0)
