# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What belongs to others: their jobs, snapshots, freezes and files are named and left alone (S18, B2)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import libvirt
import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import BusyError, KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.tests.integration.targets.vm_recovery import cycle
from ansible_collections.kvmops.backup.tests.integration.targets.vm_recovery.cycle import Before, Cycle
from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


def refused(vm, kind, text, mode="agent"):
    """take() raises that error, and the VM is as it was."""
    before = Before(vm)
    attempt = Cycle(vm, mode)
    with pytest.raises(kind) as caught:
        attempt.take()
    assert text in str(caught.value)
    attempt.journal.done()
    before.same()


def test_somebody_elses_block_job(two, lab):
    copy = lab.path("copy") / "copy.qcow2"
    target = f"<disk type='file'><source file='{copy}'/><driver type='qcow2'/></disk>"
    run_ = Cycle(two, "crash")
    run_.take()
    two.domain.blockCopy("vda", target, flags=libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
    with pytest.raises(BusyError):
        run_.remove()
    assert two.domain.blockJobInfo("vda")["type"] == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY
    other = cycle.plan_for(two)
    assert other.overlays[0].base_path.endswith(".overlay")  # still on it
    two.domain.blockJobAbort("vda")
    run_.remove()

    two.domain.blockCopy(
        "vda", target.replace("copy.qcow2", "copy2.qcow2"), flags=libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
    )
    attempt = Cycle(two, "crash")
    with pytest.raises(BusyError) as caught:
        attempt.take()
    assert "copy-vda" in str(caught.value)
    assert two.domain.blockJobInfo("vda")["type"] == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY
    attempt.journal.done()
    two.domain.blockJobAbort("vda")
    Cycle(two, "crash").whole()


def test_somebody_elses_backup(two, lab):
    directory = lab.path("nbd")
    os.chmod(directory, 0o777)
    xml = (
        f"<domainbackup mode='pull'><server transport='unix' socket='{directory}/socket'/>"
        f"<disks><disk name='vda' backup='yes' type='file'><scratch file='{directory}/scratch'/></disk>"
        "<disk name='vdb' backup='no'/></disks></domainbackup>"
    )
    two.domain.backupBegin(xml, None)
    try:
        attempt = Cycle(two, "crash")
        with pytest.raises(BusyError) as caught:
            attempt.take()
        assert "backup job" in str(caught.value)
        attempt.journal.done()
        assert two.domain.jobStats()["operation"] == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
    finally:
        two.domain.abortJob()
        wait_for("its end", lambda: two.domain.jobStats()["type"] == libvirt.VIR_DOMAIN_JOB_NONE, 60)
    Cycle(two, "crash").whole()


def test_somebody_elses_freeze(two):
    two.domain.fsFreeze()
    refused(two, RefusedError, "already frozen by somebody else")
    assert two.agent.freeze_status() == "frozen"
    two.domain.fsThaw()


def test_somebody_elses_file(two):
    path = cycle.plan_for(two).overlays[1].overlay_path
    with open(path, "w", encoding="ascii") as file:
        file.write("mine")
    refused(two, RefusedError, path)
    with open(path, encoding="ascii") as file:
        assert file.read() == "mine"
    os.unlink(path)


def test_a_disk_plugged_in_since_the_plan(two, lab):
    attempt = Cycle(two, "crash")
    image = lab.path("more") / "c.raw"
    run("truncate", "-s", "8M", str(image))
    disk = f"<disk type='file' device='disk'><driver type='raw'/><source file='{image}'/><target dev='sdx' bus='usb'/></disk>"
    two.domain.attachDeviceFlags(disk, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    with pytest.raises(RefusedError) as caught:
        attempt.take()
    assert "sdx" in str(caught.value)
    attempt.journal.done()
    two.domain.detachDeviceFlags(disk, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    wait_for("the disk to be gone", lambda: "sdx" not in two.xml(), 120)


def test_snapshots_of_the_user(two):
    """They stay as they are, an external one that the disks stand on too, and the current one stays current."""
    directory = Before(two).directory
    overlays_ = [("vda", f"{directory}/user.vda"), ("vdb", f"{directory}/user.vdb")]
    snapshots.create(two.domain, snapshots.document("user", "mine", overlays_, []), memory=False, quiesce=False)
    tree, definition = snapshots.tree(two.domain), two.xml(inactive=True)
    plan = cycle.plan_for(two, "agent")
    assert plan.overlays[0].base_path == f"{directory}/user.vda"
    run_ = Cycle(two, "agent")
    run_.take()
    assert [node.name for node in snapshots.tree(two.domain)] == ["user", cycle.NAME]
    run_.remove()
    assert snapshots.tree(two.domain) == tree
    assert two.xml(inactive=True) == definition
    cycle.assert_writing(two)


def test_somebody_elses_snapshot_in_the_making(lab, run_module):
    """libvirt lists its name and nothing else of it yet: the VM is busy, and nobody else is held up."""
    vm = lab.create_vm("freezing", [Disk()])
    vm.wait_for_marker(2)
    lab.create_vm("other", [Disk(size_mib=16)], writer=False, start=False)
    backups = str(lab.path("backups"))
    snapshots.create(
        vm.domain, snapshots.document("first", "", [("vda", f"{backups}.first")], []), memory=False, quiesce=False
    )
    whole = snapshots.tree(vm.domain)
    vm.set_freeze_mode("hang")
    disk = f"vda,snapshot=external,file={backups}.second"
    argv = ["virsh", "snapshot-create-as", vm.name, "second", "--disk-only", "--quiesce", "--diskspec", disk]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as user:
        try:
            wait_for("libvirt's work on it", lambda: "second" in vm.domain.snapshotListNames(), 120)
            assert snapshots.tree(vm.domain) == whole
            busy = run_module("vm_backup", vm=vm.name, path=backups, fails=True)
            assert vm.name in busy.message and "Another job is at work on the VM" in busy.message
            archive = run_module("vm_backup", vm="other", path=backups)["archive"]["path"]
            assert run_module("vm_restore", source=archive, name="copy")["changed"]
        finally:
            vm.domain.destroy()
    assert user.returncode


def test_settling_while_libvirt_is_still_at_it(lab):
    """The worker dies right after it has asked; its successor waits for what libvirt makes of it."""
    vm = lab.create_vm("slow", [Disk()])
    vm.wait_for_marker(2)
    vm.set_freeze_mode("pause")  # a freeze that takes its time
    before = Before(vm)
    worker = subprocess.Popen(
        [sys.executable, os.path.abspath(cycle.__file__), vm.name, "agent", "0"], stdout=subprocess.DEVNULL
    )
    journals = Path(_paths.state_dir()) / "journal"
    wait_for(
        "the request",
        lambda: any("snapshot" in path.read_text() for path in journals.glob("*.json")),
        120,
        every_s=0.01,
    )
    wait_for("libvirt's work on it", lambda: cycle.NAME in vm.domain.snapshotListNames(), 120, every_s=0.01)
    worker.kill()
    worker.wait()
    print(cycle.settle(vm))
    time.sleep(1)  # a snapshot that came later would be seen now
    before.same()
    cycle.assert_writing(vm, ["vda"])


def test_no_agent(lab):
    vm = lab.create_vm("mute", [Disk()], agent=False, writer=False)
    refused(vm, RefusedError, "no guest agent channel")
    before = Before(vm)
    Cycle(vm, "memory").whole()
    before.same()


def test_volumes_come_back_as_volumes(lab):
    pool = lab.create_pool("vols")
    image = pool / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "32M")
    lab.connection.storagePoolLookupByName("vols").refresh()
    vm = lab.create_vm("volumes", [Disk(size_mib=16)], writer=False, start=False)
    xml = vm.xml(inactive=True)
    start = xml.index("<source file=")
    xml = xml[:start] + "<source pool='vols' volume='disk.qcow2'/>" + xml[xml.index("/>", start) + 2 :]
    lab.connection.defineXML(xml.replace("<disk type='file'", "<disk type='volume'", 1))
    definition = vm.xml(inactive=True)
    assert "volume='disk.qcow2'" in definition
    vm.start()
    overlay = cycle.snapshot.Overlay("vda", str(image), "qcow2", f"{image}.overlay")
    plan = cycle.snapshot.SnapshotPlan(vm.domain.UUIDString(), vm.name, cycle.NAME, "", (overlay,), (), "", False)
    run_ = Cycle.__new__(Cycle)
    run_.plan, run_.conn, run_.domain, run_.journal = plan, lab.connection, vm.domain, cycle.open_journal(plan)
    run_.whole()
    assert vm.xml(inactive=True) == definition
    vm.shutdown()
    run_.journal = cycle.open_journal(plan)
    run_.whole()
    assert vm.xml(inactive=True) == definition


def test_managed_save(lab):
    vm = lab.create_vm("saved", [Disk()], writer=False)
    vm.domain.managedSave()
    refused(vm, RefusedError, "managed-save image", mode="crash")
    assert vm.domain.hasManagedSaveImage()
    vm.domain.managedSaveRemove()


def test_off_but_in_use(lab):
    """libvirt says off, but somebody writes to the image: a QEMU that libvirt has lost, or a person with a tool."""
    vm = lab.create_vm("lost", [Disk()], writer=False, start=False)
    image = vm.disks()["vda"]
    socket = lab.path("nbd") / "socket"
    holder = subprocess.Popen(["qemu-nbd", "--persistent", "-f", "qcow2", "-k", str(socket), str(image)])
    try:
        # it listens before it has opened the image, and answers when it has
        ask = ["qemu-img", "info", "-f", "raw", f"nbd+unix:///?socket={socket}"]
        wait_for("qemu-nbd", lambda: subprocess.run(ask, capture_output=True, check=False).returncode == 0, 60)
        digest = truth.file_sha256(image)
        attempt = Cycle(vm, "crash")
        with pytest.raises(KvmopsError) as caught:
            attempt.take()
        assert str(image) in str(caught.value) and "libvirt says it is off" in str(caught.value)
        attempt.journal.done()
        assert truth.file_sha256(image) == digest
    finally:
        holder.terminate()
        holder.wait()
