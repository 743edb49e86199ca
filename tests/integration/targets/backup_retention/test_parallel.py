# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How many backups are at work in one place at once (SPEC B18)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _slots
from ansible_collections.kvmops.backup.tests.lab import fingerprint, modules
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


@pytest.fixture
def vms(module_lab):
    """VMs that are off, with 4 MiB each: two seconds at 2 MiB/s."""
    made = []
    for number in range(5):
        vm = module_lab.create_vm(f"parallel{number}", [Disk(size_mib=16, ext4=False)], start=False)
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} 0 4M", str(vm.disks()["vda"]))
        made.append(vm.name)
    yield made
    for name in made:
        module_lab.vm(name).remove()


def begin(vm, target, **options):
    slowly = {"bandwidth": "2M", "include_boot_files": False}
    argv = modules.module_argv("vm_backup", {"vm": vm, "path": str(target), **slowly, **options})
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)


def partial(target):
    return [name for name in os.listdir(target) if ".partial-" in name]


@contextmanager
def stopped(vm, target, at_work, **options):
    """A backup that stands still in the middle, the last of so many that are at work in the target; it goes on after the block."""
    with begin(vm, target, bandwidth="512K", **options) as process:
        try:
            # what a backup does before its first byte, others may wait for
            wait_for(f"{at_work} backups to write", lambda: writing(target) == at_work, 120)
            process.send_signal(signal.SIGSTOP)
            yield process
        finally:
            process.send_signal(signal.SIGCONT)


def writing(target):
    return sum(os.path.getsize(target / name) > 0 for name in partial(target))


def finish(process):
    stdout, stderr = process.communicate(timeout=300)
    return modules.module_result("vm_backup", stdout, stderr)


def waiting():
    """How many say that they wait for a slot."""
    found = 0
    for path in Path("/run/kvmops-backup/status").glob("*.json"):
        with suppress(FileNotFoundError):
            found += "wait for a slot (2 at work, max_parallel 2)" in path.read_text()
    return found


def test_never_more_than_the_limit_at_work(lab, vms, run_module):
    target = lab.path("backups")
    with stopped(vms[0], target, 1, max_parallel=2) as first, stopped(vms[1], target, 2, max_parallel=2) as second:
        processes = [first, second, *(begin(vm, target, max_parallel=2) for vm in vms[2:])]
        wait_for("the others to wait", lambda: waiting() == 3, 120)
        seen = [len(partial(target))]
        for process in (first, second):
            process.send_signal(signal.SIGCONT)
        while any(process.poll() is None for process in processes):
            seen.append(len(partial(target)))
            time.sleep(0.02)
        results = [finish(process) for process in processes]
    assert not any(result.failed for result in results)
    assert max(seen) == 2
    assert len(fingerprint.names(target)) == len(vms)  # and the file with the slots is gone


def test_who_does_not_wait_is_told_who_is_at_work(lab, vms, run_module):
    target = lab.path("backups")
    with stopped(vms[0], target, 1) as first:  # without a limit it counts all the same
        refused = run_module("vm_backup", vm=vms[1], path=str(target), max_parallel=1, wait_timeout="0", fails=True)
        assert f"backup of VM {vms[0]} (process {first.pid} on" in refused.message
        assert not run_module("vm_backup", vm=vms[2], path=str(target)).failed
        first.send_signal(signal.SIGCONT)
        waited = run_module("vm_backup", vm=vms[1], path=str(target), max_parallel=1)
        assert first.poll() is not None or not partial(target)
        assert not waited.failed and not finish(first).failed
    assert not os.path.exists(target / _slots.NAME)


def test_a_killed_backup_frees_its_slot_at_once(lab, vms, run_module):
    target = lab.path("backups")
    with stopped(vms[0], target, 1) as first:
        first.kill()
        first.wait()
    assert not run_module("vm_backup", vm=vms[1], path=str(target), max_parallel=1, wait_timeout="0").failed
    assert not run_module("vm_backup", vm=vms[0], path=str(target), max_parallel=1, wait_timeout="0").failed
    assert len(fingerprint.names(target)) == 2
