# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How many backups are at work in one place at once (SPEC B18)."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
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
    argv = modules.module_argv("vm_backup", {"vm": vm, "path": str(target), "bandwidth": "2M", **options})
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)


def partial(target):
    return [name for name in os.listdir(target) if ".partial-" in name]


def finish(process):
    stdout, stderr = process.communicate(timeout=120)
    return modules.module_result("vm_backup", stdout, stderr)


def test_never_more_than_the_limit_at_work(lab, vms, run_module):
    target = lab.path("backups")
    processes = [begin(vm, target, max_parallel=2) for vm in vms]
    seen, waiting = [], set()
    while any(process.poll() is None for process in processes):
        seen.append(len(partial(target)))
        for path in Path("/run/kvmops-backup/status").glob("*.json"):
            with suppress(FileNotFoundError):
                waiting.add("wait for a slot (2 at work, max_parallel 2)" in path.read_text())
        time.sleep(0.02)
    results = [finish(process) for process in processes]
    assert not any(result.failed for result in results)
    assert max(seen) == 2 and True in waiting
    assert len(fingerprint.names(target)) == len(vms)  # and the file with the slots is gone


def test_who_does_not_wait_is_told_who_is_at_work(lab, vms, run_module):
    target = lab.path("backups")
    with begin(vms[0], target) as first:  # without a limit it counts all the same
        wait_for("the first to write", lambda: partial(target), 60)
        refused = run_module("vm_backup", vm=vms[1], path=str(target), max_parallel=1, wait_timeout="0", fails=True)
        assert f"backup of VM {vms[0]} (process {first.pid} on" in refused.message
        assert not run_module("vm_backup", vm=vms[2], path=str(target)).failed
        waited = run_module("vm_backup", vm=vms[1], path=str(target), max_parallel=1)
        assert first.poll() is not None or not partial(target)
        assert not waited.failed and not finish(first).failed
    assert not os.path.exists(target / _slots.NAME)


def test_a_killed_backup_frees_its_slot_at_once(lab, vms, run_module):
    target = lab.path("backups")
    with begin(vms[0], target) as first:
        wait_for("the first to write", lambda: partial(target), 60)
        first.kill()
        first.wait()
    assert not run_module("vm_backup", vm=vms[1], path=str(target), max_parallel=1, wait_timeout="0").failed
    assert not run_module("vm_backup", vm=vms[0], path=str(target), max_parallel=1, wait_timeout="0").failed
    assert len(fingerprint.names(target)) == 2
