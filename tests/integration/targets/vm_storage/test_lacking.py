# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Targets that lack what local file systems have, or that are not there: a way round, or an early refusal (H8)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.lab import fingerprint, fuse, kills, modules, truth
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm, make_image

UNITS = Path("/run/systemd/system")


def off_vm(lab: Lab, name: str, directory: Path | None = None) -> LabVm:
    """A VM that is off, with 12 MiB of data that do not compress."""
    image = make_image((directory or lab.path(name)) / f"{name}.qcow2", Disk(size_mib=16))
    run("sh", "-c", f"head -c 12M /dev/urandom >{image}.raw")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", f"{image}.raw", str(image))
    os.unlink(f"{image}.raw")
    return lab.create_vm(name, [Disk(path=image)], start=False)


@pytest.mark.parametrize("options", [(), ("disable_hardlink",)], ids=["links with other inodes", "no links"])
def test_backup_and_restore_in_place_on_sshfs(lab: Lab, run_module, options: tuple[str, ...]) -> None:
    far, near = lab.path("far"), lab.path("near")
    with fuse.sshfs(far, near, *options):
        vm = off_vm(lab, "ssh", near)
        disk = vm.disks()["vda"]
        content = truth.content_sha256(disk, "qcow2")
        archive = run_module("vm_backup", vm="ssh", path=str(near))["archive"]["path"]
        run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 1M", str(disk))
        run_module("vm_restore", source=archive, force=True)
        assert truth.content_sha256(disk, "qcow2") == content
        assert not run_module("vm_restore", source=archive, force=True).changed
        assert fingerprint.names(far) == sorted([str(far / disk.name), str(far / os.path.basename(archive))])


def test_a_restore_that_was_killed_on_sshfs_is_taken_back(lab: Lab, run_module) -> None:
    """After all files have got their names; until the next run it was mounted anew, so every file has another inode."""
    far, near, backups = lab.path("far"), lab.path("near"), lab.path("backups")
    (far / "vms").mkdir()
    (far / "vms").chmod(0o755)
    with fuse.sshfs(far, near):
        disk = off_vm(lab, "killed", near / "vms").disks()["vda"]
        archive = run_module("vm_backup", vm="killed", path=str(backups))["archive"]["path"]
        run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 1M", str(disk))
        content = truth.content_sha256(disk, "qcow2")
        arguments = {"source": archive, "force": True}
        kills.kill_around_libvirt_call("vm_restore", arguments, "virConnect.defineXML", "before")
        assert truth.content_sha256(disk, "qcow2") != content
        (far / "first").touch()  # looked up first, it takes the inode that the directory had
    with fuse.sshfs(far, near):
        os.stat(near / "first")
        done = run_module("vm_backup", vm="killed", path=str(backups))
        assert any("was taken back" in text for text in done.warnings)
        assert truth.content_sha256(disk, "qcow2") == content
        assert fingerprint.names(far / "vms") == [str(far / "vms" / disk.name)]


def test_a_file_in_the_way_of_the_former_disk(lab: Lab, run_module) -> None:
    """An undo that cannot be completed says where the former disk is; once the way is free, the next run puts it back."""
    disk = off_vm(lab, "blocked").disks()["vda"]
    archive = run_module("vm_backup", vm="blocked", path=str(lab.path("backups")))["archive"]["path"]
    content = truth.content_sha256(disk, "qcow2")
    kills.kill_around_libvirt_call("vm_restore", {"source": archive, "force": True}, "virConnect.defineXML", "before")
    disk.unlink()
    disk.write_text("of somebody else")
    (kept,) = (path for path in disk.parent.iterdir() if path != disk)
    message = run_module("vm_restore", source=archive, force=True, fails=True).message
    assert f"at {disk} is a file that is not the restore's; what was {disk} is kept as {kept}" in message
    disk.unlink()
    run_module("vm_backup", vm="blocked", path=str(lab.directory / "backups"))
    assert truth.content_sha256(disk, "qcow2") == content and fingerprint.names(disk.parent) == [str(disk)]


def test_disks_with_the_longest_names_that_there_are(lab: Lab, run_module) -> None:
    """There is no room for what an overlay adds to its name; the two differ at their ends only."""
    directory = lab.path("images")
    disks = [directory / f"{'x' * 248}{each}.qcow2" for each in "ab"]
    for disk in disks:
        make_image(disk, Disk(size_mib=8))
    contents = [truth.content_sha256(disk, "qcow2") for disk in disks]
    vm = lab.create_vm("long", [Disk(path=disk) for disk in disks], start=False)
    backups = str(lab.path("backups"))
    run_module("vm_backup", vm="long", path=backups, mode="auto")
    run_module("vm_snapshot", vm="long", snapshot="s" * 100)
    done = run_module("vm_backup", vm="long", path=backups, mode="auto")
    assert done["mode"] == "incremental"
    run_module("vm_snapshot", vm="long", snapshot="s" * 100, state="reverted")
    run_module("vm_restore", source=done["archive"]["path"], force=True)
    run_module("vm_snapshot", vm="long", snapshot="all", state="absent")
    assert [truth.content_sha256(disk, "qcow2") for disk in vm.disks().values()] == contents


