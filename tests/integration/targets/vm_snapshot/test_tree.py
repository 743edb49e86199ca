# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A tree ten deep with branches, internal and external, with and without memory: each is reverted to (S29)."""

from __future__ import annotations

import os

from ansible_collections.kvmops.backup.tests.integration.targets.vm_snapshot import states
from ansible_collections.kvmops.backup.tests.lab import markers, truth
from ansible_collections.kvmops.backup.tests.lab._run import wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk

# name and kind: internal (with memory), memory (external with memory), disk (external without)
TRUNK = [
    ("t1", "memory"), ("t2", "internal"), ("t3", "disk"), ("t4", "memory"), ("t5", "internal"),
    ("t6", "disk"), ("t7", "disk"), ("t8", "memory"), ("t9", "disk"), ("t10", "disk"),
]  # fmt: skip
BRANCHES = {"t4": [("a1", "disk"), ("a2", "memory")], "t2": [("b1", "memory"), ("b2", "disk")]}
# branches first and back, up and down, twice from the same
REVERTS = ["t7", "a1", "t10", "t1", "b2", "t3", "a2", "t5", "t9", "t4", "b1", "t6", "t2", "t8", "t10", "t5"]


def take(vm, name, kind):
    vm.wait_for_marker(vm.last_marker().number + 1)
    vm.agent.shell(f"echo {name} >/run/mark")
    if kind == "internal":
        states.internal(vm, name)
    else:
        states.external(vm, name, memory=kind == "memory")


def check(vm, name, kind, frozen):
    """The VM is in that snapshot."""
    if kind == "disk":
        assert not vm.is_running()
        for target, path in vm.disks().items():
            assert truth.content_sha256(path, "qcow2") == frozen[name, target], (name, target)
        return
    wait_for(f"the agent of {vm.name}", vm.agent.answers, 180)
    assert vm.agent.shell("cat /run/mark").strip() == name
    # what the guest's memory thinks of the disks must be what the disks hold
    vm.agent.shell("echo 3 >/proc/sys/vm/drop_caches")
    for target in vm.disks():
        markers.parse_log(vm.log(target))
    assert "error" not in vm.agent.shell("dmesg | grep -i ext4").lower()  # at least that it was mounted


def test_every_snapshot_of_a_tree(lab, run_module):
    vm = lab.create_vm("tree", [Disk(size_mib=32), Disk(size_mib=32)])
    vm.wait_for_marker(1)
    directory = os.path.dirname(vm.disks()["vda"])
    kinds = dict(TRUNK) | {name: kind for branch in BRANCHES.values() for name, kind in branch}
    for name, kind in TRUNK:
        take(vm, name, kind)
    for fork, branch in BRANCHES.items():
        run_module("vm_snapshot", vm=vm.name, snapshot=fork, state="reverted")
        check(vm, fork, kinds[fork], {})
        for name, kind in branch:
            take(vm, name, kind)
    frozen = states.frozen(vm)
    parents = {state.name: state.info.parent for state in states.look(vm).states}
    assert len(parents) == 14 and parents["a1"] == "t4" and parents["b1"] == "t2"

    assert len(REVERTS) <= 16 and set(REVERTS) == set(kinds)
    for name in REVERTS:
        result = run_module("vm_snapshot", vm=vm.name, snapshot=name, state="reverted")
        assert [each["name"] for each in result["snapshots"] if each["current"]] == [name]
        check(vm, name, kinds[name], frozen)
        states.assert_consistent(vm)
        assert states.frozen(vm) == frozen
    assert {state.name: state.info.parent for state in states.look(vm).states} == parents

    # what stays, stays what it is, whichever goes
    vm.destroy()
    for name in ("t4", "t6", "t1", "a1"):
        run_module("vm_snapshot", vm=vm.name, snapshot=name, state="absent")
        left = states.frozen(vm)
        assert left == {key: digest for key, digest in frozen.items() if key in left}
        assert (name, "vda") not in left
        states.assert_consistent(vm)
    for name in ("a2", "t8", "b2"):
        run_module("vm_snapshot", vm=vm.name, snapshot=name, state="reverted")
        check(vm, name, kinds[name], frozen)
    run_module("vm_snapshot", vm=vm.name, snapshot="all", state="absent")
    assert states.names(vm) == []
    for target, path in vm.disks().items():
        assert truth.content_sha256(path, "qcow2") == frozen["b2", target]
    print(sorted(os.listdir(directory)))
    assert len(os.listdir(directory)) == 2
