# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every row of docs/DISKS.md with such a disk in a real definition: the VM off, and running where this host can start it."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Callable

import libvirt
import pytest

from ansible_collections.kvmops.backup.tests.lab import daemons, fingerprint, lvm, zfs
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm, make_image, make_iso

DOCUMENT = Path(__file__).parents[4] / "docs" / "DISKS.md"
SECRET = "c2177883-f1bb-47f0-914d-32a22e3a8804"
NBD = "<source protocol='nbd' name='x'><host name='127.0.0.1'/></source>"
SCSI = "<controller type='scsi' model='virtio-scsi'/>"


class Bench:
    """Where a row gets its images from; takes them down again."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self.lab, self._stack, self.directory = lab, stack, lab.path("row")

    def image(self, image_format: str = "qcow2") -> Path:
        return make_image(self.directory / f"disk.{image_format}", Disk(image_format, 16))

    def created(self, image_format: str, *options: str) -> Path:
        path = self.directory / f"disk.{image_format}"
        run("qemu-img", "create", "-q", "-f", image_format, *options, str(path), "16M")
        return path

    def device(self, image_format: str = "raw") -> str:
        name = run("losetup", "-f", "--show", str(self.image(image_format))).strip()
        self._stack.callback(run, "losetup", "-d", name)
        return name

    def volume_group(self) -> None:
        if not lvm.is_there():
            pytest.skip("lvm2 is not installed")
        self._stack.enter_context(lvm.VolumeGroup("labvg", self.lab.path("lvm")))

    def zfs_image(self) -> Path:
        if not zfs.is_there():
            pytest.skip("zfs-fuse is not installed")
        pool = self._stack.enter_context(zfs.ZfsPool("tank", self.lab.directory / "zfs"))
        return make_image(pool.create("vms") / "disk.qcow2", Disk(size_mib=16))


def disk(
    source: str,
    kind: str = "file",
    image_format: str = "qcow2",
    more: str = "",
    device: str = "disk",
    to: str = "vdx virtio",
) -> str:
    target, bus = to.split()
    return (
        f"<disk type='{kind}' device='{device}'><driver name='qemu' type='{image_format}'/>{source}"
        f"<target dev='{target}' bus='{bus}'/>{more}</disk>"
    )


def file(path: Path, image_format: str = "qcow2", more: str = "", **options: str) -> str:
    return disk(f"<source file='{path}'/>", "file", image_format, more, **options)


def volume(bench: Bench) -> str:
    name = "row-pool"
    bench.lab.create_pool(name, bench.image().parent)
    return disk(f"<source pool='{name}' volume='disk.qcow2'/>", "volume")


def lvm_disk(bench: Bench) -> str:
    bench.volume_group()
    return disk("<source dev='/dev/labvg/thin'/>", "block", "raw")


def data_file(bench: Bench) -> str:
    path = bench.created("qcow2", "-o", f"data_file={bench.directory}/data.raw")
    (bench.directory / "data.raw").chmod(0o666)
    return file(path)


def slice_of(bench: Bench) -> str:
    slices = "<slices><slice type='storage' offset='1048576' size='1048576'/></slices>"
    return disk(f"<source file='{bench.image('raw')}'>{slices}</source>", "file", "raw")


def encrypted(bench: Bench) -> str:
    path = bench.created(
        "qcow2",
        "--object",
        "secret,id=s,data=geheim",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
    )
    return file(path, more=f"<encryption format='luks'><secret type='passphrase' uuid='{SECRET}'/></encryption>")


def lun(bench: Bench) -> str:
    return SCSI + disk(f"<source dev='{bench.device()}'/>", "block", "raw", device="lun", to="sdx scsi")


def iso(bench: Bench) -> str:
    return file(make_iso(bench.directory / "cd.iso", b"cd"), "raw", "<readonly/>", device="cdrom", to="sdx sata")


# row of the document: (makes the disk, target, whether this host can start a VM with it)
ROWS: dict[str, list[tuple[Callable[[Bench], str], bool]]] = {
    "file, qcow2": [(lambda bench: file(bench.image()), True)],
    "file, raw": [(lambda bench: file(bench.image("raw"), "raw"), True)],
    "volume of a directory pool": [(volume, True)],
    "block device, partition or multipath device, raw": [
        (lambda bench: disk(f"<source dev='{bench.device()}'/>", "block", "raw"), True)
    ],
    "block device with qcow2 on it": [
        (lambda bench: disk(f"<source dev='{bench.device('qcow2')}'/>", "block", "qcow2"), True)
    ],
    "on LVM, thin LVM or shared LVM": [(lvm_disk, False)],
    "on ZFS, VM without snapshots": [(lambda bench: file(bench.zfs_image()), True)],
    "on ZFS, VM with snapshots": [(lambda bench: file(bench.zfs_image()), True)],
    "network disk (iSCSI, RBD, NBD, …), NVMe, vhost-user, vDPA": [
        (
            lambda _bench: disk(
                "<source protocol='rbd' name='p/i'><host name='127.0.0.1'/></source>", "network", "raw"
            ),
            False,
        ),
        (
            lambda _bench: disk(
                "<source protocol='iscsi' name='iqn.2026-01.example:t/1'><host name='127.0.0.1'/></source>",
                "network",
                "raw",
            ),
            False,
        ),
        (lambda _bench: disk(NBD, "network", "raw"), False),
        (
            lambda _bench: disk(
                "<source type='pci' managed='yes' namespace='1'><address domain='0' bus='1' slot='0' function='0'/></source>",
                "nvme",
                "raw",
            ),
            False,
        ),
    ],
    "other image formats (vmdk, vdi, vpc, …)": [
        (lambda bench, kind=kind: file(bench.created(kind), kind), True) for kind in ("vmdk", "vdi", "vpc")
    ],
    "qcow2 with an external data file": [(data_file, True)],
    "slice of a larger file": [(slice_of, True)],
    "encrypted (LUKS)": [(encrypted, False)],
    "LUN (`device='lun'`)": [(lun, False)],
    "transient": [(lambda bench: file(bench.image(), more="<transient/>"), False)],
    "shareable and writable": [(lambda bench: file(bench.image("raw"), "raw", "<shareable/>"), True)],
    "read-only": [(lambda bench: file(bench.image(), more="<readonly/>"), True)],
    "source that does not exist": [
        (lambda bench: file(bench.directory / "gone.qcow2"), False),
        (lambda _bench: disk("<source dev='/dev/gone'/>", "block", "raw"), False),
        (lambda _bench: disk("<source pool='gone' volume='gone'/>", "volume"), False),
    ],
    "CD image (`include_iso: true`)": [(iso, True)],
    "CD image (`include_iso: false`)": [(iso, True)],
    "floppy": [
        (lambda bench: file(make_iso(bench.directory / "a.img", b"fd"), "raw", device="floppy", to="fdb fdc"), True)
    ],
    "empty CD or floppy drive": [
        (lambda _bench: disk("", "file", "raw", "<readonly/>", device="cdrom", to="sdx sata"), True),
        (lambda _bench: disk("", "file", "raw", device="floppy", to="fdb fdc"), True),
    ],
}
RUNNING_ONLY = "with somebody else's block job"
CASES = [
    pytest.param(row, make, running, id=f"{row}-{number}-{'running' if running else 'off'}")
    for row, cases in ROWS.items()
    for number, (make, startable) in enumerate(cases)
    for running in ([False, True] if startable else [False])
]


def rows() -> dict[str, tuple[str, str]]:
    """What the document says of each kind of disk: (running, off)."""
    found = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return {kind: (running, off) for kind, running, off in found if kind != "kind of disk"}


@pytest.fixture
def bench(lab: Lab) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(lab, stack)
        for domain in lab.connection.listAllDomains():
            if domain.isActive():
                domain.destroy()


def with_disk(lab: Lab, devices: str, running: bool) -> tuple[LabVm, str]:
    """A VM with an ordinary disk and one of the row, and the target of the latter."""
    vm = lab.create_vm("web", extra_devices=devices, start=False)
    if running:
        vm.start(wait=False)
    found = re.findall(r"<target dev='(\w+)'", devices)
    return vm, found[-1]


def test_every_row_is_here() -> None:
    assert list(rows()) == [*list(ROWS)[:-4], RUNNING_ONLY, *list(ROWS)[-4:]]


@pytest.mark.parametrize(("row", "make", "running"), CASES)
def test_row(lab: Lab, bench: Bench, run_module, row: str, make: Callable[[Bench], str], running: bool) -> None:
    told = rows()[row][0 if running else 1]
    vm, target = with_disk(lab, make(bench), running)
    if "with snapshots" in row:
        vm.domain.snapshotCreateXML("<domainsnapshot><name>mine</name></domainsnapshot>", 0)
    before, archives = fingerprint.definition(vm), lab.path("backups")
    options = {"consistency": "crash", "include_iso": "false" not in row}
    done = run_module("vm_backup", vm="web", path=str(archives), fails=told.startswith("refused"), **options)
    assert fingerprint.definition(vm) == before
    skipped = {item["device"]: item["reason"] for item in done.data.get("skipped_devices", [])}
    word = told.split()[0].rstrip(",")
    if word == "refused":
        assert f"disk {target}" in done.message and fingerprint.names(archives) == []
        return
    with tarfile.open(done["archive"]["path"]) as members:
        names = members.getnames()
    stored = any(name.startswith(f"{target}_") or (target == "sdx" and name.endswith(".iso")) for name in names)
    assert {"stored": True, "as": True, "skipped": False, "nothing": False}[word] is stored, (told, names)
    assert (target in skipped) is (word == "skipped"), skipped
    if word == "skipped":
        assert any(target in warning for warning in done.warnings)
    assert ("warning" not in told) or any(target in warning for warning in done.warnings)


def test_somebody_elses_block_job(lab: Lab, bench: Bench, run_module) -> None:
    assert rows()[RUNNING_ONLY][0] == "refused"
    vm, target = with_disk(lab, file(bench.image()), True)
    copy = f"<disk type='file'><source file='{bench.directory}/copy.qcow2'/><driver type='qcow2'/></disk>"
    vm.domain.blockCopy(target, copy, flags=libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
    wait_for("the copy to be complete", lambda: "ready='yes'" in vm.xml(), 120)
    before, archives = fingerprint.definition(vm), lab.path("backups")
    message = run_module("vm_backup", vm="web", path=str(archives), consistency="crash", fails=True).message
    assert "block" in message and "job" in message
    assert fingerprint.definition(vm) == before and fingerprint.names(archives) == []
    assert vm.domain.blockJobInfo(target)["type"] == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY  # it goes on


def test_disks_of_the_running_vm_only_and_of_its_next_start(lab: Lab, bench: Bench, run_module) -> None:
    ports = "<controller type='pci' model='pcie-root-port'/>" * 4
    vm = lab.create_vm("web", extra_devices=ports, start=False).start(wait=False)
    hot = disk(f"<source file='{bench.image('raw')}'/>", image_format="raw")
    later = file(bench.image("qcow2")).replace("vdx", "vdy")
    vm.domain.attachDeviceFlags(hot, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    vm.domain.attachDeviceFlags(later, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    before = fingerprint.definition(vm)
    done = run_module("vm_backup", vm="web", path=str(lab.path("backups")), consistency="crash")
    assert fingerprint.definition(vm) == before
    with tarfile.open(done["archive"]["path"]) as members:
        assert {"vda_0.qcow2", "vdx_0.qcow2"} <= set(members.getnames()) and "vdy_0.qcow2" not in members.getnames()
    assert [item["device"] for item in done["skipped_devices"]] == ["vdy"]
    assert any("vdx" in text and "running VM only" in text for text in done.warnings)
    run_module("vm_restore", source=done["archive"]["path"], name="copy", path=str(lab.path("restored")))
    assert set(lab.adopt("copy").disks()) == {"vda", "vdx"}


def test_a_transient_vm(lab: Lab, run_module) -> None:
    vm = lab.create_vm("web", start=False).start(wait=False)
    vm.domain.undefine()
    target = str(lab.path("backups"))
    done = run_module("vm_backup", vm="web", path=target, consistency="crash")
    assert any("transient" in text for text in done.warnings) and vm.is_running()
    daemons.stop()
    daemons.start()
    assert not vm.domain.isPersistent(), "libvirt has defined it by a file that it wrote at the end of the merge"
    assert "transient" in run_module("vm_backup", vm="web", path=target, mode="auto", fails=True).message
    run_module("vm_restore", source=done["archive"]["path"], name="copy", path=str(lab.path("restored")))
    assert set(lab.adopt("copy").disks()) == {"vda"}
    vm.destroy()
