# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The same restore again, of a VM that has gone on since without a write to the files that the restore had made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Callable

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm

Run = Callable[..., ModuleResult]


def shown(vm: LabVm) -> str:
    """Digest of what the guest sees of its disk."""
    return truth.content_sha256(vm.disks()["vda"], "qcow2")


def gone_on(result: ModuleResult) -> bool:
    """Whether it says that the VM is not at the point."""
    return any("has gone on since this restore" in text for text in result.warnings)


def test_a_snapshot_or_another_disk_is_not_the_point(lab: Lab, run_module: Run) -> None:
    vm = lab.create_vm("onward", [Disk()], start=False)
    at_point = shown(vm)
    archive = str(run_module("vm_backup", vm=vm.name, path=str(lab.path("backups")))["archive"]["path"])
    assert run_module("vm_restore", source=archive, force=True).changed
    same = run_module("vm_restore", source=archive, force=True)
    assert not same.changed and not gone_on(same)
    made = vm.disks()["vda"]
    lab.create_pool("onward-pool", made.parent)  # elsewhere a file that the VM does not have any more stays

    def overlaid() -> None:
        """As after the nightly increment: the file of the restore is frozen, the writes go to another one."""
        run_module("vm_snapshot", vm=vm.name, snapshot="nightly")
        assert vm.disks()["vda"] != made
        run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", str(vm.disks()["vda"]))

    def redefined() -> None:
        other = Path(shutil.copy(made, made.with_name("other.qcow2")))
        run("qemu-io", "-f", "qcow2", "-c", "write -P 8 1M 64k", str(other))
        lab.connection.defineXML(vm.xml(inactive=True).replace(str(made), str(other)))

    for change in (overlaid, redefined):
        frozen = truth.file_sha256(made)
        change()
        assert shown(vm) != at_point and truth.file_sha256(made) == frozen
        stays, now = run_module("vm_restore", source=archive), shown(vm)
        assert not stays.changed and gone_on(stays) and now != at_point
        assert run_module("vm_restore", source=archive, force=True, check_mode=True).changed and shown(vm) == now
        assert run_module("vm_restore", source=archive, force=True).changed
        assert shown(vm) == at_point and vm.disks()["vda"] == made and vm.domain.snapshotNum() == 0
        assert not run_module("vm_restore", source=archive, force=True).changed
