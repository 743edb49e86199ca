# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Descriptors in the manner of each product that exports them: what becomes of them, or why they are refused.

All are written for this test. They have the traits of the real ones of `test_corpus`, which are not part of this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import descriptor, hardware
from ansible_collections.kvmops.backup.plugins.module_utils._restore import host_exposure
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._ovf import packages
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._ovf.packages import CPU, LSI, MEMORY, item

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
DISK, NIC, BASE = packages.DISK, packages.NIC, packages.BASE
IDE = item(20, 5, Address=0, ElementName="IDE 0") + item(21, 5, Address=1, ElementName="IDE 1")
VBOX = "virtualbox-2.2"
ISO = '<File ovf:id="file1" ovf:href="disk1.vmdk"/><File ovf:id="iso" ovf:href="x.iso"/>'


def disk(number: int, parent: int, address: int | str = 0, name: str = "d1") -> str:
    where = {"Parent": parent, "AddressOnParent": address, "HostResource": f"ovf:/disk/{name}"}
    return item(number, 17, ElementName=f"disk {number}", **where)


def nic(number: int, model: str, network: str = "VM Network", **fields: object) -> str:
    return item(number, 10, ResourceSubType=model, Connection=network, ElementName=f"card {number}", **fields)


def config(**settings: str) -> str:
    return "".join(f'<vmw:Config vmw:key="{key}" vmw:value="{value}"/>' for key, value in settings.items())


def extra(key: str, value: str) -> str:
    return f'<vmw:ExtraConfig ovf:required="false" vmw:key="{key}" vmw:value="{value}"/>'


def rows(*names: str) -> dict[str, str]:
    """File and disk rows for several disks."""
    return {
        "files": "".join(f'<File ovf:id="f{name}" ovf:href="{name}.vmdk"/>' for name in names),
        "disks": "".join(f'<Disk ovf:diskId="{name}" ovf:fileRef="f{name}" ovf:capacity="4194304"/>' for name in names),
    }


def machine(boot: str = "", content: str = "") -> str:
    orders = "".join(f'<Order position="{at}" device="{kind}"/>' for at, kind in enumerate(boot.split(), 1))
    return f"<vbox:Machine><Hardware><Boot>{orders}</Boot>{content}</Hardware></vbox:Machine>"


def guest(text: str, **attributes: str) -> str:
    told = " ".join(f'{key.replace("_", ":")}="{value}"' for key, value in attributes.items())
    return f"<OperatingSystemSection {told}><Info/>{text}</OperatingSystemSection>"


def ovirt(bios_type: int) -> bytes:
    """As oVirt writes it: sections by their types, disks by the image's path, network cards by numbers."""
    items = (
        "<Item><rasd:InstanceId>1</rasd:InstanceId><rasd:ResourceType>3</rasd:ResourceType>"
        "<rasd:num_of_sockets>2</rasd:num_of_sockets><rasd:cpu_per_socket>2</rasd:cpu_per_socket><rasd:threads_per_cpu>1</rasd:threads_per_cpu></Item>"
        "<Item><rasd:InstanceId>2</rasd:InstanceId><rasd:ResourceType>4</rasd:ResourceType>"
        "<rasd:AllocationUnits>MegaBytes</rasd:AllocationUnits><rasd:VirtualQuantity>2048</rasd:VirtualQuantity></Item>"
        + "".join(
            f"<Item><rasd:InstanceId>v{number}</rasd:InstanceId><rasd:ResourceType>17</rasd:ResourceType>"
            f"<rasd:HostResource>i{number}/v{number}</rasd:HostResource><BootOrder>{order}</BootOrder></Item>"
            for number, order in ((1, 0), (2, 1))
        )
        + "<Item><rasd:InstanceId>n</rasd:InstanceId><rasd:ResourceType>10</rasd:ResourceType>"
        "<rasd:ResourceSubType>3</rasd:ResourceSubType><rasd:Connection>ovirtmgmt</rasd:Connection><rasd:MACAddress>56:6f:00:01:02:03</rasd:MACAddress></Item>"
        "<Item><rasd:InstanceId>u</rasd:InstanceId><rasd:ResourceType>23</rasd:ResourceType>"
        "<rasd:UsbPolicy>DISABLED</rasd:UsbPolicy></Item>"
    )
    disks = "".join(
        f'<Disk ovf:diskId="v{number}" ovf:fileRef="i{number}/v{number}" ovf:capacity="10" ovf:parentRef="" '
        f'ovf:volume-format="COW" ovf:disk-interface="VirtIO"/>'
        for number in (1, 2)
    )
    files = "".join(f'<File ovf:id="i{number}/v{number}" ovf:href="v{number}"/>' for number in (1, 2))
    return (
        '<ovf:Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1/" xmlns:ovirt="http://www.ovirt.org/ovf" '
        'xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" '
        f'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><References>{files}</References>'
        f'<Section xsi:type="ovf:DiskSection_Type">{disks}</Section><Content ovf:id="out" xsi:type="ovf:VirtualSystem_Type">'
        f'<Name>ov1</Name><Section xsi:type="ovf:VirtualHardwareSection_Type">{items}</Section><BiosType>{bios_type}</BiosType>'
        "</Content></ovf:Envelope>"
    ).encode()


