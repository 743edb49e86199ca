# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""A process of its own that thaws the guest when the worker, or libvirtd under it, dies while the guest is frozen.

It is a fresh interpreter in its own session: no lock, journal or connection of the worker lives on in it, and Ansible does
not wait for it. It holds one pipe: "done" on it, or nothing to thaw after its end, and the watchdog ends too.
"""

from __future__ import annotations

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


class Watchdog:
    """``with Watchdog(uri, uuid):`` around what freezes the guest; it is at work when the block begins."""

    def __init__(self, uri: str, uuid: str) -> None:
        self._uri, self._uuid = uri, uuid
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watchdog:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self._uri, self._uuid],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        if self._process.stdout is None or not select.select([self._process.stdout], [], [], START_TIMEOUT_S)[0]:
            self._process.kill()
        if self._process.stdout is None or self._process.stdout.readline() != b"ready\n":
            self.done()
            raise KvmopsError(
                "The watchdog that thaws the guest", self._last_words(), "Nothing was frozen; run it again."
            )
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.done()
        elif self._process is not None and self._process.stdin is not None:
            # leave the thawing to it: it looks whether there is anything to do
            self._process.stdin.close()

    def _last_words(self) -> str:
        """Why it ended, as far as it said so."""
        said = self._process.stderr.read().decode(errors="replace") if self._process and self._process.stderr else ""
        reason = said.strip().rpartition("\n")[2]
        return f"it did not start: {reason}" if reason else f"it did not start within {START_TIMEOUT_S:.0f} s"

    def done(self) -> None:
        """The guest is known to be thawed."""
        if self._process is not None and self._process.stdin is not None:
            try:
                self._process.stdin.write(b"done\n")
                self._process.stdin.close()
            except BrokenPipeError:
                pass
            self._process.wait()


def watch(uri: str, uuid: str, pipe: int) -> None:
    """Look after one guest until "done" comes down the pipe; thaw it when the other end or libvirtd is gone."""
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
            return os.read(pipe, 16).startswith(b"done")
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
