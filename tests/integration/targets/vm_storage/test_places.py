# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks and archives on real file systems, on ZFS and on LVM: what works, and what is refused before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.lab import fingerprint, lvm, truth, zfs
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm, make_image

needs_zfs = pytest.mark.skipif(not zfs.is_there(), reason="zfs-fuse is not installed")
needs_lvm = pytest.mark.skipif(not lvm.is_there(), reason="lvm2 is not installed")


@pytest.fixture
def dataset(lab: Lab) -> Iterator[Path]:
    """The directory of a real ZFS dataset."""
    with zfs.ZfsPool("tank", lab.directory / "zfs") as pool:
        yield pool.create("vms")


@pytest.fixture
def place(lab: Lab, loop_fs, request: pytest.FixtureRequest) -> Path:
    """A directory on the kind of file system that the test is about."""
    if request.param == "dir":
        return lab.path("place")
    if request.param == "zfs":
        return request.getfixturevalue("dataset")
    return loop_fs(request.param, 300).path


PLACES = pytest.mark.parametrize("place", ["dir", "xfs", "btrfs", pytest.param("zfs", marks=needs_zfs)], indirect=True)


@PLACES
@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_source_target_and_archive_on_every_file_system(lab: Lab, run_module, place: Path, image_format: str) -> None:
    image = make_image(place / f"disk.{image_format}", Disk(image_format))
    run("qemu-io", "-f", image_format, "-c", "write -P 7 3M 5M", str(image))
    content = truth.content_sha256(image, image_format)
    vm = lab.create_vm("web", [Disk(image_format, path=image)], start=False)
    archives = place / "archives"
    archives.mkdir()
    done = run_module("vm_backup", vm="web", path=str(archives))
    assert done["archive"]["path"].startswith(str(archives))
    assert truth.content_sha256(image, image_format) == content
    restored = place / "restored"
    restored.mkdir()
    restored.chmod(0o755)
    run_module("vm_restore", source=done["archive"]["path"], name="copy", path=str(restored))
    copy = lab.adopt("copy")
    assert truth.content_sha256(copy.disks()["vda"], image_format) == content
    assert vm.disks()["vda"] == image


def block_vm(lab: Lab, name: str, disk_xml: str) -> LabVm:
    """A VM that is off, with an ordinary disk and one more."""
    return lab.create_vm(name, extra_devices=disk_xml, start=False)


def by_device(path: str) -> str:
    return (
        f"<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='{path}'/>"
        "<target dev='vdl' bus='virtio'/></disk>"
    )


def by_volume(pool: str, volume: str) -> str:
    return (
        f"<disk type='volume' device='disk'><driver name='qemu' type='raw'/><source pool='{pool}' volume='{volume}'/>"
        "<target dev='vdl' bus='virtio'/></disk>"
    )


def refused(run_module, vm: LabVm, target: Path, **options: object) -> str:
    """The message of a backup that must change nothing, in check mode and without."""
    look = fingerprint.names if vm.is_running() else fingerprint.files
    before, files = fingerprint.definition(vm), look(vm.disks()["vda"].parent)
    predicted = run_module("vm_backup", vm=vm.name, path=str(target), check_mode=True, fails=True, **options)
    message = run_module("vm_backup", vm=vm.name, path=str(target), fails=True, **options).message
    assert predicted.message == message
    assert fingerprint.definition(vm) == before and look(vm.disks()["vda"].parent) == files
    assert fingerprint.names(target) == []
    return message


@needs_lvm
@pytest.mark.parametrize("nodes", [False, True], ids=["inactive", "active"])
@pytest.mark.parametrize(
    ("shared", "volume", "kind"),
    [
        (False, "linear", "LVM"),
        (False, "thin", "thin LVM"),
        (True, "linear", "shared LVM"),
        (True, "thin", "shared LVM"),
    ],
)
def test_a_disk_on_lvm_is_refused(lab: Lab, run_module, shared: bool, volume: str, kind: str, nodes: bool) -> None:
    target = lab.path("backups")
    with lvm.VolumeGroup("labvg", lab.path("lvm"), shared=shared, nodes=nodes):
        for number, disk in enumerate((by_device(f"/dev/labvg/{volume}"), by_volume("fast", volume))):
            pool = lab.connection.storagePoolDefineXML(
                "<pool type='logical'><name>fast</name><source><name>labvg</name></source>"
                "<target><path>/dev/labvg</path></target></pool>"
            )
            try:
                vm = block_vm(lab, f"vm-{number}", disk)
                for mode in ("full", "auto"):
                    message = refused(run_module, vm, target, mode=mode)
                    assert f"disk vdl (/dev/labvg/{volume})" in message
                    assert f"is on {kind} (volume group labvg, pool fast of type logical)" in message
            finally:
                pool.undefine()
        outside = block_vm(lab, "outside", by_device(f"/dev/labvg/{volume}"))
        assert f"is on {kind} (volume group labvg)" in refused(run_module, outside, target)


