# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirtd SIGKILLed while an increment takes its snapshot: the chain goes on, no point and no write is lost (S4b)."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

from ansible_collections.kvmops.backup.tests.integration.targets.vm_increment import chains
from ansible_collections.kvmops.backup.tests.lab import daemons, markers, modules
from ansible_collections.kvmops.backup.tests.lab._run import wait_for, within
from ansible_collections.kvmops.backup.tests.lab.vm import Disk

JOURNALS = Path("/var/lib/kvmops-backup/journal")
TAKING_S = 0.6  # about what it takes from the first overlay to the end
THAW_LIMIT_S = 10


def overlays(vm):
    """Every file that a snapshot has made; libvirt makes them first, then it freezes and switches."""
    return set(next(iter(vm.disks().values())).parent.glob("*.kvmops-*"))


def test_inside_the_snapshot_of_an_increment(lab, run_module):
    vm = lab.create_vm("struck", [Disk(), Disk("raw")])
    vm.wait_for_marker(2)
    arguments = {"vm": "struck", "path": str(lab.path("backups")), "mode": "auto"}
    full = run_module("vm_backup", **arguments)
    archive = full["archive"]["path"]
    known = {full["point"]: chains.frozen_now(vm)}
    count = 20 if os.environ.get("KVMOPS_SWEEP") == "all" else 5
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    for number in range(count):
        delay_s = (number + chance.random()) * TAKING_S / count
        before = overlays(vm)
        with subprocess.Popen(
            modules.module_argv("vm_backup", arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as worker:
            wait_for("an overlay", lambda before=before: overlays(vm) - before, 60, every_s=0.002)
            time.sleep(delay_s)  # the moment is what is tested
            daemons.kill()
            worker.wait(300)
        daemons.start()
        assert within(vm.wait_until_thawed(), THAW_LIMIT_S)
        result = run_module("vm_backup", **arguments)
        print(f"killed after {delay_s:.3f} s, worker ended with {worker.returncode}: {result.warnings}")
        assert (result["mode"], result["archive"]["path"]) == ("incremental", archive), result["reason"]
        known[result["point"]] = chains.frozen_now(vm)
        assert len(vm.domain.snapshotListNames()) == len(result["archive"]["points"])
        assert list(JOURNALS.iterdir()) == []
    assert run_module("backup_verify", archive=archive)["archives"][0]["ok"]
    found = chains.digests_of_points(archive, lab.path("out"))
    assert known.items() <= found.items()
    wait_for("the agent", vm.agent.answers, 180)
    numbers = [each.number for each in markers.parse_log(vm.log())]
    assert numbers == list(range(1, len(numbers) + 1))
    merged = run_module("vm_backup", increment_limit=2, **arguments)["merged_snapshots"]
    assert len(merged) == len(found) + 1
    assert vm.domain.snapshotListNames() == []
    assert chains.chain_lengths(vm) == {"vda": 1, "vdb": 1}


def test_in_the_writing_of_what_libvirt_knows(lab, run_module):
    """It leaves NAME.xml.new, from which a deleted snapshot would come back with every restart of libvirtd."""
    vm = lab.create_vm("scribe", [Disk()])
    vm.wait_for_marker(2)
    arguments = {"vm": "scribe", "path": str(lab.path("backups")), "mode": "auto"}
    archive = run_module("vm_backup", **arguments)["archive"]["path"]
    notes = Path("/var/lib/libvirt/qemu/snapshot/scribe")
    for of_new in (False, True):
        before = vm.domain.snapshotListNames()
        now = int(time.time())
        names = [f"kvmops-{timestamp}" for timestamp in range(now, now + 60)] if of_new else before
        with daemons.killed_in_rename_to([f"{notes}/{name}.xml" for name in names]):
            run_module("vm_backup", fails=True, **arguments)
            wait_for("libvirtd to die", lambda: daemons.libvirtd_pid() is None, 60)
        assert len(list(notes.glob("*.new"))) == 1
        daemons.start()
        result = run_module("vm_backup", **arguments)
        assert (result["mode"], result["archive"]["path"]) == ("incremental", archive), result["reason"]
        assert list(notes.glob("*.new")) == []
        names = sorted(vm.domain.snapshotListNames())
        assert len(names) == len(before) + 1
        daemons.stop()
        daemons.start()
        assert sorted(vm.domain.snapshotListNames()) == names
        assert vm.domain.snapshotCurrent().getName() == f"kvmops-{result['point']}"
