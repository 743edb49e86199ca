# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A backup killed at any moment: the next run puts the VM back on its disks and succeeds; no half archive is ever visible.

A seeded sample; KVMOPS_SWEEP=all kills at every system call of every kind.
"""

from __future__ import annotations

import os
import random

import pytest

from ansible_collections.kvmops.backup.tests.lab import fingerprint, kills, markers
from ansible_collections.kvmops.backup.tests.lab.vm import Disk

SYSTEM_CALLS = ("write", "pwrite64", "fsync", "fdatasync", "ftruncate", "renameat2", "unlink")
DECISIVE = ("pwrite64", "fsync", "renameat2")
LIBVIRT_CALLS = (
    ("virDomain.snapshotCreateXML", 1),
    ("virDomain.blockCommit", 1),
    ("virDomain.blockCommit", 2),
    ("virDomain.blockJobAbort", 1),
    ("virDomain.blockJobAbort", 2),
    ("virDomainSnapshot.delete", 1),
)


@pytest.fixture(scope="module")
def victim(module_lab):
    """A writing VM with an agent and two disks."""
    return module_lab.create_vm("victim", [Disk(), Disk("raw", size_mib=32)])


def visible(target):
    """Names in the target that a user or another tool sees as archives."""
    return [name for name in fingerprint.names(target) if not os.path.basename(name).startswith(".")]


def assert_next_run_heals(victim, before, files, target, run_module):
    """What must hold after a kill."""
    old = visible(target)
    for archive in old:
        assert run_module("backup_verify", archive=archive)["archives"][0]["ok"]
    victim.wait_until_thawed()
    result = run_module("vm_backup", vm="victim", path=str(target))
    assert fingerprint.definition(victim) == before
    assert fingerprint.names(*{path.parent for path in victim.disks().values()}) == files
    assert fingerprint.names(target) == sorted([*old, result["archive"]["path"]])
    assert os.listdir("/var/lib/kvmops-backup/journal") == []
    for path in fingerprint.names(target):
        os.unlink(path)


def assert_nothing_was_lost(victim):
    """The guest's log has every line."""
    numbers = [each.number for each in markers.parse_log(victim.log())]
    assert numbers == list(range(1, len(numbers) + 1))
    victim.wait_for_marker(len(numbers) + 1)


def test_at_system_calls(lab, victim, run_module):
    target = lab.path("backups")
    arguments = {"vm": "victim", "path": str(target)}
    before, files = (
        fingerprint.definition(victim),
        fingerprint.names(*{path.parent for path in victim.disks().values()}),
    )
    counted = kills.count_system_calls("vm_backup", arguments, SYSTEM_CALLS)
    for path in fingerprint.names(target):
        os.unlink(path)
    seed = random.randrange(2**32)
    print("seed", seed, "calls", counted)
    chance = random.Random(seed)
    for name, count in counted.items():
        assert count, f"{name} is never called"
        wanted = {chance.randint(1, count)} | ({1, count} if name in DECISIVE else set())
        if os.environ.get("KVMOPS_SWEEP") == "all":
            wanted = range(1, count + 1)
        for number in sorted(wanted):
            print("kill at", name, number)
            kills.kill_at_system_call("vm_backup", arguments, name, number)
            assert_next_run_heals(victim, before, files, target, run_module)
    assert_nothing_was_lost(victim)


def test_around_libvirt_calls(lab, victim, run_module):
    target = lab.path("backups")
    before, files = (
        fingerprint.definition(victim),
        fingerprint.names(*{path.parent for path in victim.disks().values()}),
    )
    for method, number in LIBVIRT_CALLS:
        for when in ("before", "after"):
            print("kill", when, method, number)
            arguments = {"vm": "victim", "path": str(target)}
            killed = kills.kill_around_libvirt_call("vm_backup", arguments, method, when, number)
            assert killed.returncode == -9, killed.stdout + killed.stderr
            if method == "virDomain.snapshotCreateXML":
                assert visible(target) == []
                told = run_module("vm_info", vms=["victim"]).warnings
                assert [text for text in told if "will put right: a run of backup of victim" in text] == told != []
            assert_next_run_heals(victim, before, files, target, run_module)
    assert_nothing_was_lost(victim)
