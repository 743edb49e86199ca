# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirtd SIGKILLed inside a snapshot and inside a merge (S4b, issue 2 number 7)."""

from __future__ import annotations

import time

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import blockjobs, snapshots
from ansible_collections.kvmops.backup.tests.integration.targets.vm_recovery import cycle
from ansible_collections.kvmops.backup.tests.integration.targets.vm_recovery.cycle import Before, Cycle
from ansible_collections.kvmops.backup.tests.lab import daemons
from ansible_collections.kvmops.backup.tests.lab._run import wait_for

THAW_LIMIT_S = 10


def duration_s(vm, mode, function):
    """How long a call takes at least when nobody is killed."""
    module, name = function
    original = getattr(module, name)
    taken = []

    def timed(*arguments, **named):
        begin = time.monotonic()
        result = original(*arguments, **named)
        taken.append(time.monotonic() - begin)
        return result

    setattr(module, name, timed)
    try:
        for _dummy in range(3):
            Cycle(vm, mode).whole()
    finally:
        setattr(module, name, original)
    return min(taken)


@pytest.mark.parametrize("mode", ["agent", "crash"])
def test_inside_the_snapshot(two, moments, mode):
    function = (snapshots, "create")
    before = Before(two)
    limit_s = 1.2 * duration_s(two, mode, function)
    slowest_s = 0.0
    for delay_s in moments(limit_s):
        run = Cycle(two, mode)
        error = cycle.killed_libvirtd(run, run.take, function, delay_s)
        daemons.start()
        slowest_s = max(slowest_s, cycle.thawed_within(two, THAW_LIMIT_S))
        print(f"killed after {delay_s:.3f} s: {error}; settled: {cycle.settle(two)}")
        before.same()
        cycle.assert_writing(two)
        Cycle(two, mode).whole()
        before.same()
    print(f"{mode}: snapshot takes {limit_s / 1.2:.2f} s; thawed at most {slowest_s:.2f} s after libvirtd answered")


def test_restarted_while_the_snapshot_exists(two):
    """The same worker goes on with the new libvirtd."""
    before = Before(two)
    run = Cycle(two, "agent")
    run.take()
    daemons.kill()
    daemons.start()
    run.remove()
    wait_for("the agent to be connected again", two.agent.answers, 120)
    before.same()
    cycle.assert_writing(two)


def test_inside_the_merge(two, moments):
    function = (blockjobs, "pivot")
    before = Before(two)
    for delay_s in moments(0.04)[::2]:
        run = Cycle(two, "crash")
        run.take()
        error = cycle.killed_libvirtd(run, run.remove, function, delay_s)
        daemons.start()
        print(f"killed after {delay_s:.3f} s: {error}; settled: {cycle.settle(two)}")
        before.same()
        cycle.assert_writing(two)
        Cycle(two, "crash").whole()
        before.same()


def test_disks_are_clean_after_all_that(two, lab):
    cycle.assert_clean_after_shutdown(two, lab.path("raw"))
