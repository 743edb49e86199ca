# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Host devices, LUNs, shared directories: what is recorded, what comes back, and only where it is there and free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.loopfs import attach
from ansible_collections.kvmops.backup.tests.lab.vm import Lab

PCI = (
    "<hostdev mode='subsystem' type='pci' managed='yes'><source><address domain='0x0000' bus='0x7f' slot='0x1e' "
    "function='0x7'/></source></hostdev>"
)
USB = (
    "<hostdev mode='subsystem' type='usb'><source startupPolicy='optional'><vendor id='0xdead'/><product id='0xbeef'/>"
    "</source></hostdev>"
)
MDEV = (
    "<hostdev mode='subsystem' type='mdev' model='vfio-pci'><source><address "
    "uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source></hostdev>"
)
VSOCK = "<vsock model='virtio'><cid auto='no' address='77'/></vsock>"
SHARED = "<filesystem type='mount'><source dir='/srv/shared'/><target dir='tag'/></filesystem>"


@pytest.fixture
def loops(lab: Lab) -> Iterator[list[str]]:
    """Two block devices that nobody uses."""
    with ExitStack() as stack:
        found = []
        for number in range(2):
            image = lab.directory / f"lun-{number}"
            with open(image, "wb") as file:
                file.truncate(8 << 20)
            found.append(attach(image))
            stack.callback(run, "losetup", "-d", found[-1])
        yield found


def lun(device: str) -> str:
    return (
        "<controller type='scsi' model='virtio-scsi'/><disk type='block' device='lun'><driver name='qemu' type='raw'/>"
        f"<source dev='{device}'/><target dev='sdx' bus='scsi'/></disk>"
    )


def luns(lab: Lab, name: str) -> list[str]:
    root = etree.fromstring(lab.adopt(name).xml(inactive=True).encode())
    return [str(source.get("dev")) for source in root.iterfind("devices/disk[@device='lun']/source")]


def test_a_lun_comes_back_where_it_is_there_and_free(lab: Lab, run_module, loops: list[str]) -> None:
    wanted, other = loops
    lab.create_vm("web", extra_devices=lun(wanted), start=False)
    done = run_module("vm_backup", vm="web", path=str(lab.path("backups")))
    assert [item["device"] for item in done["skipped_devices"]] == ["sdx"] and any("sdx" in text for text in done.warnings)
    archive = done["archive"]["path"]
    shown = run_module("backup_info", archive=archive)["archives"][0]
    assert any("sdx" in text for text in shown["warnings"])
    place = str(lab.path("restored"))

    def restored(name: str) -> str:
        """Why the LUN was left out; "" if it is there."""
        result = run_module("vm_restore", source=archive, name=name, path=place)
        reasons = [item["reason"] for item in result["skipped_devices"] if item["device"] == "sdx"]
        assert luns(lab, name) == ([] if reasons else [wanted])
        assert all(any(reason in text for text in result.warnings) for reason in reasons)
        return "".join(reasons)

    assert "belongs to the VM web" in restored("beside-the-original")
    lab.vm("web").remove()
    run("mke2fs", "-q", "-F", wanted)
    with ExitStack() as stack:
        point = lab.path("mounted")
        run("mount", wanted, str(point))
        stack.callback(run, "umount", str(point))
        assert "in use" in restored("while-mounted")
    assert restored("free") == ""
    lab.vm("free").remove()
    image = run("losetup", "-n", "-O", "BACK-FILE", wanted).strip()
    run("losetup", "-d", wanted)
    try:
        assert restored("nothing-behind-it") != ""
        Path(wanted).rename(f"{wanted}.away")
        assert "not on this host" in restored("gone")
        Path(wanted).write_bytes(b"a plain file")
        assert "not a block device" in restored("a-file-of-that-name")
    finally:
        Path(wanted).unlink(missing_ok=True)
        Path(f"{wanted}.away").rename(wanted)
        run("losetup", wanted, image)
    assert other in loops


def test_host_devices_are_recorded_and_left_out_where_they_are_not(lab: Lab, run_module) -> None:
    lab.create_vm("web", extra_devices=PCI + USB + MDEV + VSOCK + SHARED, start=False)
    done = run_module("vm_backup", vm="web", path=str(lab.path("backups")))
    assert {item["device"] for item in done["skipped_devices"]} == {"pci device", "usb device", "mdev device", "filesystem tag"}
    archive = done["archive"]["path"]
    shown = run_module("backup_info", archive=archive)["archives"][0]
    assert len(shown["config"]["hostdevs"]) == 3
    restored = run_module("vm_restore", source=archive, name="copy", path=str(lab.path("restored")))
    left = {item["device"]: item["reason"] for item in restored["skipped_devices"]}
    assert left == {
        "pci:0000:7f:1e.7": "it is not on this host",
        "usb:dead:beef": "it is not on this host",
        "mdev:c2177883-f1bb-47f0-914d-32a22e3a8804": "it is not on this host",
    }
    devices = etree.fromstring(lab.adopt("copy").xml(inactive=True).encode()).find("devices")
    assert devices is not None and devices.find("hostdev") is None
    assert devices.find("vsock") is not None and devices.find("filesystem") is not None
