# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Clocks that jump, two runs at once, other people's jobs, kills in the middle (SPEC B6, B18; reliability S1, S16, S18, S24)."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import libvirt
import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive import reader
from ansible_collections.kvmops.backup.tests.integration.targets.vm_increment import chains
from ansible_collections.kvmops.backup.tests.lab import daemons, kills, markers, modules, truth
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk

DAY = 86400
#: Runs a module whose clock shows another time: shifted by so many seconds, or (with "at") standing still.
_CLOCK = """
import runpy, sys, time
real, kind, value = time.time, sys.argv[1], float(sys.argv[2])
time.time = (lambda: value) if kind == "at" else (lambda: real() + value)
sys.argv = sys.argv[3:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def at_another_time(kind, value, **arguments):
    argv = [sys.executable, "-c", _CLOCK, kind, str(value), *modules.module_argv("vm_backup", arguments)[2:]]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    result = modules.module_result("vm_backup", done.stdout, done.stderr)
    assert not result.failed, result.message
    return result


def test_clock(lab, run_module):
    vm = lab.create_vm("late", [Disk(size_mib=16)], start=False)
    target = lab.path("backups")
    arguments = {"vm": "late", "path": str(target), "mode": "auto"}
    first = run_module("vm_backup", **arguments)
    known = {first["point"]: chains.frozen_now(vm)}
    for kind, value in (
        ("by", -DAY),
        ("at", time.time()),
        ("at", time.time()),
        ("by", 3650 * DAY),
        ("by", 0),
        ("by", -DAY),
    ):
        result = at_another_time(kind, value, **arguments)
        assert result["mode"] == "incremental", result["reason"]
        assert result["point"] > max(known)
        known[result["point"]] = chains.frozen_now(vm)
    archive = result["archive"]["path"]
    assert [each["point"] for each in result["archive"]["points"]] == sorted(known)
    assert chains.digests_of_points(archive, lab.path("out")) == known
    # points of the far future do not keep later archives from being continued
    run_module("vm_snapshot", vm="late", snapshot="all", state="absent")
    healed = run_module("vm_backup", **arguments)
    assert healed["mode"] == "full"
    assert healed["point"] < time.time() + DAY
    later = run_module("vm_backup", **arguments)
    assert (later["mode"], later["archive"]["path"]) == ("incremental", healed["archive"]["path"])
    back = at_another_time("by", -DAY, **{**arguments, "mode": "full", "incrementable": True})
    assert back["point"] > later["point"]
    assert at_another_time("by", -DAY, **arguments)["archive"]["path"] == back["archive"]["path"]
    # later than all points of the VM there, also those of another archive
    beside = at_another_time("by", 1200, **{**arguments, "mode": "full"})
    grown = run_module("vm_backup", **arguments)
    assert (grown["mode"], grown["archive"]["path"]) == ("incremental", back["archive"]["path"])
    assert grown["point"] > beside["point"] >= time.time() + 600


#: Runs a module that believes an archive to be full with fewer bytes of configurations.
_SMALL = """
import runpy, sys
from ansible_collections.kvmops.backup.plugins.module_utils._archive import append, reader
append.MAX_CONFIGURATION_BYTES = reader.MAX_CONFIGURATION_BYTES = int(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_a_chain_without_end(lab, run_module):
    """Every configuration has all snapshots; when readers take no more of them, auto begins anew and says why."""
    vm = lab.create_vm("endless", [Disk(size_mib=16)], start=False)
    arguments = {"vm": "endless", "path": str(lab.path("backups")), "mode": "auto"}
    for _dummy in range(3):
        result = run_module("vm_backup", **arguments)
    with reader.open_archive(result["archive"]["path"]) as archive:
        newest = archive.entry(archive.points[-1].member_name).size_bytes
        room = archive.heads_bytes + newest

    def limited(limit, **more):
        argv = [sys.executable, "-c", _SMALL, str(limit), *modules.module_argv("vm_backup", {**arguments, **more})[2:]]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        return modules.module_result("vm_backup", done.stdout, done.stderr)

    refused = limited(room, mode="incremental")
    assert "no room for the configuration of one more" in refused.message and len(vm.domain.snapshotListNames()) == 3
    assert limited(room + newest)["mode"] == "incremental"
    begun = limited(room + newest)
    assert (begun["mode"], "no room for the configuration" in begun["reason"]) == ("full", True)
    assert len(begun["merged_snapshots"]) == 4 and len(vm.domain.snapshotListNames()) == 1
    assert run_module("vm_backup", **arguments)["archive"]["path"] == begun["archive"]["path"]


def test_two_at_once_and_a_dead_one(lab, run_module):
    vm = lab.create_vm("shared", [Disk(size_mib=16)], start=False)
    target = lab.path("backups")
    arguments = {"vm": "shared", "path": str(target), "mode": "auto"}
    run_module("vm_backup", **arguments)
    known = {}
    argv = modules.module_argv("vm_backup", {**arguments, "bandwidth": "1K"})
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        wait_for("the snapshot of the first run", lambda: len(vm.domain.snapshotListNames()) == 2, 120)
        busy = run_module("vm_backup", fails=True, **arguments)
        assert f"process {first.pid} on" in busy.message
        first.kill()
    result = run_module("vm_backup", **arguments)
    assert result["mode"] == "incremental", result["reason"]
    assert any("put right" in text for text in result.warnings)
    known[result["point"]] = chains.frozen_now(vm)
    assert len(vm.domain.snapshotListNames()) == 2
    found = chains.digests_of_points(result["archive"]["path"], lab.path("out"))
    assert len(found) == 2
    assert known.items() <= found.items()


@pytest.fixture(scope="module")
def victim(module_lab):
    """A writing VM with two disks."""
    return module_lab.create_vm("victim", [Disk(), Disk("raw", size_mib=32)])


def test_foreign_job(lab, victim, run_module):
    target = lab.path("backups")
    arguments = {"vm": "victim", "path": str(target), "mode": "auto"}
    run_module("vm_backup", **arguments)
    before = victim.domain.snapshotListNames()
    foreign = lab.path("foreign")
    foreign.chmod(0o777)
    victim.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{foreign}/nbd'/><disks>"
        f"<disk name='vda' type='file'><scratch file='{foreign}/scratch'/></disk>"
        "<disk name='vdb' backup='no'/></disks></domainbackup>",
        None,
    )
    try:
        refused = run_module("vm_backup", fails=True, **arguments)
        assert "backup job" in refused.message
        assert victim.domain.snapshotListNames() == before
        assert victim.domain.jobStats()["type"] != libvirt.VIR_DOMAIN_JOB_NONE
    finally:
        victim.domain.abortJob()
        wait_for("its end", lambda: victim.domain.jobStats()["type"] == libvirt.VIR_DOMAIN_JOB_NONE, 60)
    assert run_module("vm_backup", **arguments)["mode"] == "incremental"


