# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Restarting the daemon: a shell script of its name stands for it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import daemon

SCRIPT = """#!/bin/sh
case "$*" in *-d*) test -n "$MARK" || exit 3; setsid "$0" --listen </dev/null >/dev/null 2>&1 & exit 0 ;; esac
echo $$ > {run}/libvirtd.pid
trap 'exit 0' TERM
while :; do sleep 0.05; done
"""


def pid_once_running(run, other_than=0):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with suppress(OSError, ValueError):
            pid = int((run / "libvirtd.pid").read_text())
            if pid != other_than and daemon._pid_of("libvirtd") == pid:
                return pid
        time.sleep(0.02)
    raise AssertionError("it does not run")


@pytest.fixture
def run(tmp_path, monkeypatch):
    script = tmp_path / "libvirtd"
    script.write_text(SCRIPT.format(run=tmp_path))
    script.chmod(0o755)
    monkeypatch.setattr(daemon, "_RUN", str(tmp_path))
    monkeypatch.setattr(daemon, "_SUPERVISED_S", 0.3)
    yield tmp_path
    with suppress(OSError, ValueError):
        os.kill(int((tmp_path / "libvirtd.pid").read_text()), signal.SIGKILL)


class Answering:
    def close(self):
        """Of a connection."""


def test_started_again_as_it_was(run, monkeypatch):
    monkeypatch.setattr(daemon, "connect", lambda _uri: Answering())
    with subprocess.Popen([run / "libvirtd", "--listen"], env={**os.environ, "MARK": "kept"}) as first:
        pid = pid_once_running(run)
        found = daemon.find("qemu:///system")
        assert (found.name, found.pid, found.unit) == ("libvirtd", pid, "")
        assert found.command[-1] == "--listen" and ("MARK", "kept") in found.environment
        found.restart()
    assert first.returncode == 0
    again = pid_once_running(run, other_than=pid)
    assert "MARK=kept" in daemon._strings(again, "environ")


def test_one_that_does_not_come_back_is_an_error(run, monkeypatch):
    monkeypatch.setattr(daemon, "connect", lambda _uri: Answering())
    with subprocess.Popen([run / "libvirtd"], env={**os.environ, "MARK": ""}):
        pid_once_running(run)
        with pytest.raises(KvmopsError, match="does not start again"):
            daemon.find("qemu:///system").restart()


def test_systemd_restarts_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "connect", lambda _uri: Answering())
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    daemon.Daemon("libvirtd", 17, "libvirtd.service", ("libvirtd",), ()).restart()
    assert (tmp_path / "asked").read_text() == "restart libvirtd.service\n"


def test_refused(run):
    with pytest.raises(KvmopsError, match="neither of virtqemud, libvirtd"):
        daemon.find("qemu:///system")
    with pytest.raises(KvmopsError, match="only that of qemu:///system"):
        daemon.find("qemu:///session")
