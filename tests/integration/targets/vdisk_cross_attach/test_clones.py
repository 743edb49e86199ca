# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Templates and thin clones: which disk is meant, and nothing ever reaches the template (D8)."""

from __future__ import annotations

from ansible_collections.kvmops.backup.tests.integration.targets.vdisk_cross_attach import appliance
from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


def raw(path, directory):
    """SHA-256 of what a guest reads of a qcow2."""
    truth.to_raw(path, "qcow2", directory / "raw", in_use=True)
    return truth.file_sha256(directory / "raw")


def test_template_and_clone(module_lab, receiver, run_module, tmp_path):
    template = module_lab.create_vm("base", [Disk(size_mib=16)], start=False)
    [path] = template.disks().values()
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 8M 64k", str(path))
    run_module("vm_template", vm="base")
    run_module("vm_thin_clone", template="base", name="clone")
    clone = module_lab.adopt("clone")
    [overlay] = clone.disks().values()
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 9M 64k", str(overlay))
    template_digest, clone_digest = raw(path, tmp_path), raw(overlay, tmp_path)
    unchanged = truth.file_sha256(path)
    before = appliance.standing(template), appliance.standing(clone)
    [facts] = run_module("vm_info", vms=["base"])["vms"]
    disk = facts["disks"][0]["id"]

    def attach(vdisk, state="attached", **options):
        return run_module("vdisk_cross_attach", vm="backup01", vdisk=vdisk, state=state, **options)

    def seen(result):
        return appliance.digest(receiver, appliance.device(receiver, result["vdisks"][0]["attached_as"]["serial"]))

    itself, cloned = attach(disk), attach(disk, thin_clone="clone")
    assert (itself["vdisks"][0]["thin_clone"], cloned["vdisks"][0]["thin_clone"]) == ("", "clone")
    assert (seen(itself), seen(cloned)) == (template_digest, clone_digest)
    assert appliance.snapshots(template) == [] and appliance.snapshots(clone) == [appliance.SNAPSHOT]
    assert not attach(disk, thin_clone="clone").changed and not attach(str(path)).changed
    assert "attached to backup01" in run_module("vm_thin_clone", template="base", name="more", fails=True).message
    run_module("vm_info")
    held = run_module("vdisk_cross_attach_info", another_domain="backup01")["vdisks"]
    assert [(each["domain"]["name"], each["thin_clone"]) for each in held] in (
        [("base", ""), ("clone", "clone")],
        [("clone", "clone"), ("base", "")],
    )
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 10M 64k", str(next(iter(clone.disks().values()))))
    now = raw(next(iter(clone.disks().values())), tmp_path)
    assert attach(disk, state="detached", thin_clone="clone").changed
    assert seen(itself) == template_digest
    assert appliance.snapshots(clone) == [] and raw(overlay, tmp_path) == now and appliance.chain(overlay) == 2
    assert attach(disk, state="detached").changed
    own = attach(run_module("vm_info", vms=["clone"])["vms"][0]["disks"][0]["id"])
    assert own["vdisks"][0]["thin_clone"] == "" and seen(own) == now
    assert attach(own["vdisks"][0]["id"], state="detached").changed
    assert truth.file_sha256(path) == unchanged
    assert (appliance.standing(template), appliance.standing(clone)[0].keys()) == (before[0], before[1][0].keys())
    assert {key: value for key, value in appliance.standing(clone)[0].items() if key[1:2] == ("vda",)} == {
        key: value for key, value in before[1][0].items() if key[1:2] == ("vda",)
    }
    run_module("vm_thin_clone", template="base", name="more")
    module_lab.adopt("more")
    clone.start()
    clone.destroy()
