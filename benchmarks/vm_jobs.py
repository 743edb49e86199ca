# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs on a running VM, end to end: the modules beside virtnbdbackup."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

import libvirt

from ansible_collections.kvmops.backup.benchmarks.file_jobs import Source
from ansible_collections.kvmops.backup.benchmarks.measure import BenchmarkError, Contender, Goal, Job, Jobs, files
from ansible_collections.kvmops.backup.tests.lab.modules import module_argv, run_module
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm

_VM, _COPY = "benchmark", "benchmark-copy"


def running_vm(source: Source, directory: Path) -> Jobs:
    """Full and restore of a running VM with a guest agent: a small ext4 disk that it writes to, and the disk with the data."""
    with Lab(directory / "lab") as lab:
        vm = lab.create_vm(_VM, [Disk(), Disk(path=source.qcow2)])
        work = lab.path("work")
        yield from _full(vm, work, source)
        yield from _restore(lab, vm, work)


def _peer_backup(output: Path) -> tuple[str, ...]:
    return ("virtnbdbackup", "-n", "-d", _VM, "-l", "copy", "-S", str(output.parent), "-o", str(output))


def _full(vm: LabVm, work: Path, source: Source) -> Jobs:
    ours, packed, peer = work / "ours", work / "packed", work / "virtnbdbackup"

    def qemu() -> tuple[int, ...]:
        return (int(Path(f"/run/libvirt/qemu/{vm.name}.pid").read_text()),)

    def full(name: str, output: Path, **options: object) -> Contender:
        argv = tuple(module_argv("vm_backup", {"vm": _VM, "path": str(output), **options}))
        return Contender(name, (argv,), output, output_is_directory=True, durable=True, helpers=qemu)

    yield Job(
        "full of a running VM, ext4",
        (
            full("vm_backup", ours),
            Contender("virtnbdbackup -l copy", (_peer_backup(peer),), peer, output_is_directory=True, helpers=qemu),
            full("vm_backup, compressed", packed, compress=True),
        ),
        (Goal(1, 3.0),),
        (source.qcow2,),
    )


def _restore(lab: Lab, vm: LabVm, work: Path) -> Jobs:
    backups, peer = work / "backups", work / "virtnbdbackup-kept"
    backups.mkdir()
    archive = Path(run_module("vm_backup", vm=_VM, path=str(backups))["archive"]["path"])
    subprocess.run(_peer_backup(peer), check=True, capture_output=True)
    ours, theirs = work / "restored", work / "virtnbdrestored"

    def undefine() -> None:
        with suppress(libvirt.libvirtError):
            lab.connection.lookupByName(_COPY).undefine()

    def equal() -> None:
        for directory in (ours, theirs):
            image = max(files(directory), key=lambda file: file.stat().st_size)
            compare = ["qemu-img", "compare", "-q", "-U", str(vm.disks()["vdb"]), str(image)]
            if subprocess.run(compare, check=False).returncode:
                raise BenchmarkError(f"{image} is not the disk that was backed up")

    restore = tuple(module_argv("vm_restore", {"source": str(archive), "name": _COPY, "path": str(ours)}))
    peer_restore = ("virtnbdrestore", "-n", "-L", "/dev/null", "-cD", "-N", _COPY, "-i", str(peer), "-o", str(theirs))
    yield Job(
        "restore of a VM, ext4",
        (
            Contender("vm_restore", (restore,), ours, True, durable=True, before=undefine, after=undefine),
            Contender("virtnbdrestore", (peer_restore,), theirs, True, before=undefine, after=undefine),
        ),
        (Goal(1, 3.0),),
        (archive, *files(peer)),
        check=equal,
    )
