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


def removed_by_hand(vm, number, flags):
    """virsh detach-disk."""
    disk = re.search(rf"<disk[^>]*>(?:(?!</disk>).)*{number}.*?</disk>", vm.xml(inactive=True), re.DOTALL).group()
    vm.domain.detachDeviceFlags(disk, flags)


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
    source.destroy()
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
    removed_by_hand(receiver, number, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    wait_for("the disk to go", lambda: appliance.held(receiver)[0] == [], 60)
    assert statuses() == ["attached", "attached"]  # the definition still has it
    removed_by_hand(receiver, number, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    told = run_module("vdisk_cross_attach_info")
    assert [each["status"] for each in told["vdisks"]] == ["gone", "attached"] and "is free again" in told.warnings[0]
    foreseen = run_module("vdisk_cross_attach", state="reconciled", check_mode=True)
    assert foreseen.changed and statuses() == ["gone", "attached"]
    for predicted in (foreseen, attach("detached", check_mode=True)):
        assert any("The next run" in text and "is free again" in text for text in predicted.warnings)
    done = run_module("vdisk_cross_attach", state="reconciled")
    assert done.changed and [each["target"] for each in done["vdisks"]] == ["vda"]
    assert foreseen["vdisks"] == done["vdisks"]
    assert appliance.snapshots(source) == [appliance.SNAPSHOT]  # vdb is still at the other one
    other.remove()
    assert statuses() == ["gone"]
    done = run_module("vdisk_cross_attach", state="reconciled")
    assert done.changed and appliance.standing(source) == before
    assert not run_module("vdisk_cross_attach", state="reconciled").changed
    module_lab.create_vm("backup02", start=False)
    assert not attach("detached", vdisk="vdb", vm="backup02").changed


def test_a_receiver_in_its_firmware(module_lab, source, attach, statuses, run_module):
    before = appliance.standing(source)
    late = module_lab.create_vm("late", [Disk(ext4=False)], start=False, writer=False, extra_devices=appliance.PORTS)
    menu = "<bootmenu enable='yes' timeout='65000'/>"  # the BIOS waits for a key, so long, and nothing answers an unplug
    module_lab.connection.defineXML(late.xml().replace("</os>", f"{menu}</os>"))
    late.start(wait=False)
    number = serial(attach(vm="late"))
    assert appliance.held(late) == ([number], [number])
    failed = attach("detached", vm="late", fails=True)
    assert "device did not detach" in failed.message
    assert appliance.held(late) == ([number], []) and statuses() == ["detaching"]
    assert "attached to late" in run_module("vm_snapshot", vm="web01", snapshot="mine", fails=True).message
    late.domain.sendKey(libvirt.VIR_KEYCODE_SET_LINUX, 0, [57], 1, 0)  # the space bar: it boots
    late.wait_until_up()
    attach("detached", vm="late")
    assert appliance.held(late) == ([], []) and statuses() == [] and appliance.standing(source) == before

    late.destroy()
    late.start(wait=False)  # in its firmware again
    number = serial(attach(vm="late"))
    removed_by_hand(late, number, libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    assert appliance.held(late) == ([number], []) and statuses() == ["attached"]  # it was only asked for
    late.domain.reset(0)  # QEMU takes it out then
    wait_for("the disk to go", lambda: appliance.held(late)[0] == [], 60)
    assert statuses() == ["gone"]
    run_module("vm_template", vm="late", state="absent")  # any change of the receiver settles it
    assert statuses() == [] and appliance.standing(source) == before
    late.remove()


def test_unplugged_right_after_the_plug(source, receiver, attach, statuses):
    before = appliance.standing(source)
    for _each in range(3):
        attach()
        assert attach("detached").changed
    assert statuses() == [] and appliance.standing(source) == before
    assert subprocess.run(["pgrep", "-f", "watchdog"], check=False, stdout=subprocess.DEVNULL).returncode
