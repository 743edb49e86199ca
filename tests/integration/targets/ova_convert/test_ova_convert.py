# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs of other products boot here: converted and restored, or restored directly, with the usual mapping and with virtio."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.tests.lab import bootable, truth
from ansible_collections.kvmops.backup.tests.lab.loopfs import LoopFileSystem
from ansible_collections.kvmops.backup.tests.lab.modules import module_argv
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm, make_image

NETWORKS = {"VM Network": "default"}


@pytest.fixture(scope="module")
def ovas(module_lab: Lab) -> dict[str, Path]:
    """A VM with a BIOS, one with EFI, and one with two disks on two controllers, of which the file's first is the second."""
    work = module_lab.path("ovas")
    bios, data = bootable.bios_disk(work), work / "data.raw"
    make_image(data, Disk("raw", 16))
    made = {
        "bios": bootable.ova(work / "bios.ova", [(bios, 0, 0)]),
        "two": bootable.ova(work / "two.ova", [(data, 1, 0), (bios, 0, 3)]),
        "efi": bootable.ova(work / "efi.ova", [(bootable.efi_disk(work), 0, 0)], efi=True),
    }
    for raw in work.glob("*.raw"):
        if raw != data:
            raw.unlink()
    return made


def boots(lab: Lab, name: str) -> LabVm:
    """Starts it, on a network that needs nothing of the host, until the guest says that it is up."""
    vm = lab.adopt(name)
    xml = vm.xml(inactive=True).replace("<interface type='network'>", "<interface type='user'>")
    lab.connection.defineXML(xml.replace("<source network='default'/>", ""))
    vm.start(wait=False)
    vm.console_line("GUEST-UP")
    return vm


def ends(vm: LabVm) -> None:
    vm.destroy()
    vm.remove()


@pytest.mark.parametrize("kind", ["bios", "efi", "two"])
@pytest.mark.parametrize("mapping", [{}, {"disk_bus": "virtio", "nic_model": "virtio"}], ids=["usual", "virtio"])
def test_converted_vms_boot(kind: str, mapping: dict[str, Any], ovas: dict[str, Path], module_lab: Lab, run_module: Any) -> None:
    target = module_lab.path(f"to-{kind}-{len(mapping)}")
    made = run_module("ova_convert", src=str(ovas[kind]), path=str(target), networks=NETWORKS, compress=bool(mapping), **mapping)
    assert made.changed and "before its first start" in str(made.warnings)
    again = run_module("ova_convert", src=str(ovas[kind]), path=str(target), networks=NETWORKS, compress=bool(mapping), **mapping)
    assert not again.changed and again["archive"] == made["archive"]
    restored = run_module("vm_restore", source=made["archive"]["path"], name=f"{kind}-{len(mapping)}")
    assert "has no KVM" in str(restored.warnings)  # the lab's hosts have none; the archive itself is for those that have
    disks = {disk["target"]: Path(disk["path"]) for disk in restored["disks"]}
    assert all(path.parent == target for path in disks.values())  # no former places: the one that holds the archive
    if kind == "two":  # the order of controllers and addresses, not of the file
        data = disks["vdb" if mapping else "sdb"]
        assert truth.content_sha256(data, "qcow2") == truth.content_sha256(ovas["two"].parent / "data.raw", "raw")
    vm = boots(module_lab, restored["vm"]["name"])
    assert ("virtio" in vm.xml().partition("<target dev='vda'")[2][:40]) == bool(mapping)
    ends(vm)


def test_restored_directly(ovas: dict[str, Path], module_lab: Lab, run_module: Any, ansible: Any) -> None:
    target = module_lab.path("direct")
    arguments = {"source": str(ovas["two"]), "path": str(target), "networks": NETWORKS}
    predicted = run_module("vm_restore", check_mode=True, **arguments)
    assert predicted.changed and not os.listdir(target)
    missing = run_module("vm_restore", fails=True, source=str(ovas["two"]), path=str(target))
    assert "the network VM Network" in missing.message and not os.listdir(target)
    restored = ansible.module("vm_restore", **arguments)
    assert restored.changed and restored["replaced"] and [disk["target"] for disk in restored["disks"]] == ["sda", "sdb"]
    assert not run_module("vm_restore", **arguments).changed
    vm = boots(module_lab, "two")
    vm.destroy()
    backup = run_module("vm_backup", vm="two", path=str(module_lab.path("backup")), keep_last=1)
    assert backup.changed
    ends(vm)


