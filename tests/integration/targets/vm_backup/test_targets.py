# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Places that cannot take a backup, names that are odd, check mode, idempotence (SPEC B13, B15, B18, B22)."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from ansible_collections.kvmops.backup.tests.lab import fingerprint, modules, truth
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


@pytest.fixture(scope="module")
def running(module_lab):
    """A running VM with an agent and about 40 MiB of data that does not compress."""
    vm = module_lab.create_vm("source", [Disk(size_mib=128)])
    vm.agent.shell("dd if=/dev/urandom of=/disk/vda/ballast bs=1M count=40 conv=fsync")
    return vm


def refused(run_module, vm, **arguments):
    """The message of a backup that must fail and leave the VM as it was."""
    before, files = fingerprint.definition(vm), fingerprint.names(vm.disks()["vda"].parent)
    result = run_module("vm_backup", vm=vm.name, fails=True, **arguments)
    assert fingerprint.definition(vm) == before
    assert fingerprint.names(vm.disks()["vda"].parent) == files
    return result.message


@pytest.mark.parametrize("leave_mib", [0, 1, 8, 30])
def test_full_target(lab, loop_fs, running, run_module, leave_mib):
    target = loop_fs("ext4", 128)
    target.fill(leave_mib << 20)
    message = refused(run_module, running, path=str(target.path))
    assert str(target.path) in message
    assert "free" in message or "No space" in message
    assert [name for name in fingerprint.names(target.path) if ".tar" in name] == []


def test_target_that_fills_up_meanwhile(lab, loop_fs, running, run_module):
    """Compressed: what is needed is known only when it is too late."""
    target = loop_fs("ext4", 128)
    target.fill(20 << 20)
    message = refused(run_module, running, path=str(target.path), compress=True)
    assert "No space left" in message
    assert [name for name in fingerprint.names(target.path) if ".tar" in name] == []


def test_read_only_target(lab, loop_fs, running, run_module):
    target = loop_fs("ext4", 64)
    target.remount("ro")
    assert "read-only" in refused(run_module, running, path=str(target.path))


def test_target_that_nobody_may_write_to(lab, loop_fs, running, run_module):
    target = loop_fs("ext4", 64)
    directory = target.path / "closed"
    directory.mkdir()
    run("chattr", "+i", str(directory))
    try:
        assert "not writable" in refused(run_module, running, path=str(directory))
    finally:
        run("chattr", "-i", str(directory))


def test_pool_whose_file_system_is_not_mounted(lab, running, run_module):
    directory = lab.path("mount point")
    xml = f"""<pool type='fs'><name>disk2</name><source><device path='/dev/disk/by-label/no-such'/></source>
      <target><path>{directory}</path></target></pool>"""
    pool = lab.connection.storagePoolDefineXML(xml)
    try:
        assert "disk2" in refused(run_module, running, pool="disk2")
        assert fingerprint.names(directory) == []
    finally:
        pool.undefine()


def test_missing_places(lab, running, run_module):
    assert "no such pool" in refused(run_module, running, pool="no such pool")
    assert "/no/such/directory" in refused(run_module, running, path="/no/such/directory")
    file = lab.path("files") / "file"
    file.write_text("x")
    assert str(file) in refused(run_module, running, path=str(file))


def test_unknown_vm(lab, run_module):
    assert "nobody" in run_module("vm_backup", vm="nobody", path=str(lab.path("backups")), fails=True).message


