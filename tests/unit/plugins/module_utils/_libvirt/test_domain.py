# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The view of a domain XML."""

from __future__ import annotations

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain

XML = """
<domain type='kvm' id='3'>
  <name>web 01 &amp; co</name><uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid><title>Web</title>
  <memory unit='GiB'>2</memory><vcpu placement='static'>4</vcpu>
  <os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader><nvram>/var/lib/libvirt/qemu/nvram/web.fd</nvram></os>
  <cpu mode='host-passthrough'/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/pool/a.ov' index='4'/>
      <backingStore type='file' index='2'><format type='qcow2'/><source file='/pool/a.qcow2'/>
        <backingStore type='block'><format type='raw'/><source dev='/dev/vg/t'/><backingStore/></backingStore></backingStore>
      <mirror type='file' job='active-commit' ready='yes'><source file='/pool/a.qcow2'/></mirror>
      <target dev='vda' bus='virtio'/><alias name='virtio-disk0'/><serial>S1</serial></disk>
    <disk type='volume' device='disk'><driver type='raw'/><source pool='vms' volume='b.raw'/><target dev='vdb' bus='scsi'/>
      <shareable/></disk>
    <disk type='network' device='disk'><source protocol='rbd' name='pool/image'/><target dev='vdc'/><transient/></disk>
    <disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sda' bus='scsi'/></disk>
    <disk type='file' device='disk'><source file='/pool/l.qcow2'><encryption format='luks'/></source><target dev='vdd'/></disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/><model type='virtio'/></interface>
    <interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='br0'/></interface>
    <interface type='user'><mac address='52:54:00:00:00:03'/></interface>
    <hostdev mode='subsystem' type='mdev'><source><address uuid='u-1'/></source></hostdev>
    <hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/><product id='0x2'/></source></hostdev>
    <hostdev mode='subsystem' type='pci'><source><address domain='0x0000' bus='0x06' slot='0x02' function='0x0'/></source></hostdev>
    <filesystem type='mount'><driver type='virtiofs'/><source dir='/srv'/><target dir='share'/></filesystem>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0' persistent_state='yes'/></tpm><vsock model='virtio'/>
  </devices>
</domain>"""


def test_machine():
    view = domain.parse(XML)
    assert (view.name, view.uuid, view.title) == ("web 01 & co", "4dea22b3-1d52-d8f3-2516-782e98ab3fa0", "Web")
    assert (view.type, view.memory_bytes, view.vcpus, view.arch, view.machine) == (
        "kvm",
        2 << 30,
        4,
        "x86_64",
        "pc-q35-7.2",
    )
    assert (view.firmware, view.nvram_path, view.cpu_mode) == (
        "efi",
        "/var/lib/libvirt/qemu/nvram/web.fd",
        "host-passthrough",
    )
    assert (view.tpm, view.tpm_persistent, view.vsock, view.agent_channel, view.agent_connected) == (
        "emulator",
        True,
        True,
        True,
        True,
    )


def test_disks():
    disks = {disk.target: disk for disk in domain.parse(XML).disks}
    vda = disks["vda"]
    assert (vda.path, vda.format, vda.bus, vda.alias, vda.index, vda.serial) == (
        "/pool/a.ov",
        "qcow2",
        "virtio",
        "virtio-disk0",
        "4",
        "S1",
    )
    assert vda.chain == (domain.ChainLink("/pool/a.qcow2", "qcow2"), domain.ChainLink("/dev/vg/t", "raw"))
    assert vda.chain_complete and vda.mirror == "active-commit" and vda.mirror_ready
    assert (disks["vdb"].path, disks["vdb"].pool, disks["vdb"].volume, disks["vdb"].shareable) == (
        "",
        "vms",
        "b.raw",
        True,
    )
    assert (disks["vdc"].network, disks["vdc"].path, disks["vdc"].transient) == ("rbd:pool/image", "", True)
    assert (disks["sda"].device, disks["sda"].path) == ("lun", "/dev/sdx")
    assert disks["vdd"].encrypted and not vda.encrypted
    assert (disks["sdb"].path, disks["sdb"].readonly, disks["sdb"].chain_complete) == ("", True, False)


def test_other_devices():
    view = domain.parse(XML)
    assert [(nic.mac, nic.type, nic.source, nic.model) for nic in view.nics] == [
        ("52:54:00:00:00:01", "network", "default", "virtio"),
        ("52:54:00:00:00:02", "bridge", "br0", ""),
        ("52:54:00:00:00:03", "user", "", ""),
    ]
    assert [(each.kind, each.description) for each in view.hostdevs] == [
        ("mdev", "u-1"),
        ("usb", "0x1:0x2"),
        ("pci", "bus=0x06 domain=0x0000 function=0x0 slot=0x02"),
    ]
    assert view.filesystems == (domain.Filesystem("virtiofs", "/srv", "share"),)


@pytest.mark.parametrize(
    ("unit", "number", "expected"),
    [
        ("", 1048576, 1 << 30),
        ("unit='b'", 7, 7),
        ("unit='MB'", 3, 3_000_000),
        ("unit='M'", 3, 3 << 20),
        ("unit='TiB'", 1, 1 << 40),
        ("", "²", 0),
        ("", "9" * 5000, 0),
    ],
)
def test_memory_units(unit, number, expected):
    assert domain.parse(f"<domain><memory {unit}>{number}</memory></domain>").memory_bytes == expected


def test_a_volume_below_an_overlay():
    disk = (
        "<disk><source file='/o'/><backingStore type='volume'><format type='raw'/><source pool='p' volume='v'/></backingStore>"
        "<target dev='vda'/></disk>"
    )
    view = domain.parse(f"<domain><devices>{disk}</devices></domain>")
    assert view.disks[0].chain == (domain.ChainLink("", "raw", "p", "v"),)


def test_almost_nothing_is_fine_and_other_documents_are_not():
    assert domain.parse("<domain/>").disks == ()
    with pytest.raises(HostileError):
        domain.parse("<network/>")
