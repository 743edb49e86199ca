# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""UEFI variables and the state of a TPM: in every point, and back, byte for byte."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.tests.lab._run import wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Lab, LabVm

TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
OVMF = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
SWTPM = Path("/var/lib/libvirt/swtpm")

pytestmark = pytest.mark.skipif(
    not OVMF.exists() or not Path("/usr/bin/swtpm").exists(), reason="this host has no OVMF or no swtpm"
)


@dataclass(frozen=True)
class State:
    """The bytes of what firmware and TPM keep."""

    nvram: str
    tpm: dict[str, str]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def nvram(vm: LabVm) -> Path:
    named = etree.fromstring(vm.xml(inactive=True).encode()).findtext("os/nvram")
    return Path(named or f"/var/lib/libvirt/qemu/nvram/{vm.name}_VARS.fd")


def state(vm: LabVm) -> State:
    directory = SWTPM / vm.domain.UUIDString()
    # not what swtpm is just writing, TMP2-00.permall, which gets the name of the old one
    tpm = {str(path.relative_to(directory)): digest(path.read_bytes()) for path in sorted(directory.glob("*/tpm2-*"))}
    return State(digest(nvram(vm).read_bytes()), tpm)


def stored(archive: str, point: int) -> State:
    """What a point holds, read by an ordinary tar."""
    with tarfile.open(archive) as members:
        variables = members.extractfile(f"{point}.nvram").read()
        with tarfile.open(fileobj=io.BytesIO(members.extractfile(f"{point}.tpm.tar").read())) as files:
            tpm = {name: digest(files.extractfile(name).read()) for name in files.getnames()}
    return State(digest(variables), tpm)


def uefi_vm(lab: Lab, name: str) -> LabVm:
    """Running, its NVRAM and TPM made by this first start."""
    vm = lab.create_vm(name, extra_devices=TPM, start=False)
    root = etree.fromstring(vm.xml(inactive=True).encode())
    system = root.find("os")
    system.set("firmware", "efi")
    feature = etree.SubElement(etree.SubElement(system, "firmware"), "feature")
    feature.set("enabled", "no")
    feature.set("name", "secure-boot")
    lab.connection.defineXML(etree.tostring(root, encoding="unicode"))
    template = OVMF.with_name("OVMF_VARS_4M.fd").read_bytes()
    vm.start()  # until the firmware has handed over
    assert nvram(vm).read_bytes() != template
    return vm


def write_variable(vm: LabVm, byte: bytes) -> None:
    """As the firmware does, somewhere in the store."""
    with open(nvram(vm), "r+b") as file:
        file.seek(-4096, 2)
        file.write(byte * 512)


def manufactured(name: str) -> bool:
    """Whether libvirt had a new TPM made for a VM."""
    log = Path(f"/var/log/swtpm/libvirt/qemu/{name}-swtpm.log")
    return log.exists() and "manufacturing" in log.read_text()


def test_every_point_has_its_nvram_and_tpm(lab: Lab, run_module) -> None:
    vm = uefi_vm(lab, "uefi")
    assert manufactured("uefi")
    target = lab.path("backups")
    wanted: dict[int, State] = {}
    for number in range(3):
        if number:
            vm.destroy()  # the last increment is of a VM that is off
            write_variable(vm, b"%d" % number)
            before = state(vm).tpm
            if number == 1:
                vm.start()
                assert state(vm).tpm != before
        done = run_module("vm_backup", vm="uefi", path=str(target), mode="auto")
        assert done["mode"] == ("incremental" if number else "full"), done["reason"]
        wanted[done["point"]] = state(vm)
        assert not [item for item in done["skipped_devices"] if item["device"] == "tpm"]
    archive = done["archive"]["path"]
    assert len({each.nvram for each in wanted.values()}) == 3 and len({str(each.tpm) for each in wanted.values()}) == 2
    assert {point: stored(archive, point) for point in wanted} == wanted

    for number, point in enumerate(wanted):  # as copies, beside the original
        done = run_module(
            "vm_restore", source=archive, point=point, name=f"copy-{number}", path=str(lab.path(f"restored-{number}"))
        )
        copy = lab.adopt(f"copy-{number}")
        assert copy.domain.UUIDString() != vm.domain.UUIDString()
        assert state(copy) == wanted[point] and "TPM" not in " ".join(done.warnings)
    copy.start(wait=False)
    wait_for("the copy's firmware to start its TPM", lambda: state(copy).tpm != wanted[point].tpm, 120)
    assert not manufactured(copy.name)
    copy.destroy()

    first, *_later, last = wanted
    uuid = vm.domain.UUIDString()
    run_module("vm_restore", source=archive, point=first, force=True)  # in place
    assert state(vm) == wanted[first]
    left, files = nvram(vm), vm.disks()["vda"].parent
    vm.remove()
    for file in files.iterdir():
        file.unlink()
    assert not (SWTPM / uuid).exists()
    left.write_bytes(b"left behind")
    assert "force" in run_module("vm_restore", source=archive, point=last, fails=True).message
    run_module("vm_restore", source=archive, point=last, force=True)  # after it is gone
    again = lab.adopt("uefi")
    assert state(again) == wanted[last]
    leftovers = [path.name for path in SWTPM.iterdir() if path.name.startswith(".")]
    assert leftovers == []


def test_a_vm_that_never_ran_has_no_tpm_state(lab: Lab, run_module) -> None:
    lab.create_vm("fresh", extra_devices=TPM, start=False)
    done = run_module("vm_backup", vm="fresh", path=str(lab.path("backups")))
    restored = run_module("vm_restore", source=done["archive"]["path"], name="other", path=str(lab.path("restored")))
    lab.adopt("other")
    assert any("no TPM state" in warning for warning in restored.warnings)
