# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The snapshot tree in an archive, restored under another name: every snapshot can be reverted to and is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable

import pytest

from ansible_collections.kvmops.backup.tests.integration.targets.vm_restore_tree import snapshot_tree as trees
from ansible_collections.kvmops.backup.tests.integration.targets.vm_restore_tree.snapshot_tree import Saved
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult, run_module
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm

Run = Callable[..., ModuleResult]

#: Every revert that is tried on the restored VM, in this order: an internal snapshot changes the file it lies in, which
#: later snapshots stand on, so the deepest go first.
REVERTS = [
    "b2", "b1", "a9", "a8", "a6", "a4", "a3", "a2",  # external
    "a10", "a7", "a5", "a1",  # internal
]  # fmt: skip


@dataclass
class Scene:
    """A VM with its tree, backed up while it was off and once more while it ran."""

    vm: LabVm
    states: dict[str, Saved]
    digests: dict[str, dict[str, str]]
    current: dict[str, str]
    archive: str
    running_archive: str
    tree: dict[str, tuple[str, bool]]


def grow(lab: Lab) -> tuple[LabVm, list[Saved]]:
    """a1 to a10 in a row; b1 and b2 on a6; then back to a4, so that the current one is in the middle."""
    vm = lab.create_vm("tree", [Disk(), Disk(size_mib=16)], start=False)
    states = [trees.take(vm, "a1", internal=True), trees.take(vm, "a2")]
    vm.start()
    vm.wait_for_marker(2)
    states.append(trees.take(vm, "a3"))
    states.append(trees.take(vm, "a4", memory=True))
    states.append(trees.take(vm, "a5", internal=True, memory=True))
    states.append(trees.take(vm, "a6", memory=True))
    states.append(trees.take(vm, "a7", internal=True, memory=True))
    states.append(trees.take(vm, "a8"))
    states.append(trees.take(vm, "a9", memory=True))
    vm.destroy()
    states.append(trees.take(vm, "a10", internal=True))
    trees.revert_outside(vm, "a6", 1)
    vm.start()
    states.append(trees.take(vm, "b1", memory=True))
    vm.destroy()
    states.append(trees.take(vm, "b2"))
    trees.revert_outside(vm, "a4", 2)
    vm.start()
    vm.wait_for_marker(vm.wait_for_marker(1).number + 1)
    vm.destroy()
    return vm, states


@pytest.fixture(scope="module")
def scene(module_lab: Lab) -> Iterator[Scene]:
    vm, states = grow(module_lab)
    target = module_lab.path("backups")
    off = run_module("vm_backup", vm="tree", path=str(target))["archive"]["path"]
    digests = {state.name: trees.digests(state) for state in states}
    current, tree = trees.shown(vm), trees.tree(module_lab, "tree")
    vm.start()
    vm.agent.shell(f"echo at the backup >{trees.MARKER}")
    running = run_module("vm_backup", vm="tree", path=str(target), consistency="memory")["archive"]["path"]
    vm.destroy()
    yield Scene(vm, {state.name: state for state in states}, digests, current, off, running, tree)


def test_every_snapshot_of_a_restored_tree_is_right(module_lab: Lab, scene: Scene) -> None:
    assert sorted(REVERTS) == sorted(scene.states) and len(REVERTS) <= 16
    done = run_module("vm_restore", source=scene.archive, name="copy", path=str(module_lab.path("restored")))
    copy = module_lab.adopt("copy")
    assert sorted(done["snapshots"]) == sorted(scene.states) and not copy.is_running()
    assert trees.tree(module_lab, "copy") == scene.tree
    assert trees.shown(copy) == scene.current
    for snapshot in copy.domain.listAllSnapshots():
        xml = snapshot.getXMLDesc(1)
        assert str(scene.vm.disks()["vda"].parent) not in xml and scene.vm.domain.UUIDString() not in xml
        assert "<name>tree</name>" not in xml
    assert not run_module(
        "vm_restore", source=scene.archive, name="copy", path=str(module_lab.directory / "restored")
    ).changed
    for number, name in enumerate(REVERTS):
        state = scene.states[name]
        if state.internal:
            trees.revert_inside(copy, name)
        else:
            trees.revert_outside(copy, name, number, resume=state.memory)
        assert trees.shown(copy) == scene.digests[name], name
        if state.memory:
            assert trees.remembers(copy) == name
        copy.destroy()