def xencenter() -> bytes:
    """As XenCenter writes it: everything prefixed, disks of the type 19, the firmware among parameters of its own."""
    data = packages.descriptor(
        CPU + MEMORY + item("a", 19, AddressOnParent=0, HostResource="ovf:/disk/d1", Connection="device=0,bootable=true")
        + nic(5, "", "Network 0", Address="aa:bb:cc:dd:ee:00"),
        family="hvm-3.0-unknown",
        hardware='<x:VirtualSystemOtherConfigurationData xmlns:x="http://schemas.citrix.com/ovf/envelope/1" Name="HVM_boot_params">'
        "<x:Value>order=dc;firmware=uefi;</x:Value></x:VirtualSystemOtherConfigurationData>"
        '<x:VirtualSystemOtherConfigurationData xmlns:x="http://schemas.citrix.com/ovf/envelope/1" Name="platform">'
        "<x:Value>nx=true;secureboot=true;</x:Value></x:VirtualSystemOtherConfigurationData>",
    )  # fmt: skip
    for name in ("Envelope", "References", "File", "DiskSection", "Disk", "NetworkSection", "Network", "VirtualSystem", "Name",
                 "OperatingSystemSection", "VirtualHardwareSection", "System", "Item", "Info"):  # fmt: skip
        for before, after in ((f"<{name}>", f"<ovf:{name}>"), (f"<{name} ", f"<ovf:{name} "), (f"<{name}/", f"<ovf:{name}/"),
                              (f"</{name}>", f"</ovf:{name}>")):  # fmt: skip
            data = data.replace(before.encode(), after.encode())
    return data


@dataclass(frozen=True)
class Becomes:
    """What a descriptor becomes; "" and () where it does not matter. `disks`: id, target and bus in the order of booting."""

    data: bytes
    machine: str = "pc"
    disks: str = "d1 sda sata"
    nics: str = ""
    told: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    has_not: tuple[str, ...] = ()
    silent: bool = False  # nothing to warn of


