# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The limit of bytes per second holds for the merge of snapshots too, of a VM that runs and of one that is off; the
copying has the priority that was asked for, the merge the usual one (SPEC H2)."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress

import libvirt
import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import blockjobs
from ansible_collections.kvmops.backup.tests.lab import modules
from ansible_collections.kvmops.backup.tests.lab._run import wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk

MIB = 2**20


def merges(vm, process):
    """The limits seen on the disk's jobs while the process ran, for how long a job was there, and how nice the process
    was before and during it: what it was both before and after the look at the job."""
    seen, began, ended, nice = set(), 0.0, 0.0, (set(), set())
    while process.poll() is None:
        with suppress(libvirt.libvirtError, ProcessLookupError):
            how_nice = os.getpriority(os.PRIO_PROCESS, process.pid)
            info = vm.domain.blockJobInfo("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES)
            if info:
                seen.add(info["bandwidth"])
                began, ended = began or time.monotonic(), time.monotonic()
            if how_nice == os.getpriority(os.PRIO_PROCESS, process.pid):
                nice[bool(info)].add(how_nice)
        time.sleep(0.02)
    return seen, ended - began, nice


def begin(module="vm_backup", **arguments):
    argv = modules.module_argv(module, arguments)
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)


def test_a_merge_keeps_to_the_limit(lab, run_module):
    target = str(lab.path("backups"))
    vm = lab.create_vm("limited", [Disk(size_mib=128)])
    run_module("vm_backup", vm="limited", path=target, mode="auto")
    vm.agent.shell("dd if=/dev/urandom of=/disk/vda/ballast bs=1M count=32 conv=fsync")
    arguments = {"vm": "limited", "path": target, "mode": "auto", "increment_limit": 2, "bandwidth": "8M"}
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with begin(**arguments, nice=3, ionice="idle") as process:
        seen, lasted, (before, merging) = merges(vm, process)
        stdout, stderr = process.communicate()
    result = modules.module_result("vm_backup", stdout, stderr)
    assert not result.failed and len(result["merged_snapshots"]) == 2
    assert seen - {0} == {8 * MIB} and lasted > 2.5  # 32 MiB at 8 MiB/s, less what QEMU lets through at once
    assert {usual, usual + 3} <= before and merging == {usual}
    # off: qemu-img does it
    run_module("vm_backup", vm="limited", path=target, mode="auto")
    vm.agent.shell("dd if=/dev/urandom of=/disk/vda/ballast bs=1M count=32 conv=fsync,notrunc")
    vm.shutdown()
    began = time.monotonic()
    merged = run_module("vm_backup", **arguments)
    assert len(merged["merged_snapshots"]) == 2
    assert time.monotonic() - began > 6.5  # copy and merge
    # vm_snapshot, and whoever goes on after a killed run
    vm.start()
    run_module("vm_snapshot", vm="limited", snapshot="ours")
    vm.agent.shell("dd if=/dev/urandom of=/disk/vda/ballast bs=1M count=32 conv=fsync,notrunc")
    with begin("vm_snapshot", vm="limited", snapshot="ours", state="absent", bandwidth="1M") as process:
        wait_for("the merge", lambda: vm.domain.blockJobInfo("vda", 0), 120)
        process.kill()
    vm.domain.blockJobAbort("vda", 0)  # so that another one has to be begun
    with begin("vm_snapshot", vm="limited", snapshot="ours", state="absent", bandwidth="9M") as process:
        seen, _lasted, _nice = merges(vm, process)
        assert not modules.module_result("vm_snapshot", *process.communicate()).failed
    assert seen - {0} == {9 * MIB} and vm.domain.snapshotNum() == 0


class Disks:
    """A VM with disks whose merges have limits."""

    def __init__(self):
        self.speeds = {}

    def blockJobSetSpeed(self, target, bps, flags):
        assert flags == libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
        self.speeds.setdefault(target, []).append(bps)


@pytest.fixture
def now(monkeypatch):
    """The time, in a list."""
    now = [0.0]
    monkeypatch.setattr(blockjobs.time, "monotonic", lambda: now[0])
    return now


def test_a_guest_that_writes_faster_does_not_keep_the_merge_from_ending(now):
    """The limit is raised as long as the end comes no nearer by at least half of it."""
    vm = Disks()
    limit = blockjobs.Limit(vm, MIB)
    assert limit.share("vda", 1) == MIB
    for second in range(100):
        now[0] = float(second)
        limit.look({"vda": (second * MIB, (1000 + second) * MIB)})  # what is left stays the same
    assert vm.speeds["vda"] == [2 * MIB, 4 * MIB, 8 * MIB]
    for second in range(100, 150):
        now[0] = float(second)
        limit.look({"vda": (0, (1700 - 7 * second) * MIB)})
    assert vm.speeds["vda"] == [2 * MIB, 4 * MIB, 8 * MIB]
    for second in range(150, 211):
        now[0] = float(second)
        limit.look({"vda": (0, 650 * MIB - second * 1000)})  # nearer, but it would take days
    assert vm.speeds["vda"] == [2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB]
    # what QEMU copies in a moment needs no limit; without it the end falls between two writes of the guest
    limit.look({"vda": (0, 0)})
    assert vm.speeds["vda"][-1] == 32 * MIB
    limit.look({"vda": (100 * MIB, 100 * MIB + 1000)})
    limit.look({"vda": (100 * MIB, 101 * MIB)})
    assert vm.speeds["vda"][-2:] == [32 * MIB, 0]


def test_disks_share_the_limit_and_settling_ends_in_time(now):
    vm = Disks()
    limit = blockjobs.Limit(vm, 8 * MIB)
    assert [limit.share(target, 2) for target in ("vda", "vdb")] == [4 * MIB, 4 * MIB]
    limit.look({"vda": (1, 1000 * MIB), "vdb": (1, 1000 * MIB)})
    assert vm.speeds == {}
    limit.look({"vda": (999 * MIB, 1000 * MIB), "vdb": (1, 1000 * MIB)})  # the other one has it all
    assert vm.speeds == {"vda": [0], "vdb": [8 * MIB]}

    vm = Disks()
    limit = blockjobs.Limit(vm, MIB, within_s=3600)
    limit.share("vda", 1)
    limit.look({"vda": (0, 36000 * MIB)})
    assert vm.speeds["vda"] == [10 * MIB]
    now[0] = 3000.0
    limit.look({"vda": (0, 36000 * MIB)})
    assert vm.speeds["vda"][-1] >= 60 * MIB
    assert blockjobs.Limit(vm, 0, within_s=3600).look({"vda": (0, 36000 * MIB)}) is None  # no limit stays none
    assert blockjobs.least_bps(0, 2**40, 3600) == 0
