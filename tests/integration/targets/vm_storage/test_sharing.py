# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two definitions over one disk, as people have them to run a VM with a GPU or without: no snapshot stays on either."""

from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import SplitViewError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, vm_key
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import overlays, snapshot
from ansible_collections.kvmops.backup.tests.lab import daemons, truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm, make_image


@pytest.fixture
def disk(lab: Lab) -> Path:
    return make_image(lab.path("vms") / "desk.qcow2", Disk())


def define(lab: Lab, name: str, disk: Path) -> LabVm:
    return lab.create_vm(name, [Disk(path=disk)], agent=False, start=False)


@pytest.mark.parametrize("running", [False, True])
def test_of_one_disk_there_are_full_backups_only(lab: Lab, run_module, disk: Path, running: bool) -> None:
    desk, backups = define(lab, "desk", disk), str(lab.path("backups"))
    (lab.directory / "link").symlink_to(disk.parent)
    define(lab, "desk-gpu", lab.directory / "link/desk.qcow2")
    if running:
        desk.start(wait=False)
    crash = {"vm": "desk", "path": backups, "consistency": "crash"}
    for asked in ({"mode": "full", "incrementable": True}, {"mode": "incremental"}):
        refused = run_module("vm_backup", **crash, **asked, fails=True)
        assert f"the VM desk-gpu has {disk} too" in refused.message
    done = run_module("vm_backup", **crash, mode="auto")
    assert done["mode"] == "full" and not done["archive"]["incrementable"]
    assert f"the VM desk-gpu has {disk} too" in done["reason"]
    assert any("nothing can be added to this archive" in text for text in done.warnings)
    for check_mode in (False, True):
        refused = run_module("vm_snapshot", vm="desk", snapshot="s1", check_mode=check_mode, fails=True)
        assert f"the VM desk-gpu has {disk} too" in refused.message
    assert desk.domain.snapshotListNames() == [] and desk.disks()["vda"] == disk


def test_a_definition_that_is_made_later_ends_the_increments(lab: Lab, run_module, disk: Path) -> None:
    desk, backups = define(lab, "desk", disk), str(lab.path("backups"))
    first = run_module("vm_backup", vm="desk", path=backups, mode="auto")["archive"]["path"]
    define(lab, "desk-gpu", disk)
    (entry,) = run_module("backup_info", archive=first)["archives"]
    assert entry["incrementable"] is False
    done = run_module("vm_backup", vm="desk", path=backups, mode="auto")
    assert done["mode"] == "full" and f"the VM desk-gpu has {disk} too" in done["reason"]
    assert len(desk.domain.snapshotListNames()) == 1


def test_what_another_vm_wrote_to_the_base_is_not_merged_into(lab: Lab, disk: Path) -> None:
    """The VM is shut down in mid-backup, and the other definition is started meanwhile."""
    desk = define(lab, "desk", disk)
    plan = snapshot.SnapshotPlan(
        vm_uuid=desk.domain.UUIDString(),
        vm_name="desk",
        name="kvmops-test",
        description="",
        overlays=(snapshot.Overlay("vda", str(disk), "qcow2", f"{disk}.overlay"),),
        excluded_targets=(),
        memory_path="",
        quiesce=False,
    )
    conn = connection.connect(daemons.URI)
    domain = connection.find_domain(conn, "desk")
    journal = Journal.open(vm_key(plan.vm_uuid), snapshot.OPERATION, overlays.SnapshotFacts({}, plan.vm_uuid, "desk"))
    try:
        snapshot.take(conn, domain, plan, journal)
        run("qemu-io", "-c", "write -P 3 0 4096", f"{disk}.overlay")
        run("qemu-io", "-c", "write -P 4 8192 4096", str(disk))
        was = truth.file_sha256(disk)
        with pytest.raises(SplitViewError, match="was written to since"):
            snapshot.remove(conn, domain, plan, journal, Progress())
        assert truth.file_sha256(disk) == was and Path(f"{disk}.overlay").exists()
    finally:
        journal.done()
