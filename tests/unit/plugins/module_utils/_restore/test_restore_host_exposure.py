# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a definition can reach on the host: kept with a warning, or left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils._restore.host_exposure import NOT_TAKEN
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import ExistingVm, HostFile
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._restore.restore_values import (
    DISKS,
    ORIGINAL,
    OTHER_UUID,
    configuration,
    domain_xml,
    host,
    planned,
)

QEMU = "<qemu:commandline><qemu:arg value='-chardev'/></qemu:commandline>"
#: (devices, children of <domain>, what the user reads, whether a copy beside the original loses it too)
ITEMS = [
    ("", QEMU, "-chardev", False),
    ("<filesystem type='mount'><source dir='/srv/share'/><target dir='s'/></filesystem>", "", "/srv/share", False),
    ("<serial type='file'><source path='/root/.bashrc'/><target port='0'/></serial>", "", "/root/.bashrc", True),
    ("<serial type='pty'><log file='/var/log/x.log'/><target port='0'/></serial>", "", "/var/log/x.log", True),
    (
        "<channel type='unix'><source mode='bind' path='/run/x.sock'/><target type='virtio'/></channel>",
        "",
        "/run/x.sock",
        True,
    ),
    (
        "<channel type='tcp'><source mode='connect' host='10.0.0.1'/><target type='virtio'/></channel>",
        "",
        "10.0.0.1",
        True,
    ),
    ("<rng model='virtio'><backend model='random'>/dev/sda</backend></rng>", "", "/dev/sda", False),
    (
        "<tpm model='tpm-crb'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>",
        "",
        "/dev/tpm0",
        True,
    ),
    ("<shmem name='shared'/>", "", "shared", False),
    ("<pstore backend='acpi-erst'><path>/root/erst</path><size unit='KiB'>64</size></pstore>", "", "/root/erst", True),
    ("<input type='evdev'><source dev='/dev/input/event1'/></input>", "", "/dev/input/event1", True),
    ("<audio id='1' type='file' path='/root/a.wav'/>", "", "/root/a.wav", True),
    ("<smartcard mode='host-certificates'><certificate>c</certificate></smartcard>", "", "smartcard", True),
    ("<redirdev bus='usb' type='tcp'><source mode='connect' host='h' service='1'/></redirdev>", "", "redirdev", True),
    ("<graphics type='vnc' socket='/root/vnc.sock'/>", "", "/root/vnc.sock", True),
    ("", "<seclabel type='static' model='dac'><label>+0:+0</label></seclabel>", "+0:+0", False),
    ("", "<seclabel type='none'/>", "seclabel", False),
    ("<interface type='ethernet'><script path='/tmp/evil'/></interface>", "", "/tmp/evil", True),
    (
        "<interface type='vhostuser'><source type='unix' path='/run/v.sock' mode='client'/></interface>",
        "",
        "/run/v.sock",
        True,
    ),
]


@pytest.mark.parametrize(("devices", "top", "words", "exclusive"), ITEMS, ids=[item[2] for item in ITEMS])
def test_the_table(devices: str, top: str, words: str, exclusive: bool) -> None:
    xml = domain_xml(DISKS + devices, top=top)
    in_place = planned(point=configuration(xml))
    assert any(words in notice.text and "Kept" in notice.text for notice in in_place.warnings)
    assert words.strip("+") in in_place.domain_xml

    foreign = planned(point=configuration(xml, format_version=0))
    assert any(words in item.device and item.reason == NOT_TAKEN for item in foreign.skipped), foreign.skipped
    if words.startswith("/"):
        assert words not in foreign.domain_xml

    copy = planned(host(vms=(ORIGINAL,)), configuration(xml), name="copy")
    assert any(words in item.device for item in copy.skipped) == exclusive


@pytest.mark.parametrize(
    "devices",
    [
        "<channel type='unix'><source path='/var/lib/libvirt/qemu/channel/target/web.agent'/></channel>",
        "<channel type='unix'><source mode='bind' path='/run/libvirt/qemu/channel/3-web/org.qemu.guest_agent.0'/></channel>",
        "<channel type='unix'><source path='/run/user/1000/libvirt/qemu/run/channel/3-web/agent.0'/></channel>",
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
        "<channel type='spicevmc'><target type='virtio'/></channel>",
        "<serial type='pty'><source path='/dev/pts/3'/><target port='0'/></serial>",
        "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
        "<rng model='virtio'><backend model='builtin'/></rng>",
        "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>",
        "<redirdev bus='usb' type='spicevmc'/>",
        "<graphics type='vnc' port='-1' autoport='yes'><listen type='address' address='0.0.0.0'/></graphics>",
    ],
)
def test_what_every_vm_has_is_not_touched(devices: str) -> None:
    found = planned(point=configuration(domain_xml(DISKS + devices), format_version=0))
    assert found.skipped == ()
    root = etree.fromstring(found.domain_xml)
    assert root.find(f"devices/{devices.split()[0].lstrip('<')}") is not None
    assert "/dev/pts/3" not in found.domain_xml and "/channel/" not in found.domain_xml