@needs_lvm
def test_a_layer_below_on_lvm_is_refused(lab: Lab, run_module) -> None:
    with lvm.VolumeGroup("labvg", lab.path("lvm"), nodes=True):
        top = lab.path("layered") / "top.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/dev/labvg/linear", str(top))
        vm = lab.create_vm("layered", [Disk(path=top)], start=False)
        message = refused(run_module, vm, lab.path("backups"))
        assert "disk vda" in message and "is on LVM (volume group labvg)" in message


@needs_lvm
def test_lvm_is_no_target(lab: Lab, run_module) -> None:
    vm = lab.create_vm("web", start=False)
    archive = run_module("vm_backup", vm="web", path=str(lab.path("backups")))["archive"]["path"]
    with lvm.VolumeGroup("labvg", lab.path("lvm"), nodes=True):
        pool = lab.connection.storagePoolDefineXML(
            "<pool type='logical'><name>fast</name><source><name>labvg</name></source>"
            "<target><path>/dev/labvg</path></target></pool>"
        )
        try:
            before = fingerprint.definition(vm)
            for place in ({"pool": "fast"}, {"path": "/dev/labvg"}):
                for module, options in (
                    ("vm_backup", {"vm": "web"}),
                    ("vm_restore", {"source": archive, "name": "copy"}),
                ):
                    message = run_module(module, fails=True, **options, **place).message
                    assert "fast" in message and "logical" in message, message
            assert fingerprint.definition(vm) == before
        finally:
            pool.undefine()


@needs_zfs
def test_zfs_without_snapshots_only(lab: Lab, run_module, dataset: Path) -> None:
    """A running VM on a real dataset: full backups work, increments and snapshots do not."""
    image = make_image(dataset / "disk.qcow2", Disk())
    vm = lab.create_vm("web", [Disk(path=image)])
    pool = lab.create_pool("zfspool", dataset)
    target = lab.path("backups")
    for options in ({"mode": "auto"}, {"mode": "full", "incrementable": True}):
        message = refused(run_module, vm, target, **options)
        assert f"disk vda ({image})" in message and "is on ZFS (dataset tank/vms, pool zfspool of type dir)" in message
        assert "cannot be incrementable" in message
    vm.set_freeze_mode("pause")
    done = run_module("vm_backup", vm="web", path=str(target))
    assert done["consistency"] == "agent" and vm.disks()["vda"] == image
    assert vm.domain.snapshotNum() == 0 and sorted(path.name for path in pool.iterdir()) == ["disk.qcow2"]
    frozen = vm.frozen_digests()
    run_module("vm_restore", source=done["archive"]["path"], name="copy", path=str(lab.path("restored")))
    assert lab.adopt("copy").start().booted_digests() == frozen
    run_module("vm_snapshot", vm="web", snapshot="mine")
    Path(done["archive"]["path"]).unlink()
    message = refused(run_module, vm, target)
    assert f"disk vda ({dataset}" in message and "the VM has snapshots" in message
    assert "is on ZFS (dataset tank/vms, pool zfspool of type dir)" in message


def test_an_archive_on_a_read_only_file_system(lab: Lab, loop_fs, run_module) -> None:
    """Viewed, verified and restored from there, to a place that is named; nothing is written to it."""
    vm = lab.create_vm("web", start=False)
    content = truth.content_sha256(vm.disks()["vda"], "qcow2")
    keep = loop_fs("ext4", 64)
    archive = run_module("vm_backup", vm="web", path=str(keep.path))["archive"]["path"]
    keep.remount("ro")
    files = fingerprint.files(keep.path)
    assert run_module("backup_info", archive=archive)["archives"][0]["vm"]["name"] == "web"
    assert run_module("backup_info", path=str(keep.path), vm="web")["archives"][0]["path"] == archive
    verified = run_module("backup_verify", archive=archive)["archives"][0]
    assert verified["ok"] and verified["coverage"] == "full"
    # the former place is there: no other is needed
    run_module("vm_restore", source=archive, force=True)
    former = vm.disks()["vda"].parent
    vm.remove()
    run("rm", "-r", str(former))
    for options in ({}, {"path": str(keep.path)}, {"name": "copy"}):
        message = run_module("vm_restore", source=archive, fails=True, **options).message
        assert "read-only" in message and (options.get("path") or "'pool' or 'path'" in message), message
    place = lab.path("restored")
    run_module("vm_restore", source=archive, path=str(place))
    assert truth.content_sha256(lab.adopt("web").disks()["vda"], "qcow2") == content
    for module, options in (
        ("vm_backup", {"vm": "web", "path": str(keep.path)}),
        ("backup_archive", {"archive": archive, "compressed": True}),
        ("backup_archive", {"archive": archive, "state": "absent", "force": True}),
        ("backup_archive", {"archive": archive, "protected": True}),
    ):
        assert "read-only" in run_module(module, fails=True, **options).message.lower(), module
    assert fingerprint.files(keep.path) == files


