# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs on a running VM, end to end: the modules beside virtnbdbackup."""

from __future__ import annotations

import functools
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Callable

import libvirt

from ansible_collections.kvmops.backup.benchmarks.file_jobs import Source
from ansible_collections.kvmops.backup.benchmarks.measure import BenchmarkError, Contender, Goal, Job, Jobs, files
from ansible_collections.kvmops.backup.tests.lab.modules import module_argv, run_module
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm

_VM, _COPY = "benchmark", "benchmark-copy"
_CHANGE_MIB = 100
_MANY_DISKS = (1, 10, 20, 31)  # besides the one that the guest writes to


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

    qemu = _qemu_of(vm)

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
        (Goal(1, 3.5),),
        (archive, *files(peer)),
        check=equal,
    )


def increments(source: Source, directory: Path) -> Jobs:
    """100 MiB that a running guest has written since the last backup, libvirt's time included; each tool has a VM of its own."""
    with Lab(directory / "lab") as lab:
        work = lab.path("work")
        images = [work / f"{name}.qcow2" for name in ("ours", "peer")]
        for image in images:
            subprocess.run(["cp", "--sparse=always", str(source.qcow2), str(image)], check=True)
        ours, peer = (lab.create_vm(f"{_VM}-{image.stem}", [Disk(), Disk(path=image)]) for image in images)
        archives, chain = work / "archives", work / "virtnbdbackup"
        archives.mkdir()
        full = run_module("vm_backup", vm=ours.name, path=str(archives), incrementable=True)
        peer_backup = ("virtnbdbackup", "-n", "-d", peer.name, "-S", str(work), "-o", str(chain), "-l")
        subprocess.run([*peer_backup, "full"], check=True, capture_output=True)
        increment = module_argv("vm_backup", {"vm": ours.name, "path": str(archives), "mode": "incremental"})
        theirs = f"{shlex.join([*peer_backup, 'inc'])} && sync {shlex.quote(str(chain))}/*"
        yield Job(
            f"increment of {_CHANGE_MIB} MiB of a running VM, ext4",
            (
                Contender("vm_backup", (tuple(increment),), durable=True, before=_Writer(ours), helpers=_qemu_of(ours)),
                Contender(
                    "virtnbdbackup -l inc, fsync",
                    (("sh", "-c", theirs),),
                    durable=True,
                    before=_Writer(peer),
                    helpers=_qemu_of(peer),
                ),
            ),
            (Goal(1, 2.5),),
            check=lambda: _restores(lab, ours, Path(full["archive"]["path"]), work / "restored"),
        )


class _Writer:
    """Lets the guest change another part of its second disk each time it is called."""

    def __init__(self, vm: LabVm) -> None:
        self._vm, self._calls = vm, 0

    def __call__(self) -> None:
        self._calls += 1
        seek = self._calls * _CHANGE_MIB
        self._vm.agent.shell(
            f"dd if=/dev/urandom of=/dev/vdb bs=1M count={_CHANGE_MIB} seek={seek} conv=notrunc,fsync 2>/dev/null",
            timeout_s=300,
        )


def merges(directory: Path) -> Jobs:
    """Removing the snapshot of a running VM with many small disks; libvirt's own removal beside it."""
    with Lab(directory / "lab") as lab:
        for disks in _MANY_DISKS:
            images = lab.path(f"disks-{disks}")
            extra = "<controller type='scsi' model='virtio-scsi'/>"
            for number in range(disks):
                image = images / f"{number}.qcow2"
                subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "16M"], check=True)
                letters = "abcdefghijklmnopqrstuvwxyz"
                target = "sd" + ("" if number < 26 else "a") + letters[number % 26]
                extra += (
                    f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
                    f"<target dev='{target}' bus='scsi'/></disk>"
                )
            vm = lab.create_vm(f"{_VM}-{disks}", [Disk()], extra_devices=extra)
            ours = tuple(module_argv("vm_snapshot", {"vm": vm.name, "snapshot": "s", "state": "absent"}))
            snapshot = functools.partial(run_module, "vm_snapshot", vm=vm.name, snapshot="s")

            def before(snapshot: Callable[..., object] = snapshot) -> None:
                snapshot()

            yield Job(
                f"merge of a snapshot of {disks + 1} disks",
                (
                    Contender("vm_snapshot", (ours,), durable=True, before=before),
                    Contender("virsh snapshot-delete", (("virsh", "-q", "snapshot-delete", vm.name, "s"),), before=before),
                ),
            )
            vm.remove()


def _qemu_of(vm: LabVm) -> Callable[[], tuple[int, ...]]:
    return lambda: (int(Path(f"/run/libvirt/qemu/{vm.name}.pid").read_text()),)


def _restores(lab: Lab, vm: LabVm, archive: Path, output: Path) -> None:
    """The newest point is what the guest's disk, which nobody has written to since, holds."""
    output.mkdir()
    run_module("vm_restore", source=str(archive), name=_COPY, path=str(output))
    restored = LabVm(lab, _COPY).disks()["vdb"]
    compare = ["qemu-img", "compare", "-q", "-U", str(vm.disks()["vdb"]), str(restored)]
    if subprocess.run(compare, check=False).returncode:
        raise BenchmarkError(f"{restored} is not the disk that was backed up")
    lab.connection.lookupByName(_COPY).undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
