# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs that are off, go off or come on while a snapshot exists; splits that no merge can heal."""

from __future__ import annotations

import os
from pathlib import Path

import libvirt
import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError, SplitViewError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain, monitor, views
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import SnapshotPhase, Step
from ansible_collections.kvmops.backup.tests.integration.targets.vm_recovery import cycle
from ansible_collections.kvmops.backup.tests.integration.targets.vm_recovery.cycle import Before, Cycle, open_journal
from ansible_collections.kvmops.backup.tests.lab import recovery, truth
from ansible_collections.kvmops.backup.tests.lab._run import wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


@pytest.fixture
def vm(lab):
    """A VM of its own, running, its writer at work."""
    machine = lab.create_vm("power", [Disk(), Disk("raw")])
    machine.wait_for_marker(1)
    return machine


def overlaid_behind_libvirt(vm):
    """What a libvirtd that dies in QEMU's transaction leaves: QEMU on the overlays, no definition knows them."""
    run = Cycle(vm, "crash")
    plan = run.plan
    originals = cycle.snapshot._originals(run.domain, plan)
    run.journal.record(plan=plan, originals=originals, phase=SnapshotPhase.TAKING)
    indexes = [int(disk.index) for disk in domain.parse(vm.xml()).disks]
    actions = []
    for number, overlay in enumerate(plan.overlays, start=max(indexes) + 1):
        cycle.qemu_img.create_overlay(overlay.overlay_path, overlay.base_path, overlay.base_format)
        owner = os.stat(overlay.base_path)
        os.chown(overlay.overlay_path, owner.st_uid, owner.st_gid)
        storage, image = f"libvirt-{number}-storage", f"libvirt-{number}-format"
        monitor.execute(run.domain, "blockdev-add", driver="file", filename=overlay.overlay_path, node_name=storage)
        monitor.execute(run.domain, "blockdev-add", driver="qcow2", file=storage, backing=None, node_name=image)
        node = views.gather(run.conn, run.domain).disk(overlay.target).node
        actions.append({"type": "blockdev-snapshot", "data": {"node": node, "overlay": image}})
    monitor.execute(run.domain, "transaction", actions=actions)
    run.die()
    return plan


def visible(plan, of):
    """Digests of what a guest would see on the VM's disks: through the overlays ("overlay"), or on the bases alone ("base")."""
    if of == "overlay":
        return [truth.content_sha256(each.overlay_path, "qcow2") for each in plan.overlays]
    return [truth.content_sha256(each.base_path, each.base_format) for each in plan.overlays]


def assert_settles_to(vm, before, plan, content):
    """The next run brings the VM, which is off, back to its own disks with that content."""
    print(cycle.settle(vm))
    assert vm.xml(inactive=True) == before.definition
    assert sorted(os.listdir(before.directory)) == before.files
    assert visible(plan, "base") == content
    assert recovery.pending(plan.vm_uuid) == []


def test_snapshot_of_an_off_vm(vm):
    vm.shutdown()
    before = Before(vm)
    digests = {path: truth.content_sha256(path, path.suffix[1:]) for path in vm.disks().values()}
    run = Cycle(vm, "crash")
    taken = run.take()
    assert taken.frozen_ms == 0 and "<domainsnapshot>" in taken.snapshot_xml
    run.remove()
    before.same()
    assert {path: truth.content_sha256(path, path.suffix[1:]) for path in vm.disks().values()} == digests


def test_started_while_the_snapshot_exists(vm):
    vm.shutdown()
    before = Before(vm)
    run = Cycle(vm, "crash")
    run.take()
    frozen = {each.base_path: truth.file_sha256(each.base_path) for each in run.plan.overlays}
    vm.start().wait_for_marker(5)
    assert {path: truth.file_sha256(path) for path in frozen} == frozen
    run.remove()
    assert vm.xml(inactive=True) == before.definition
    cycle.assert_writing(vm, ["vda"])
    vm.shutdown()
    before.same()


@pytest.mark.parametrize("how", ["shutdown", "destroy"])
def test_powered_off_while_the_snapshot_exists(vm, how):
    before = Before(vm)
    run = Cycle(vm, "agent")
    run.take()
    run.die()
    vm.wait_for_marker(vm.last_marker().number + 3)
    getattr(vm, how)()
    content = visible(run.plan, "overlay")
    assert content != visible(run.plan, "base")
    assert_settles_to(vm, before, run.plan, content)


@pytest.mark.parametrize("bandwidth_mib", [0, 1])
def test_powered_off_in_the_merge(vm, bandwidth_mib):
    before = Before(vm)
    run = Cycle(vm, "crash")
    run.take()
    vm.wait_for_marker(vm.last_marker().number + 3)
    vda = run.plan.overlays[0]
    run.journal.record(steps={"vda": Step.COMMITTING})
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
    run.domain.blockCommit("vda", vda.base_path, vda.overlay_path, bandwidth_mib, flags)
    run.die()
    vm.destroy()
    assert_settles_to(vm, before, run.plan, visible(run.plan, "overlay"))


