# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The power goes after a run: libvirt syncs what it writes, but not the directories; its files are elsewhere than ours."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import libvirt

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.loopfs import LoopFileSystem
from ansible_collections.kvmops.backup.tests.lab.vm import Disk

DEFINITIONS = Path("/etc/libvirt/qemu")
SNAPSHOTS = Path("/var/lib/libvirt/qemu/snapshot")


@contextlib.contextmanager
def on_its_own(directory, scratch):
    """A directory of libvirt on a file system of its own, which writes nothing out by itself."""
    directory.mkdir(parents=True, exist_ok=True)
    with LoopFileSystem("ext4", 16, scratch) as disk:
        disk.remount("rw,commit=3600")
        shutil.copytree(directory, disk.path, dirs_exist_ok=True)
        run("sync", "-f", str(disk.path))
        run("mount", "--bind", str(disk.path), str(directory))
        try:
            yield disk
        finally:
            run("umount", str(directory))


def after_a_cut(disk):
    """Every file that would be there if the power went now, with its content."""
    cut = disk.directory / "cut"
    cut.mkdir(exist_ok=True)
    run("cp", "--sparse=always", str(disk.image), f"{cut}.img")
    run("mount", "-o", "loop", f"{cut}.img", str(cut))
    try:
        return files_in(cut)
    finally:
        run("umount", str(cut))


def files_in(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_libvirt_knows_is_durable_when_a_run_has_ended(lab, run_module):
    with (
        on_its_own(DEFINITIONS, lab.path("etc")) as definitions,
        on_its_own(SNAPSHOTS, lab.path("var")) as snapshots,
    ):
        vm = lab.create_vm("mains", [Disk(ext4=False), Disk("raw", ext4=False)], writer=False, start=False)

        def durable(module, **arguments):
            result = run_module(module, **arguments)
            for disk, directory in ((definitions, DEFINITIONS), (snapshots, SNAPSHOTS)):
                cut, now = after_a_cut(disk), files_in(directory)
                assert cut == now, f"{module} {arguments}: {sorted(set(cut) ^ set(now))}"
            return result

        try:
            content = {target: truth.content_sha256(path, path.suffix[1:]) for target, path in vm.disks().items()}
            backups = str(lab.path("backups"))
            archive = durable("vm_backup", vm="mains", path=backups, mode="auto")["archive"]["path"]
            durable("vm_backup", vm="mains", path=backups, mode="auto")
            durable("vm_backup", vm="mains", path=backups, mode="full")
            durable("vm_snapshot", vm="mains", snapshot="all", state="absent")
            durable("vm_snapshot", vm="mains", snapshot="mine")
            durable("vm_snapshot", vm="mains", snapshot="mine", state="reverted")
            durable("vm_snapshot", vm="mains", snapshot="mine", state="absent")
            durable("vm_restore", source=archive, name="second", path=str(lab.path("second")))
            assert content == {t: truth.content_sha256(path, path.suffix[1:]) for t, path in vm.disks().items()}
        finally:
            for domain in lab.connection.listAllDomains():
                if domain.name() in ("mains", "second"):
                    domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
