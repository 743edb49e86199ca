# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host on which libvirt changes no owners (OpenNebula nodes, root_squash): what we make is for whom it stands for."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.lab import daemons
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm, make_image

_CONF = Path("/etc/libvirt/qemu.conf")
_USER = "libvirt-qemu"
_ACL = "system.posix_acl_access"


@pytest.fixture
def static_ownership() -> Iterator[None]:
    """libvirtd with dynamic_ownership = 0."""
    before = _CONF.read_text()
    daemons.stop()
    _CONF.write_text(f'{before}\ndynamic_ownership = 0\nuser = "{_USER}"\ngroup = "{_USER}"\n')
    daemons.start()
    yield
    daemons.stop()
    _CONF.write_text(before)
    daemons.start()


def acl_for(uid: int) -> bytes:
    """The kernel's form of "the owner reads and writes, the group and this user read" (linux/posix_acl_xattr.h)."""
    nobody = 2**32 - 1
    entries = [(1, 6, nobody), (2, 4, uid), (4, 4, nobody), (16, 4, nobody), (32, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries)


def rights(path: Path) -> tuple[str, str, int, bytes]:
    found = path.stat()
    acl = os.getxattr(path, _ACL) if _ACL in os.listxattr(path) else b""
    return path.owner(), path.group(), stat.S_IMODE(found.st_mode), acl


def starts(vm: LabVm) -> bool:
    vm.start(wait=False)
    vm.destroy()
    return True


def test_every_file_we_make_is_for_qemu(static_ownership: None, lab: Lab, run_module) -> None:
    directory, backups = lab.path("vms"), str(lab.path("backups"))
    disk = make_image(directory / "one.qcow2", Disk())
    shutil.chown(disk, _USER, _USER)
    disk.chmod(0o640)
    os.setxattr(disk, _ACL, acl_for(pwd.getpwnam("backup").pw_uid))
    was = rights(disk)
    vm = lab.create_vm("one", [Disk(path=disk)], agent=False, start=False)
    crash = {"vm": "one", "path": backups, "consistency": "crash"}
    vm.start(wait=False)
    full = run_module("vm_backup", **crash)["archive"]["path"]
    run_module("vm_backup", **crash, mode="auto")
    assert rights(vm.disks()["vda"]) == was
    vm.destroy()
    assert run_module("vm_backup", **crash, mode="auto")["mode"] == "incremental"
    assert rights(vm.disks()["vda"]) == was and starts(vm)
    run_module("vm_snapshot", vm="one", snapshot="s1")
    run_module("vm_backup", **crash, mode="auto")
    run_module("vm_snapshot", vm="one", snapshot="s1", state="reverted")
    assert rights(vm.disks()["vda"]) == was and starts(vm)
    run_module("vm_snapshot", vm="one", snapshot="all", state="absent")
    assert vm.disks()["vda"] == disk and rights(disk) == was and starts(vm)
    run_module("vm_restore", source=full, force=True)
    assert rights(disk) == was and starts(vm)
    run_module("vm_restore", source=full, name="base", path=str(lab.path("new")))
    base = lab.adopt("base")
    assert rights(base.disks()["vda"]) == (_USER, _USER, 0o600, b"") and starts(base)
    run_module("vm_template", vm="base", state="present")
    run_module("vm_thin_clone", template="base", name="clone", path=str(lab.path("clones")))
    assert starts(lab.adopt("clone"))


def test_what_was_root_s_before_its_vm_ran_is_root_s_in_the_overlay(lab: Lab, run_module) -> None:
    """libvirt gives the files of a running VM to QEMU, and remembers whose they were."""
    vm = lab.create_vm("one", [Disk()], agent=False, start=False)
    disk = vm.disks()["vda"]
    shutil.chown(disk, "backup", "backup")
    disk.chmod(0o640)
    was = rights(disk)
    vm.start(wait=False)
    run_module("vm_snapshot", vm="one", snapshot="s1")
    overlay = vm.disks()["vda"]
    assert overlay != disk and overlay.owner() == _USER
    vm.destroy()
    assert rights(overlay) == was
