# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The worker SIGKILLed before steps of a removal and of a revert: the next run finishes or takes back (S1, S26)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.integration.targets.vm_snapshot import states
from ansible_collections.kvmops.backup.tests.lab import markers, truth
from ansible_collections.kvmops.backup.tests.lab._run import wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


def stepwise(kill_at, vm, snapshot, state):
    """stepwise.py; the number of events if it was not to be killed. How many there are depends on where the VM stands just then."""
    program = str(Path(__file__).with_name("stepwise.py"))
    done = subprocess.run(
        [sys.executable, program, str(kill_at), vm.name, snapshot, state], capture_output=True, text=True, check=False
    )
    ended_before = done.returncode == 0 and kill_at > int(done.stdout)
    assert ended_before or done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr
    return 0 if kill_at else int(done.stdout)


def visible(vm):
    found = states.look(vm)
    return {
        target: truth.content_sha256(path, found.files[path].format, in_use=found.running)
        for target, path in found.active.items()
    }


def write_word(vm, word):
    """Something of its own on every disk of a VM that is off."""
    for path in vm.disks().values():
        fmt = states.look(vm).files[os.path.realpath(path)].format
        subprocess.run(
            ["qemu-io", "-f", fmt, "-c", f"write -q -P {len(word) % 255 + 1} 60M 64k", str(path)], check=True
        )
        subprocess.run(
            ["qemu-io", "-f", fmt, "-c", f"write -q -P {sum(map(ord, word)) % 255} 61M 64k", str(path)], check=True
        )


@pytest.mark.parametrize("name", ["all", "s1", "s2", "s3"])
def test_removal_off(lab, chosen, name):
    vm = lab.create_vm("off", [Disk(), Disk("raw")], writer=False, start=False)
    fresh = visible(vm)

    def build():
        for state in ("s1", "s2", "s3"):
            write_word(vm, state)
            states.external(vm, state)
        write_word(vm, f"now {name}")
        return states.frozen(vm), visible(vm)

    build()
    count = stepwise(0, vm, name, "absent")
    states.remove(vm)
    assert visible(vm) != fresh
    for kill_at in chosen(count):
        frozen, now = build()
        stepwise(kill_at, vm, name, "absent")
        print(f"killed before {kill_at} of {count}: {states.settle(vm)}")
        left = states.names(vm)
        assert left in (["s1", "s2", "s3"], [each for each in ("s1", "s2", "s3") if name not in (each, "all")])
        assert visible(vm) == now
        assert states.frozen(vm) == {key: digest for key, digest in frozen.items() if key[0] in left}
        states.assert_consistent(vm)
        states.remove(vm)
        assert visible(vm) == now
        assert len(os.listdir(os.path.dirname(next(iter(vm.disks().values()))))) == 2


@pytest.mark.parametrize("name", ["all", "s1", "s2"])
def test_removal_running(lab, chosen, name):
    vm = lab.create_vm("running", [Disk(), Disk("raw")])
    vm.wait_for_marker(1)

    def build():
        for state in ("s1", "s2", "s3"):
            states.external(vm, state)
        vm.wait_for_marker(vm.last_marker().number + 1)
        return states.frozen(vm)

    build()
    count = stepwise(0, vm, name, "absent")
    states.remove(vm)
    for kill_at in chosen(count):
        frozen = build()
        stepwise(kill_at, vm, name, "absent")
        print(f"killed before {kill_at} of {count}: {states.settle(vm)}")
        left = states.names(vm)
        assert left in (["s1", "s2", "s3"], [each for each in ("s1", "s2", "s3") if name not in (each, "all")])
        assert states.frozen(vm) == {key: digest for key, digest in frozen.items() if key[0] in left}
        states.assert_consistent(vm)
        states.remove(vm)
        vm.wait_for_marker(vm.last_marker().number + 1)
        for target in ("vda", "vdb"):
            markers.parse_log(vm.log(target))


@pytest.mark.parametrize("name", ["m1", "d2", "i0"])
def test_revert(lab, chosen, name):
    vm = lab.create_vm("back", [Disk(), Disk()])
    vm.wait_for_marker(2)
    vm.agent.shell("echo i0 >/run/mark")
    states.internal(vm, "i0")
    vm.agent.shell("echo m1 >/run/mark")
    states.external(vm, "m1", memory=True)
    vm.wait_for_marker(vm.last_marker().number + 1)
    states.external(vm, "d2")
    frozen = states.frozen(vm)
    states.external(vm, "now", memory=True)
    count = stepwise(0, vm, name, "reverted")
    for kill_at in chosen(count):
        if name == "i0" and "i0" in [state.name for state in states.look(vm).states if state.info.current]:
            states.external(vm, f"over{kill_at}")  # so that the next revert needs a copy again
        stepwise(0, vm, "now", "reverted")
        stepwise(kill_at, vm, name, "reverted")
        print(f"killed before {kill_at} of {count}: {states.settle(vm)}")
        states.assert_consistent(vm)
        now = states.frozen(vm)
        assert {key: now[key] for key in frozen} == frozen
        current = [state.name for state in states.look(vm).states if state.info.current]
        assert current in (["now"], [name])
        if current == [name] and name != "d2":
            wait_for("the agent", vm.agent.answers, 180)
            assert vm.agent.shell("cat /run/mark").strip() == name
        assert vm.is_running() or current == ["d2"]
        wanted = {os.path.basename(path) for path in states.look(vm).files}
        files = {each for each in os.listdir(os.path.dirname(next(iter(vm.disks().values())))) if ".memory" not in each}
        assert files == wanted


@pytest.mark.parametrize("name", ["all", "s2"])
def test_removal_then_power_off(lab, chosen, name):
    """The worker is killed, and the guest's power goes, before anybody can settle anything."""
    vm = lab.create_vm("unplugged", [Disk(), Disk("raw")])
    vm.wait_for_marker(1)
    for state in ("s1", "s2", "s3"):
        states.external(vm, state)
    count = stepwise(0, vm, name, "absent")
    states.remove(vm)
    for kill_at in chosen(count)[1::2]:
        for state in ("s1", "s2", "s3"):
            states.external(vm, state)
        vm.wait_for_marker(vm.last_marker().number + 1)
        stepwise(kill_at, vm, name, "absent")
        vm.destroy()
        now, frozen = visible(vm), states.frozen(vm)
        print(f"killed before {kill_at} of {count}: {states.settle(vm)}")
        left = states.names(vm)
        assert left in (["s1", "s2", "s3"], [each for each in ("s1", "s2", "s3") if name not in (each, "all")])
        assert visible(vm) == now
        kept = {key for key in frozen if key[0] in left and key[0] != name}
        assert {key: digest for key, digest in states.frozen(vm).items() if key in kept} == {
            key: frozen[key] for key in kept
        }
        states.assert_consistent(vm)
        states.remove(vm)
        assert visible(vm) == now
        vm.start().wait_for_marker(1)