def test_libvirt_has_forgotten_which_snapshot_the_vm_stands_on(lab, run_module):
    """As one does that dies in taking the next: a moment too short for a test that kills it anywhere."""
    vm = lab.create_vm("forgotten", [Disk(size_mib=16)], start=False)
    arguments = {"vm": "forgotten", "path": str(lab.path("backups")), "mode": "auto"}
    run_module("vm_backup", **arguments)
    killed = kills.kill_around_libvirt_call("vm_backup", arguments, "virDomain.snapshotCreateXML", "before")
    assert killed.returncode == -9
    (note,) = Path("/var/lib/libvirt/qemu/snapshot/forgotten").glob("*.xml")
    daemons.stop()
    note.write_text(note.read_text().replace("<active>1</active>", "<active>0</active>"))
    daemons.start()
    assert vm.domain.snapshotListNames() and not vm.domain.hasCurrentSnapshot()
    result = run_module("vm_backup", **arguments)
    assert result["mode"] == "incremental", result["reason"]
    assert any("told libvirt again" in text for text in result.warnings)


def test_an_internal_snapshot_on_what_a_dead_run_has_left(lab, run_module):
    """It lies in an overlay that is to go: refused with the way out, and not lost, also where nothing else is in it."""
    vm = lab.create_vm("inside", [Disk(size_mib=16)], start=False)
    arguments = {"vm": "inside", "path": str(lab.path("backups")), "mode": "auto"}
    run_module("vm_backup", **arguments)
    kills.kill_around_libvirt_call("vm_backup", arguments, "virDomain.snapshotCreateXML", "after")
    mine = vm.domain.snapshotCreateXML("<domainsnapshot><name>mine</name></domainsnapshot>")
    refused = run_module("vm_backup", fails=True, **arguments)
    assert "would lose internal snapshots in its overlay: mine" in refused.message
    assert "virsh snapshot-delete" in refused.message
    vm.domain.revertToSnapshot(mine)
    mine.delete()
    result = run_module("vm_backup", **arguments)
    assert result["mode"] == "incremental", result["reason"]