def test_libvirtd_died_in_the_transaction(vm):
    before = Before(vm)
    overlaid_behind_libvirt(vm)
    cycle.assert_writing(vm)
    print(cycle.settle(vm))
    before.same()
    cycle.assert_writing(vm)
    Cycle(vm, "agent").whole()  # fails if QEMU still had the old nodes
    before.same()


def test_libvirtd_died_in_the_transaction_then_power_off(vm):
    before = Before(vm)
    plan = overlaid_behind_libvirt(vm)
    vm.wait_for_marker(vm.last_marker().number + 3)
    vm.shutdown()
    assert_settles_to(vm, before, plan, visible(plan, "overlay"))


def test_base_written_without_the_overlay(vm):
    """The one split nobody can heal: said, with both names, and nothing touched."""
    plan = overlaid_behind_libvirt(vm)
    vm.wait_for_marker(vm.last_marker().number + 3)
    vm.shutdown()
    vm.start().wait_for_marker(3)
    vm.shutdown()
    files = [path for each in plan.overlays for path in (each.base_path, each.overlay_path)]
    before = {path: truth.file_sha256(path) for path in files}
    with pytest.raises(SplitViewError) as caught:
        cycle.settle(vm)
    assert plan.overlays[0].base_path in str(caught.value) and plan.overlays[0].overlay_path in str(caught.value)
    assert {path: truth.file_sha256(path) for path in files} == before
    assert recovery.pending(plan.vm_uuid)


def test_undefined_while_the_snapshot_exists(vm, lab):
    run = Cycle(vm, "crash")
    run.take()
    run.die()
    vm.wait_for_marker(vm.last_marker().number + 2)
    uuid = run.plan.vm_uuid
    vm.destroy()
    vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
    with pytest.raises(SplitViewError):
        recovery.settle(uuid)
    assert all(os.path.exists(each.overlay_path) for each in run.plan.overlays)


def test_renamed_while_the_snapshot_exists(vm, lab):
    run = Cycle(vm, "crash")
    run.take()
    vm.destroy()
    run.remove()
    Cycle(vm, "crash").die()  # a run that did nothing yet
    vm.domain.rename("other name")
    renamed = lab.adopt("other name")
    assert cycle.settle(renamed) == []
    assert recovery.pending(run.plan.vm_uuid) == []


def test_managed_save_in_between(vm):
    before = Before(vm)
    run = Cycle(vm, "crash")
    run.take()
    run.die()
    vm.domain.managedSave()
    with pytest.raises(RefusedError) as caught:
        cycle.settle(vm)
    assert "virsh start" in str(caught.value)
    vm.start()
    print(cycle.settle(vm))
    assert vm.xml(inactive=True) == before.definition
    cycle.assert_writing(vm, ["vda"])


def test_a_disk_that_was_unplugged(vm, lab):
    """From the running VM and its definition, while the snapshot exists: nobody has it, so its overlay is merged outside."""
    run = Cycle(vm, "crash")
    run.take()
    vm.wait_for_marker(vm.last_marker().number + 2)
    vdb = next(each for each in run.plan.overlays if each.target == "vdb")
    xml = vm.xml()
    start = xml.rindex("<disk", 0, xml.index("vdb.overlay"))
    element = xml[start : xml.index("</disk>", start) + len("</disk>")]

    def unplug():
        vm.agent.shell("kill -STOP -$(cat /run/writer.pid); umount -l /disk/vdb; sync")
        vm.domain.detachDeviceFlags(element, libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        wait_for("vdb to be gone", lambda: "vdb" not in vm.disks(), 180)
        return truth.content_sha256(vdb.overlay_path, "qcow2")

    content = unplug()
    run.die()
    # taken over by another VM, as a person would who reads the path in the definition
    other = lab.create_vm("other", [Disk("qcow2", path=Path(vdb.overlay_path))], start=False)
    told = cycle.settle(vm)
    assert any(vdb.overlay_path in text and vdb.base_path in text and "the VM other" in text for text in told), told
    assert truth.content_sha256(vdb.overlay_path, "qcow2") == content
    assert recovery.pending(run.plan.vm_uuid) == [] and vm.domain.snapshotListNames() == []
    assert vm.disks() == {"vda": Path(run.plan.overlays[0].base_path)}
    other.remove()

    # the same run again, and nobody takes it
    again = open_journal(run.plan)
    originals = cycle.snapshot._originals(run.domain, run.plan)
    again.record(plan=run.plan, originals=originals, phase=SnapshotPhase.TAKEN)
    again.close()
    print(cycle.settle(vm))
    assert not os.path.exists(vdb.overlay_path)
    assert truth.content_sha256(vdb.base_path, vdb.base_format) == content
    assert recovery.pending(run.plan.vm_uuid) == []