D = packages.descriptor
PRODUCTS = {
    "ESXi 7, EFI and secure boot": Becomes(
        D(CPU + MEMORY + item(3, 6, ResourceSubType="VirtualSCSI", Address=0) + DISK + NIC,
          hardware=config(firmware="efi", **{"bootOptions.efiSecureBootEnabled": "true"}) + extra("nvram", "a.nvram")),
        "q35 efi secure", nics="e1000e VM Network",
    ),
    "ESXi 8, NVMe, USB 3, TPM, CD image on SATA": Becomes(
        D(CPU + MEMORY + item(3, 20, ResourceSubType="vmware.nvme.controller", Address=0) + DISK
          + item(6, 20, ResourceSubType="vmware.sata.ahci", Address=0)
          + item(7, 15, Parent=6, AddressOnParent=0, HostResource="ovf:/file/iso", ResourceSubType="vmware.cdrom.iso")
          + item(8, 23, ResourceSubType="vmware.usb.xhci") + item(9, 1, ResourceSubType="vmware.vtpm"),
          files=ISO, hardware=config(firmware="efi"), os=guest("", vmw_osType="windows11_64Guest"), family="vmx-21"),
        "q35 efi", told=("/dev/nvme0n1 is /dev/sda", "recovery key"),
        has=("devices/tpm", "devices/controller[@model='qemu-xhci']", "devices/disk[@device='cdrom']",
             "clock[@offset='localtime']"),
    ),
    "Workstation, IDE beside SCSI": Becomes(
        D(CPU + MEMORY + IDE + LSI + disk(8, 3, 0, "a") + disk(9, 20, 1, "b"), **rows("a", "b")), disks="b hda ide, a sda sata",
    ),
    "ESX 3, BusLogic and PCnet": Becomes(
        D(CPU + MEMORY + item(3, 6, ResourceSubType="buslogic", Address=0) + DISK + nic(5, "PCNet32"), family="vmx-04"),
        nics="pcnet VM Network",
    ),
    "two SCSI controllers in odd order": Becomes(
        D(CPU + MEMORY + item(6, 6, ResourceSubType="VirtualSCSI", Address=1) + LSI + disk(7, 6, 0, "z") + disk(8, 3, 1, "b")
          + disk(9, 3, 0, "a"), **rows("z", "a", "b")),
        disks="a sda sata, b sdb sata, z sdc sata",
    ),
    "two disks from one file": Becomes(
        D(CPU + MEMORY + LSI + disk(8, 3, 0, "a") + disk(9, 3, 1, "b"),
          disks='<Disk ovf:diskId="a" ovf:fileRef="file1"/><Disk ovf:diskId="b" ovf:fileRef="file1"/>'),
        disks="a sda sata, b sdb sata",
    ),
    "one disk twice": Becomes(D(CPU + MEMORY + LSI + disk(8, 3, 0) + disk(9, 3, 1)), disks="d1 sda sata, d1 sdb sata"),
    "a disk by its file": Becomes(D(CPU + MEMORY + LSI + item(4, 17, Parent=3, HostResource="ovf:/file/file1"))),
    "a disk without a controller": Becomes(D(CPU + MEMORY + item(4, 17, HostResource="ovf:/disk/d1"))),
    "sixteen disks": Becomes(
        D(CPU + MEMORY + LSI + "".join(disk(100 + at, 3, at, f"x{at:02}") for at in range(16)),
          **rows(*(f"x{at:02}" for at in range(16)))),
        disks=", ".join(f"x{at:02} sd{chr(97 + at)} sata" for at in range(16)),
    ),
    "vCloud, a size instead of a disk": Becomes(
        D(CPU + MEMORY + LSI + item(4, 17, Parent=3, HostResource="", VirtualQuantity=1 << 30, AllocationUnits="byte"),
          disks="", files=""),
        disks=" sda sata",
    ),
    "NIC that is not connected": Becomes(
        D(CPU + MEMORY + LSI + DISK + nic(5, "E1000e", AutomaticAllocation="false")), nics="e1000e VM Network",
        told=("card 5 is not connected",), has=("devices/interface/link[@state='down']",),
    ),
    "NICs in another order than their slots": Becomes(
        D(CPU + MEMORY + LSI + DISK + nic(5, "E1000", "c", AddressOnParent=9) + nic(6, "E1000", "a", AddressOnParent=7)
          + nic(7, "E1000", "b", AddressOnParent=8) + nic(8, "E1000", "none")),
        nics="e1000 a, e1000 b, e1000 c, e1000 none",
    ),
    "NICs of all models": Becomes(
        D(CPU + MEMORY + LSI + DISK + "".join(
            nic(30 + at, model, f"n{at}", AddressOnParent=at)
            for at, model in enumerate(("PCNet32", "Flexible", "E1000", "e1000e", "VmxNet2", "VMXNET3", "virtio",
                                        "VMXNET3 virtio", "vmxnet3,e1000", "rtl8139", "Unheard")))),
        nics="pcnet n0, e1000e n1, e1000 n2, e1000e n3, e1000e n4, e1000e n5, virtio n6, virtio n7, e1000 n8, rtl8139 n9, "
        "e1000e n10",
    ),
    "MAC addresses in all notations": Becomes(
        D(CPU + MEMORY + LSI + DISK + "".join(
            nic(30 + at, "E1000", Address=address)
            for at, address in enumerate(("00:50:56:aa:bb:c0", "005056AABBC1", "00-50-56-AA-BB-C2", "0050.56aa.bbc3", "",
                                          "7", "00:00:00:00:00:00", "00:50:56:aa:bb:c0")))),
        nics=", ".join([*(f"e1000 VM Network 00:50:56:aa:bb:c{at}" for at in range(4)), *["e1000 VM Network"] * 4]),
    ),
    "appliance for several hypervisors": Becomes(
        D(CPU + MEMORY + item(3, 6, ResourceSubType="virtio lsilogic", Address=0) + DISK + IDE
          + item(6, 15, Parent=21, AddressOnParent=0, HostResource="ovf:/file/iso") + nic(5, "VMXNET3 virtio"), files=ISO),
        disks="d1 vda virtio", nics="virtio VM Network",
    ),
    "cloud image with properties": Becomes(
        D(BASE + item(6, 21, ElementName="Serial Port 1"), family="vmx-10 vmx-13",
          system='<ProductSection ovf:required="false"><Info/><Property ovf:key="user-data" ovf:type="string"/></ProductSection>'),
        nics="e1000e VM Network", has=("devices/serial",),
    ),
    "boot order with the network first": Becomes(
        D(BASE, system='<vmw:BootOrderSection vmw:instanceId="5" vmw:type="net"/>'
          '<vmw:BootOrderSection vmw:instanceId="4" vmw:type="disk"/>'),
        has=("devices/interface/boot[@order='1']", "devices/disk/boot[@order='2']"),
    ),
    "bios.bootOrder": Becomes(
        D(BASE + item(6, 15, ElementName="CD"), hardware=extra("bios.bootOrder", "ethernet0,cdrom,hdd")),
        has=("devices/interface/boot[@order='1']", "devices/disk[@device='cdrom']/boot[@order='2']",
             "devices/disk/boot[@order='3']"),
    ),
    "floppy with an image": Becomes(
        D(CPU + MEMORY + LSI + DISK + item(6, 14, ElementName="Floppy 1", HostResource="ovf:/file/iso"), files=ISO),
        told=("its image x.iso is left out",), has=("devices/disk[@device='floppy']",),
    ),
    "a CD image among the disks": Becomes(
        D(CPU + MEMORY + LSI + DISK + IDE + item(6, 16, Parent=21, AddressOnParent=0, HostResource="ovf:/disk/cd"), files=ISO,
          disks='<Disk ovf:diskId="d1" ovf:fileRef="file1"/><Disk ovf:diskId="cd" ovf:fileRef="iso"/>'),
        has=("devices/disk[@device='cdrom']",), silent=True,
    ),
    "firmware in ExtraConfig": Becomes(
        D(hardware=extra("firmware", "efi") + extra("uefi.secureBoot.enabled", "TRUE")), "q35 efi secure",
    ),
    "VirtualBox 5": Becomes(
        D(CPU + MEMORY + IDE + item(3, 20, ResourceSubType="AHCI", Address=0) + DISK + item(6, 15, Parent=21, AddressOnParent=0)
          + nic(5, "E1000", "NAT") + item(7, 23) + item(8, 35, ResourceSubType="ensoniq1371"),
          system=machine("Floppy DVD HardDisk"), family=VBOX),
        nics="e1000 NAT", has=("devices/disk[@device='cdrom']/boot[@order='1']", "devices/sound[@model='es1370']"),
    ),
    "VirtualBox 7, EFI, NVMe, TPM": Becomes(
        D(CPU + MEMORY + item(3, 20, ResourceSubType="NVMe", Address=0) + DISK,
          system=machine("HardDisk", '<Firmware type="EFI"/><TrustedPlatformModule type="v2_0"/>'), family=VBOX),
        "q35 efi", told=("recovery key",), has=("devices/tpm",),
    ),
    "VirtualBox, IDE": Becomes(
        D(CPU + MEMORY + IDE + disk(6, 20, 0, "a") + disk(7, 20, 1, "b") + disk(8, 21, 1, "c")
          + item(9, 15, Parent=21, AddressOnParent=0), family=VBOX, **rows("c", "b", "a")),
        disks="a hda ide, b hdb ide, c hdc ide",
    ),
    "VirtualBox, VirtIO SCSI": Becomes(
        D(CPU + MEMORY + item(3, 20, ResourceSubType="VirtioSCSI", Address=0) + DISK + nic(5, "virtio", "NAT"), family=VBOX),
        disks="d1 sda scsi", nics="virtio NAT",
    ),
    "oVirt, BIOS": Becomes(
        ovirt(2), "q35", disks="v2 vdb virtio, v1 vda virtio", nics="virtio ovirtmgmt 56:6f:00:01:02:03",
        has=("devices/controller[@model='none']",),
    ),
    "oVirt, i440fx": Becomes(ovirt(1), "pc", disks="v2 vdb virtio, v1 vda virtio"),
    "oVirt, EFI": Becomes(ovirt(3), "q35 efi", disks="v2 vdb virtio, v1 vda virtio"),
    "oVirt, secure boot": Becomes(ovirt(4), "q35 efi secure", disks="v2 vdb virtio, v1 vda virtio"),
    "XenCenter": Becomes(xencenter(), "q35 efi secure", nics="e1000e Network 0 aa:bb:cc:dd:ee:00"),
    "comments everywhere": Becomes(
        D().replace(b"<rasd:", b"<!-- a --><rasd:").replace(b"</rasd:", b"<!-- b --></rasd:")
        .replace(b"VirtualQuantity>2<", b"VirtualQuantity><!-- c -->2<"),
    ),
    "spaces everywhere": Becomes(
        D(CPU + MEMORY + LSI + DISK.replace("ovf:/disk/d1", "\n ovf:/disk/d1 \n").replace(">3<", "> 3 <"),
          disks='<Disk ovf:diskId=" d1" ovf:fileRef="file1 " ovf:capacity=" 4194304 "/>'),
    ),
    "CDATA and processing instructions": Becomes(
        D(CPU + MEMORY + LSI + DISK.replace("ovf:/disk/d1", "<![CDATA[ovf:/disk/d1]]>"))
        .replace(b"<References>", b"<?x y?><References>"),
    ),
    "CRLF and a byte order mark": Becomes(b"\xef\xbb\xbf" + D().replace(b"<Item", b"\r\n<Item")),
    "UTF-16": Becomes(D().replace(b"UTF-8", b"UTF-16").decode().encode("utf-16")),
    "a prefix that nobody has declared": Becomes(
        D(hardware=config(firmware="efi")).replace(b'xmlns:vmw="http://www.vmware.com/schema/ovf" ', b""), "q35 efi",
    ),
    "attributes without prefixes": Becomes(
        D().replace(b"ovf:id", b"id").replace(b"ovf:href", b"href").replace(b"ovf:diskId", b"diskId"),
    ),
    "only the number of Windows": Becomes(D(os=guest("", ovf_id="105")), has=("clock[@offset='localtime']",)),
    "Windows of VirtualBox": Becomes(
        D(os=guest("<vbox:OSType>Windows10_64</vbox:OSType>", ovf_id="120"), family=VBOX), has=("clock[@offset='localtime']",),
    ),
    "Linux by number": Becomes(D(os=guest("", ovf_id="94")), has=("clock[@offset='utc']",), has_not=("features/hyperv",)),
    "nothing said of the guest": Becomes(D(os="", family="")),
    "no disks at all": Becomes(D(CPU + MEMORY + NIC, disks="", files=""), disks=""),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_it_becomes(name: str) -> None:
    want = PRODUCTS[name]
    described = descriptor.parse(want.data, name)
    made = hardware.plan(described, want.data, name, hardware.Options())
    root = etree.fromstring(made.domain_xml)
    firmware = " efi" * made.efi + " secure" * (root.find("features/smm") is not None)
    assert f"{root.find('os/type').get('machine')}{firmware}" == want.machine
    orders = {d.find("target").get("dev"): int(d.find("boot").get("order")) for d in root.iterfind("devices/disk[boot]")}
    buses = {d.find("target").get("dev"): d.find("target").get("bus") for d in root.iterfind("devices/disk")}
    disks = sorted((drive for drive in made.drives if drive.device == "disk"), key=lambda drive: orders[drive.target])
    assert ", ".join(f"{drive.disk.id} {drive.target} {buses[drive.target]}" for drive in disks) == want.disks
    if disks:
        assert [drive.target for drive in made.drives if drive.boots] == [disks[0].target]
    serials = [d.findtext("serial") for d in root.iterfind("devices/disk[@device='disk']")]
    assert len(set(serials)) == len(serials)
    cards = []
    for card in root.iterfind("devices/interface"):
        mac = card.find("mac")
        address = mac.get("address") if mac is not None else ""
        parts = (card.find("model").get("type"), card.find("source").get("network"), address)
        cards.append(" ".join(filter(None, parts)))
    if want.nics:
        assert ", ".join(cards) == want.nics
    told = "\n".join(notice.text for notice in made.report.warnings)
    assert all(text in told for text in want.told) and not (want.silent and told), told
    assert all(root.find(path) is not None for path in want.has), made.domain_xml
    assert not any(root.find(path) is not None for path in want.has_not), made.domain_xml
    assert not host_exposure.only_allowed(_xml.parse(made.domain_xml, name)).skipped
    if SCHEMA.exists():
        etree.RelaxNG(etree.parse(str(SCHEMA))).assertValid(root)


def test_windows_on_virtio() -> None:
    """A likely mistake, which only shows when the guest does not start."""
    windows = D(os=guest("", vmw_osType="windows9_64Guest"))
    for bus, told in (("virtio", True), ("scsi", True), ("sata", False), ("", False)):
        made = hardware.plan(descriptor.parse(windows, "x"), windows, "x", hardware.Options(disk_bus=bus))
        assert any("virtio-win" in notice.text for notice in made.report.warnings) == told, bus


@pytest.mark.parametrize(
    "unit", ["MByte", "MBytes", "megabyte", "MebiBytes", "MiB", "MB", "byte*1024*1024", "bytes * 2 ^ 20", "byte * 1024^2"]
)
def test_units(unit: str) -> None:
    data = D(CPU + item(2, 4, VirtualQuantity=512, AllocationUnits=unit))
    made = hardware.plan(descriptor.parse(data, "x"), data, "x", hardware.Options())
    assert etree.fromstring(made.domain_xml).findtext("memory") == "524288"


@pytest.mark.parametrize(
    "encoding, name",
    [
        ("GB2312", "\u6d4b\u8bd5"), ("Shift_JIS", "\u30c6\u30b9\u30c8"), ("windows-1251", "\u0442\u0435\u0441\u0442"),
        ("iso-8859-1", "B\u00fcro"),
    ],
)  # fmt: skip
def test_declared_encodings(encoding: str, name: str) -> None:
    data = D(name=name).decode().replace("UTF-8", encoding).encode(encoding)
    described = descriptor.parse(data, "x")
    assert described.system.name == name and not described.warnings


REFUSED = {
    "a template: a number": (D(CPU.replace(">2<", ">@CPUS@<") + MEMORY), "is no number"),
    "a template: a capacity": (
        D(disks='<Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:capacity="${size}"/>'), "the property size, which has no value",
    ),
    "a template: ids": (D(item("#ID#", 3, VirtualQuantity=1) + item("#ID#", 4, VirtualQuantity=1)), "the InstanceID '#ID#'"),
    "POWER": (D(family="IBM:POWER:AIXLINUX"), "no PC"),
    "a container": (D(family="openvz"), "container"),
    "ARM, of VMware": (D(os=guest("", ovf_id="101", vmw_osType="arm-debian11-64Guest")), "for ARM"),
    "ARM, of VirtualBox": (D(os=guest("<vbox:OSType>Debian12_arm64</vbox:OSType>", ovf_id="96"), family=VBOX), "for ARM"),
    "aarch64": (D(os=guest("<Description>CentOS (aarch64)</Description>", ovf_id="101")), "for ARM"),
    "cut off": (D()[:-40], "not well-formed"),
    "another document": (b"<domain type='kvm'><name>x</name></domain>", "is no OVF descriptor"),
    "no virtual system": (packages.envelope("<References/>"), "describes no virtual system"),
    "no hardware": (packages.envelope("<References/><VirtualSystem ovf:id='x'/>"), "no hardware section"),
    "a delta disk": (D(disks='<Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:parentRef="d0"/>'), "stands on the disk"),
    "an invalid name": (D(name="Windows 7 / IE11"), "is not a name for a VM"),
    "a file that the descriptor lacks": (D(disks='<Disk ovf:diskId="d1" ovf:fileRef="file9"/>'), "the descriptor does not have"),
    "two items with one id": (D(BASE + item(4, 10)), "Export the VM again, or give each its own InstanceID"),
    "an encrypted package": (
        D(head="<EncryptionSection><EncryptedData xmlns='http://www.w3.org/2001/04/xmlenc#'/></EncryptionSection>"), "is encrypted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_why_it_is_refused(name: str) -> None:
    data, why = REFUSED[name]
    with pytest.raises(KvmopsError, match=why):
        hardware.plan(descriptor.parse(data, name), data, name, hardware.Options())