def test_a_merge_that_cannot_be_done_costs_no_backup(lab, run_module):
    """What a dead run has left cannot be merged: the point is made on top and says so, a later run merges, nothing is lost."""
    vm = lab.create_vm("stuck", [Disk(size_mib=16)], start=False)
    base = vm.disks()["vda"]
    arguments = {"vm": "stuck", "path": str(lab.path("backups")), "mode": "auto"}
    kills.kill_around_libvirt_call("vm_backup", arguments, "virDomain.snapshotCreateXML", "after")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 1M 64k", str(vm.disks()["vda"]))
    left = vm.domain.snapshotCurrent().getName()
    run("chattr", "+i", str(base))
    try:
        stuck = run_module("vm_backup", **arguments)
        failed = run_module("vm_backup", unmerged="fail", fails=True, **arguments)
        refused = run_module("vm_snapshot", vm="stuck", snapshot="all", state="absent", fails=True)
    finally:
        run("chattr", "-i", str(base))
    assert stuck["mode"] == "full" and stuck["archive"]["incrementable"]
    assert any(f"still to be merged: {left}" in text and str(base) in text for text in stuck.warnings), stuck.warnings
    assert f"Point {failed['point']} is in {failed['archive']['path']}" in failed.message and left in failed.message
    assert failed["point"] > stuck["point"] and failed["archive"]["points"][-1]["point"] == failed["point"]
    assert str(base) in refused.message
    visible = truth.content_sha256(vm.disks()["vda"], "qcow2")
    healed = run_module("vm_backup", **arguments)
    assert left in healed["merged_snapshots"] and left not in vm.domain.snapshotListNames()
    assert chains.frozen_now(vm)["vda"] == visible
    assert not [text for text in healed.warnings if "still to be merged" in text]
    for result in (stuck, failed, healed):
        found = chains.digests_of_points(result["archive"]["path"], lab.path(f"out-{result['point']}"))
        assert found[result["point"]]["vda"] == visible
    run_module("vm_snapshot", vm="stuck", snapshot="all", state="absent")
    assert vm.disks()["vda"] == base and truth.content_sha256(base, "qcow2") == visible


def test_a_chain_that_is_too_long_to_start_does_not_become_longer(lab, run_module):
    """Its own snapshots are merged by a new cycle; where they are the user's, the full stands alone and somebody has to act."""
    vm = lab.create_vm("long", [Disk(size_mib=16)], start=False)
    arguments = {"vm": "long", "path": str(lab.path("backups"))}
    first = run_module("vm_backup", mode="auto", **arguments)

    def freeze(names):
        for name in names:
            document = f"<domainsnapshot><name>{name}</name></domainsnapshot>"
            vm.domain.snapshotCreateXML(document, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY)

    freeze(range(21))
    refused = run_module("vm_backup", mode="incremental", fails=True, **arguments)
    assert "vda stands on 23 images" in refused.message
    healed = run_module("vm_backup", mode="auto", **arguments)
    assert (healed["mode"], healed["merged_snapshots"]) == ("full", [f"kvmops-{first['point']}"])
    assert chains.chain_lengths(vm) == {"vda": 23}
    assert any("vda stands on 23 images" in text for text in healed.warnings), healed.warnings
    freeze(["more", "and more"])
    failed = run_module("vm_backup", mode="auto", fails=True, **arguments)
    assert "vda stands on 24 images" in failed.message and "snapshot: all and state: absent" in failed.message
    assert failed["archive"]["points"][-1]["point"] == failed["point"] and chains.chain_lengths(vm) == {"vda": 24}


def test_checkpoints_of_another_tool_on_a_vm_that_is_off(lab, run_module):
    """libvirt refuses snapshots beside them: there is a backup all the same, and a revert does not stop half-way."""
    vm = lab.create_vm("shared", [Disk(size_mib=16)], start=False)
    arguments = {"vm": "shared", "path": str(lab.path("backups"))}
    run_module("vm_snapshot", vm="shared", snapshot="older")
    first = run_module("vm_backup", mode="auto", **arguments)
    definition = vm.xml(inactive=True)
    vm.domain.checkpointCreateXML(
        "<domaincheckpoint><name>virtnbdbackup.0</name><creationTime>1700000000</creationTime>"
        f"<disks><disk name='vda' checkpoint='bitmap' bitmap='virtnbdbackup.0'/></disks>{definition}</domaincheckpoint>",
        libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE,
    )
    names = vm.domain.snapshotListNames()
    full = run_module("vm_backup", mode="auto", **arguments)
    assert (full["mode"], full["archive"]["incrementable"]) == ("full", False)
    assert "the VM is off: it has checkpoints (virtnbdbackup.0)" in full["reason"]
    assert any("virsh checkpoint-delete shared virtnbdbackup.0 --metadata" in text for text in full.warnings)
    for refused in (
        run_module("vm_backup", mode="incremental", fails=True, **arguments),
        run_module("vm_backup", mode="full", incrementable=True, fails=True, **arguments),
        run_module("vm_snapshot", vm="shared", snapshot="mine", fails=True),
        run_module("vm_snapshot", vm="shared", snapshot="older", state="reverted", fails=True),
    ):
        assert "it has checkpoints (virtnbdbackup.0)" in refused.message
    assert (vm.domain.snapshotListNames(), vm.xml(inactive=True)) == (names, definition)
    run("virsh", "checkpoint-delete", "shared", "virtnbdbackup.0", "--metadata")
    again = run_module("vm_backup", mode="auto", **arguments)
    assert (again["mode"], again["archive"]["path"]) == ("incremental", first["archive"]["path"]), again["reason"]


