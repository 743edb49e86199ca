# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check mode behind a dead run: the next run would put its remains right first, so they are no reason to refuse."""

from __future__ import annotations

from ansible_collections.kvmops.backup.tests.integration.targets.vm_snapshot import states
from ansible_collections.kvmops.backup.tests.lab import kills
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


def test_a_dead_merge_is_told_and_not_held_against_the_vm(lab, run_module):
    vm = lab.create_vm("left", [Disk()], writer=False)
    run_module("vm_snapshot", vm=vm.name, snapshot="s1")
    absent = {"vm": vm.name, "snapshot": "s1", "state": "absent"}
    kills.kill_around_libvirt_call("vm_snapshot", absent, "virDomain.blockCommit", "after")
    assert vm.domain.blockJobInfo("vda")["cur"] >= 0  # QEMU goes on with it
    for arguments in (absent, {"vm": vm.name, "snapshot": "new"}):
        predicted = run_module("vm_snapshot", check_mode=True, **arguments)
        assert predicted.changed and any("will put right" in text for text in predicted.warnings)
    assert vm.domain.snapshotListNames() == ["s1"] and vm.domain.blockJobInfo("vda")
    run_module("vm_snapshot", **absent)
    assert vm.domain.snapshotListNames() == []
    states.assert_consistent(vm)
