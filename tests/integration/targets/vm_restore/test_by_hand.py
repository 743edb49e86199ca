# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The way back without this collection, by the commands of docs/FORMAT.md ("Reading without this collection")."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm

Run = Callable[..., ModuleResult]


def extracted(lab: Lab, run_module: Run, vm: LabVm) -> Path:
    """A directory with the members of a new archive of the VM, which is then lost with its disks."""
    archive = run_module("vm_backup", vm=vm.name, path=str(lab.path("backups")))["archive"]["path"]
    directory = lab.path(f"members of {vm.name}")
    run("tar", "-xf", archive, "-C", str(directory))
    disks = vm.disks()
    vm.remove()
    for path in disks.values():
        path.unlink()
    return directory


def definition(members: Path) -> str:
    """The newest configuration."""
    return sorted(members.glob("*.xml"))[-1].read_text(encoding="utf-8")


def test_a_raw_disk_is_converted_back(lab: Lab, run_module: Run) -> None:
    vm = lab.create_vm("by hand", [Disk(), Disk("raw")])
    number = vm.wait_for_marker(3).number
    vm.destroy()
    disks = vm.disks()
    before = {"vda": truth.content_sha256(disks["vda"], "qcow2"), "vdb": truth.raw_sha256(disks["vdb"])}
    members = extracted(lab, run_module, vm)
    (members / "vda_0.qcow2").rename(disks["vda"])
    run("qemu-img", "convert", "-O", "raw", str(members / "vdb_0.qcow2"), str(disks["vdb"]))
    lab.connection.defineXML(definition(members))
    assert before == {"vda": truth.content_sha256(disks["vda"], "qcow2"), "vdb": truth.raw_sha256(disks["vdb"])}
    vm.start()
    vm.wait_for_marker(number + 1)


def test_a_thin_clone_is_put_on_its_template(lab: Lab, run_module: Run) -> None:
    template = lab.create_vm("template", [Disk()], start=False)
    run_module("vm_template", vm="template")
    run_module("vm_thin_clone", template="template", name="clone", path=str(lab.path("clones")))
    clone = lab.adopt("clone")
    disk = clone.disks()["vda"]
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", str(disk))
    before = truth.content_sha256(disk, "qcow2")
    members = extracted(lab, run_module, clone)
    (members / "vda_0.qcow2").rename(disk)
    run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", str(template.disks()["vda"]), str(disk))
    lab.connection.defineXML(definition(members))
    assert clone.disks()["vda"] == disk and truth.content_sha256(disk, "qcow2") == before