SYSTEM_CALLS = ("pwrite64", "fsync", "fdatasync")
LIBVIRT_CALLS = (("virDomain.snapshotCreateXML", "before"), ("virDomain.snapshotCreateXML", "after"))


ROUND = 20  # an archive has room for some 45 points, and a killed run may have made one too


def test_killed(lab, victim, run_module):
    """Before the commit the point is not there and the VM is as before, after it the chain goes on; nothing is ever lost."""
    arguments = {"vm": "victim", "path": str(lab.path("backups")), "mode": "auto"}
    run_module("vm_snapshot", vm="victim", snapshot="all", state="absent")
    run_module("vm_backup", **{**arguments, "mode": "full", "incrementable": True})
    counted = kills.count_system_calls("vm_backup", arguments, SYSTEM_CALLS)
    seed = random.randrange(2**32)
    print("seed", seed, "calls", counted)
    chance = random.Random(seed)
    wanted = [(name, n) for name in SYSTEM_CALLS for n in sorted({1, counted[name], chance.randint(1, counted[name])})]
    if os.environ.get("KVMOPS_SWEEP") == "all":
        wanted = [(name, n) for name in SYSTEM_CALLS for n in range(1, counted[name] + 1)]
    wanted += LIBVIRT_CALLS
    for begin in range(0, len(wanted), ROUND):
        killed_at_each(wanted[begin : begin + ROUND], victim, run_module, arguments, lab.path(f"out{begin}"))
    numbers = [each.number for each in markers.parse_log(victim.log())]
    assert numbers == list(range(1, len(numbers) + 1))


def killed_at_each(places, vm, run_module, arguments, scratch):
    """A new chain: before each increment of it one is killed."""
    run_module("vm_snapshot", vm=vm.name, snapshot="all", state="absent")
    full = run_module("vm_backup", **{**arguments, "mode": "full", "incrementable": True})
    archive = full["archive"]["path"]
    known = {full["point"]: chains.frozen_now(vm)}
    for place, number in places:
        print("kill at", place, number)
        if isinstance(number, int):
            kills.kill_at_system_call("vm_backup", arguments, place, number)
        else:
            kills.kill_around_libvirt_call("vm_backup", arguments, place, number)
        vm.wait_until_thawed()
        left = run_module("backup_verify", archive=archive)["archives"][0]
        assert left["ok"], left
        result = run_module("vm_backup", **arguments)
        assert (result["mode"], result["archive"]["path"]) == ("incremental", archive), (
            place,
            number,
            result["reason"],
        )
        known[result["point"]] = chains.frozen_now(vm)
        assert len(vm.domain.snapshotListNames()) == len(result["archive"]["points"])
        journals = [path.read_text() for path in Path("/var/lib/kvmops-backup/journal").iterdir()]
        assert journals == []
    found = chains.digests_of_points(archive, scratch)
    assert known.items() <= found.items()
    done = run_module("vm_backup", increment_limit=2, **arguments)
    assert len(done["merged_snapshots"]) == len(found) + 1
    assert vm.domain.snapshotListNames() == []


def test_no_space_while_appending(lab, victim, run_module):
    """The run fails, the archive is as it was, the VM is on its chain, and the next run goes on."""
    run_module("vm_snapshot", vm="victim", snapshot="all", state="absent")
    target = lab.path("backups")
    arguments = {"vm": "victim", "path": str(target), "mode": "auto"}
    full = run_module("vm_backup", **arguments)
    archive, before = full["archive"]["path"], victim.domain.snapshotListNames()
    disks = victim.disks()
    for number in (3, 9):
        inject = [
            "strace",
            "-f",
            "-o",
            "/dev/null",
            "-P",
            archive,
            "-e",
            f"inject=pwrite64:error=ENOSPC:when={number}+",
        ]
        victim.wait_for_marker(victim.last_marker().number + 2)  # so that there is something to append
        argv = [*inject, *modules.module_argv("vm_backup", arguments)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        result = modules.module_result("vm_backup", done.stdout, done.stderr)
        assert result.failed
        assert "No space left" in result.message
        assert len(run_module("backup_info", archive=archive)["archives"][0]["points"]) == 1
        assert run_module("backup_verify", archive=archive)["archives"][0]["ok"]
        assert (victim.domain.snapshotListNames(), victim.disks()) == (before, disks)
    result = run_module("vm_backup", **arguments)
    assert (result["mode"], len(result["archive"]["points"])) == ("incremental", 2)
    assert chains.digests_of_points(archive, lab.path("out"))[result["point"]] == chains.frozen_now(victim)
