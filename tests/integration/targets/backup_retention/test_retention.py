# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Old archives go by rules, for space, or not at all (SPEC E1 to E6, B16)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._archive import archive_locks
from ansible_collections.kvmops.backup.tests.lab import fingerprint, modules
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog import catalog_archives

DAY_S = 86400
MIB = 2**20


@pytest.fixture
def off(lab):
    """Makes VMs that are off, with as much data on their disk that does not compress."""

    def make(name: str, data_mib: int = 1):
        vm = lab.create_vm(name, [Disk(size_mib=data_mib + 8, ext4=False)], start=False)
        data = lab.path(f"data of {name}") / "random"
        data.write_bytes(os.urandom(data_mib * MIB))
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(data), str(vm.disks()["vda"]))
        return vm

    return make


def history(directory, vm, days):
    """Archives as old as that, in days; without the VM's own disk."""
    now = int(time.time())
    return [
        str(catalog_archives.write(directory, name=vm.name, uuid=vm.domain.UUIDString(), timestamp=now - each * DAY_S))
        for each in days
    ]


def paths(entries):
    return {each["path"] for each in entries}


def made(run_module, vm, target, **options):
    # without the kernel that lab VMs boot: sizes are those of the disks then
    return run_module("vm_backup", vm=vm.name, path=str(target), include_boot_files=False, **options)


def test_a_backup_keeps_the_newest_of_its_vm_and_touches_nothing_else(lab, off, run_module):
    target, vm, other = lab.path("backups"), off("web01"), off("db01")
    old = history(target, vm, [40, 20, 10]) + history(target, other, [300, 200])
    catalog_archives.write_foreign(target, uuid=vm.domain.UUIDString(), name="web01_20200101T000000Z_6f1a2b3c")
    for name in (".web01.tar.partial-0123456789ab", ".kvmops-trash-0123456789ab", "web01.tar.zst", "notes.txt"):
        (target / name).write_text("of somebody else")
    shutil.copytree(target, lab.directory / "before")
    predicted = made(run_module, vm, target, keep_last=2, check_mode=True)
    assert paths(predicted["removed_archives"]) == set(old[:2])
    assert fingerprint.files(target).keys() == {str(target / name) for name in os.listdir(lab.directory / "before")}
    result = made(run_module, vm, target, keep_last=2)
    assert result["removed_archives"] == predicted["removed_archives"]
    expected = set(os.listdir(lab.directory / "before")) - {os.path.basename(path) for path in old[:2]}
    assert set(os.listdir(target)) == expected | {os.path.basename(result["archive"]["path"])}
    untouched = fingerprint.files(target)
    for name in expected:
        assert (
            untouched[str(target / name)][2]
            == fingerprint.files(lab.directory / "before")[str(lab.directory / "before" / name)][2]
        )
    assert made(run_module, vm, target, keep_last=2, max_age="20h").changed is False


def test_a_month_is_kept_and_a_young_point_does_not_stop_the_rules(lab, off, run_module):
    target, vm = lab.path("backups"), off("web01")
    old = history(target, vm, [60, 31, 29])
    result = made(run_module, vm, target, keep_days=30)
    assert paths(result["removed_archives"]) == set(old[:2])
    assert {each["reason"] for each in result["removed_archives"]} == {"it is older than 30 days (keep_days)"}
    again = made(run_module, vm, target, keep_days=30, max_age="20h")
    assert not again.changed and again["removed_archives"] == []
    history(target, vm, [50])  # as after a run that died between backup and retention
    again = made(run_module, vm, target, keep_days=30, max_age="20h")
    assert again.changed and again["mode"] == "none" and len(again["removed_archives"]) == 1
    assert len(fingerprint.names(target)) == 2


def test_the_last_good_archive_and_the_chain_stay(lab, off, run_module):
    """The archive that auto would continue stays while the VM stands on it, and goes when that has ended."""
    target, vm = lab.path("backups"), off("web01")
    chain = made(run_module, vm, target, mode="auto")["archive"]["path"]
    fulls = [made(run_module, vm, target)["archive"]["path"] for _number in range(3)]
    result = run_module("backup_retention", path=str(target), keep_last=1)
    assert paths(result["removed"]) == set(fulls[:2])
    reasons = {each["path"]: each["reason"] for each in result["kept"]}
    assert reasons[chain] == "a backup with mode auto would continue it" and "keep_last" in reasons[fulls[2]]
    grown = made(run_module, vm, target, mode="auto", keep_last=1)
    assert grown["archive"]["path"] == chain and grown["mode"] == "incremental"
    assert paths(grown["removed_archives"]) == {fulls[2]}
    run_module("vm_snapshot", vm=vm.name, snapshot="all", state="absent")
    last = made(run_module, vm, target, keep_last=1)
    assert paths(last["removed_archives"]) == {chain}
    assert fingerprint.names(target) == [last["archive"]["path"]]
    assert run_module("backup_retention", path=str(target), keep_days=1, keep_last=1).changed is False


