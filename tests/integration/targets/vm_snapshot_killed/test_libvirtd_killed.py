# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirtd SIGKILLed in a revert that it has begun to end: QEMU runs on, and what was not done is done by the next run (S26)."""

from __future__ import annotations

import libvirt
import pytest

from ansible_collections.kvmops.backup.tests.integration.targets.vm_snapshot import states
from ansible_collections.kvmops.backup.tests.lab import daemons, libvirtd_kills
from ansible_collections.kvmops.backup.tests.lab._run import wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


@pytest.fixture(scope="module")
def vm(module_lab):
    """A VM with an internal snapshot that others stand on, one with memory, and an internal one on top."""
    vm = module_lab.create_vm("cut", [Disk(), Disk()])
    vm.wait_for_marker(2)
    for name, take in (("below", states.internal), ("m1", with_memory), ("top", states.internal)):
        vm.agent.shell(f"echo {name} >/run/mark")
        take(vm, name)
    return vm


def with_memory(vm, name):
    states.external(vm, name, memory=True)


def in_writing_the_definition(name):
    return libvirtd_kills.killed_in_writing(f"/etc/libvirt/qemu/{name}.xml")


# libvirt notes that QEMU runs, starts the CPUs, notes the snapshot and, of an internal one, writes the definition
@pytest.mark.parametrize(
    ("name", "killed"),
    [  # in this order: "top" lies in what the VM writes to, "below" needs a copy
        ("top", libvirtd_kills.killed_before_cpus_of),
        ("below", in_writing_the_definition),
        ("m1", libvirtd_kills.killed_before_cpus_of),
    ],
)
def test_revert(vm, run_module, name, killed):
    title = f"since {name}"
    vm.domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_TITLE, title, None, None, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    vm.agent.shell("echo now >/run/mark")
    frozen = states.frozen(vm)
    with killed(vm.name):
        run_module("vm_snapshot", fails=True, vm=vm.name, snapshot=name, state="reverted")
        wait_for("libvirtd to die", lambda: daemons.libvirtd_pid() is None, 60)
    daemons.start()
    found = states.frozen(vm)
    assert {key: found[key] for key in frozen} == frozen
    paused = vm.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    assert paused == (killed is libvirtd_kills.killed_before_cpus_of)

    result = run_module("vm_snapshot", vm=vm.name, snapshot=name)
    assert result.changed  # settling was a change, the snapshot was there
    assert not run_module("vm_snapshot", vm=vm.name, snapshot=name).changed
    assert any(f"the revert to {name} was finished" in text for text in result.warnings), result.warnings
    assert vm.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    assert [each["name"] for each in result["snapshots"] if each["current"]] == [name]
    states.assert_consistent(vm)
    assert title not in vm.xml(inactive=True)
    wait_for("the agent", vm.agent.answers, 180)
    assert vm.agent.shell("cat /run/mark").strip() == name
    vm.wait_for_marker(vm.last_marker().number + 1)
    assert states.frozen(vm) == frozen