def test_a_foreign_console_to_a_file_becomes_a_terminal() -> None:
    serial = "<serial type='file'><source path='/root/x'/><log file='/root/y'/><target port='0'/></serial>"
    found = planned(point=configuration(domain_xml(DISKS + serial), format_version=0))
    element = etree.fromstring(found.domain_xml).find("devices/serial")
    assert element.get("type") == "pty" and [child.tag for child in element] == ["target"]


def test_a_memory_device_with_its_content_on_the_host_never_comes_back() -> None:
    nvdimm = "<memory model='nvdimm'><source><path>/srv/pmem</path></source><target><size>1</size></target></memory>"
    found = planned(point=configuration(domain_xml(DISKS + nvdimm)))
    assert "/srv/pmem" not in found.domain_xml and "/srv/pmem" in found.skipped[0].device


@pytest.mark.parametrize(
    ("os_extra", "top", "devices", "path"),
    [
        ("<acpi><table type='slic'>/etc/shadow</table></acpi>", "", "", "/etc/shadow"),
        ("", "<sysinfo type='fwcfg'><entry name='opt/x' file='/etc/shadow'/></sysinfo>", "", "/etc/shadow"),
        ("", "", "<interface type='user'><rom file='/etc/shadow'/></interface>", "/etc/shadow"),
    ],
)
def test_host_files_are_shown_to_a_guest_only_if_everybody_may_read_them(
    os_extra: str, top: str, devices: str, path: str
) -> None:
    point = configuration(domain_xml(DISKS + devices, os_extra=os_extra, top=top))
    private = planned(host(files={path: HostFile(1, public=False, pool_iso=False)}), point)
    assert path not in private.domain_xml and private.skipped[0].device == path
    assert path in planned(host(files={path: HostFile(1, public=True, pool_iso=False)}), point).domain_xml


PCI = (
    "<hostdev mode='subsystem' type='pci' managed='yes'><source>"
    "<address domain='0x0000' bus='0x01' slot='0x00' function='0x1'/></source></hostdev>"
)
USB = "<hostdev mode='subsystem' type='usb'><source><vendor id='0x1D6B'/><product id='0x0002'/></source></hostdev>"
MDEV = "<hostdev mode='subsystem' type='mdev'><source><address uuid='C2177883-f1bb-47f0-914d-32a22e3a8804'/></source></hostdev>"


@pytest.mark.parametrize(
    ("element", "identity"),
    [(PCI, "pci:0000:01:00.1"), (USB, "usb:1d6b:0002"), (MDEV, "mdev:c2177883-f1bb-47f0-914d-32a22e3a8804")],
)
def test_host_devices_stay_where_present_and_free(element: str, identity: str) -> None:
    point = configuration(domain_xml(DISKS + element))
    assert planned(point=point).skipped[0].device == identity
    here = host(hostdevs=frozenset({identity}))
    kept = planned(here, point)
    assert etree.fromstring(kept.domain_xml).find("devices/hostdev") is not None and identity in kept.warnings[0].text
    taken = replace(here, vms=(ExistingVm("db", OTHER_UUID, hostdevs=frozenset({identity})),))
    assert "the VM db has it" in planned(taken, point).skipped[0].reason


def test_a_copy_takes_a_free_port() -> None:
    graphics = (
        "<graphics type='vnc' port='5901' autoport='no'/><vsock model='virtio'><cid auto='no' address='3'/></vsock>"
    )
    point = configuration(domain_xml(DISKS + graphics))
    assert "5901" in planned(point=point).domain_xml
    copy = etree.fromstring(planned(point=point, name="copy").domain_xml)
    assert dict(copy.find("devices/graphics").attrib) == {"type": "vnc", "autoport": "yes"}
    assert dict(copy.find("devices/vsock/cid").attrib) == {"auto": "yes"}
