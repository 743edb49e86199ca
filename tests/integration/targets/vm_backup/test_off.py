# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs that are off, or said to be; kinds of disks; what other tools make of the archive (SPEC B2, B4, B9, B11, A1, A4)."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import libvirt
import pytest
from lxml import etree

from ansible_collections.kvmops.backup.tests.lab import daemons, fingerprint, modules, truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, make_iso

_LUN = """<controller type='scsi' model='virtio-scsi'/>
<disk type='block' device='lun'><driver name='qemu' type='raw'/><source dev='/dev/disk/by-id/no-such-lun'/>
<target dev='sdz' bus='scsi'/></disk>"""


@pytest.fixture
def varied(lab):
    """Off: qcow2 with internal snapshots, sparse raw, an ISO, a LUN that is not there."""
    iso = make_iso(lab.path("isos") / "tools 1.iso", b"CD" * 5000)
    vm = lab.create_vm("varied", [Disk(), Disk("raw", size_mib=256)], isos=[iso], start=False)
    vda = vm.disks()["vda"]
    run("qemu-img", "snapshot", "-c", "first", str(vda))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 3M", str(vda))
    run("qemu-img", "snapshot", "-c", "second", str(vda))
    xml = vm.xml(inactive=True).replace("</devices>", _LUN + "</devices>")
    lab.connection.defineXML(xml)
    return vm


@pytest.mark.parametrize("compress", [False, True])
def test_every_reader_gets_the_same_bytes(lab, varied, run_module, compress):
    before = fingerprint.definition(varied), fingerprint.files(varied.disks()["vda"].parent)
    result = run_module("vm_backup", vm="varied", path=str(lab.path("backups")), compress=compress)
    assert (fingerprint.definition(varied), fingerprint.files(varied.disks()["vda"].parent)) == before
    assert result["consistency"] == "off"
    assert [skipped["device"] for skipped in result["skipped_devices"]] == ["sdz"]
    assert any("sdz" in warning for warning in result.warnings)
    archive = result["archive"]["path"]

    listed = run("tar", "-tf", archive).split("\n")[:-1]
    stamp = result["point"]
    expected = ["vda_0.qcow2", "vdb_0.qcow2", "0_tools_1.iso", "1_vmlinuz.boot", "2_initrd.gz.boot"]
    expected += [f"{stamp}.digests", f"{stamp}_varied.xml"]
    assert listed == expected
    assert run("bsdtar", "-tf", archive).split("\n")[:-1] == expected
    plain = archive
    if compress:
        run("zstd", "-q", "-t", archive)
        plain = str(lab.path("plain") / "plain.tar")
        run("zstd", "-q", "-d", archive, "-o", plain)
    assert run("busybox", "tar", "-tf", plain).split("\n")[:-1] == expected
    with tarfile.open(plain) as stream:
        assert stream.getnames() == expected
    for number, argv in enumerate(
        (["tar", "-xf", archive], ["bsdtar", "-xf", archive], ["busybox", "tar", "-xf", plain])
    ):
        files = lab.path(f"out{number}")
        subprocess.run(argv, cwd=files, check=True)
        assert truth.file_sha256(files / "vda_0.qcow2") == truth.file_sha256(varied.disks()["vda"])
        assert truth.content_sha256(files / "vdb_0.qcow2", "qcow2") == truth.raw_sha256(varied.disks()["vdb"])
        assert (files / "0_tools_1.iso").read_bytes() == (lab.directory / "isos" / "tools 1.iso").read_bytes()
        assert truth.file_sha256(files / "1_vmlinuz.boot") == truth.file_sha256(lab.directory / "boot" / "vmlinuz")
        for name in ("vda_0.qcow2", "vdb_0.qcow2"):
            run("qemu-img", "check", "-f", "qcow2", str(files / name))
    config = (lab.directory / "out0" / expected[-1]).read_text(encoding="utf-8")
    assert etree.fromstring(config).findtext("name") == "varied"
    lab.connection.defineXMLFlags(config, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)  # against libvirt's own schema


_RESTORE = """
- hosts: localhost
  gather_facts: false
  tasks:
    - name: Restore
      kvmops.backup.vm_restore: {source: "{{ archive }}", path: "{{ place }}", name: copy}
      notify: Told
  handlers:
    - name: Told
      ansible.builtin.debug: {msg: a handler ran}
"""


