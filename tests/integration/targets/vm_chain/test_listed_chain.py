# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a disk stands on: QEMU goes by what the definition lists, and so does the backup, whatever the images say of themselves."""

from __future__ import annotations

import shutil

import libvirt
import pytest

from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.vm import Disk

_DISK_ONLY = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
_LISTED, _SAID = 0x11, 0x22


@pytest.mark.parametrize("running", [True, False], ids=["running", "off"])
def test_image_that_says_it_stands_on_another_file(lab, run_module, running):
    vm = lab.create_vm("listed", [Disk(ext4=False)], agent=False, writer=False, start=False)
    base = vm.disks()["vda"]
    vm.domain.create()
    vm.domain.snapshotCreateXML("<domainsnapshot><name>before</name></domainsnapshot>", _DISK_ONLY)
    vm.domain.destroy()
    other = base.with_name("other.qcow2")
    shutil.copy(base, other)
    for path, pattern in ((base, _LISTED), (other, _SAID)):
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 0 64k", str(path))
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(other), str(vm.disks()["vda"]))
    vm.domain.create()
    if not running:
        vm.domain.destroy()
    target = lab.path("backups")
    modes = []
    for number, mode in enumerate(["full", "auto", "auto"]):
        made = run_module("vm_backup", vm="listed", path=str(target), mode=mode, consistency="crash")
        modes.append(made["mode"])
        place = lab.path(f"restored-{number}")
        run_module("vm_restore", source=made["archive"]["path"], path=str(place), name="copy")
        restored = lab.adopt("copy")
        # fails where the pattern is another one
        run("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {_LISTED} 0 64k", str(restored.disks()["vda"]))
        restored.remove()
    assert modes == ["full", "full", "incremental"]
    names = vm.domain.snapshotListNames()
    refused = run_module("vm_snapshot", vm="listed", snapshot="all", state="absent", fails=True)
    assert f"the image itself says that it stands on {other}" in refused.message
    assert vm.domain.snapshotListNames() == names