def test_a_target_that_cannot_rename_is_refused_at_once(lab: Lab, run_module) -> None:
    vm = off_vm(lab, "norename")
    far, near = lab.path("far"), lab.path("near")
    archive = run_module("vm_backup", vm="norename", path=str(lab.path("backups")))["archive"]["path"]
    before, files = fingerprint.definition(vm), fingerprint.names(vm.disks()["vda"].parent)
    with fuse.bindfs(far, near, "--rename-deny"):
        for module, arguments in (
            ("vm_backup", {"vm": "norename", "path": str(near), "mode": "auto"}),
            ("vm_restore", {"source": archive, "path": str(near), "name": "copy"}),
            ("backup_archive", {"archive": f"{near}/{os.path.basename(archive)}", "compressed": True}),
        ):
            if module == "backup_archive":
                run("cp", archive, str(far))
            message = run_module(module, fails=True, **arguments).message
            assert f"The directory {near}: files cannot be renamed there" in message
    assert fingerprint.names(far) == [str(far / os.path.basename(archive))]
    assert (fingerprint.definition(vm), fingerprint.names(vm.disks()["vda"].parent)) == (before, files)


def test_a_file_system_for_small_files_only(lab: Lab, run_module) -> None:
    """16 GiB, as ext3 with small blocks has it; nothing else that this kernel mounts has so low a limit."""
    image, target = lab.path("loop") / "small.img", lab.path("target")
    run("truncate", "-s", "64M", str(image))
    run("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "1024", "-O", "^extent,^64bit,^has_journal", str(image))
    run("mount", "-o", "loop", str(image), str(target))
    try:
        disk = lab.path("disks") / "big.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", str(disk), "20G")
        run("truncate", "-s", "20G", str(disk))
        lab.create_vm("big", [Disk(path=disk)], start=False)
        message = run_module("vm_backup", vm="big", path=str(target), fails=True).message
        assert "it takes files of up to 16.1 GiB, and big_" in message and "has about 20.0 GiB" in message
        assert [name for name in fingerprint.names(target) if "lost+found" not in name] == []
        run_module("vm_backup", vm="big", path=str(target), compress=True)
    finally:
        run("umount", str(target))


def _size_of_partial(far: Path) -> int:
    return sum(path.stat().st_size for path in far.glob(".*.partial-*"))


def test_a_target_that_goes_away_meanwhile(lab: Lab, run_module) -> None:
    """What was written is removed by the next run there, whichever VM it is of; a run elsewhere does not wait for it."""
    off_vm(lab, "drops")
    off_vm(lab, "other")
    far, near, elsewhere = lab.path("far"), lab.path("near"), lab.path("elsewhere")
    argv = modules.module_argv("vm_backup", {"vm": "drops", "path": str(near), "bandwidth": "4M"})
    with fuse.bindfs(far, near) as process, subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as backup:  # fmt: skip
        wait_for("the archive to grow", lambda: _size_of_partial(far) > 2**20, 60)
        process.kill()
        stdout, stderr = backup.communicate(timeout=300)
    message = modules.module_result("vm_backup", stdout, stderr).message
    assert str(near) in message and "Look at its mount" in message
    (left,) = (path.name for path in far.iterdir() if ".partial-" in path.name)
    run_module("vm_backup", vm="other", path=str(elsewhere))
    assert (far / left).exists()
    with fuse.bindfs(far, near):
        done = run_module("backup_retention", path=str(near), keep_last=7)
    assert any(left in text for text in done.warnings)
    assert [path.name for path in far.iterdir() if path.name.startswith(".drops")] == []


def test_a_mount_point_with_nothing_mounted(lab: Lab, run_module) -> None:
    """A mount unit names it, or the VM's snapshots stand for an archive that must be there."""
    vm = off_vm(lab, "nas")
    far, near = lab.path("far"), lab.path("near")
    with fuse.bindfs(far, near):
        archive = run_module("vm_backup", vm="nas", path=str(near), mode="auto")["archive"]["path"]
    before = fingerprint.definition(vm)
    message = run_module("vm_backup", vm="nas", path=str(near), fails=True).message
    assert f"snapshots of the VM were made for {archive}: it seems not to be mounted" in message
    assert run_module("backup_info", path=str(near))["archives"] == []
    UNITS.mkdir(parents=True, exist_ok=True)
    unit = UNITS / "near.mount"
    unit.write_text(f"[Mount]\nWhat=nas:/backups\nWhere={near}\n")
    try:
        for module, arguments in (
            ("vm_backup", {"vm": "nas"}),
            ("backup_retention", {"keep_last": 1}),
            ("backup_info", {}),
        ):
            message = run_module(module, path=str(near), fails=True, **arguments).message
            assert f"nothing is mounted at {near}, where {unit} has nas:/backups" in message, module
        assert fingerprint.names(near) == [] and fingerprint.definition(vm) == before
        with fuse.bindfs(far, near):
            assert run_module("vm_backup", vm="nas", path=str(near), mode="auto")["mode"] == "incremental"
            assert len(run_module("backup_info", path=str(near))["archives"]) == 1
    finally:
        unit.unlink()