ODD_NAMES = ["two words", 'it\'s "quoted"', "..up", "a..b", "Übung-日本", "-dash", "x" * 100, "$(id)`id`;&|"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(lab, run_module, name):
    vm = lab.create_vm(name, [Disk(size_mib=8)], start=False)
    target = lab.path("backups")
    archive = run_module("vm_backup", vm=name, path=str(target))["archive"]["path"]
    assert os.path.dirname(archive) == str(target)
    assert fingerprint.names(lab.directory / "backups") == [archive]
    for member in run("tar", "-tf", archive).split("\n")[:-1]:
        assert "/" not in member and not member.startswith(("-", "."))
    run("tar", "-xf", archive, "-C", str(lab.path("out")))
    assert truth.file_sha256(lab.directory / "out" / "vda_0.qcow2") == truth.file_sha256(vm.disks()["vda"])
    assert run_module("backup_info", archive=archive)["archives"][0]["vm"]["name"] == name


def test_two_in_one_second(lab, run_module):
    lab.create_vm("quick", [Disk(size_mib=8)], start=False)
    target = lab.path("backups")
    made = [run_module("vm_backup", vm="quick", path=str(target)) for _dummy in range(3)]
    points = [result["point"] for result in made]
    assert points == sorted(set(points))
    assert len(fingerprint.names(target)) == 3


def test_check_mode_touches_nothing_and_predicts(lab, running, run_module):
    target = lab.path("backups")
    running.agent.shell("kill -STOP -$(cat /run/writer.pid); sync")  # it would write between prediction and backup
    before = fingerprint.definition(running), fingerprint.names(running.disks()["vda"].parent, target)
    predicted = run_module("vm_backup", vm="source", path=str(target), check_mode=True, diff=True)
    assert (fingerprint.definition(running), fingerprint.names(running.disks()["vda"].parent, target)) == before
    assert predicted.changed
    assert predicted["consistency"] == "agent"
    assert predicted["mode"] == "full"
    assert "vda_0.qcow2" in predicted["diff"]["after"]
    made = run_module("vm_backup", vm="source", path=str(target))
    running.agent.shell("kill -CONT -$(cat /run/writer.pid)")
    assert os.path.dirname(made["archive"]["path"]) == os.path.dirname(predicted["archive"]["path"])
    stem = os.path.basename(predicted["archive"]["path"])
    assert stem.split("_")[0] == os.path.basename(made["archive"]["path"]).split("_")[0]
    size = made["archive"]["size"]
    assert abs(predicted["estimated_bytes"] - size) <= 0.02 * size + 2**20


def test_max_age(lab, run_module):
    lab.create_vm("daily", [Disk(size_mib=8)], start=False)
    target = lab.path("backups")
    first = run_module("vm_backup", vm="daily", path=str(target), max_age="20h", notes="the first")
    again = run_module("vm_backup", vm="daily", path=str(target), max_age="20h")
    assert first.changed and not again.changed
    assert (again["mode"], again["point"]) == ("none", first["point"])
    assert fingerprint.names(target) == sorted([first["archive"]["path"], first["archive"]["path"] + ".notes"])
    with open(first["archive"]["path"], "r+b") as file:
        file.seek(8192)
        file.write(b"damage")
    assert run_module("backup_verify", path=str(target), fails=True)
    good = run_module("vm_backup", vm="daily", path=str(target), max_age="20h")  # the young point is not a good one
    assert good.changed and good["mode"] == "full"
    assert not run_module("vm_backup", vm="daily", path=str(target), max_age="20h").changed
    assert run_module("vm_backup", vm="daily", path=str(target), max_age="0").changed


def test_notes_never_cost_what_follows(lab, run_module):
    vm = lab.create_vm("annotated", [Disk(size_mib=8)], start=False)
    target = lab.path("backups")
    arguments = {"vm": "annotated", "path": str(target), "mode": "auto", "increment_limit": 2}
    archive = run_module("vm_backup", **arguments)["archive"]["path"]
    os.mkdir(archive + ".notes")  # in the way
    last = run_module("vm_backup", notes="the second", **arguments)
    assert last["mode"] == "incremental" and len(last["merged_snapshots"]) == 2
    assert any("has no notes" in text for text in last.warnings)
    assert vm.domain.snapshotListNames() == []


def test_one_writer_per_vm(lab, run_module):
    """A second run is told who is at work; a dead holder is replaced at once."""
    lab.create_vm("shared", [Disk(size_mib=256)], start=False)
    disk = lab.adopt("shared").disks()["vda"]
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 200M", str(disk))
    target = lab.path("backups")
    slow = modules.module_argv("vm_backup", {"vm": "shared", "path": str(target), "bandwidth": "1M"})
    with subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as first:
        wait_for("the first run to write", lambda: fingerprint.names(target), 60)
        busy = run_module("vm_backup", vm="shared", path=str(target), fails=True)
        assert str(first.pid) in busy.message
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert run_module("vm_backup", vm="shared", path=str(target)).changed
    assert len(fingerprint.names(target)) == 1  # the dead run's partial file is gone


def test_stop_by_signal_is_clean(lab, running, run_module):
    target = lab.path("backups")
    before = fingerprint.definition(running)
    argv = modules.module_argv("vm_backup", {"vm": "source", "path": str(target), "bandwidth": "1M"})
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as process:
        wait_for("the run to write", lambda: fingerprint.names(target), 60)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=300)
    result = modules.module_result("vm_backup", stdout, stderr)
    assert result.failed and result["cancelled"]
    assert fingerprint.definition(running) == before
    assert fingerprint.names(target) == []
