# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A snapshot has a disk that the VM has no more: it is in the backup, and a revert of the restored VM brings it back."""

from __future__ import annotations

from xml.etree import ElementTree

import libvirt

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


def detach(vm, target):
    root = ElementTree.fromstring(vm.xml(inactive=True))
    disk = next(each for each in root.iterfind("devices/disk") if each.find("target").get("dev") == target)
    vm.domain.detachDeviceFlags(ElementTree.tostring(disk, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_CONFIG)


def test_a_disk_that_only_a_snapshot_has(lab, run_module):
    vm = lab.create_vm("fewer", [Disk(), Disk("raw", size_mib=16), Disk(size_mib=16)], start=False)
    paths = vm.disks()
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 3M", str(paths["vdb"]))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 8 2M 3M", str(paths["vdc"]))
    frozen = {target: truth.content_sha256(path, path.suffix[1:]) for target, path in paths.items()}
    run_module("vm_snapshot", vm="fewer", snapshot="three disks")
    for target in ("vdb", "vdc"):
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 1M", str(vm.disks()[target]))  # what nobody will miss
        detach(vm, target)
    source = run_module("vm_backup", vm="fewer", path=str(lab.path("backups")))["archive"]["path"]

    restored = run_module("vm_restore", source=source, name="copy", path=str(lab.path("restored")))
    copy = lab.adopt("copy")
    assert list(copy.disks()) == ["vda"]
    assert restored.warnings == []

    run_module("vm_snapshot", vm="copy", snapshot="three disks", state="reverted")
    assert {target: truth.content_sha256(path, "qcow2") for target, path in copy.disks().items()} == frozen