#: Runs a module that stops itself before it verifies an archive, which it holds already.
STOPS = """
import os, runpy, signal, sys
from ansible_collections.kvmops.backup.plugins.module_utils._archive import verify
original = verify.verify_file
def stopping(*arguments, **options):
    os.kill(os.getpid(), signal.SIGSTOP)
    return original(*arguments, **options)
verify.verify_file = stopping
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_what_is_being_verified_stays(lab, off, run_module):
    target, vm = lab.path("backups"), off("web01", 30)
    first, second = (made(run_module, vm, target)["archive"]["path"] for _number in range(2))
    argv = [sys.executable, "-c", STOPS, *modules.module_argv("backup_verify", {"archive": first})[2:]]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as reader:
        try:
            assert os.waitid(os.P_PID, reader.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code == os.CLD_STOPPED
            assert archive_locks.users(first)
            result = run_module("backup_retention", path=str(target), keep_last=1)
            assert not result.changed and "restored or verified" in result["kept"][0]["reason"]
            assert (
                "restored or verified"
                in run_module("backup_archive", archive=first, state="absent", fails=True).message
            )
        finally:
            reader.send_signal(signal.SIGCONT)
        reader.communicate()
    assert paths(run_module("backup_retention", path=str(target), keep_last=1)["removed"]) == {first}
    assert fingerprint.names(target) == [second]


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_space_is_made_at_zero_bytes_free_and_no_more_than_needed(lab, off, loop_fs, run_module, kind):
    place = loop_fs(kind, 400)
    vms = [off(f"vm{number}", 20) for number in range(3)]
    old = [
        made(run_module, vm, place.path)["archive"]["path"] for vm in (vms[0], vms[1], vms[2], vms[0], vms[1], vms[2])
    ]
    place.fill(0)
    before = fingerprint.names(place.path)
    free = _files.free_bytes(str(place.path))
    assert free < 2 * MIB
    refused = run_module("backup_retention", path=str(place.path), free_space="300M", fails=True)
    assert "Nothing was removed" in refused.message and fingerprint.names(place.path) == before
    result = run_module("backup_retention", path=str(place.path), free_space="30M")
    assert [each["path"] for each in result["removed"]] == old[:2]
    assert abs(result["freed_bytes"] - (_files.free_bytes(str(place.path)) - free)) < 4 * MIB
    assert not run_module("backup_retention", path=str(place.path), free_space="30M").changed
    filler = place.path / "filler2"
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(_files.free_bytes(str(place.path)) - 10 * MIB, 4096))
    predicted = made(run_module, vms[0], place.path, free_space=True, check_mode=True)
    made_one = made(run_module, vms[0], place.path, free_space=True)
    assert made_one["removed_archives"] == predicted["removed_archives"]
    assert [each["path"] for each in made_one["removed_archives"]] == [old[2]]
    left = sorted([*old[3:], made_one["archive"]["path"]])
    assert [name for name in fingerprint.names(place.path) if name.endswith(".tar")] == left
    assert run_module("backup_verify", path=str(place.path))["archives"][-1]["ok"]


def test_a_backup_that_cannot_fit_removes_nothing(lab, off, loop_fs, run_module):
    place = loop_fs("ext4", 100)
    small, large = off("small", 10), off("large", 80)
    for _number in range(3):
        made(run_module, small, place.path)
    before = fingerprint.names(place.path)
    refused = made(run_module, large, place.path, free_space=True, fails=True)
    assert "free_space" in refused.message and "nothing was removed" in refused.message
    assert fingerprint.names(place.path) == before
    assert made(run_module, large, place.path, free_space=True, fails=True, check_mode=True).message == refused.message


def test_two_do_not_reckon_with_the_same_space(lab, off, loop_fs, run_module):
    """Each would fit alone: the second one makes room for itself while the first is writing."""
    place = loop_fs("ext4", 200)
    old, first, second = off("old", 12), off("first", 40), off("second", 30)
    gone = [made(run_module, old, place.path)["archive"]["path"] for _number in range(3)][:2]
    place.fill(56 * MIB)

    def begin(vm):
        options = {"vm": vm.name, "path": str(place.path), "free_space": True, "bandwidth": "6M"}
        options["include_boot_files"] = False
        argv = modules.module_argv("vm_backup", options)
        return subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )

    with begin(first) as one:
        wait_for("the first to write", lambda: any(".partial-" in name for name in os.listdir(place.path)), 60)
        with begin(second) as two:
            results = [modules.module_result("vm_backup", *each.communicate(timeout=300)) for each in (one, two)]
    assert not any(result.failed for result in results), [result.message for result in results]
    assert [[each["path"] for each in result["removed_archives"]] for result in results] == [[], gone]


def test_space_that_was_freed_just_now_counts(off, loop_fs, run_module):
    """btrfs gives back what was removed when it is synced, or half a minute later."""
    place, vm = loop_fs("btrfs", 200), off("web01", 20)
    filler = place.path / "filler"
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, _files.free_bytes(str(place.path)) - 5 * MIB)
    run("sync", "-f", str(place.path))
    assert "are free" in made(run_module, vm, place.path, fails=True).message
    filler.unlink()
    assert made(run_module, vm, place.path).changed


def test_read_only_places_and_missing_ones_are_refused(lab, off, loop_fs, run_module):
    place, vm = loop_fs("ext4", 60), off("web01")
    for _number in range(2):
        made(run_module, vm, place.path)
    place.remount("ro")
    assert "read-only" in run_module("backup_retention", path=str(place.path), keep_last=1, fails=True).message
    assert "not a directory" in run_module("backup_retention", path="/no/such/place", keep_last=1, fails=True).message
    assert len(fingerprint.names(place.path)) == 2


def test_protected_archives_stay_until_they_are_not(lab, off, run_module):
    target, vm = lab.path("backups"), off("web01")
    old = history(target, vm, [3, 2, 1])
    run_module("backup_archive", archive=old[0], protected=True)
    assert paths(run_module("backup_retention", path=str(target), keep_last=1, vm="web01")["removed"]) == {old[1]}
    run_module("backup_archive", archive=old[0], protected=False)
    assert paths(run_module("backup_retention", path=str(target), keep_last=1, vm="web01")["removed"]) == {old[0]}


def test_in_a_play_with_check_mode_and_a_pool(lab, off, ansible):
    vm, target = off("web01"), lab.create_pool("old backups")
    old = history(target, vm, [3, 2, 1])
    play = """
