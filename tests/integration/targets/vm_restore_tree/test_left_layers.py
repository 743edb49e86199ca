# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A layer that no snapshot tells of any more comes back as the VM's own: it goes when the last snapshot goes."""

from __future__ import annotations

from pathlib import Path

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


def test_branch_whose_snapshot_was_removed(lab, run_module):
    vm = lab.create_vm("branches", [Disk(ext4=False)], agent=False, writer=False, start=False)

    def take(name):
        run_module("vm_snapshot", vm="branches", snapshot=name)
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {len(name)} {len(name)}M 64k", str(vm.disks()["vda"]))

    take("a")
    take("bb")
    run_module("vm_snapshot", vm="branches", snapshot="a", state="reverted")
    take("ccc")
    run_module("vm_snapshot", vm="branches", snapshot="a", state="absent")
    archive = run_module("vm_backup", vm="branches", path=str(lab.path("backups")))["archive"]["path"]
    place = lab.path("restored")
    run_module("vm_restore", source=archive, path=str(place), name="copy")
    copy = lab.adopt("copy")
    before = truth.content_sha256(copy.disks()["vda"], "qcow2")
    run_module("vm_snapshot", vm="copy", snapshot="all", state="absent")
    disk = copy.disks()["vda"]
    assert sorted(place.iterdir()) == [Path(disk)]
    assert "backing file" not in run("qemu-img", "info", str(disk))
    assert truth.content_sha256(disk, "qcow2") == before
