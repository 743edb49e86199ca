# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""vm_restore on real VMs: what comes back, where, as whom, and what is refused."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import libvirt
import pytest
from lxml import etree

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.loopfs import LoopFileSystem, attach
from ansible_collections.kvmops.backup.tests.lab.markers import parse_log
from ansible_collections.kvmops.backup.tests.lab.modules import Ansible, ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm, make_iso

Run = Callable[..., ModuleResult]


def backup(run_module: Run, vm: LabVm, target: Path, **options: Any) -> str:
    return str(run_module("vm_backup", vm=vm.name, path=str(target), **options)["archive"]["path"])


def contents(vm: LabVm) -> dict[str, str]:
    """Digest of the virtual content of every disk."""
    formats = {
        disk.find("target").get("dev"): disk.find("driver").get("type")
        for disk in etree.fromstring(vm.xml(inactive=True)).findall("devices/disk[@device='disk']")
    }
    return {target: truth.content_sha256(path, formats[target]) for target, path in vm.disks().items()}


def world(lab: Lab) -> dict[str, Any]:
    """Everything a restore might touch: all files with their content, all definitions, the journal."""
    files = {str(path): truth.file_sha256(path) for path in sorted(lab.directory.rglob("*")) if path.is_file()}
    vms = {domain.name(): domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) for domain in lab.connection.listAllDomains()}
    return {"files": files, "vms": vms, "journal": sorted(os.listdir("/var/lib/kvmops-backup/journal"))}


def lose(vm: LabVm) -> None:
    """The VM and its disks are gone."""
    disks = vm.disks()
    vm.remove()
    for path in disks.values():
        path.unlink()


def test_a_copy_beside_the_running_original_boots_with_the_data_of_the_freeze(lab: Lab, run_module: Run) -> None:
    vm = lab.create_vm("web 01", [Disk(), Disk("raw")], freeze_mode="pause")
    vm.wait_for_marker(5)
    archive = backup(run_module, vm, lab.path("backups"))
    at_freeze = vm.frozen_digests()

    done = run_module("vm_restore", source=archive, name="copy", path=str(lab.path("restored")))
    copy = lab.adopt("copy")

    assert done.changed and done["vm"] == {"name": "copy", "uuid": copy.domain.UUIDString()}
    assert copy.domain.UUIDString() != vm.domain.UUIDString() and not copy.is_running()
    assert [(d["target"], d["format"]) for d in done["disks"]] == [("vda", "qcow2"), ("vdb", "raw")]
    assert {d["target"]: Path(d["path"]) for d in done["disks"]} == copy.disks()
    reader = lab.read_back("reader", [Disk("qcow2", path=copy.disks()["vda"]), Disk("raw", path=copy.disks()["vdb"])])
    assert reader.digests() == at_freeze
    reader.remove()
    copy.start()
    marker = copy.wait_for_marker(copy.last_marker().number + 1)
    assert marker not in parse_log(vm.log())  # it goes its own way
    assert vm.is_running()

    for force in (False, True):
        again = run_module("vm_restore", source=archive, name="copy", path=str(lab.directory / "restored"), force=force)
        assert not again.changed  # the same restore again; but the copy has gone on
        assert any("has gone on" in text and "once it is shut down" in text for text in again.warnings)
    text = run_module("vm_restore", source=archive, force=True, fails=True).message
    assert "is running" in text
    copy.domain.managedSave()
    text = run_module(
        "vm_restore", source=archive, name="copy", path=str(lab.path("other")), force=True, fails=True
    ).message
    assert "managed-save image" in text and list((lab.directory / "other").iterdir()) == []


@contextmanager
def lun(lab: Lab) -> Iterator[str]:
    """A block device to be passed through."""
    backing = lab.directory / "lun.img"
    backing.write_bytes(bytes(1 << 20))
    device = attach(backing)
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


