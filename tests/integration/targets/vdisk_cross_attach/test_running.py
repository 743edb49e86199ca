# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks of a busy VM in a running appliance (D1 to D5, D10, D11, B17, S31)."""

from __future__ import annotations

import re

import pytest

from ansible_collections.kvmops.backup.tests.integration.targets.vdisk_cross_attach import appliance
from ansible_collections.kvmops.backup.tests.lab import markers
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


@pytest.fixture(scope="module")
def web(module_lab):
    vm = module_lab.create_vm("web01", [Disk(), Disk("raw")], freeze_mode="pause")
    vm.wait_for_marker(2)
    return vm


@pytest.fixture(scope="module")
def backup01(module_lab):
    return module_lab.create_vm("backup01", writer=False, extra_devices=appliance.PORTS)


@pytest.fixture
def attach(run_module):
    def run(vdisk, state="attached", vm="backup01", **options):
        return run_module("vdisk_cross_attach", vm=vm, vdisk=vdisk, state=state, **options)

    return run


def ids(run_module, vm):
    [facts] = run_module("vm_info", vms=[vm])["vms"]
    return {disk["target"]: disk["id"] for disk in facts["disks"]}


def test_two_disks_show_one_moment_while_the_vm_goes_on(web, backup01, run_module, attach):
    before, known = appliance.standing(web), ids(run_module, "web01")
    foreseen = attach("vda", source_vm="web01", check_mode=True)
    assert foreseen.changed and appliance.standing(web) == before
    first = attach("vda", source_vm="web01")
    web.wait_for_marker(web.last_marker().number + 2)
    second = attach(str(web.disks()["vdb"]))  # by the path that it has now
    [vda], [vdb] = first["vdisks"], second["vdisks"]
    assert first.changed and second.changed
    assert (vda["id"], vdb["id"]) == (known["vda"], known["vdb"]) and ids(run_module, "web01") == known
    assert (vda["target"], vdb["target"], vda["consistency"], vda["moment"]) == ("vda", "vdb", "agent", vdb["moment"])
    assert vda["attached_as"]["serial"] != vdb["attached_as"]["serial"]
    assert re.fullmatch("/dev/disk/by-id/virtio-[a-z0-9]{20}", vda["attached_as"]["by_id"])
    assert appliance.snapshots(web) == [appliance.SNAPSHOT]
    assert not attach(vda["id"]).changed
    assert not attach("vdb", source_vm="web01").changed

    seen = {each["target"]: appliance.device(backup01, each["attached_as"]["serial"]) for each in (vda, vdb)}
    digests = {}
    for target, device in seen.items():
        assert backup01.agent.shell(f"cat /sys/block/{device[5:]}/ro").strip() == "1"
        assert not appliance.writes(backup01, device)
        digests[target] = appliance.digest(backup01, device)
    frozen = web.frozen_digests()
    for target, device in seen.items():  # without replay of a journal
        here = appliance.files(backup01, device)
        assert here.replace(" ./", f" /disk/{target}/") == "".join(
            line for line in frozen.splitlines(keepends=True) if f"/disk/{target}/" in line
        )
    numbers = {markers.parse_log(appliance.log(backup01, device))[-1].number for device in seen.values()}
    assert max(numbers) - min(numbers) <= 1  # the writer may have been between the two
    assert web.last_marker().number > max(numbers)

    held = run_module("vdisk_cross_attach_info", another_domain="backup01")["vdisks"]
    assert [each["id"] for each in held] == [vda["id"], vdb["id"]]
    assert {each["status"] for each in held} == {"attached"} and held[0]["domain"]["name"] == "web01"
    assert run_module("vdisk_cross_attach_info", source_vm="web01")["vdisks"] == held
    assert run_module("vdisk_cross_attach_info", another_domain="web01")["vdisks"] == []

    web.wait_for_marker(web.last_marker().number + 2)
    assert {target: appliance.digest(backup01, device) for target, device in seen.items()} == digests
    assert attach(vda["id"], state="detached").changed
    assert not attach(vda["id"], state="detached").changed
    assert appliance.snapshots(web) == [appliance.SNAPSHOT]
    assert appliance.digest(backup01, seen["vdb"]) == digests["vdb"]
    assert attach(held[1]["id"], state="detached", check_mode=True).changed
    assert attach(held[1]["id"], state="detached").changed
    assert appliance.held(backup01) == ([], [])
    assert appliance.standing(web) == before
    assert run_module("vdisk_cross_attach_info")["vdisks"] == []
    web.wait_for_marker(web.last_marker().number + 1)
    markers.parse_log(web.log("vda"))
    markers.parse_log(web.log("vdb"))


def test_the_example_playbook(web, backup01, run_module, ansible):
    before = appliance.standing(web)
    played = ansible.playbook(
        "kvmops.backup.cross_attach_example",
        cross_attach_become=False,
        cross_attach_source="web01",
        cross_attach_receiver="backup01",
    )
    said = re.findall(
        r"(vd[ab]): ([0-9a-f]{64})  /dev/vd", str(played.task("Say what it said, and fail if it failed").data)
    )
    assert dict(said).keys() == {"vda", "vdb"}
    assert appliance.standing(web) == before and appliance.held(backup01) == ([], [])
    failed = ansible.playbook(
        "kvmops.backup.cross_attach_example",
        fails=True,
        cross_attach_become=False,
        cross_attach_source="web01",
        cross_attach_receiver="backup01",
        cross_attach_command=["/bin/false"],
    )
    assert failed.task("Detach it").status == "ok" or failed.task("Detach it").data["results"]
    assert appliance.standing(web) == before and appliance.held(backup01) == ([], [])