def allocated(*paths: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in paths)


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_the_estimate(lab: Lab, run_module, image_format: str) -> None:
    """Of a backup and of a restore, within one per cent of what they take."""
    vm = lab.create_vm("web", [Disk(image_format, size_mib=512), Disk(image_format)], start=False)
    run("qemu-io", "-f", image_format, "-c", "write -P 1 8M 301M", "-c", "write -P 2 400M 3M", str(vm.disks()["vda"]))
    target = lab.path("backups")
    predicted = run_module("vm_backup", vm="web", path=str(target), check_mode=True)
    done = run_module("vm_backup", vm="web", path=str(target))
    size = Path(done["archive"]["path"]).stat().st_size
    assert predicted["estimated_bytes"] == done["estimated_bytes"] == pytest.approx(size, rel=0.01)
    assert Path(predicted["archive"]["path"]).name[:4] == "web_" and Path(predicted["archive"]["path"]).parent == target
    options = {"source": done["archive"]["path"], "name": "copy", "path": str(lab.path("restored"))}
    predicted = run_module("vm_restore", check_mode=True, **options)
    done = run_module("vm_restore", **options)
    taken = allocated(*lab.adopt("copy").disks().values())
    assert predicted["estimated_bytes"] == done["estimated_bytes"] == pytest.approx(taken, rel=0.01)


def test_the_estimate_of_increments(lab: Lab, run_module) -> None:
    vm = lab.create_vm("web", [Disk(size_mib=128)], writer=False)
    target = lab.path("backups")
    size = 0
    for number in range(2):
        vm.agent.shell(f"dd if=/dev/urandom of=/disk/vda/data-{number} bs=1M count=30 conv=fsync")
        predicted = run_module("vm_backup", vm="web", path=str(target), mode="auto", check_mode=True)
        done = run_module("vm_backup", vm="web", path=str(target), mode="auto")
        grown = Path(done["archive"]["path"]).stat().st_size - size
        size += grown
        assert done["mode"] == ("incremental" if number else "full")
        assert predicted["estimated_bytes"] == pytest.approx(grown, rel=0.01)


def test_the_former_pool_is_full_or_gone(lab: Lab, loop_fs, run_module) -> None:
    """Its disks go to the pool of the archive, all of them together, and the result says so."""
    small = loop_fs("ext4", 128)
    lab.create_pool("small", small.path)
    roomy = lab.create_pool("roomy")
    backups = lab.create_pool("backups")
    images = [make_image(small.path / f"{name}.raw", Disk("raw", 32)) for name in ("a", "b")]
    images.append(make_image(roomy / "c.raw", Disk("raw", 32)))
    for image in images:
        run("qemu-io", "-f", "raw", "-c", "write -P 9 4M 20M", str(image))
    digests = [truth.content_sha256(image, "raw") for image in images]
    vm = lab.create_vm("web", [Disk("raw", path=image) for image in images], start=False)
    done = run_module("vm_backup", vm="web", pool="backups")
    archive = done["archive"]["path"]
    vm.remove()
    for image in images:
        image.unlink()

    def restored(where: str) -> None:
        result = run_module("vm_restore", source=archive)
        paths = [Path(disk["path"]) for disk in result["disks"]]
        assert [path.parent for path in paths] == [backups, backups, roomy]
        assert [truth.content_sha256(path, "raw") for path in paths] == digests
        said = [text for text in result.warnings if "small" in text]
        assert len(said) == 1 and where in said[0] and "backups" in said[0], result.warnings
        lab.adopt("web").remove()
        for path in paths:
            path.unlink()

    small.fill(30 << 20)  # one of the two would fit
    restored("bytes free")
    lab.connection.storagePoolLookupByName("small").destroy()
    restored("not active")
    lab.connection.storagePoolLookupByName("small").undefine()
    restored("no storage pool of that name")


def test_where_neither_has_room(lab: Lab, loop_fs, run_module) -> None:
    vm = lab.create_vm("web", [Disk("raw", 32)], start=False)
    image = vm.disks()["vda"]
    run("qemu-io", "-f", "raw", "-c", "write -P 9 4M 20M", str(image))
    keep = loop_fs("ext4", 64)
    archive = run_module("vm_backup", vm="web", path=str(keep.path))["archive"]["path"]
    vm.remove()
    run("rm", "-r", str(image.parent))
    keep.fill(1 << 20)
    message = run_module("vm_restore", source=archive, fails=True).message
    assert str(image.parent) in message and str(keep.path) in message and "'pool' or 'path'" in message
    assert lab.connection.listAllDomains() == []