def test_internal_snapshots_sparse_raw_iso_and_lun(lab: Lab, run_module: Run) -> None:
    iso = make_iso(lab.directory / "os.iso", b"install me")
    pool = lab.create_pool("rt-pool")
    with lun(lab) as device:
        lun_xml = (
            f"<controller type='scsi' model='virtio-scsi'/><disk type='block' device='lun'><driver name='qemu' type='raw'/>"
            f"<source dev='{device}'/><target dev='sdz' bus='scsi'/></disk>"
        )
        vm = lab.create_vm("mixed", [Disk(), Disk("raw", size_mib=512)], isos=[iso], extra_devices=lun_xml, start=False)
        run("qemu-img", "snapshot", "-c", "inside", str(vm.disks()["vda"]))
        before = {target: truth.file_sha256(path) for target, path in vm.disks().items()}
        archive = backup(run_module, vm, lab.path("backups"))

        beside = run_module("vm_restore", source=archive, name="beside", pool="rt-pool")
        copy = lab.adopt("beside")
        assert {target: truth.file_sha256(path) for target, path in copy.disks().items()} == before
        assert all(path.parent == pool for path in copy.disks().values())
        assert copy.disks()["vdb"].stat().st_blocks * 512 < 64 << 20
        assert "inside" in run("qemu-img", "snapshot", "-l", str(copy.disks()["vda"]))
        cd = etree.fromstring(copy.xml()).find("devices/disk[@device='cdrom']/source")
        assert cd.get("file") == str(iso)
        assert [item["device"] for item in beside["skipped_devices"]] == ["sdz"]
        assert "mixed" in beside["skipped_devices"][0]["reason"]
        assert any("sdz" in warning for warning in beside.warnings)
        volumes = {volume.name() for volume in lab.connection.storagePoolLookupByName("rt-pool").listAllVolumes()}
        assert {"beside-vda.qcow2", "beside-vdb.raw"} <= volumes

        lose(vm)
        iso.unlink()
        copy.remove()
        back = run_module("vm_restore", source=archive)
        again = lab.adopt("mixed")
        assert {target: truth.file_sha256(path) for target, path in again.disks().items()} == before
        assert back["skipped_devices"] == [] and f"dev='{device}'" in again.xml()
        assert iso.read_bytes().startswith(b"install me")
        assert again.disks() == vm.disks()
        raw_disk = again.disks()["vdb"]
        again.remove()

    lost = run_module("vm_restore", source=archive, name="elsewhere", pool="rt-pool", disk_format="qcow2", force=True)
    last = lab.adopt("elsewhere")
    assert [item["device"] for item in lost["skipped_devices"]] == ["sdz"]
    assert "nothing behind" in lost["skipped_devices"][0]["reason"]
    assert {disk["format"] for disk in lost["disks"] if disk["target"] in ("vda", "vdb")} == {"qcow2"}
    assert truth.content_sha256(last.disks()["vdb"], "qcow2") == truth.raw_sha256(raw_disk)


def test_a_lost_vm_comes_back_as_it_was(lab: Lab, run_module: Run, ansible: Ansible) -> None:
    vm = lab.create_vm("lost, 'quoted' & <odd> näme", [Disk(), Disk("raw")], start=False)
    vm.domain.setAutostart(1)
    former, before = vm.xml(inactive=True), contents(vm)
    archive = backup(run_module, vm, lab.path("backups"))
    lose(vm)

    done = ansible.module("vm_restore", source=archive)
    back = lab.adopt(vm.name)
    assert done["vm"]["name"] == vm.name and contents(back) == before

    def comparable(xml: str) -> list[bytes]:
        """Without the mark; libvirt sorts controllers when it reads a definition again."""
        root = etree.fromstring(xml, etree.XMLParser(remove_blank_text=True))
        devices = root.find("devices")
        for element in root.findall("metadata"):
            root.remove(element)
        root.remove(devices)
        return [etree.tostring(root, method="c14n"), *sorted(etree.tostring(each, method="c14n") for each in devices)]

    assert comparable(back.xml(inactive=True)) == comparable(former)
    assert not ansible.module("vm_restore", source=archive).changed
    assert {oct(path.stat().st_mode & 0o777) for path in back.disks().values()} == {"0o600"}
    started = run_module("vm_restore", source=archive, start=True)
    assert started.changed and back.is_running()
    back.wait_until_up()


