# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives with several points: each comes back with its disks, its snapshots, and only the layers that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.tests.integration.targets.vm_restore_tree import snapshot_tree as trees
from ansible_collections.kvmops.backup.tests.lab import kills, truth
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult, module_argv
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm

Run = Callable[..., ModuleResult]


def frozen(vm: LabVm, own: str) -> dict[str, str]:
    """Digest of what the snapshot of a point has frozen."""
    snapshot = vm.domain.snapshotLookupByName(own).getXMLDesc(1)
    definition = snapshot[snapshot.index("<domain ") : snapshot.index("</domain>") + len("</domain>")]
    return {
        target: truth.content_sha256(path, "raw" if path.suffix == ".raw" else "qcow2", in_use=vm.is_running())
        for target, path in trees.sources(definition).items()
    }


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_every_point_of_an_incremental_archive(lab: Lab, run_module: Run, compress: bool) -> None:
    vm = lab.create_vm("points", [Disk(), Disk("raw", size_mib=32)])
    vm.wait_for_marker(3)
    target = lab.path("backups")
    known: dict[int, tuple[dict[str, str], dict[str, tuple[str, bool]]]] = {}

    def backup(mode: str, consistency: str) -> str:
        done = run_module(
            "vm_backup",
            vm="points",
            path=str(target),
            mode=mode,
            incrementable=True,
            consistency=consistency,
            compress=compress,
        )
        assert done["mode"] == mode, done["reason"]
        own = next(name for name, (_parent, current) in trees.tree(lab, "points").items() if current)
        known[done["point"]] = (frozen(vm, own), trees.tree(lab, "points"))
        if vm.is_running():
            vm.wait_for_marker(vm.wait_for_marker(1).number + 2)
        return str(done["archive"]["path"])

    archive = backup("full", "agent")
    backup("incremental", "memory")
    mine = trees.take(vm, "mine", memory=True)  # the next increment brings its layers and its memory too
    backup("incremental", "agent")
    vm.destroy()
    backup("incremental", "auto")
    at_mine = trees.digests(mine)
    assert len(known) == 4
    with open_archive(archive) as reader:
        # the kernel is used where it is, as this host has the same one
        members = {p.timestamp: {m.name for m in p.members if m.role is not Role.BOOT} for p in reader.points}
    assert list(members) == list(known)
    for number, (point, (digests, tree)) in enumerate(known.items()):
        place = lab.path(f"restored-{number}")
        done = run_module("vm_restore", source=archive, point=point, name=f"copy-{number}", path=str(place))
        copy = lab.adopt(f"copy-{number}")
        assert done["point"] == point and set(done["snapshots"]) == set(tree)
        assert trees.tree(lab, f"copy-{number}") == tree and trees.shown(copy) == digests
        assert len(list(place.iterdir())) == len(members[point]) + 2  # and the two fresh overlays
        copy.start()
        copy.wait_for_marker(1)
        copy.destroy()
        if number == 3:
            trees.revert_outside(copy, "mine", 1, resume=True)
            assert trees.shown(copy) == at_mine and trees.remembers(copy) == "mine"
        copy.remove()
    flat = run_module("vm_restore", source=archive, name="flat", path=str(lab.path("flat")), flatten=True)
    assert {disk["target"]: disk["format"] for disk in flat["disks"]} == {"vda": "qcow2", "vdb": "raw"}
    found = {disk["target"]: truth.content_sha256(disk["path"], disk["format"]) for disk in flat["disks"]}
    lab.adopt("flat")
    assert found == list(known.values())[-1][0]

    # in place, to an older point: no increment goes on from there
    older = list(known)[1]
    run_module("vm_restore", source=archive, point=older, force=True)
    assert trees.shown(vm) == known[older][0] and trees.tree(lab, "points") == known[older][1]
    text = run_module("vm_backup", vm="points", path=str(target), mode="incremental", fails=True).message
    assert "restored in place" in text
    full = run_module("vm_backup", vm="points", path=str(target), mode="auto")
    assert full["mode"] == "full" and "restored in place" in full["reason"]


def test_a_raw_base_below_snapshots_comes_back_in_the_format_asked_for(lab: Lab, run_module: Run) -> None:
    vm = lab.create_vm("raw", [Disk("raw")], start=False)
    states = [trees.take(vm, "one"), trees.take(vm, "two")]
    archive = run_module("vm_backup", vm="raw", path=str(lab.path("backups")))["archive"]["path"]
    for disk_format, suffixes in (("keep", {".raw", ".qcow2"}), ("qcow2", {".qcow2"})):
        place = lab.path(disk_format)
        done = run_module(
            "vm_restore", source=archive, name=disk_format, path=str(place), disk_format=disk_format, mac="new"
        )
        copy = lab.adopt(disk_format)
        again = run_module("vm_restore", source=archive, name=disk_format, path=str(place), disk_format=disk_format)
        assert not again.changed
        assert {path.suffix for path in place.iterdir()} == suffixes and len(done["disks"]) == 1
        for number, state in enumerate(states):
            trees.revert_outside(copy, state.name, number)
            assert trees.shown(copy) == trees.digests(state)
        copy.remove()


def test_a_backup_settles_a_dead_restore_of_the_vm(lab: Lab, run_module: Run) -> None:
    vm = lab.create_vm("settled", [Disk(size_mib=16)], start=False)
    trees.take(vm, "before", internal=True)
    target = lab.path("backups")
    archive = run_module("vm_backup", vm="settled", path=str(target))["archive"]["path"]
    tree, digests, xml = trees.tree(lab, "settled"), trees.shown(vm), vm.xml(inactive=True)
    arguments = {"source": archive, "force": True}
    for method, number in (("virConnect.defineXML", 1), ("virDomain.snapshotCreateXML", 1)):
        run_module("vm_restore", source=archive, force=True)
        tree, digests, xml = trees.tree(lab, "settled"), trees.shown(vm), vm.xml(inactive=True)
        Path(vm.disks()["vda"]).touch()  # written to since: the same restore is one again
        done = kills.kill_around_libvirt_call("vm_restore", arguments, method, "after", number)
        assert done.returncode == -9, (done.stdout, done.stderr, module_argv("vm_restore", arguments))
        predicted = run_module("vm_backup", vm="settled", path=str(target), check_mode=True)
        assert any("was interrupted" in text for text in predicted.warnings)
        settled = run_module("vm_backup", vm="settled", path=str(target))
        assert any("was taken back" in text for text in settled.warnings)
        assert (trees.tree(lab, "settled"), trees.shown(vm), vm.xml(inactive=True)) == (tree, digests, xml)