def test_what_is_left_out_is_told_and_the_task_is_not_skipped(lab, varied, ansible):
    """Ansible takes a result with the key `skipped` for that of a task which was not run."""
    result = ansible.module("vm_backup", vm="varied", path=str(lab.path("backups")), include_iso=False)
    assert not [name for name in run("tar", "-tf", result["archive"]["path"]).split() if name.endswith(".iso")]
    assert {device["device"] for device in result["skipped_devices"]} == {"sda", "sdz"}
    assert "localhost | CHANGED => {" in result.output and '"skipped_devices": [' in result.output
    done = ansible.playbook(_RESTORE, archive=result["archive"]["path"], place=str(lab.path("restored")))
    lab.adopt("copy")
    assert done.task("Restore").status == "ok" and done.task("Told").data["msg"] == "a handler ran"
    assert "sdz" in {device["device"] for device in done.task("Restore").data["skipped_devices"]}
    assert "skipped=0" in done.output


def test_managed_save_is_refused(lab, run_module):
    vm = lab.create_vm("saved", [Disk()])
    vm.domain.managedSave(0)
    target = lab.path("backups")
    before = fingerprint.definition(vm), fingerprint.files(vm.disks()["vda"].parent)
    result = run_module("vm_backup", vm="saved", path=str(target), fails=True)
    assert "managed-save" in result.message
    assert (fingerprint.definition(vm), fingerprint.files(vm.disks()["vda"].parent)) == before
    assert fingerprint.names(target) == []


def test_image_locked_by_a_forgotten_qemu(lab, run_module):
    vm = lab.create_vm("ghost", [Disk()], start=False)
    disk = vm.disks()["vda"]
    holder = ["qemu-io", "-f", "qcow2", str(disk)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdin.write("length\n")
        process.stdin.flush()
        process.stdout.readline()  # the image is open, so it is locked
        target = lab.path("backups")
        result = run_module("vm_backup", vm="ghost", path=str(target), fails=True)
        assert str(disk) in result.message
        assert fingerprint.names(target) == []
        process.stdin.close()
    assert run_module("vm_backup", vm="ghost", path=str(target)).changed


def test_terabyte_of_nothing(lab, run_module):
    vm = lab.create_vm("huge", [Disk("raw", size_mib=2**20, ext4=False), Disk(size_mib=2**20, ext4=False)], start=False)
    with open(vm.disks()["vda"], "r+b") as disk:
        disk.seek(700 * 2**30)
        disk.write(b"here" * 1000)
    result, peak_bytes, processor_s = modules.measure_module("vm_backup", vm="huge", path=str(lab.path("backups")))
    assert peak_bytes < 300 * 2**20
    assert processor_s < 60
    files = lab.path("out")
    run("tar", "-xf", result["archive"]["path"], "-C", str(files))
    data = run("qemu-io", "-f", "qcow2", "-r", "-c", "read -v 700G 16", str(files / "vda_0.qcow2"))
    assert "herehere" in data.replace(" ", "")


@pytest.fixture
def as_member(lab):
    """Runs a module as a user of the group libvirt, whom this libvirtd lets in without polkit."""
    settings = Path("/etc/libvirt/libvirtd.conf")
    before = settings.read_text()
    daemons.stop()
    settings.write_text(f'{before}\nauth_unix_rw = "none"\n')
    daemons.start()
    home = lab.path("home")
    os.chown(home, 65534, 65534)

    def run_as_member(module, **arguments):
        member = ["setpriv", "--reuid=65534", "--regid=65534", "--groups=libvirt", "env", f"HOME={home}"]
        done = subprocess.run(
            [*member, *modules.module_argv(module, arguments)], capture_output=True, text=True, check=False
        )
        return modules.module_result(module, done.stdout, done.stderr)

    yield run_as_member
    daemons.stop()
    settings.write_text(before)
    daemons.start()


def test_who_is_not_root_changes_no_vm_of_the_system(lab, as_member):
    """Locks and journals of that user would be seen by nobody else (SPEC H9)."""
    vm = lab.create_vm("shared", start=False)
    seen = as_member("vm_info")
    assert [each["name"] for each in seen["vms"]] == ["shared"]
    before = fingerprint.definition(vm)
    target = lab.path("backups")
    target.chmod(0o777)
    for module, arguments in (
        ("vm_backup", {"vm": "shared", "path": str(target)}),
        ("vm_snapshot", {"vm": "shared", "snapshot": "mine"}),
        ("vm_template", {"vm": "shared"}),
    ):
        refused = as_member(module, **arguments)
        assert refused.failed and "root only" in refused.message and "become: true" in refused.message, refused.output
    assert fingerprint.definition(vm) == before and fingerprint.names(target) == []
