# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots are removed: chains and trees, VM running and off; what stays is what it was."""

from __future__ import annotations

import os

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import blockjobs
from ansible_collections.kvmops.backup.tests.integration.targets.vm_snapshot import states
from ansible_collections.kvmops.backup.tests.lab import markers, truth
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


def chain_of(vm, length, memory=False):
    """That many external snapshots, the guest writing in between."""
    for number in range(1, length + 1):
        if vm.is_running():
            vm.wait_for_marker(vm.last_marker().number + 1)
        states.external(vm, f"s{number}", memory=memory and number % 2 == 1)


@pytest.mark.parametrize(("length", "power"), [(1, "running"), (10, "running"), (2, "off"), (10, "off")])
def test_all_of_a_chain(lab, length, power):
    vm = lab.create_vm("chain", [Disk(), Disk("raw")])
    vm.wait_for_marker(1)
    directory = os.path.dirname(vm.disks()["vda"])
    before, files = vm.xml(inactive=True), sorted(os.listdir(directory))
    chain_of(vm, length)
    vm.wait_for_marker(vm.last_marker().number + 1)
    last = vm.last_marker().number
    if power == "off":
        vm.shutdown()
        visible = {target: truth.content_sha256(path, "qcow2") for target, path in vm.disks().items()}
    removed = states.remove(vm)
    assert list(removed.names) == [f"s{number}" for number in range(length, 0, -1)]
    assert states.names(vm) == []
    assert vm.xml(inactive=True) == before
    assert sorted(os.listdir(directory)) == files
    states.assert_consistent(vm)
    if power == "off":
        assert visible == {target: truth.content_sha256(path, path.suffix[1:]) for target, path in vm.disks().items()}
        vm.start()
    vm.wait_for_marker(last + 2)
    for target in ("vda", "vdb"):
        markers.parse_log(vm.log(target))


def test_each_disk_is_looked_at_a_few_times(lab, monkeypatch):
    """Merging takes as long as there are disks, not as their square; all of them begin before the first one ends."""
    disks = 9
    vm = lab.create_vm("many", [Disk(), *(Disk(size_mib=1, ext4=False) for _dummy in range(disks - 1))])
    chain_of(vm, 1)
    calls = []
    monkeypatch.setattr(qemu_img, "_execute", states.noted(calls, "qemu-img", qemu_img._execute))
    for name in ("start_commit", "pivot"):
        monkeypatch.setattr(blockjobs, name, states.noted(calls, name, getattr(blockjobs, name)))
    states.remove(vm)
    merges = [call for call in calls if call != "qemu-img"]
    assert merges == ["start_commit"] * disks + ["pivot"] * disks
    assert len(calls) - len(merges) <= 5 * disks
    states.assert_consistent(vm)
