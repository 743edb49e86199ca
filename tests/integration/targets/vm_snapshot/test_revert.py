# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Back to every kind of snapshot, and what that does to the others."""

from __future__ import annotations

import os

from ansible_collections.kvmops.backup.tests.integration.targets.vm_snapshot import states
from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


def visible(vm):
    """Digest of what the guest sees on each disk."""
    return {
        target: truth.content_sha256(path, states.look(vm).files[os.path.realpath(path)].format, in_use=vm.is_running())
        for target, path in vm.disks().items()
    }


def mark(vm, text):
    """A word in the guest's memory that no disk has."""
    vm.agent.shell(f"echo {text} >/run/mark")


def marked(vm):
    return vm.agent.shell("cat /run/mark").strip()


def patiently_marked(vm):
    wait_for(f"the agent of {vm.name}", vm.agent.answers, 180)
    return marked(vm)


def revert(run_module, vm, name, **more):
    return run_module("vm_snapshot", vm=vm.name, snapshot=name, state="reverted", **more)


def test_external_with_and_without_memory(lab, run_module):
    """A chain, reverted into from both ends; branches grow, and everything else stays what it was."""
    vm = lab.create_vm("external", [Disk(), Disk("raw")])
    vm.wait_for_marker(2)
    mark(vm, "m1")
    assert run_module("vm_snapshot", vm=vm.name, snapshot="m1", memory=True).changed
    vm.wait_for_marker(vm.last_marker().number + 2)
    mark(vm, "later")
    assert run_module("vm_snapshot", vm=vm.name, snapshot="d2", quiesce=True).changed
    vm.wait_for_marker(vm.last_marker().number + 2)
    before = states.frozen(vm)

    result = revert(run_module, vm, "m1")
    assert result.changed and vm.is_running()
    assert patiently_marked(vm) == "m1"
    vm.wait_for_marker(vm.last_marker().number + 2)
    assert states.frozen(vm) == before
    assert [each["name"] for each in result["snapshots"] if each["current"]] == ["m1"]
    states.assert_consistent(vm)
    assert run_module("vm_snapshot", vm=vm.name, snapshot="branch").changed
    frozen = states.frozen(vm)

    assert revert(run_module, vm, "d2").changed
    assert not vm.is_running()
    assert visible(vm) == {target: digest for (name, target), digest in before.items() if name == "d2"}
    assert not revert(run_module, vm, "d2").changed
    run(
        "qemu-img", "resize", "-q", "-f", "qcow2", str(vm.disks()["vda"]), "+1M"
    )  # nothing written, yet not the same disk
    assert revert(run_module, vm, "d2").changed
    assert visible(vm) == {target: digest for (name, target), digest in before.items() if name == "d2"}
    assert states.frozen(vm) == frozen
    vm.start().wait_for_marker(1)
    assert states.frozen(vm) == frozen
    assert {each["name"]: each["parent"] for each in revert(run_module, vm, "branch")["snapshots"]} == {
        "m1": "", "d2": "m1", "branch": "m1",
    }  # fmt: skip
    assert states.frozen(vm) == frozen

    removed = run_module("vm_snapshot", vm=vm.name, snapshot="all", state="absent")
    assert removed["snapshots"] == []
    directory = os.path.dirname(next(iter(vm.disks().values())))
    assert visible(vm) == {target: digest for (name, target), digest in frozen.items() if name == "branch"}
    assert sorted(os.listdir(directory)) == sorted(os.path.basename(path) for path in vm.disks().values()), os.listdir(
        directory
    )


def test_internal_below_external(lab, run_module):
    """libvirt alone would write to the image that the external ones stand on."""
    vm = lab.create_vm("mixed", [Disk(), Disk()])
    vm.wait_for_marker(2)
    mark(vm, "i1")
    states.internal(vm, "i1")
    vm.wait_for_marker(vm.last_marker().number + 2)
    mark(vm, "later")
    states.external(vm, "e1", memory=True)
    vm.wait_for_marker(vm.last_marker().number + 2)
    states.external(vm, "e2")
    frozen = states.frozen(vm)

    assert revert(run_module, vm, "i1").changed
    assert patiently_marked(vm) == "i1"
    vm.wait_for_marker(vm.last_marker().number + 2)
    assert states.frozen(vm) == frozen
    states.assert_consistent(vm)

    mark(vm, "again")
    assert revert(run_module, vm, "i1").changed
    assert patiently_marked(vm) == "i1"
    assert revert(run_module, vm, "e1").changed
    assert patiently_marked(vm) == "later"
    assert states.frozen(vm) == frozen
    states.assert_consistent(vm)
    vm.shutdown()
    run_module("vm_snapshot", vm=vm.name, snapshot="all", state="absent")
    assert states.names(vm) == []
    vm.start().wait_for_marker(1)
