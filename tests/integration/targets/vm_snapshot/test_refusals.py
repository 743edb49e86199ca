# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What vm_snapshot leaves alone and says so, what a second run and check mode do, and the thin clone's template."""

from __future__ import annotations

import json
import os
import subprocess

import libvirt
import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _locks
from ansible_collections.kvmops.backup.tests.integration.targets.vm_snapshot import states
from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


def everything(vm):
    """All that a refusal must leave as it was."""
    directory = os.path.dirname(next(iter(vm.disks().values())))
    return (
        vm.xml(inactive=True),
        [state.info.xml for state in states.look(vm).states],
        sorted(os.listdir(directory)),
        states.frozen(vm),
    )


@pytest.fixture(scope="module")
def mute(module_lab):
    """A VM that is off, with a chain of two."""
    vm = module_lab.create_vm("mute", [Disk(), Disk("raw")], writer=False, start=False)
    states.external(vm, "s1")
    states.external(vm, "s2")
    return vm


@pytest.fixture(scope="module")
def busy(module_lab):
    """A running VM with a chain of two."""
    vm = module_lab.create_vm("busy", [Disk()])
    states.external(vm, "s1")
    states.external(vm, "s2")
    return vm


def refused(run_module, vm, text, check_modes=(True, False), **arguments):
    """Check mode predicts nothing that a run refuses."""
    before = everything(vm)
    for check_mode in check_modes:
        result = run_module("vm_snapshot", fails=True, check_mode=check_mode, vm=vm.name, **arguments)
        assert text in result.message, result.message
    assert everything(vm) == before


ALL_THREE = [
    {"snapshot": "new"},
    {"snapshot": "s1", "state": "absent"},
    {"snapshot": "s1", "state": "reverted"},
]


@pytest.mark.parametrize("arguments", ALL_THREE, ids=["present", "absent", "reverted"])
def test_somebody_elses_jobs(busy, module_lab, run_module, arguments):
    directory = module_lab.path(f"others-{arguments.get('state')}")
    copy = directory / "copy.qcow2"
    target = f"<disk type='file'><source file='{copy}'/><driver type='qcow2'/></disk>"
    busy.domain.blockCopy("vda", target, flags=libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
    refused(run_module, busy, "copy-vda", **arguments)
    assert busy.domain.blockJobInfo("vda")["type"] == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY
    busy.domain.blockJobAbort("vda")

    os.chmod(directory, 0o777)
    xml = (
        f"<domainbackup mode='pull'><server transport='unix' socket='{directory}/socket'/>"
        f"<disks><disk name='vda' backup='yes' type='file'><scratch file='{directory}/scratch'/></disk></disks></domainbackup>"
    )
    busy.domain.backupBegin(xml, None)
    refused(run_module, busy, "backup job", **arguments)
    assert busy.domain.jobStats()["operation"] == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
    busy.domain.abortJob()
    wait_for("its end", lambda: busy.domain.jobStats()["type"] == libvirt.VIR_DOMAIN_JOB_NONE, 60)


def test_standing_still_since_its_memory_was_saved(busy, module_lab, run_module):
    """QEMU has handed its disks over then: a merge would fail in the middle."""
    busy.domain.suspend()
    run_module("vm_snapshot", vm="busy", snapshot="asleep", memory=True)
    refused(run_module, busy, "virsh resume busy", snapshot="asleep", state="absent")
    refused(run_module, busy, "virsh resume busy", snapshot="new")
    path = str(module_lab.path("backups"))
    assert "virsh resume busy" in run_module("vm_backup", vm="busy", path=path, fails=True).message
    assert os.listdir(path) == []
    busy.domain.resume()
    assert not run_module("vm_snapshot", vm="busy", snapshot="asleep", state="absent").warnings


@pytest.mark.parametrize("arguments", ALL_THREE, ids=["present", "absent", "reverted"])
def test_managed_save(busy, run_module, arguments):
    busy.domain.managedSave()
    try:
        refused(run_module, busy, "managed-save image", **arguments)
        assert busy.domain.hasManagedSaveImage()
    finally:
        busy.domain.create()


def test_two_at_once(mute, run_module):
    uuid = mute.domain.UUIDString()
    with _locks.hold(f"vm-{uuid}", of="The VM web01", what="a test of mine"):
        # check mode takes no lock
        refused(run_module, mute, "a test of mine", check_modes=(False,), snapshot="all", state="absent")


def test_an_internal_one_that_a_merge_would_lose(mute, run_module):
    active = mute.disks()["vda"]
    run("qemu-img", "snapshot", "-c", "inside", str(active))
    refused(run_module, mute, "it would be lost", snapshot="s2", state="absent")
    refused(run_module, mute, "it would be lost", snapshot="all", state="absent")
    run("qemu-img", "snapshot", "-d", "inside", str(active))


def test_a_layer_that_another_vm_has(mute, module_lab, run_module):
    layer = next(iter(states.look(mute).states)).disk("vda").path
    other = module_lab.create_vm("other", [Disk(size_mib=8)], writer=False, start=False)
    xml = other.xml(inactive=True).replace(str(other.disks()["vda"]), layer)
    module_lab.connection.defineXML(xml)
    refused(run_module, mute, "other", snapshot="s1", state="absent")
    directory = module_lab.path("clone")
    options = {"driver": "qcow2", "file": {"driver": "file", "filename": layer}}
    for name, backing in (("clone.qcow2", layer), ("second.qcow2", f"json:{json.dumps(options)}")):
        overlay = directory / name
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, f"file:{overlay}")
        module_lab.connection.defineXML(xml.replace(layer, str(overlay)))
        refused(run_module, mute, "other", snapshot="s1", state="absent")
    other.remove()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"snapshot": "new", "memory": True}, "it is off"),
        ({"snapshot": "new", "quiesce": True}, "it is off"),
        ({"snapshot": "new", "quiesce": True, "memory": True}, "exclude each other"),
        ({"snapshot": "all"}, "every snapshot"),
        ({"snapshot": "a/b"}, "slash"),
        ({"snapshot": "nothing", "state": "reverted"}, "no such snapshot"),
    ],
)
def test_what_cannot_be(mute, run_module, arguments, text):
    refused(run_module, mute, text, **arguments)


