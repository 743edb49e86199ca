# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is not done to a VM while its disks are attached, and what a backup of the receiver has (D5, D7, D11, B17)."""

from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.integration.targets.vdisk_cross_attach import appliance
from ansible_collections.kvmops.backup.tests.lab._run import wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


@pytest.fixture
def attach(run_module):
    def run(state="attached", vm="backup01", **options):
        return run_module("vdisk_cross_attach", vm=vm, source_vm="web01", vdisk="vda", state=state, **options)

    return run


def test_everything_is_refused_and_an_increment_follows(module_lab, source, receiver, attach, run_module, ansible):
    target = module_lab.path("backups")
    first = run_module("vm_backup", vm="web01", path=str(target), mode="auto")
    source.wait_for_marker(source.last_marker().number + 1)
    before = appliance.standing(source)
    attach()
    archive, path = first["archive"]["path"], str(target)
    attempts = [
        *(("vm_backup", {"vm": "web01", "path": path, "mode": mode}) for mode in ("full", "auto", "incremental")),
        ("vm_backup", {"vm": "web01", "path": path, "mode": "auto", "increment_limit": 2}),
        ("vm_backup", {"vm": "web01", "path": path, "incrementable": True}),
        ("vm_snapshot", {"vm": "web01", "snapshot": "mine"}),
        ("vm_snapshot", {"vm": "web01", "snapshot": appliance.SNAPSHOT, "state": "absent"}),
        ("vm_snapshot", {"vm": "web01", "snapshot": "all", "state": "absent"}),
        ("vm_snapshot", {"vm": "web01", "snapshot": appliance.SNAPSHOT, "state": "reverted"}),
        ("vm_restore", {"source": archive, "force": True}),
        ("vm_template", {"vm": "web01"}),
        ("vm_template", {"vm": "web01", "state": "absent"}),
        ("vm_thin_clone", {"template": "web01", "name": "clone"}),
    ]
    standing = appliance.standing(source)
    for module, arguments in attempts:
        for check_mode in (False, True):
            failed = run_module(module, check_mode=check_mode, fails=True, **arguments)
            assert "attached to backup01" in failed.message, (module, arguments, failed.message)
            assert failed["attached_to"] == ["backup01"]
    assert appliance.standing(source) == standing
    played = ansible.playbook(
        "- hosts: all\n  gather_facts: false\n  roles: [kvmops.backup.weekly_backup]\n",
        weekly_backup_vms=["web01"],
        weekly_backup_path=path,
        weekly_backup_max_age="0s",
    )
    [row] = played.task("kvmops.backup.weekly_backup : Say who was backed up").data["msg"]
    assert row.startswith("web01  skipped") and "attached to backup01" in row
    # a copy under another name is no change of it
    assert run_module(
        "vm_restore", source=archive, name="copy", path=str(module_lab.path("copy")), check_mode=True
    ).changed
    attach("detached")
    assert appliance.standing(source) == before
    second = run_module("vm_backup", vm="web01", path=path, mode="auto")
    assert second["mode"] == "incremental", second["reason"]
    frozen = source.frozen_digests()
    run_module("vm_restore", source=archive, name="restored", path=str(module_lab.path("restored")))
    restored = module_lab.adopt("restored").start()
    assert restored.booted_digests() == frozen
    restored.remove()
    run_module("vm_snapshot", vm="web01", snapshot="all", state="absent")


def test_a_backup_of_the_receiver_leaves_the_disk_out(module_lab, source, receiver, attach, run_module):
    target, digests = module_lab.path("appliance"), receiver.digests()
    attach()
    held = appliance.held(receiver)
    for options in ({}, {"mode": "auto"}, {"mode": "auto"}):
        done = run_module("vm_backup", vm="backup01", path=str(target), **options)
        assert [each["device"] for each in done["skipped_devices"]] == ["vdb"]
    assert done["mode"] == "incremental", done["reason"]
    failed = run_module("vm_backup", vm="backup01", path=str(target), consistency="memory", fails=True)
    assert "a disk of another VM" in failed.message
    assert appliance.held(receiver) == held
    run_module("vm_restore", source=done["archive"]["path"], name="copy", path=str(module_lab.path("copied")))
    copy = module_lab.adopt("copy")
    assert list(copy.disks()) == ["vda"]
    assert copy.start().digests() == digests
    copy.remove()
    run_module("vm_snapshot", vm="backup01", snapshot="all", state="absent")
    attach("detached")