def test_the_memory_of_the_point_resumes_the_guest(module_lab: Lab, scene: Scene) -> None:
    """The backup of the running VM: its own snapshot is the current one, the disk a fresh overlay on what it froze."""
    done = run_module("vm_restore", source=scene.running_archive, name="resumed", path=str(module_lab.path("resumed")))
    copy = module_lab.adopt("resumed")
    (own,) = set(done["snapshots"]) - set(scene.states)
    tree = trees.tree(module_lab, "resumed")
    assert tree.pop(own) == ("a4", True)
    assert tree == {name: (parent, False) for name, (parent, _current) in scene.tree.items()}
    at_point = trees.shown(copy)
    copy.start()
    copy.wait_for_marker(1)
    copy.destroy()
    assert trees.shown(copy) != at_point
    run_module("vm_snapshot", vm="resumed", snapshot=own, state="reverted")
    assert copy.is_running() and trees.remembered(copy) == "at the backup"
    copy.wait_for_marker(copy.wait_for_marker(1).number + 2)
    copy.destroy()
    # reverting by our own module, an external and an internal one that others stand on
    for name in ("a4", "a5", "b2"):
        run_module("vm_snapshot", vm="resumed", snapshot=name, state="reverted")
        if scene.states[name].memory:
            assert trees.remembered(copy) == name
            copy.destroy()
        else:
            assert trees.shown(copy) == scene.digests[name]
    copy.remove()


def test_flatten_gives_one_image_per_disk(module_lab: Lab, scene: Scene) -> None:
    place = module_lab.path("flat")
    done = run_module("vm_restore", source=scene.archive, name="flat", path=str(place), flatten=True)
    flat = module_lab.adopt("flat")
    assert done["snapshots"] == [] and trees.tree(module_lab, "flat") == {} and trees.shown(flat) == scene.current
    assert sorted(path.name for path in place.iterdir()) == ["flat-vda.qcow2", "flat-vdb.qcow2"]
    for path in flat.disks().values():
        image = json.loads(run("qemu-img", "info", "--output=json", str(path)))
        assert "backing-filename" not in image and not image.get("snapshots")
        run("qemu-img", "check", "-q", str(path))
    assert not run_module("vm_restore", source=scene.archive, name="flat", path=str(place), flatten=True).changed
    text = run_module("vm_restore", source=scene.archive, name="flat", path=str(place), fails=True).message
    assert "a VM named flat exists" in text  # the tree is something else
    flat.remove()


def test_restored_in_place_with_force(module_lab: Lab, scene: Scene) -> None:
    """Last, for it replaces the VM: the tree under its own names, and the end of the VM's backup cycle."""
    vm = scene.vm
    trees.take(vm, "since")
    done = run_module("vm_restore", source=scene.archive, force=True)
    assert done.changed and trees.tree(module_lab, "tree") == scene.tree and trees.shown(vm) == scene.current
    assert not [path for path in vm.disks()["vda"].parent.iterdir() if "kvmops-old" in path.name]
    for state in scene.states.values():
        assert trees.digests(state) == scene.digests[state.name], state.name  # every file where it was
    assert not run_module("vm_restore", source=scene.archive).changed
    run_module("vm_snapshot", vm="tree", snapshot="a6", state="reverted")
    assert trees.remembered(vm) == "a6"
    vm.destroy()
    assert run_module("vm_restore", source=scene.archive, force=True).changed and trees.shown(vm) == scene.current
