# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The worker or libvirtd killed, and several at once: the record or nothing attached, and the next run settles (D7, D11, S31).

`--kill-steps 0` kills at every step.
"""

from __future__ import annotations

import re
import subprocess

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments
from ansible_collections.kvmops.backup.tests.integration.targets.vdisk_cross_attach import appliance
from ansible_collections.kvmops.backup.tests.integration.targets.vdisk_cross_attach.stepwise import (
    stepwise as run_stepwise,
)
from ansible_collections.kvmops.backup.tests.integration.targets.vdisk_cross_attach.stepwise import with_libvirtd_killed
from ansible_collections.kvmops.backup.tests.lab.modules import module_argv
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


def bare(lab, name, disks):
    """A VM whose guest never comes to an operating system: up at once, and nobody writes."""
    vm = lab.create_vm(name, disks, agent=False, start=False)
    lab.connection.defineXML(re.sub(r"<(kernel|initrd|cmdline)>.*?</\1>", "", vm.xml()))
    return vm


@pytest.fixture(scope="module")
def source(module_lab):
    return bare(module_lab, "db01", [Disk(size_mib=8, ext4=False)])


@pytest.fixture(scope="module")
def receiver(module_lab):
    return bare(module_lab, "backup02", [Disk(size_mib=8, ext4=False)])


def stepwise(kill_at, state):
    return run_stepwise(kill_at, "backup02", "db01", "vda", state)


def settled(run_module, source, receiver, before):
    """Whether the disk is attached, after the next run; what is attached has a record, and can be detached."""
    live, config = appliance.held(receiver)
    records = [each for record in _attachments.everything() for each in record.attachments]
    assert {*live, *config} <= {each.serial for each in records}
    run_module("vdisk_cross_attach", state="reconciled")
    held = run_module("vdisk_cross_attach_info")["vdisks"]
    assert [each["attached_as"]["serial"] for each in held] == appliance.held(receiver)[1]
    if held:
        assert {each["status"] for each in held} <= {"attached", "detaching"}
        assert appliance.snapshots(source) == [appliance.SNAPSHOT]
    else:
        assert appliance.standing(source) == before
    return bool(held)


@pytest.mark.parametrize("power", ["off", "running"])
def test_worker_killed(source, receiver, run_module, chosen, power):
    if power == "running":
        source.start(wait=False)
    before = appliance.standing(source)
    counts = {state: stepwise(0, state) for state in ("attached", "detached")}
    for state, count in counts.items():
        for kill_at in chosen(count):
            if state == "detached":
                stepwise(0, "attached")
            stepwise(kill_at, state)
            print(f"killed before {kill_at} of {count} ({state})")
            settled(run_module, source, receiver, before)
            stepwise(0, "attached")  # the same again
            assert settled(run_module, source, receiver, before)
            stepwise(0, "detached")
            assert not settled(run_module, source, receiver, before)
            assert appliance.held(receiver)[1] == [] and not list(_attachments.everything())
    source.destroy()


@pytest.mark.parametrize("state", ["attached", "detached"])
def test_libvirtd_killed(source, receiver, run_module, chosen, state):
    source.start(wait=False)
    before = appliance.standing(source)
    counts = {each: stepwise(0, each) for each in ("attached", "detached")}
    for kill_at in chosen(counts[state]):
        if state == "detached":
            stepwise(0, "attached")
        with_libvirtd_killed(kill_at, "backup02", "db01", "vda", state)
        print(f"libvirtd killed before {kill_at} of {counts[state]} ({state})")
        settled(run_module, source, receiver, before)
        stepwise(0, "detached")
        assert not settled(run_module, source, receiver, before)
    source.destroy()


def test_several_at_once(module_lab, run_module):
    source = bare(module_lab, "db02", [Disk(size_mib=8, ext4=False), Disk("raw", size_mib=8, ext4=False)])
    raw = source.disks()["vdb"]
    module_lab.create_pool("vms", raw.parent)
    volume = f"<disk type='volume'\\1<source pool='vms' volume='{raw.name}'/>"
    module_lab.connection.defineXML(re.sub(rf"<disk type='file'([^<]*<driver[^<]*)<source file='{raw}'/>", volume, source.xml()))
    receivers = [bare(module_lab, name, [Disk(size_mib=8, ext4=False)]) for name in ("backup03", "backup04")]
    source.start(wait=False)
    before = appliance.standing(source)

    def at_once(state):
        jobs = [
            subprocess.Popen(
                module_argv("vdisk_cross_attach", {"vm": vm.name, "source_vm": "db02", "vdisk": vdisk, "state": state}),
                stdout=subprocess.PIPE,
            )
            for vm in receivers
            for vdisk in ("vda", "vdb")
        ]
        told = [job.communicate(timeout=300)[0] for job in jobs]
        assert not any(job.returncode for job in jobs), told

    at_once("attached")
    held = run_module("vdisk_cross_attach_info", source_vm="db02")["vdisks"]
    assert len(held) == 4 and len({each["moment"] for each in held}) == 1
    assert appliance.snapshots(source) == [appliance.SNAPSHOT]
    assert all(len(appliance.held(vm)[1]) == 2 for vm in receivers)
    assert {(each["pool"], each["attached_as"]["path"]) for each in held if each["target"] == "vdb"} == {("vms", str(raw))}
    assert not any("type='volume'" in vm.xml() for vm in receivers)  # as a file: AppArmor does not follow a volume's chain
    at_once("detached")
    assert run_module("vdisk_cross_attach_info", source_vm="db02")["vdisks"] == []
    assert appliance.standing(source) == before and all(appliance.held(vm)[1] == [] for vm in receivers)
