# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Storage that shuts root out (NFS with root_squash, FUSE without allow_root): what cannot be looked at is not called missing."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, make_image

_USER = "libvirt-qemu"


@pytest.fixture
def far(lab: Lab) -> Iterator[Path]:
    """A directory with an image, which only QEMU's user may enter."""
    behind, place = lab.path("behind"), lab.path("far")
    make_image(behind / "vm.qcow2", Disk())
    for path in (behind, behind / "vm.qcow2", place):
        shutil.chown(path, _USER, _USER)
    as_user = ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]
    mount = subprocess.Popen([*as_user, "bindfs", "-f", "--no-allow-other", str(behind), str(place)])
    wait_for("bindfs", lambda: str(place) in Path("/proc/self/mounts").read_text(), 60)
    yield place
    run("umount", "-l", str(place))
    mount.terminate()
    mount.wait()


def test_permission_denied_is_told_as_such(lab: Lab, run_module, far: Path) -> None:
    lab.create_vm("squash", [Disk(path=far / "vm.qcow2")], agent=False, start=False)
    top = lab.path("own") / "top.qcow2"
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(far / "vm.qcow2"), str(top), "64M")
    lab.create_vm("thin", [Disk(path=top)], agent=False, start=False)
    backups = str(lab.path("backups"))
    asked = [
        run_module("vm_backup", vm="squash", path=backups, fails=True),
        run_module("vm_backup", vm="thin", path=backups, fails=True),
        run_module("vm_backup", vm="thin", path=str(far), fails=True),
        run_module("vm_snapshot", vm="squash", snapshot="s1", fails=True),
        run_module("vm_snapshot", vm="thin", snapshot="s1", fails=True),
        run_module("vm_template", vm="squash", state="present", fails=True),
        run_module("backup_verify", archive=str(far / "x.tar"), fails=True),
    ]
    for refused in asked:
        assert "Permission denied" in refused.message
        assert "not there" not in refused.message and "ut that file back" not in refused.message
