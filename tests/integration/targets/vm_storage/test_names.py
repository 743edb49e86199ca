# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks by names that lead over symbolic links, or are not spelled as the kernel would: what QEMU opens is what counts."""

from __future__ import annotations

import pytest

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm, make_image


def test_nothing_is_restored_over_a_base_that_a_link_leads_a_clone_to(lab: Lab, run_module) -> None:
    """By its letters the clone's backing name would be a file beside the clone."""
    far, near = lab.path("far"), lab.path("near")
    lab.path("far/inner")
    (near / "link").symlink_to(far / "inner")
    base = lab.create_vm("base", [Disk(path=make_image(far / "base.qcow2", Disk()))], start=False)
    clone = near / "clone.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "link/../base.qcow2", str(clone))
    lab.create_vm("clone", [Disk(path=clone)], start=False)
    archive = run_module("vm_backup", vm="base", path=str(lab.path("backups")))["archive"]["path"]
    run("qemu-io", "-c", "write -P 9 0 4096", str(base.disks()["vda"]))
    was = truth.content_sha256(clone, "qcow2")
    refused = run_module("vm_restore", source=archive, force=True, fails=True)
    assert "base.qcow2 belongs to the VM clone" in refused.message
    assert truth.content_sha256(clone, "qcow2") == was


def linked_disk(lab: Lab, spelled: str) -> LabVm:
    """As on nodes of OpenNebula: /var/lib/one//datastores/0/43/disk.0, which is a link."""
    for name in ("one", "one/0", "one/0/43"):
        lab.path(name)
    directory = lab.directory / "one/0"
    make_image(directory / "43/disk.0.data", Disk())
    (directory / "43/disk.0").symlink_to("disk.0.data")
    (directory / "data").symlink_to("43")
    return lab.create_vm("one-43", [Disk(path=spelled.format(lab.directory))], agent=False, start=False)


@pytest.mark.parametrize("spelled", ["{}/one//0/43/disk.0", "{}/one/0/data/../43/disk.0"])
def test_a_disk_that_is_a_link_comes_back_in_place(lab: Lab, run_module, spelled: str) -> None:
    vm = linked_disk(lab, spelled)
    archive = run_module("vm_backup", vm="one-43", path=str(lab.path("backups")))["archive"]["path"]
    was = truth.content_sha256(vm.disks()["vda"], "qcow2")
    run("qemu-io", "-c", "write -P 7 0 4096", str(vm.disks()["vda"]))
    run_module("vm_restore", source=archive, force=True)
    assert truth.content_sha256(vm.disks()["vda"], "qcow2") == was


def test_a_disk_that_is_a_link_comes_back_with_its_snapshots(lab: Lab, run_module) -> None:
    vm, backups = linked_disk(lab, "{}/one//0/43/disk.0"), str(lab.path("backups"))
    run_module("vm_backup", vm="one-43", path=backups, mode="auto")
    run("qemu-io", "-c", "write -P 5 0 4096", str(vm.disks()["vda"]))
    done = run_module("vm_backup", vm="one-43", path=backups, mode="auto")
    assert done["mode"] == "incremental", done["reason"]
    was = truth.content_sha256(vm.disks()["vda"], "qcow2")
    run("qemu-io", "-c", "write -P 6 0 4096", str(vm.disks()["vda"]))
    run_module("vm_restore", source=done["archive"]["path"], force=True)
    assert truth.content_sha256(vm.disks()["vda"], "qcow2") == was
    assert len(vm.domain.snapshotListNames()) == 2
    run_module("vm_snapshot", vm="one-43", snapshot="all", state="absent")
    assert truth.content_sha256(vm.disks()["vda"], "qcow2") == was