def test_an_existing_vm_is_replaced_with_force_only(lab: Lab, run_module: Run) -> None:
    vm = lab.create_vm("victim", [Disk(), Disk("raw")], start=False)
    at_point = contents(vm)
    archive = backup(run_module, vm, lab.path("backups"))
    # time goes by: other data, a snapshot
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", str(vm.disks()["vda"]))
    run("qemu-io", "-f", "raw", "-c", "write -P 8 1M 64k", str(vm.disks()["vdb"]))
    vm.domain.setAutostart(1)
    former, later = vm.disks(), contents(vm)
    before = world(lab)
    text = run_module("vm_restore", source=archive, fails=True).message
    assert "a VM named victim exists" in text and str(former["vda"]) in text and "force" in text
    assert world(lab) == before

    done = run_module("vm_restore", source=archive, force=True)
    assert done.changed and vm.disks() == former and contents(vm) == at_point != later
    assert vm.domain.autostart() == 1
    assert not list(lab.directory.rglob(".*")) and world(lab)["journal"] == []
    assert not run_module("vm_restore", source=archive, force=True).changed
    # written to since: with force it is taken back once more, without it stays
    run("qemu-io", "-f", "raw", "-c", "write -P 9 1M 64k", str(former["vdb"]))
    assert not run_module("vm_restore", source=archive).changed
    assert run_module("vm_restore", source=archive, force=True).changed and contents(vm) == at_point


def test_force_replaces_another_vm_of_that_name_with_its_snapshots(lab: Lab, run_module: Run) -> None:
    first = lab.create_vm("twin", [Disk()], start=False)
    uuid, at_point = first.domain.UUIDString(), contents(first)
    archive = backup(run_module, first, lab.path("backups"))
    lose(first)
    second = lab.create_vm("twin", [Disk()], start=False)
    second.domain.snapshotCreateXML("<domainsnapshot><name>kept inside</name></domainsnapshot>")
    assert second.domain.UUIDString() != uuid

    done = run_module("vm_restore", source=archive, force=True)
    assert done["vm"]["uuid"] == uuid and contents(lab.adopt("twin")) == at_point
    assert [domain.UUIDString() for domain in lab.connection.listAllDomains()] == [uuid]
    assert lab.adopt("twin").domain.snapshotListNames() == []