def test_descriptor_alone(ovas: dict[str, Path], module_lab: Lab, run_module: Any) -> None:
    directory = module_lab.path("unpacked")
    subprocess.run(["tar", "-xf", ovas["bios"], "-C", directory], check=True)
    source = str(directory / "bios.ovf")
    run_module("vm_restore", source=source, name="alone", networks=NETWORKS, disks=False)
    vm = module_lab.adopt("alone")
    assert "<disk" not in vm.xml()
    whole = run_module("vm_restore", source=source, name="whole", networks=NETWORKS)
    assert Path(whole["disks"][0]["path"]).parent == directory
    module_lab.adopt("whole").remove()
    (directory / "bios-disk0.vmdk").unlink()
    shown = run_module("backup_info", archive=source)["archives"][0]
    assert [(row["name"], row["present"]) for row in shown["files"]] == [("bios-disk0.vmdk", False)]
    refused = run_module("vm_restore", fails=True, source=source, name="none", networks=NETWORKS)
    assert "bios-disk0.vmdk" in refused.message
    vm.remove()


def test_definition_of_a_converted_archive(ovas: dict[str, Path], module_lab: Lab, run_module: Any) -> None:
    """It names no files of any host. By itself it makes a VM without disks; tar and two lines make one with them."""
    target = module_lab.path("definition")
    archive = run_module("ova_convert", src=str(ovas["bios"]), path=str(target), networks=NETWORKS)["archive"]["path"]
    shown = run_module("backup_info", archive=archive)["archives"][0]
    assert shown["config"]["disks"][0]["target"] == "sda" and not shown["config"]["disks"][0].get("former_path")
    subprocess.run(["tar", "-xf", archive, "-C", target], check=True)
    (definition,) = target.glob("*.xml")
    assert "type=\"kvm\"" in definition.read_text() and "<source file" not in definition.read_text()
    run_module("vm_restore", source=str(definition), name="bare")
    vm = module_lab.adopt("bare")
    assert "<disk" not in vm.xml()
    vm.remove()


def test_places(ovas: dict[str, Path], module_lab: Lab, run_module: Any) -> None:
    """A read-only source needs a target; one that becomes full during a conversion has nothing of it afterwards."""
    with LoopFileSystem("ext4", 80, module_lab.directory / "loop") as place:
        source = place.path / "bios.ova"
        source.write_bytes(ovas["bios"].read_bytes())
        filled = place.fill(leave_bytes=8 << 20)
        for compress, words in ((False, "are free"), (True, "Free space there")):  # told before, and when it happens
            full = run_module("ova_convert", fails=True, src=str(source), compress=compress)
            assert words in full.message
        assert sorted(os.listdir(place.path)) == sorted({"lost+found", "bios.ova", filled.name})
        filled.unlink()
        place.remount("ro")
        refused = run_module("ova_convert", fails=True, src=str(source))
        assert "'pool' or 'path'" in refused.message
        assert run_module("ova_convert", src=str(source), path=str(module_lab.path("elsewhere"))).changed


def test_killed(ovas: dict[str, Path], module_lab: Lab, run_module: Any) -> None:
    """In the middle: nothing visible is there, and the next run works and removes what was left."""
    target = module_lab.path("killed")
    arguments = {"src": str(ovas["efi"]), "path": str(target), "compress": True, "compress_level": 19, "threads": 1}
    with subprocess.Popen([str(each) for each in module_argv("ova_convert", arguments)], stdout=subprocess.DEVNULL) as process:
        while not any(".partial-" in name for name in os.listdir(target)):
            assert process.poll() is None
        process.kill()
    assert all(name.startswith(".") for name in os.listdir(target))
    made = run_module("ova_convert", **{**arguments, "compress_level": 1})
    assert os.listdir(target) == [Path(made["archive"]["path"]).name] and "put right" in str(made.warnings)


def test_playbook(ovas: dict[str, Path], module_lab: Lab, ansible: Any) -> None:
    target = module_lab.path("played")
    played = ansible.playbook(
        "kvmops.backup.convert_ova", convert_src=str(ovas["bios"]), convert_path=str(target), convert_name="played",
        convert_networks=NETWORKS, convert_restore=True, convert_become=False,
    )  # fmt: skip
    assert "e1000 on the network default" in played.output
    vm = module_lab.adopt("played")
    assert vm.disks()["sda"].parent == target
    vm.remove()
