# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The worker SIGKILLed before every step of a snapshot's life, and inside the freeze (S1, S27, issue 2 number 7)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.watchdog import Watchdog
from ansible_collections.kvmops.backup.tests.integration.targets.vm_recovery import cycle
from ansible_collections.kvmops.backup.tests.integration.targets.vm_recovery.cycle import Before, Cycle
from ansible_collections.kvmops.backup.tests.lab import daemons
from ansible_collections.kvmops.backup.tests.lab._run import wait_for

THAW_LIMIT_S = 10


def worker(vm, mode, kill_at):
    """cycle.py as a process of its own."""
    program = str(Path(cycle.__file__))
    return subprocess.Popen(
        [sys.executable, program, vm.name, mode, str(kill_at)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def number_of_events(vm, mode):
    done = worker(vm, mode, 0)
    out, error = done.communicate(timeout=300)
    assert done.returncode == 0, error
    return int(out)


@pytest.mark.parametrize("mode", ["agent", "memory"])
def test_before_every_step(two, mode):
    before = Before(two)
    events = number_of_events(two, mode)
    assert events > 12  # the hooks are where they should be
    for kill_at in range(1, events + 1):
        killed = worker(two, mode, kill_at)
        _out, error = killed.communicate(timeout=300)
        assert killed.returncode == -signal.SIGKILL, error
        cycle.thawed_within(two, THAW_LIMIT_S)
        print(f"killed before event {kill_at} of {events}; settled: {cycle.settle(two)}")
        before.same()
    cycle.assert_writing(two)
    Cycle(two, mode).whole()
    before.same()


def test_inside_the_steps(two, request):
    """At random moments, libvirt being at work on what the dead worker has asked for."""
    before = Before(two)
    seed = request.config.getoption("--seed")
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _dummy in range(8):
        victim = worker(two, "agent", 0)
        time.sleep(chance.uniform(0.3, 2.5))
        victim.kill()
        victim.communicate()
        cycle.thawed_within(two, THAW_LIMIT_S)
        print(f"settled: {cycle.settle(two)}")
        before.same()
    cycle.assert_writing(two)


def frozen_by_a_child(vm):
    """A process that freezes the guest under a watchdog and then hangs; its pid, the guest being frozen."""
    ready, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with Watchdog(daemons.URI, vm.domain.UUIDString()):
            vm.domain.fsFreeze()
            os.write(ready_write, b"x")
            signal.pause()
    os.close(ready_write)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    assert vm.agent.freeze_status() == "frozen"
    return pid


def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def watchdogs(vm):
    done = subprocess.run(
        ["pgrep", "-f", f"_snapshots.watchdog.*{vm.domain.UUIDString()}"], capture_output=True, check=False
    )
    return done.stdout.split()


def test_watchdog_thaws_when_the_worker_dies(two):
    pid = frozen_by_a_child(two)
    end(pid)
    print(f"thawed after {cycle.thawed_within(two, THAW_LIMIT_S):.2f} s")
    wait_for("the watchdog to end", lambda: not watchdogs(two), 120)
    cycle.assert_writing(two)


def test_watchdog_thaws_when_libvirtd_dies(two):
    pid = frozen_by_a_child(two)
    daemons.kill()
    time.sleep(1)  # libvirtd stays away for a while
    daemons.start()
    print(f"thawed {cycle.thawed_within(two, THAW_LIMIT_S):.2f} s after libvirtd answered")
    end(pid)
    wait_for("the watchdog to end", lambda: not watchdogs(two), 120)


def test_watchdog_thaws_when_both_die(two):
    pid = frozen_by_a_child(two)
    daemons.kill()
    end(pid)
    daemons.start()
    print(f"thawed {cycle.thawed_within(two, THAW_LIMIT_S):.2f} s after libvirtd answered")
    wait_for("the watchdog to end", lambda: not watchdogs(two), 120)
    cycle.assert_writing(two)


def test_watchdog_goes_without_a_word_when_all_is_well(two):
    with Watchdog(daemons.URI, two.domain.UUIDString()):
        assert watchdogs(two)
    assert not watchdogs(two)


def test_disks_are_clean_after_all_that(two, lab):
    cycle.assert_clean_after_shutdown(two, lab.path("raw"))