def test_check_mode_touches_nothing_and_predicts(lab: Lab, run_module: Run) -> None:
    vm = lab.create_vm("predicted", [Disk(), Disk("raw")], start=False)
    archive = backup(run_module, vm, lab.path("backups"))
    place = lab.path("restored")
    before = world(lab)
    said = run_module("vm_restore", source=archive, name="copy", path=str(place), check_mode=True, diff=True)
    assert world(lab) == before
    assert said.changed and said["bytes_written"] == 0 and said["estimated_bytes"] > 0
    assert said["diff"]["before"] == "" and "<name>copy</name>" in said["diff"]["after"]
    done = run_module("vm_restore", source=archive, name="copy", path=str(place))
    lab.adopt("copy")
    assert done["disks"] == said["disks"]
    over = run_module("vm_restore", source=archive, force=True, check_mode=True, diff=True)
    assert over.changed and "<name>predicted</name>" in over["diff"]["before"]
    assert not run_module("vm_restore", source=archive, name="copy", path=str(place), check_mode=True).changed


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_damage_never_becomes_a_vm(lab: Lab, run_module: Run, compress: bool) -> None:
    vm = lab.create_vm("damaged", [Disk(size_mib=16), Disk("raw", size_mib=16)], start=False)
    # without kernels, which this host has: those of the archive are not read then
    archive = Path(backup(run_module, vm, lab.path("backups"), compress=compress, include_boot_files=False))
    good = archive.read_bytes()
    at_point = contents(vm)
    place = lab.path("restored")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    written = [offset for offset in range(len(good)) if good[offset]]
    refused = 0
    for offset in [*chance.sample(range(len(good)), 10), *chance.sample(written, 15)]:
        archive.write_bytes(good[:offset] + bytes([good[offset] ^ 1 << chance.randrange(8)]) + good[offset + 1 :])
        report = run_module("backup_verify", archive=str(archive), fail_on_damage=False)["archives"][0]
        done = _try(run_module, archive, place)
        if done.failed:
            assert not report["ok"], f"flipped byte {offset}"
            refused += 1
            assert list(place.iterdir()) == [], f"flipped byte {offset}"
            assert "copy" not in [domain.name() for domain in lab.connection.listAllDomains()]
        else:  # a byte without meaning, e.g. padding
            copy = lab.adopt("copy")
            assert contents(copy) == at_point, f"flipped byte {offset}"
            lose(copy)
    assert refused > 3
    archive.write_bytes(good[: len(good) // 2])
    assert _try(run_module, archive, place).failed and list(place.iterdir()) == []


def _try(run_module: Run, archive: Path, place: Path) -> ModuleResult:
    from ansible_collections.kvmops.backup.tests.lab import modules

    argv = modules.module_argv("vm_restore", {"source": str(archive), "name": "copy", "path": str(place)})
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return modules.module_result("vm_restore", done.stdout, done.stderr)


def test_full_read_only_and_missing_places(
    lab: Lab, run_module: Run, loop_fs: Callable[[str, int], LoopFileSystem]
) -> None:
    vm = lab.create_vm("placed", [Disk("raw", size_mib=64)], start=False)
    run("qemu-io", "-f", "raw", "-c", "write -P 5 8M 40M", str(vm.disks()["vda"]))
    at_point = contents(vm)
    archive = backup(run_module, vm, lab.path("backups"))
    small = loop_fs("ext4", 32)
    text = run_module("vm_restore", source=archive, name="copy", path=str(small.path), fails=True).message
    assert "are needed" in text
    assert "Create it" in run_module("vm_restore", source=archive, path=str(lab.directory / "none"), fails=True).message
    small.remount("ro")
    assert "read-only" in run_module("vm_restore", source=archive, path=str(small.path), fails=True).message
    # the former place is gone: to the one that holds the archive, with a warning
    former = vm.disks()["vda"].parent
    lose(vm)
    former.rmdir()
    done = run_module("vm_restore", source=archive)
    assert Path(done["disks"][0]["path"]).parent == lab.directory / "backups"
    assert any(str(former) in warning for warning in done.warnings)
    assert contents(lab.adopt("placed")) == at_point


def test_a_chain_is_restored_to_a_new_place_and_reads_the_same(lab: Lab, run_module: Run) -> None:
    vm = lab.create_vm("chained", [Disk("raw")], start=False)
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    for number in (1, 2):
        overlay = vm.disks()["vda"].with_suffix(f".s{number}")
        vm.domain.snapshotCreateXML(
            f"<domainsnapshot><name>s{number}</name><disks><disk name='vda' snapshot='external'>"
            f"<source file='{overlay}'/></disk></disks></domainsnapshot>",
            flags,
        )
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {number} {number}M 64k", str(overlay))
    at_point = contents(vm)
    archive = backup(run_module, vm, lab.path("backups"))
    done = run_module("vm_restore", source=archive, name="copy", path=str(lab.path("restored")))
    copy = lab.adopt("copy")
    assert contents(copy) == at_point
    chain = run("qemu-img", "info", "--backing-chain", str(copy.disks()["vda"]))
    assert str(vm.disks()["vda"].parent) not in chain and chain.count("image: ") == 3
    assert sorted(done["snapshots"]) == ["s1", "s2"]
    copy.start()
    copy.agent.shell("test -f /disk/vda/log || touch /disk/vda/log")


def test_a_bare_configuration_gives_a_vm_without_disks(lab: Lab, run_module: Run) -> None:
    vm = lab.create_vm("bare", [Disk()], isos=[make_iso(lab.directory / "x.iso", b"x")], start=False)
    file = lab.directory / "bare.xml"
    file.write_text(vm.xml(inactive=True))
    vm.remove()
    done = run_module("vm_restore", source=str(file))
    root = etree.fromstring(lab.adopt("bare").xml())
    assert root.find("devices/disk") is None and done["disks"] == []
    left_out = {item["device"].split()[0] for item in done["skipped_devices"]}
    assert left_out == {"vda", "sda", "kernel", "initrd", "cmdline"}
    assert not run_module("vm_restore", source=str(file)).changed


def test_nvram_and_a_volume_come_back(lab: Lab, run_module: Run) -> None:
    firmware = lab.directory / "code.fd"
    firmware.write_bytes(bytes(4096))
    firmware.chmod(0o644)
    nvram = Path("/var/lib/libvirt/qemu/nvram/settings of efi_VARS.fd")
    nvram.write_bytes(b"settings" * 512)
    pool = lab.create_pool("vm-volumes")
    vm = lab.create_vm("efi", [Disk()], start=False)
    path = vm.disks()["vda"]
    path.rename(pool / "efi.qcow2")
    make_iso(pool / "tools.iso", b"tools")
    lab.connection.storagePoolLookupByName("vm-volumes").refresh()
    xml = vm.xml(inactive=True).replace("<disk type='file'", "<disk type='volume'")
    xml = xml.replace(f"<source file='{path}'/>", "<source pool='vm-volumes' volume='efi.qcow2'/>")
    loader = f"<loader readonly='yes' type='pflash'>{firmware}</loader><nvram>{nvram}</nvram>"
    cd = (
        "<disk type='volume' device='cdrom'><source pool='vm-volumes' volume='tools.iso'/>"
        "<target dev='sdx' bus='sata'/></disk></devices>"
    )
    lab.connection.defineXML(xml.replace("</type>", f"</type>{loader}").replace("</devices>", cd))
    content = truth.content_sha256(pool / "efi.qcow2", "qcow2")
    archive = backup(run_module, vm, lab.path("backups"))

    run_module("vm_restore", source=archive, name="copy")
    copy = lab.adopt("copy")
    theirs = Path("/var/lib/libvirt/qemu/nvram/copy_VARS.fd")
    assert theirs.read_bytes() == nvram.read_bytes() and str(theirs) in copy.xml()
    assert copy.disks() == {"vda": pool / "copy-vda.qcow2"}
    assert "<source pool='vm-volumes' volume='tools.iso'/>" in copy.xml()  # there is one, for both

    vm.remove()
    nvram.unlink(missing_ok=True)
    (pool / "efi.qcow2").unlink()
    run_module("vm_restore", source=archive)
    back = lab.adopt("efi")
    assert nvram.read_bytes() == b"settings" * 512 and str(nvram) in back.xml()
    assert "<source pool='vm-volumes' volume='efi.qcow2'/>" in back.xml(inactive=True)
    assert truth.content_sha256(pool / "efi.qcow2", "qcow2") == content
    assert not run_module("vm_restore", source=archive).changed


def test_a_kernel_comes_from_the_archive_where_the_host_has_not_the_same(lab: Lab, run_module: Run) -> None:
    """Stored once in an archive with two points; used from its former path also where only root may read it."""
    vm = lab.create_vm("direct", [Disk()], agent=False, start=False)
    place = lab.path("boot-of-direct")
    for name in ("vmlinuz", "initrd.gz"):
        shutil.copy(lab.directory / "boot" / name, place / name)
        (place / name).chmod(0o600)
    digests = {path.name: truth.file_sha256(path) for path in place.iterdir()}
    lab.connection.defineXML(vm.xml(inactive=True).replace(f"{lab.directory}/boot/", f"{place}/"))
    target = lab.path("backups")
    for _dummy in range(2):
        archive = backup(run_module, vm, target, mode="auto")
    shown = run_module("backup_info", archive=archive)["archives"][0]
    assert len(shown["points"]) == 2
    assert [each["member"] for each in shown["config"]["boot_files"]] == ["0_vmlinuz.boot", "1_initrd.gz.boot"]
    before = vm.xml(inactive=True)
    run_module("vm_restore", source=archive, force=True, flatten=True)
    assert [line for line in vm.xml(inactive=True).splitlines() if "boot-of-direct" in line] == [
        line for line in before.splitlines() if "boot-of-direct" in line
    ]

    (place / "vmlinuz").unlink()
    (place / "initrd.gz").write_bytes(b"another one")
    restored = lab.path("restored")
    done = run_module("vm_restore", source=archive, name="copy", path=str(restored))
    assert any("is not on this host" in text and "vmlinuz" in text for text in done.warnings)
    assert any("another file" in text and "initrd.gz" in text for text in done.warnings)
    assert {name: truth.file_sha256(restored / f"copy-{name}") for name in digests} == digests
    copy = lab.adopt("copy").start()  # its guest is up
    root = etree.fromstring(copy.xml())
    assert root.findtext("os/kernel") == str(restored / "copy-vmlinuz") and "console=ttyS0" in root.findtext("os/cmdline")
    copy.destroy()
    assert not run_module("vm_restore", source=archive, name="copy", path=str(restored)).changed

    bare = backup(run_module, copy, lab.path("without"), include_boot_files=False)
    copy_kernel = restored / "copy-vmlinuz"
    copy_kernel.rename(f"{copy_kernel}.away")
    refused = run_module("vm_restore", source=bare, name="other", path=str(lab.path("other")), fails=True)
    assert f"{copy_kernel} (booted by the VM, and not in the archive)" in refused.message


def without_a_refcount(path: Path, mark: int) -> None:
    """A qcow2 with one reference count too few, marked as dirty (1) or corrupt (2) as QEMU does it."""
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 48)
    (block,) = struct.unpack_from(">Q", data, table)
    counts = struct.unpack_from(">64H", data, block)
    data[79] |= mark
    struct.pack_into(">H", data, block + 2 * max(n for n, count in enumerate(counts) if count), 0)
    path.write_bytes(data)


def test_a_disk_that_qemu_has_marked_as_corrupt_is_restored_repaired(lab: Lab, run_module: Run) -> None:
    """And one that was not closed (lazy_refcounts), which QEMU repairs by itself; both said at the backup."""
    lazy = Disk(options="lazy_refcounts=on")
    vm = lab.create_vm("worn", [Disk(), lazy], agent=False, start=False)
    good = contents(vm)
    disks = vm.disks()
    without_a_refcount(disks["vda"], 2)
    without_a_refcount(disks["vdb"], 1)
    target = lab.path("backups")
    refused = run_module("vm_backup", vm="worn", path=str(target), incrementable=True, fails=True)
    assert str(disks["vda"]) in refused.message and "qemu-img check -r all" in refused.message
    for check_mode in (True, False):
        done = run_module("vm_backup", vm="worn", path=str(target), mode="auto", check_mode=check_mode)
        assert any(str(disks["vda"]) in text and "corrupt" in text and "repair: true" in text for text in done.warnings)
        assert any(str(disks["vdb"]) in text and "not closed" in text for text in done.warnings)
        assert not done["archive"]["incrementable"] and vm.domain.snapshotListNames() == []
    archive = done["archive"]["path"]
    digest = truth.file_sha256(archive)
    shown = run_module("backup_info", archive=archive)["archives"][0]
    assert any("corrupt" in text and "repair: true" in text for text in shown["warnings"])
    checked = run_module("backup_verify", archive=archive)
    assert checked["archives"][0]["ok"] and any("vda_0.qcow2" in text for text in checked.warnings)
    deep = run_module("backup_verify", archive=archive, deep=True, fails=True)
    assert [each["member"] for each in deep["archives"][0]["damage"]] == ["vda_0.qcow2"]

    place = lab.path("restored")
    for check_mode in (True, False):
        refused = run_module("vm_restore", source=archive, name="copy", path=str(place), check_mode=check_mode, fails=True)
        assert "vda_0.qcow2 (vda)" in refused.message and "'repair: true'" in refused.message
    assert list(place.iterdir()) == []
    done = run_module("vm_restore", source=archive, name="copy", path=str(place), repair=True)
    copy = lab.adopt("copy")
    assert {each["target"]: each["corruptions"] > 0 for each in done["repaired"]} == {"vda": True, "vdb": True}
    assert any("is repaired" in text and "vda" in text for text in done.warnings)
    for path in copy.disks().values():
        run("qemu-img", "check", "-f", "qcow2", str(path))
    assert contents(copy) == good
    assert truth.file_sha256(archive) == digest