- hosts: localhost
  gather_facts: false
  tasks:
    - name: What would go
      kvmops.backup.backup_retention:
        pool: old backups
        keep_daily: 2
      check_mode: true
      diff: true
    - name: Go
      kvmops.backup.backup_retention:
        pool: old backups
        keep_daily: 2
    - name: Nothing more
      kvmops.backup.backup_retention:
        pool: old backups
        keep_daily: 2
"""
    result = ansible.playbook(play)
    assert result.exit_code == 0, result.output
    predicted, gone, again = (result.task(name).data for name in ("What would go", "Go", "Nothing more"))
    assert predicted["removed"] == gone["removed"] and paths(gone["removed"]) == {old[0]}
    assert gone["changed"] and not again["changed"] and len(again["kept"]) == 2
    assert old[0] in predicted["diff"]["before"]


def test_a_template_that_a_kept_archive_of_its_clone_needs_stays(lab, off, run_module):
    target, template = lab.path("backups"), off("golden")
    run_module("vm_template", vm="golden")
    run_module("vm_thin_clone", template="golden", name="thin", path=str(lab.path("clones")))
    clone = lab.adopt("thin")
    needed = made(run_module, template, target)["archive"]["path"]
    thin = made(run_module, clone, target)["archive"]["path"]
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", str(template.disks()["vda"]))  # as nobody should
    changed = [made(run_module, template, target)["archive"]["path"] for _number in range(2)]
    result = run_module("backup_retention", path=str(target), keep_last=1)
    assert paths(result["removed"]) == {changed[0]}
    reasons = {each["path"]: each["reason"] for each in result["kept"]}
    assert "thin clone needs" in reasons[needed] and set(reasons) == {needed, thin, changed[1]}
    run_module("backup_archive", archive=thin, state="absent", force=True)
    assert paths(run_module("backup_retention", path=str(target), keep_last=1)["removed"]) == {needed}


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_blocks_that_are_shared_are_not_freed(lab, loop_fs, kind):
    place = loop_fs(kind, 300)
    path = place.path / "one"
    path.write_bytes(os.urandom(8 * MIB))
    run("sync", "-f", str(place.path))
    assert abs(_files.freed_bytes(str(path)) - 8 * MIB) < MIB
    run("cp", "--reflink=always", str(path), str(place.path / "two"))
    run("sync", "-f", str(place.path))
    assert _files.freed_bytes(str(path)) < MIB
