# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The daemon behind a connection, and how it is restarted politely; running VMs do not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import connect

_SYSTEM = "qemu:///system"
_NAMES = ("virtqemud", "libvirtd")  # a host with both has the modular one in use
_RUN = "/run"
_END_S = 60.0
_SUPERVISED_S = 3.0
_ANSWER_S = 60.0


@dataclass(frozen=True)
class Daemon:
    """A running daemon: its process, and how it was started. ``unit`` is systemd's, "" without systemd."""

    name: str
    pid: int
    unit: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]

    def restart(self) -> None:
        """End it and start it again; returns when the new one answers. Raises KvmopsError when it does not."""
        if self.unit:
            _systemctl("restart", self.unit)
        else:
            os.kill(self.pid, signal.SIGTERM)
            self._wait_for_end()
            if not self._is_back():
                self._start()
        end = time.monotonic() + _ANSWER_S
        while True:
            try:
                connect(_SYSTEM).close()
                return
            except KvmopsError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.1)

    def _wait_for_end(self) -> None:
        end = time.monotonic() + _END_S
        while _program_of(self.pid) == self.name:
            if time.monotonic() > end:
                raise KvmopsError(
                    self.name, f"process {self.pid} does not end", f"Restart {self.name} and run the task again."
                )
            time.sleep(0.05)

    def _is_back(self) -> bool:
        """Whether somebody else, a supervisor, starts it again."""
        end = time.monotonic() + _SUPERVISED_S
        while time.monotonic() < end:
            if _pid_of(self.name):
                return True
            time.sleep(0.1)
        return False

    def _start(self) -> None:
        daemonize = () if {"-d", "--daemon"} & set(self.command) else ("-d",)
        done = subprocess.run(
            [*self.command, *daemonize],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=dict(self.environment),
            timeout=_END_S,
            check=False,
        )
        if done.returncode:
            raise KvmopsError(
                self.name,
                f"it does not start again: {done.stderr.decode(errors='replace').strip()}",
                "Start it by hand.",
            )


def find(uri: str) -> Daemon:
    """The daemon of the host's VMs. Raises KvmopsError when it cannot be found or is not ours to restart."""
    if uri != _SYSTEM:
        raise KvmopsError(f"The daemon of {uri}", f"only that of {_SYSTEM} can be restarted from here")
    name = next((name for name in _NAMES if _pid_of(name)), "")
    if not name:
        raise KvmopsError(f"The daemon of {uri}", f"neither of {', '.join(_NAMES)} has a pid file in {_RUN}")
    pid = _pid_of(name)
    if pid == 1:
        raise KvmopsError(name, "it is process 1 here: a restart would end everything")
    unit = _unit_of(pid) if os.path.isdir("/run/systemd/system") else ""
    return Daemon(name, pid, unit, _strings(pid, "cmdline"), _pairs(_strings(pid, "environ")))


def _pid_of(name: str) -> int:
    """Process id of a running daemon, from its pid file; 0 if it does not run."""
    with suppress(OSError, ValueError):
        with open(os.path.join(_RUN, f"{name}.pid"), encoding="ascii") as file:
            pid = int(file.read())
        return pid if _program_of(pid) == name else 0
    return 0


def _program_of(pid: int) -> str:
    """What a living process runs, "" for one that has ended."""
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        program, state = file.read().split("(", 1)[1].rsplit(")", 1)
        # one that has ended may wait long for a parent that asks about it
        return "" if state.startswith(" Z") else program
    return ""


def _unit_of(pid: int) -> str:
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
        units = [part for part in file.read().replace("\n", "/").split("/") if part.endswith(".service")]
    return units[-1] if units else ""


def _strings(pid: int, name: str) -> tuple[str, ...]:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return tuple(os.fsdecode(part) for part in file.read().split(b"\0") if part)


def _pairs(variables: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    split = [variable.partition("=") for variable in variables]
    return tuple((name, value) for name, _dummy, value in split)


def _systemctl(verb: str, unit: str) -> None:
    done = subprocess.run(
        ["systemctl", verb, unit], stdin=subprocess.DEVNULL, capture_output=True, timeout=2 * _END_S, check=False
    )
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip()
        raise KvmopsError(unit, f"systemctl {verb} failed: {why}", f"Look at: journalctl -u {unit}")
