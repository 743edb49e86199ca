# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Source and receiver on and off, restarted, gone; receivers that do not let go (D3, D4, D6, D7, D10)."""

from __future__ import annotations

import re
import subprocess

import libvirt
import pytest

from ansible_collections.kvmops.backup.tests.integration.targets.vdisk_cross_attach import appliance
from ansible_collections.kvmops.backup.tests.lab import daemons, markers, truth
from ansible_collections.kvmops.backup.tests.lab._run import wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


@pytest.fixture(scope="module")
def source(module_lab):
    vm = module_lab.create_vm("web01", [Disk(), Disk("raw", ext4=False, size_mib=8)])
    vm.wait_for_marker(2)
    return vm


@pytest.fixture(scope="module")
def receiver(module_lab):
    return module_lab.create_vm("backup01", writer=False, extra_devices=appliance.PORTS)


@pytest.fixture
def attach(run_module):
    def run(state="attached", vm="backup01", vdisk="vda", **options):
        return run_module("vdisk_cross_attach", vm=vm, source_vm="web01", vdisk=vdisk, state=state, **options)

    return run


@pytest.fixture
def statuses(run_module):
    def run():
        return [each["status"] for each in run_module("vdisk_cross_attach_info", source_vm="web01")["vdisks"]]

    return run


def serial(result):
    [vdisk] = result["vdisks"]
    return vdisk["attached_as"]["serial"]


def seen(vm, number):
    """Digest of the attached disk in the guest."""
    return appliance.digest(vm, appliance.device(vm, number))


def test_restarts_while_attached(source, receiver, attach, statuses):
    before = appliance.standing(source)
    number = serial(attach())
    digest = seen(receiver, number)
    receiver.destroy()
    assert statuses() == ["attached"] and not attach().changed
    receiver.start()
    assert seen(receiver, number) == digest
    daemons.kill()
    daemons.start()
    assert statuses() == ["attached"] and appliance.held(receiver) == ([number], [number])
    source.destroy()
    source.start()
    source.wait_for_marker(source.last_marker().number + 1)
    source.shutdown()
    assert seen(receiver, number) == digest
    source.start()
    source.wait_for_marker(source.last_marker().number + 1)
    assert attach("detached").changed
    assert statuses() == [] and appliance.held(receiver) == ([], [])
    assert appliance.standing(source) == before
    markers.parse_log(source.log())


def test_source_off(source, receiver, attach, tmp_path):
    source.shutdown()
    before = appliance.standing(source)
    [disk] = attach()["vdisks"]
    assert disk["consistency"] == "off"
    number = disk["attached_as"]["serial"]
    truth.to_raw(source.disks()["vda"], "qcow2", tmp_path / "now", in_use=True)
    assert seen(receiver, number) == truth.file_sha256(tmp_path / "now")
    attach("detached")
    assert appliance.standing(source) == before
    number = serial(attach())
    digest = seen(receiver, number)
    source.start()  # and it is merged while it runs
    source.wait_for_marker(source.last_marker().number + 1)
    assert seen(receiver, number) == digest
    attach("detached")
    source.shutdown()
    assert appliance.standing(source) == before


def test_receiver_off(source, receiver, attach, statuses):
    receiver.destroy()
    before = appliance.standing(source)
    number = serial(attach())  # both are off
    assert appliance.held(receiver) == ([], [number]) and statuses() == ["attached"]
    attach("detached")
    assert appliance.standing(source) == before and appliance.held(receiver) == ([], [])
    source.start()
    running = appliance.standing(source)
    number = serial(attach())
    receiver.start()
    digest = seen(receiver, number)
    source.wait_for_marker(source.last_marker().number + 2)
    assert seen(receiver, number) == digest
    receiver.destroy()
    attach("detached")
    assert appliance.standing(source) == running
    receiver.start()
    assert appliance.held(receiver) == ([], [])


def test_taken_out_by_hand_or_with_the_receiver(module_lab, source, receiver, attach, statuses, run_module):
    before = appliance.standing(source)
    other = module_lab.create_vm("backup02", start=False)
    number = serial(attach())
    attach(vdisk="vdb", vm="backup02")
    disk = re.search(rf"<disk[^>]*>(?:(?!</disk>).)*{number}.*?</disk>", receiver.xml(), re.DOTALL).group()
    receiver.domain.detachDeviceFlags(disk, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    wait_for("the disk to go", lambda: appliance.held(receiver)[0] == [], 60)
    assert statuses() == ["attached", "attached"]  # the definition still has it
    receiver.domain.detachDeviceFlags(disk, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    told = run_module("vdisk_cross_attach_info")
    assert [each["status"] for each in told["vdisks"]] == ["gone", "attached"] and "is free again" in told.warnings[0]
    foreseen = run_module("vdisk_cross_attach", state="reconciled", check_mode=True)
    assert foreseen.changed and statuses() == ["gone", "attached"]
    done = run_module("vdisk_cross_attach", state="reconciled")
    assert done.changed and [each["target"] for each in done["vdisks"]] == ["vda"]
    assert appliance.snapshots(source) == [appliance.SNAPSHOT]  # vdb is still at the other one
    other.remove()
    assert statuses() == ["gone"]
    done = run_module("vdisk_cross_attach", state="reconciled")
    assert done.changed and appliance.standing(source) == before
    assert not run_module("vdisk_cross_attach", state="reconciled").changed
    module_lab.create_vm("backup02", start=False)
    assert not attach("detached", vdisk="vdb", vm="backup02").changed


def test_a_receiver_without_an_operating_system(module_lab, source, attach, statuses, run_module):
    before = appliance.standing(source)
    bare = module_lab.create_vm("bare", [Disk(ext4=False)], start=False, extra_devices=appliance.PORTS)
    module_lab.connection.defineXML(re.sub(r"<(kernel|initrd|cmdline)>.*?</\1>", "", bare.xml()))
    bare.start(wait=False)
    number = serial(attach(vm="bare"))
    failed = attach("detached", vm="bare", fails=True)
    assert "device did not detach" in failed.message
    assert appliance.held(bare) == ([number], []) and statuses() == ["detaching"]
    bare.destroy()
    bare.start(wait=False)
    told = run_module("vdisk_cross_attach_info")
    assert [each["status"] for each in told["vdisks"]] == ["gone"]
    assert not attach("detached", vm="bare", check_mode=True, fails=False).failed
    attach("detached", vm="bare")
    assert statuses() == [] and appliance.standing(source) == before
    bare.destroy()


def test_unplugged_right_after_the_plug(source, receiver, attach, statuses):
    before = appliance.standing(source)
    for _each in range(3):
        attach()
        assert attach("detached").changed
    assert statuses() == [] and appliance.standing(source) == before
    assert subprocess.run(["pgrep", "-f", "watchdog"], check=False, stdout=subprocess.DEVNULL).returncode