def test_a_missing_file(mute, run_module):
    state = states.look(mute).state("s1").disk("vda")
    os.rename(state.path, f"{state.path}.away")
    result = run_module("vm_snapshot", fails=True, vm=mute.name, snapshot="s1", state="reverted")
    assert state.path in result.message
    os.rename(f"{state.path}.away", state.path)


def test_again_and_in_check_mode(lab, run_module):
    vm = lab.create_vm("again", [Disk(), Disk("raw")], writer=False, start=False, isos=[])
    first = everything(vm)
    predicted = run_module("vm_snapshot", check_mode=True, diff=True, vm=vm.name, snapshot="a")
    assert predicted.changed and everything(vm) == first
    made = run_module("vm_snapshot", vm=vm.name, snapshot="a", description="mine")
    assert made.changed and made["snapshots"] == predicted["snapshots"]
    assert made["diff"] == {"before": "", "after": "a (on nothing) current\n"}
    assert "mine" in states.look(vm).state("a").info.xml
    assert not run_module("vm_snapshot", vm=vm.name, snapshot="a").changed
    run_module("vm_snapshot", vm=vm.name, snapshot="b")
    second = everything(vm)
    for arguments in ({"snapshot": "a", "state": "reverted"}, {"snapshot": "b", "state": "absent"}):
        predicted = run_module("vm_snapshot", check_mode=True, vm=vm.name, **arguments)
        assert predicted.changed and everything(vm) == second
        done = run_module("vm_snapshot", vm=vm.name, **arguments)
        assert done["snapshots"] == predicted["snapshots"]
        assert not run_module("vm_snapshot", vm=vm.name, **arguments).changed
        second = everything(vm)
    assert run_module("vm_snapshot", vm=vm.name, snapshot="all", state="absent").changed
    assert not run_module("vm_snapshot", vm=vm.name, snapshot="all", state="absent").changed
    assert len(os.listdir(os.path.dirname(vm.disks()["vda"]))) == 2


@pytest.mark.parametrize("power", ["running", "off"])
def test_thin_clone(lab, run_module, power):
    """Everything is merged, and not one byte of the template changes."""
    vm = lab.create_vm("maker", [Disk()], writer=False, start=False)
    template = vm.disks()["vda"]
    vm.domain.undefine()
    clone = lab.path("clone") / "clone.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(template), str(clone))
    digest = truth.file_sha256(template)
    vm = lab.create_vm("clone", [Disk(path=clone)], start=power == "running")
    if power == "running":
        vm.wait_for_marker(1)
    for name in ("s1", "s2"):
        if power == "running":
            vm.wait_for_marker(vm.last_marker().number + 1)
        else:
            active = str(vm.disks()["vda"])
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P {ord(name[1])} 60M 64k", active], check=True)
        run_module("vm_snapshot", vm=vm.name, snapshot=name)
    run_module("vm_snapshot", vm=vm.name, snapshot="all", state="absent")
    assert vm.disks()["vda"] == clone
    assert truth.file_sha256(template) == digest
    assert os.listdir(clone.parent) == ["clone.qcow2"]
    states.assert_consistent(vm)
    vm.destroy()


def test_through_ansible(lab, ansible):
    """The action plugin, diff, and the group of defaults."""
    vm = lab.create_vm("played", [Disk()], writer=False, start=False)
    done = ansible.module("vm_snapshot", diff=True, vm=vm.name, snapshot="a")
    assert done.changed and [each["name"] for each in done["snapshots"]] == ["a"]
    assert "+a (on nothing) current" in done.output
    assert ansible.module("vm_snapshot", vm=vm.name, snapshot="all", state="absent")["snapshots"] == []
