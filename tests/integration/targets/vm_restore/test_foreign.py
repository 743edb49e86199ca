# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives that other tools made, and hostile ones."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab

Run = Callable[..., ModuleResult]


def unpacked(lab: Lab, name: str) -> tuple[Path, dict[str, str]]:
    """A directory with the disks and the definition of a VM that is gone, and the digests of the disks' content."""
    vm = lab.create_vm(name, [Disk(), Disk()], start=False)
    folder = lab.path("foreign")
    (folder / "web.xml").write_text(vm.xml(inactive=True))
    digests = {}
    for target, path in vm.disks().items():
        digests[target] = truth.content_sha256(path, "qcow2")
        path.rename(folder / path.name)
    vm.remove()
    return folder, digests


PACKERS = {
    "plain": ["tar", "-cf", "{archive}.tar", "-C", "{folder}", "web.xml", "vda.qcow2", "vdb.qcow2"],
    "dot": ["tar", "-C", "{folder}", "-cf", "{archive}.tar", "."],
    "zstd": ["sh", "-c", "tar -C '{folder}' -cf - . | zstd -q -19 --long -o '{archive}.tar.zst'"],
}


@pytest.mark.parametrize("packer", PACKERS)
def test_a_foreign_archive_is_restored(lab: Lab, run_module: Run, packer: str) -> None:
    folder, digests = unpacked(lab, "stranger")
    run(*(part.format(archive=lab.directory / "x", folder=folder) for part in PACKERS[packer]))
    archive = next(lab.directory.glob("x.tar*"))
    done = run_module("vm_restore", source=str(archive), name="restored here", path=str(lab.path("restored")))
    vm = lab.adopt("restored here")
    assert done.changed and {t: truth.content_sha256(path, "qcow2") for t, path in vm.disks().items()} == digests
    assert not run_module(
        "vm_restore", source=str(archive), name="restored here", path=str(lab.directory / "restored")
    ).changed
    # to the former places, which still are there
    back = run_module("vm_restore", source=str(archive))
    assert {disk["path"] for disk in back["disks"]} == {
        str(lab.directory / f"vm-0/{target}.qcow2") for target in digests
    }
    assert lab.adopt("stranger").domain.name() == "stranger"
    vm.start()


def test_a_foreign_overlay_stands_on_its_restored_base(lab: Lab, run_module: Run) -> None:
    folder, _dummy = unpacked(lab, "layered")
    top = folder / "vda.snapshot"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(folder / "vda.qcow2"), str(top))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 64k", str(top))
    content = truth.content_sha256(top, "qcow2")
    file = folder / "web.xml"
    file.write_text(file.read_text().replace("vda.qcow2", "vda.snapshot"))
    run("tar", "-C", str(folder), "-cf", str(lab.directory / "x.tar"), ".")
    run("rm", "-r", str(folder))
    place = lab.path("restored")
    done = run_module("vm_restore", source=str(lab.directory / "x.tar"), path=str(place))
    assert truth.content_sha256(lab.adopt("layered").disks()["vda"], "qcow2") == content, done.output
    flat = run_module("vm_restore", source=str(lab.directory / "x.tar"), name="flat", path=str(place), flatten=True)
    image = lab.adopt("flat").disks()["vda"]
    assert truth.content_sha256(image, "qcow2") == content and "flat-vda.qcow2" in {
        path.name for path in place.iterdir()
    }
    assert "backing file" not in run("qemu-img", "info", str(image)) and len(flat["disks"]) == 2


@pytest.mark.parametrize("trick", ["backing", "data-file", "not-qcow2", "foreign-base"])
def test_an_image_that_reaches_for_a_host_file_is_refused(lab: Lab, run_module: Run, trick: str) -> None:
    folder, _dummy = unpacked(lab, "hostile")
    secret = lab.directory / "secret"
    secret.write_bytes(b"s" * 65536)
    image = folder / "vda.qcow2"
    image.unlink()
    if trick == "backing":
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(image))
    elif trick == "foreign-base":
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-u",
            "-F",
            "qcow2",
            "-b",
            "/templates/base.qcow2",
            str(image),
            "64M",
        )
    elif trick == "data-file":
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            f"data_file={lab.directory}/d.raw,data_file_raw=on",
            str(image),
            "1M",
        )
    else:
        image.write_bytes(b"KDMV" + bytes(65532))
    run("tar", "-C", str(folder), "-cf", str(lab.directory / "x.tar"), ".")
    place = lab.path("restored")
    text = run_module("vm_restore", source=str(lab.directory / "x.tar"), path=str(place), fails=True).message
    assert list(place.iterdir()) == [] and lab.connection.listAllDomains() == []
    assert {"backing": "secret", "foreign-base": "base.qcow2", "data-file": "d.raw", "not-qcow2": "vmdk"}[trick] in text


def test_a_foreign_definition_does_not_reach_the_host(lab: Lab, run_module: Run) -> None:
    folder, _dummy = unpacked(lab, "grabby")
    file = folder / "web.xml"
    grab = (
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/etc/shadow'/>"
        "<target dev='vdz' bus='virtio'/></disk>"
        "<filesystem type='mount'><source dir='/etc'/><target dir='t'/></filesystem>"
        "<serial type='file'><source path='/root/evil'/><target port='1'/></serial></devices>"
    )
    file.write_text(file.read_text().replace("</devices>", grab))
    run("tar", "-C", str(folder), "-cf", str(lab.directory / "x.tar"), ".")
    done = run_module("vm_restore", source=str(lab.directory / "x.tar"), path=str(lab.path("restored")))
    xml = lab.adopt("grabby").xml(inactive=True)
    assert "/etc" not in xml and "/root/evil" not in xml
    assert len(etree.fromstring(xml).findall("devices/serial")) == 2
    assert {item["device"] for item in done["skipped"]} == {"vdz", "filesystem /etc", "serial /root/evil"}
    for item in done["skipped"]:
        assert any(item["device"] in warning for warning in done.warnings)