def test_a_snapshot_of_the_receiver_does_not_bring_the_disk_back(source, receiver, attach, run_module):
    attach()
    assert (
        "a disk of another VM"
        in run_module("vm_snapshot", vm="backup01", snapshot="s", memory=True, fails=True).message
    )
    run_module("vm_snapshot", vm="backup01", snapshot="s")
    attach("detached")  # its snapshot names the disk, and is not in the way
    assert appliance.snapshots(source) == []
    run_module("vm_snapshot", vm="backup01", snapshot="s", state="reverted")
    receiver.start()
    assert appliance.held(receiver) == ([], [])
    run_module("vm_snapshot", vm="backup01", snapshot="all", state="absent")
    assert appliance.held(receiver) == ([], [])


def test_the_next_change_of_the_source_frees_what_is_gone(module_lab, source, attach, run_module):
    module_lab.create_vm("gone", start=False)
    attach(vm="gone")
    run_module("vm_snapshot", vm="web01", snapshot="mine", fails=True)
    module_lab.vm("gone").remove()
    told = run_module("vm_info", vms=["web01"]).warnings
    assert any("is free again" in text for text in told)
    run_module("vm_snapshot", vm="web01", snapshot="mine", check_mode=True)
    done = run_module("vm_snapshot", vm="web01", snapshot="mine")
    assert [each["name"] for each in done["snapshots"]] == ["mine"]
    run_module("vm_snapshot", vm="web01", snapshot="mine", state="absent")


def test_a_lease_that_is_over(module_lab, source, attach, run_module):
    before = appliance.standing(source)
    module_lab.create_vm("late", start=False)
    attach(vm="late", lease="1s")

    def told():
        warnings = run_module("vdisk_cross_attach_info", source_vm="web01").warnings
        return any("past its lease" in text for text in warnings)

    wait_for("the end of the lease", told, 60)
    target = str(module_lab.path("late-backups"))
    for touched in (
        run_module("vm_info", vms=["web01"]),
        run_module("vm_info", vms=["late"]),
        run_module("vm_template", vm="late", state="absent"),
        run_module("vm_backup", vm="late", path=target, check_mode=True),
        run_module("vm_backup", vm="web01", path=target, fails=True),
    ):
        assert any("vda of web01 is still attached to late, past its lease" in text for text in touched.warnings)
    assert run_module("vm_info", vms=["web01"])["vms"][0]["attached"][0]["expired"]  # from which the report is made
    assert not run_module("vdisk_cross_attach", state="reconciled").changed
    assert run_module("vdisk_cross_attach", state="reconciled", expired=True).changed
    assert appliance.standing(source) == before and appliance.held(module_lab.vm("late")) == ([], [])


def test_a_snapshot_of_that_name_that_a_user_has_made(source, attach, run_module):
    run_module("vm_snapshot", vm="web01", snapshot=appliance.SNAPSHOT)
    standing = appliance.standing(source)
    assert "was not made by this module" in attach(fails=True).message
    assert appliance.standing(source) == standing
    run_module("vm_snapshot", vm="web01", snapshot=appliance.SNAPSHOT, state="absent")


def test_the_record_is_lost(source, receiver, attach, run_module):
    attach()
    [record] = Path("/var/lib/kvmops-backup/attached").iterdir()
    aside = record.rename(record.with_suffix(".lost"))
    standing = appliance.standing(source)
    for state in ("attached", "detached"):
        assert "backup01 (vdb)" in attach(state, fails=True).message
    run_module("vm_snapshot", vm="web01", snapshot="all", state="absent", fails=True)  # QEMU's lock
    assert appliance.standing(source) == standing and len(appliance.held(receiver)[0]) == 1
    record.write_text("damaged")
    assert "cannot be read" in attach("detached", fails=True).message
    told = run_module("vm_info")  # the weekly policy begins with it
    assert any("what of VM web01 is attached is not known" in text for text in told.warnings)
    aside.rename(record)
    attach("detached")


def test_who_else_writes_to_the_disk_is_named_before_anything_is_touched(module_lab, source, attach):
    module_lab.create_vm("third", [Disk(path=source.disks()["vda"])], start=False)
    before = appliance.standing(source)
    assert "third" in attach(fails=True).message
    assert appliance.standing(source) == before
    module_lab.vm("third").remove()
