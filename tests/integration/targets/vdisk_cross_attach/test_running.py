# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks of a busy VM in a running appliance (D1 to D5, D10, D11, B17, S31)."""

from __future__ import annotations

import re

import pytest

from ansible_collections.kvmops.backup.tests.integration.targets.vdisk_cross_attach import appliance
from ansible_collections.kvmops.backup.tests.lab import markers


@pytest.fixture
def attach(run_module):
    def run(vdisk, state="attached", vm="backup01", **options):
        return run_module("vdisk_cross_attach", vm=vm, vdisk=vdisk, state=state, **options)

    return run


def ids(run_module, vm):
    [facts] = run_module("vm_info", vms=[vm])["vms"]
    return {disk["target"]: disk["id"] for disk in facts["disks"]}


def test_two_disks_show_one_moment_while_the_vm_goes_on(source, receiver, run_module, attach):
    before, known = appliance.standing(source), ids(run_module, "web01")
    foreseen = attach("vda", source_vm="web01", check_mode=True)
    assert foreseen.changed and appliance.standing(source) == before
    first = attach("vda", source_vm="web01")
    source.wait_for_marker(source.last_marker().number + 2)
    second = attach(str(source.disks()["vdb"]))  # by the path that it has now
    [vda], [vdb] = first["vdisks"], second["vdisks"]
    assert first.changed and second.changed
    assert (vda["id"], vdb["id"]) == (known["vda"], known["vdb"]) and ids(run_module, "web01") == known
    assert (vda["target"], vdb["target"], vda["consistency"], vda["moment"]) == ("vda", "vdb", "agent", vdb["moment"])
    assert vda["attached_as"]["serial"] != vdb["attached_as"]["serial"]
    assert re.fullmatch("/dev/disk/by-id/virtio-[a-z0-9]{20}", vda["attached_as"]["by_id"])
    assert appliance.snapshots(source) == [appliance.SNAPSHOT]
    assert not attach(vda["id"]).changed
    assert not attach("vdb", source_vm="web01").changed

    seen = {each["target"]: appliance.device(receiver, each["attached_as"]["serial"]) for each in (vda, vdb)}
    digests = {}
    for target, device in seen.items():
        assert appliance.is_read_only(receiver, device)
        assert not appliance.writes(receiver, device)
        digests[target] = appliance.digest(receiver, device)
    frozen = source.frozen_digests()
    for target, device in seen.items():  # without replay of a journal
        here = appliance.files(receiver, device)
        assert here.replace(" ./", f" /disk/{target}/") == "".join(
            line for line in frozen.splitlines(keepends=True) if f"/disk/{target}/" in line
        )
    numbers = {markers.parse_log(appliance.log(receiver, device))[-1].number for device in seen.values()}
    assert max(numbers) - min(numbers) <= 1  # the writer may have been between the two
    assert source.last_marker().number > max(numbers)

    held = run_module("vdisk_cross_attach_info", another_domain="backup01")["vdisks"]
    assert [each["id"] for each in held] == [vda["id"], vdb["id"]]
    assert {each["status"] for each in held} == {"attached"} and held[0]["domain"]["name"] == "web01"
    assert run_module("vdisk_cross_attach_info", source_vm="web01")["vdisks"] == held
    assert run_module("vdisk_cross_attach_info", another_domain="web01")["vdisks"] == []

    source.wait_for_marker(source.last_marker().number + 2)
    assert {target: appliance.digest(receiver, device) for target, device in seen.items()} == digests
    assert attach(vda["id"], state="detached").changed
    assert not attach(vda["id"], state="detached").changed
    assert appliance.snapshots(source) == [appliance.SNAPSHOT]
    assert appliance.digest(receiver, seen["vdb"]) == digests["vdb"]
    assert attach(held[1]["id"], state="detached", check_mode=True).changed
    assert attach(held[1]["id"], state="detached").changed
    assert appliance.held(receiver) == ([], [])
    assert appliance.standing(source) == before
    assert run_module("vdisk_cross_attach_info")["vdisks"] == []
    for slip in (
        attach(vda["id"], state="detached", vm="backup1"),
        run_module("vdisk_cross_attach", state="reconciled", source_vm="backup1"),
        run_module("vdisk_cross_attach_info", another_domain="backup1"),
    ):
        assert not slip.changed and "no VM of that name" in slip.warnings[0]
    source.wait_for_marker(source.last_marker().number + 1)
    markers.parse_log(source.log("vda"))
    markers.parse_log(source.log("vdb"))


def test_the_example_playbook(source, receiver, run_module, ansible):
    before = appliance.standing(source)
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
    assert appliance.standing(source) == before and appliance.held(receiver) == ([], [])
    failed = ansible.playbook(
        "kvmops.backup.cross_attach_example",
        fails=True,
        cross_attach_become=False,
        cross_attach_source="web01",
        cross_attach_receiver="backup01",
        cross_attach_command=["/bin/false"],
    )
    assert failed.task("Detach it").status == "ok" or failed.task("Detach it").data["results"]
    assert appliance.standing(source) == before and appliance.held(receiver) == ([], [])
