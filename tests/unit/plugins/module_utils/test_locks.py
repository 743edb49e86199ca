# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Locks: one holder, named; dead holders do not count; children do not keep them."""

from __future__ import annotations

import errno
import functools
import os
import signal
import subprocess
import sys

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _locks, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import BusyError, KvmopsError

hold = functools.partial(_locks.hold, of="The VM web01")


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path):
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))


def forked_holder(name):
    """A process that holds a lock until it is killed; its pid."""
    ready, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with hold(name, what="backup of VM web01"):
            os.write(ready_write, b"x")
            signal.pause()
    os.close(ready_write)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_second_holder_of_the_same_process_is_refused():
    with hold("vm-1", what="first"), pytest.raises(BusyError) as caught, hold("vm-1", what="second"):
        pass
    assert str(caught.value).startswith(f"The VM web01: it is held by first (process {os.getpid()} on")


def test_free_again_after_the_block_and_after_an_error():
    for _number in range(2):
        with pytest.raises(KeyError), hold("vm-1", what="first"):
            raise KeyError
        assert _locks.holder("vm-1") is None


def test_other_names_are_free():
    with hold("vm-1", what="first"), hold("vm-2", what="second"):
        assert _locks.holder("vm-1").what == "first"
        assert _locks.holder("vm-3") is None


def test_dead_holder_does_not_count():
    pid = forked_holder("vm-1")
    try:
        found = _locks.holder("vm-1")
        assert (found.pid, found.what) == (pid, "backup of VM web01")
        assert found.start_ticks == _locks.start_ticks(pid)
        with pytest.raises(BusyError), hold("vm-1", what="second"):
            pass
    finally:
        kill(pid)
    assert _locks.holder("vm-1") is None
    with hold("vm-1", what="second"):
        pass


def test_waits_for_the_holder():
    pid = forked_holder("vm-1")
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({pid}, 9)"])
    with hold("vm-1", what="second", timeout_s=30):
        assert _locks.holder("vm-1").pid == os.getpid()
    killer.wait()
    os.waitpid(pid, 0)


def test_whoever_waits_is_told_for_whom_and_may_give_up():
    told = []

    def give_up(who):
        told.append(who)
        if len(told) == 3:
            raise KeyError

    with hold("vm-1", what="backup of VM web01"):
        with pytest.raises(KeyError), hold("vm-1", what="second", timeout_s=3600, on_wait=give_up):
            pass
        with pytest.raises(BusyError), hold("vm-1", what="third", on_wait=told.append):  # does not wait
            pass
        assert _locks.holder("vm-1").what == "backup of VM web01"
    assert len(told) == 3
    assert all(who.startswith(f"backup of VM web01 (process {os.getpid()} on ") for who in told)
    with hold("vm-1", what="fourth", on_wait=told.append):
        assert len(told) == 3


def test_programs_started_meanwhile_do_not_keep_it():
    with hold("vm-1", what="first"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert _locks.holder("vm-1") is None
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a\0b"])
def test_names_are_plain(name):
    with pytest.raises(ValueError), hold(name, what="x"):
        pass


def test_a_state_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "locks").write_text("in the way")
    with pytest.raises(KvmopsError, match=r"state file .*/locks/vm-1.lock: .*state directory") as caught, hold("vm-1", what="w"):
        pass
    assert not isinstance(caught.value, BusyError)


def test_a_holder_that_cannot_be_written_down_holds_the_lock(monkeypatch):
    def full(_fd, data):
        if data:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_locks, "_write", full)
    with hold("vm-1", what="w"), pytest.raises(BusyError, match="has not named itself"), hold("vm-1", what="x"):
        pass
