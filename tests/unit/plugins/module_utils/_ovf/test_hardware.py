# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a descriptor says and what becomes of it: choices, units, properties, order of disks, the mapping and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    HostileError,
    KvmopsError,
    RefusedError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import descriptor, hardware
from ansible_collections.kvmops.backup.plugins.module_utils._restore import host_exposure
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._ovf import packages
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._ovf.packages import BASE, CPU, LSI, MEMORY, item

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")


def plan(data: bytes, system: str = "", configuration: str = "", **options: Any) -> hardware.Hardware:
    described = descriptor.parse(data, "the descriptor", system=system, configuration=configuration)
    return hardware.plan(described, data, "the descriptor", hardware.Options(**options))


def root(data: bytes, **options: Any) -> etree._Element:
    return etree.fromstring(plan(data, **options).domain_xml)


def disks(element: etree._Element) -> list[tuple[str, str]]:
    return [(d.find("target").get("dev"), d.find("target").get("bus")) for d in element.iterfind("devices/disk")]


def warnings(data: bytes, **options: Any) -> str:
    return "\n".join(map(str, plan(data, **options).report.warnings))


def test_the_whole() -> None:
    found = root(packages.descriptor())
    assert (found.findtext("name"), found.findtext("vcpu"), found.findtext("memory")) == ("web01", "2", "524288")
    assert found.find("os/type").get("machine") == "pc" and found.find("os").get("firmware") is None
    assert disks(found) == [("sda", "sata")]
    nic = found.find("devices/interface")
    assert (nic.find("source").get("network"), nic.find("model").get("type")) == ("VM Network", "e1000e")
    again, other = plan(packages.descriptor()), plan(packages.descriptor(), name="other")
    assert (
        again.domain_xml == plan(packages.descriptor()).domain_xml and again.uuid != other.uuid
    )  # deterministic, serials too
    assert len(found.findtext("devices/disk/serial")) == 20


@pytest.mark.parametrize(
    "unit, quantity, kib",
    [
        ("byte * 2^20", "512", 524288), ("byte*2^30", "1", 1 << 20), ("MegaBytes", "512", 524288), ("GigaBytes", "2", 2 << 20),
        ("byte * 2 ^ 20", "512", 524288), ("KB", "524288", 524288), ("byte", "536870912", 524288), ("", "536870912", 524288),
    ],
)  # fmt: skip
def test_memory_units(unit: str, quantity: str, kib: int) -> None:
    units = {"AllocationUnits": unit} if unit else {}
    assert root(packages.descriptor(CPU + item(2, 4, VirtualQuantity=quantity, **units))).findtext("memory") == str(kib)


def test_nothing_is_guessed_silently() -> None:
    assert "512 MiB were taken" in warnings(packages.descriptor(CPU + item(2, 4, VirtualQuantity=512)))
    assert "how much memory" in warnings(packages.descriptor(CPU))
    assert "how many CPUs" in warnings(packages.descriptor(MEMORY))
    assert "names no network" in warnings(packages.descriptor(BASE + item(9, 10)))
    machine = "<vbox:Machine><Hardware><CPU count='3'/><Memory RAMSize='777'/></Hardware></vbox:Machine>"
    told = warnings(packages.descriptor("", system=machine, disks="", files=""))
    assert "3 were taken from VirtualBox" in told and "777 MiB were taken from VirtualBox" in told


@pytest.mark.parametrize("quantity", ["0", "-1", "1000000", "x", ""])
def test_absurd_cpus(quantity: str) -> None:
    with pytest.raises(ArchiveError):
        plan(packages.descriptor(item(1, 3, VirtualQuantity=quantity) + MEMORY))


@pytest.mark.parametrize(
    "quantity, unit", [("0", "MB"), ("-5", "MB"), ("9" * 18, "GB"), ("1", "byte * 2^9999"), ("5", "parsec")]
)
def test_absurd_memory(quantity: str, unit: str) -> None:
    with pytest.raises(ArchiveError):
        plan(packages.descriptor(CPU + item(2, 4, VirtualQuantity=quantity, AllocationUnits=unit)))


@pytest.mark.parametrize("capacity", ["-1", "2^9999", "${size}", "1e99", "9" * 30])
def test_absurd_capacity(capacity: str) -> None:
    with pytest.raises(ArchiveError):
        plan(packages.descriptor(disks=f'<Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:capacity="{capacity}"/>'))
    with pytest.raises(ArchiveError, match="absurd"):
        plan(
            packages.descriptor(
                disks='<Disk ovf:diskId="d1" ovf:capacity="9" ovf:capacityAllocationUnits="byte * 2^62"/>'
            )
        )


def test_topology() -> None:
    cores = item(1, 3, VirtualQuantity=8, extra="<vmw:CoresPerSocket>4</vmw:CoresPerSocket>")
    topology = root(packages.descriptor(cores + MEMORY)).find("cpu/topology")
    assert (topology.get("sockets"), topology.get("cores")) == ("2", "4")
    odd = packages.descriptor(
        item(1, 3, VirtualQuantity=6, extra="<vmw:CoresPerSocket>4</vmw:CoresPerSocket>") + MEMORY
    )
    assert root(odd).find("cpu/topology") is None and "do not fit" in warnings(odd)


def test_properties() -> None:
    section = '<ProductSection ovf:class="com.x"><Info/><Property ovf:key="size" ovf:type="int" ovf:value="5"/></ProductSection>'
    for reference in ("${size}", "${com.x.size}"):
        disk = f'<Disk ovf:diskId="d1" ovf:capacity="{reference}" ovf:capacityAllocationUnits="byte * 2^30"/>'
        data = packages.descriptor(disks=disk, system=section)
        assert descriptor.parse(data, "x").disks["d1"].capacity_bytes == 5 << 30
        assert plan(data).drives[0].file == ""


OPTIONS = (
    "<DeploymentOptionSection><Info/><Configuration ovf:id='small'/><Configuration ovf:id='large' ovf:default='true'/>"
    "</DeploymentOptionSection>"
)


def test_configurations() -> None:
    items = (
        item(1, 3, VirtualQuantity=1)
        + item(1, 3, VirtualQuantity=2, attributes="ovf:configuration='small'")
        + item(1, 3, VirtualQuantity=8, attributes="ovf:configuration='large huge'")
        + item(1, 3, VirtualQuantity=99, attributes="ovf:bound='max'")
        + MEMORY
        + item(9, 10, Connection="extra", attributes="ovf:configuration='small'")
    )
    data = packages.descriptor(items, head=OPTIONS)
    assert root(data).findtext("vcpu") == "8" and root(data).find("devices/interface") is None
    small = etree.fromstring(plan(data, configuration="small").domain_xml)
    assert small.findtext("vcpu") == "2" and small.find("devices/interface/source").get("network") == "extra"
    with pytest.raises(RefusedError, match="It has small, large"):
        plan(data, configuration="medium")


def test_systems() -> None:
    hardware_ = f"<VirtualHardwareSection><Info/>{CPU}{MEMORY}</VirtualHardwareSection>"
    systems = "".join(
        f"<VirtualSystem ovf:id='{id_}'><Name>{name}</Name>{hardware_}</VirtualSystem>"
        for id_, name in (("a", "web"), ("b", "db"))
    )
    data = packages.envelope(f"<References/><VirtualSystemCollection ovf:id='c'>{systems}</VirtualSystemCollection>")
    with pytest.raises(RefusedError, match=r"2 virtual systems: a \(web\), b \(db\)"):
        plan(data)
    assert plan(data, system="b").name == plan(data, system="db").name == "db"
    with pytest.raises(RefusedError, match="no virtual system 'x'"):
        plan(data, system="x")


def test_the_best_hardware_section() -> None:
    other = (
        "<VirtualHardwareSection><Info/><System><vssd:VirtualSystemType>xen-3</vssd:VirtualSystemType></System>"
        f"{item(1, 3, VirtualQuantity=7)}</VirtualHardwareSection>"
    )
    data = packages.descriptor(system=other)
    assert root(data).findtext("vcpu") == "2" and "2 hardware sections" in warnings(data)


@pytest.mark.parametrize(
    "namespace",
    [
        "http://schemas.dmtf.org/ovf/envelope/1", "http://schemas.dmtf.org/ovf/envelope/2", "http://schemas.dmtf.org/ovf/envelope/1/",
        "http://www.vmware.com/schema/ovf/1/envelope",
    ],
)  # fmt: skip
def test_namespaces(namespace: str) -> None:
    data = packages.descriptor().replace(b"http://schemas.dmtf.org/ovf/envelope/1", namespace.encode())
    assert root(data).findtext("vcpu") == "2" and disks(root(data)) == [("sda", "sata")]
    prefixed = data.replace(b"<rasd:", b"<r:").replace(b"</rasd:", b"</r:").replace(b"xmlns:rasd", b"xmlns:r")
    assert disks(root(prefixed)) == [("sda", "sata")]
    with pytest.raises(ArchiveError, match="no OVF descriptor"):
        plan(b"<Envelope xmlns='http://schemas.dmtf.org/ovf/environment/1'/>")


def test_encoding_that_is_not_the_declared_one() -> None:
    data = packages.descriptor(name="B\u00fcro").decode().encode("latin-1")
    assert plan(data).name == "B\u00fcro" and "encoding" in warnings(data)
    utf16 = packages.descriptor().replace(b"UTF-8", b"utf-16")
    assert plan(utf16).name == "web01"


def test_ovf_2_items() -> None:
    items = (
        CPU
        + MEMORY
        + "<EthernetPortItem><rasd:Address>00-16-8B-DB-00-5E</rasd:Address><rasd:Connection>net</rasd:Connection>"
        "<rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceType>10</rasd:ResourceType></EthernetPortItem>"
        "<StorageItem><rasd:AllocationUnits>byte*2^30</rasd:AllocationUnits><rasd:InstanceID>4</rasd:InstanceID>"
        "<rasd:Reservation>100</rasd:Reservation><rasd:ResourceType>31</rasd:ResourceType>"
        "<rasd:VirtualQuantity>1</rasd:VirtualQuantity></StorageItem>"
    )
    found = plan(packages.descriptor(items, disks="", files=""))
    assert found.drives[0].disk.capacity_bytes == 100 << 30
    assert etree.fromstring(found.domain_xml).find("devices/interface/mac").get("address") == "00:16:8b:db:00:5e"


# disks


def several(*rows: tuple[int, int, int, str], controllers: str) -> bytes:
    """Disks: item id, parent, address, disk id."""
    items = "".join(
        item(i, 17, Parent=p, AddressOnParent=a, HostResource=f"ovf:/disk/{d}", ElementName=d) for i, p, a, d in rows
    )
    files = "".join(f'<File ovf:id="f{d}" ovf:href="{d}.vmdk"/>' for *_rest, d in rows)
    table = "".join(f'<Disk ovf:diskId="{d}" ovf:fileRef="f{d}" ovf:capacity="4194304"/>' for *_rest, d in rows)
    return packages.descriptor(CPU + MEMORY + items + controllers, files=files, disks=table)


def test_disks_are_ordered_by_controller_and_address() -> None:
    controllers = (
        item(20, 6, ResourceSubType="lsilogic", Address=1) + item(21, 6, ResourceSubType="VirtualSCSI", Address=0)
        + item(22, 5, Address=0) + item(23, 20, ResourceSubType="AHCI", Address=0)
    )  # fmt: skip
    data = several(
        (4, 20, 0, "e"),
        (5, 21, 3, "d"),
        (6, 21, 1, "c"),
        (7, 22, 1, "b"),
        (8, 22, 0, "a"),
        (9, 23, 0, "f"),
        controllers=controllers,
    )
    drives = plan(data).drives
    assert [(drive.disk.id, drive.target) for drive in drives] == [
        ("a", "hda"), ("b", "hdb"), ("c", "sda"), ("d", "sdb"), ("e", "sdc"), ("f", "sdd"),
    ]  # fmt: skip
    assert [drive.disk.id for drive in drives if drive.boots] == ["a"]
    assert {bus for _target, bus in disks(root(data, machine="q35"))} == {"sata"}
    assert [target for target, _bus in disks(root(data, disk_bus="virtio"))] == [
        "vda",
        "vdb",
        "vdc",
        "vdd",
        "vde",
        "vdf",
    ]
    scsi = root(data, disk_bus="scsi")
    assert scsi.find("devices/controller[@type='scsi']").get("model") == "virtio-scsi"


def test_two_disks_in_one_place() -> None:
    data = several((4, 20, 0, "a"), (5, 20, 0, "b"), controllers=item(20, 6, Address=0))
    assert [drive.target for drive in plan(data).drives] == ["sda", "sdb"] and "same place" in warnings(data)


def test_boot_order() -> None:
    controllers = item(20, 6, Address=0)
    data = several((4, 20, 0, "a"), (5, 20, 1, "b"), controllers=controllers + item(30, 15, ElementName="CD"))
    assert [drive.disk.id for drive in plan(data).drives if drive.boots] == ["a"]
    by_section = data.replace(
        b"<VirtualHardwareSection>",
        b'<vmw:BootOrderSection vmw:instanceId="5" vmw:type="disk"/><VirtualHardwareSection>',
    )
    assert [drive.disk.id for drive in plan(by_section).drives if drive.boots] == ["b"]
    by_extra = data.replace(
        b"</VirtualHardwareSection>",
        b'<vmw:ExtraConfig vmw:key="bios.hddOrder" vmw:value="scsi0:1"/></VirtualHardwareSection>',
    )
    assert [drive.disk.id for drive in plan(by_extra).drives if drive.boots] == ["b"]
    orders = b"<Order position='1' device='DVD'/><Order position='2' device='HardDisk'/>"
    machine = b"<vbox:Machine><Hardware><Boot>" + orders + b"</Boot></Hardware></vbox:Machine>"
    found = root(data.replace(b"<VirtualHardwareSection>", machine + b"<VirtualHardwareSection>"))
    assert found.find("devices/disk[@device='cdrom']/boot").get("order") == "1"


@pytest.mark.parametrize("resource", ["ovf:/disk/d1", "/disk/d1", "d1", "ovf://disk/d1", "ovf:/file/file1"])
def test_notations_of_a_disk(resource: str) -> None:
    items = CPU + MEMORY + LSI + item(4, 17, Parent=3, HostResource=resource)
    assert plan(packages.descriptor(items)).drives[0].file == "file1"


def test_references_that_lead_nowhere() -> None:
    for items, disk in (
        (BASE.replace("disk/d1", "disk/d9"), ""),
        (BASE, '<Disk ovf:diskId="d1" ovf:fileRef="file9"/>'),
        (BASE, '<Disk ovf:diskId="d1"/>'),
    ):
        with pytest.raises(ArchiveError):
            plan(packages.descriptor(items, **({"disks": disk} if disk else {})))
    with pytest.raises(RefusedError, match="stands on"):
        plan(packages.descriptor(disks='<Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:parentRef="d0"/>'))


def test_contradictions() -> None:
    for data in (
        packages.descriptor(files='<File ovf:id="file1" ovf:href="a"/><File ovf:id="file1" ovf:href="b"/>'),
        packages.descriptor(
            disks='<Disk ovf:diskId="d1" ovf:fileRef="file1"/><Disk ovf:diskId="d1" ovf:fileRef="file1"/>'
        ),
        packages.descriptor(BASE + item(4, 17)),
        packages.descriptor(CPU + MEMORY + item(7, 6, Parent=8) + item(8, 6, Parent=7)),
        packages.descriptor(CPU + MEMORY + item(7, 6, Parent=7)),
        packages.descriptor(CPU + MEMORY + "".join(item(100 + number, 10) for number in range(400))),
        packages.envelope("<VirtualSystemCollection>" * 40 + "</VirtualSystemCollection>" * 40),
        b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + packages.descriptor(name="&e;")[39:],
        b"<Envelope>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</Envelope>",
    ):
        with pytest.raises(HostileError):
            plan(data)


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\x7fb", ".", ".."])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(RefusedError, match="'name'"):
        plan(packages.descriptor(name=name))
    assert plan(packages.descriptor(name=name), name="plain").name == "plain"


def test_names_with_any_other_character() -> None:
    for name in ("B\u00fcro \U0001f5a5", "a &amp; b &lt;c&gt;", "100% \"x\" 'y'", "-rf", "$(id)"):
        assert plan(packages.descriptor(name=name)).name == name.replace("&amp;", "&").replace("&lt;", "<").replace(
            "&gt;", ">"
        )
    assert plan(packages.descriptor(name="\n   Damn Small Linux\n  ")).name == "Damn Small Linux"


# firmware and devices


@pytest.mark.parametrize(
    "hardware_, system, secure",
    [
        ('<vmw:Config vmw:key="firmware" vmw:value="efi"/>', "", False),
        ('<vmw:ExtraConfig vmw:key="firmware" vmw:value="efi"/>', "", False),
        ("", "<vbox:Machine><Hardware><Firmware type='EFI'/></Hardware></vbox:Machine>", False),
        ('<vmw:Config vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="true"/>', "", True),
    ],
)  # fmt: skip
def test_efi(hardware_: str, system: str, secure: bool) -> None:
    data = packages.descriptor(hardware=hardware_, system=system)
    found = root(data)
    assert found.find("os").get("firmware") == "efi" and found.find("os/type").get("machine") == "q35"
    assert found.find("os/firmware/feature[@name='secure-boot']").get("enabled") == ("yes" if secure else "no")
    assert (found.find("features/smm") is not None) is secure
    assert root(data, firmware="bios").find("os").get("firmware") is None


def test_network_cards() -> None:
    cases = {"VmxNet3": "e1000e", "vmxnet": "e1000e", "PCNet32": "pcnet", "E1000": "e1000", "E1000e": "e1000e",
             "VMXNET3 virtio": "virtio",
             "virtio": "virtio", "unheard-of": "e1000e", "something, E1000": "e1000"}  # fmt: skip
    for subtype, model in cases.items():
        data = packages.descriptor(
            CPU + MEMORY + item(5, 10, ResourceSubType=subtype, Connection="n", ElementName="\u7f51\u5361")
        )
        assert root(data).find("devices/interface/model").get("type") == model
        assert root(data, nic_model="virtio").find("devices/interface/model").get("type") == "virtio"
    old = packages.descriptor(CPU + MEMORY + item(5, 10, ResourceSubType="PCNet32", Connection="n"))
    assert root(old, machine="q35").find("devices/interface/model").get("type") == "e1000"
    assert "PCnet" in warnings(old, machine="q35")
    assert root(old, networks={"n": "default"}).find("devices/interface/source").get("network") == "default"


@pytest.mark.parametrize(
    "address, mac",
    [
        ("00:50:56:29:0c:a0", "00:50:56:29:0c:a0"), ("00-16-8B-DB-00-5E", "00:16:8b:db:00:5e"),
        ("080027939672", "08:00:27:93:96:72"),
        ("", ""), ("7", ""), ("00:00:00:00:00:00", ""), ("01:00:5e:00:00:01", ""), ("00:50:56:29:0c", ""),
        ("zz:50:56:29:0c:a0", ""),
    ],
)  # fmt: skip
def test_mac_addresses(address: str, mac: str) -> None:
    found = root(packages.descriptor(CPU + MEMORY + item(5, 10, Address=address, Connection="n"))).find(
        "devices/interface/mac"
    )
    assert ("" if found is None else found.get("address")) == mac


def test_one_mac_address_twice() -> None:
    items = CPU + MEMORY + item(5, 10, Address="00:50:56:29:0c:a0") + item(6, 10, Address="00:50:56:29:0c:a0")
    assert len(root(packages.descriptor(items)).findall("devices/interface/mac")) == 1


DEVICES = (
    BASE
    + item(10, 5, Address=0) + item(11, 15, Parent=10, ElementName="CD", ResourceSubType="vmware.cdrom.remotepassthrough")
    + item(12, 14, ElementName="floppy", HostResource="/dev/fd0") + item(13, 23, ResourceSubType="vmware.usb.ehci")
    + item(14, 23, ResourceSubType="vmware.usb.xhci") + item(15, 35, ResourceSubType="ensoniq1371")
    + item(16, 1, ResourceSubType="vmware.vtpm", ElementName="vTPM") + item(17, 1, ResourceSubType="vmware.vmci")
    + item(18, 1, ResourceSubType="vmware.pci.passthrough-ah", ElementName="GPU")
    + item(19, 21, ElementName="serial", HostResource="/dev/ttyS0")
    + item(25, 22, ElementName="parallel", HostResource="/dev/lp0")
    + item(26, 20, ResourceSubType="vmware.nvdimm.device", ElementName="nvdimm")
    + item(27, 24, extra='<vmw:Config vmw:key="videoRamSizeInKB" vmw:value="65536"/>'
           '<vmw:Config vmw:key="enable3DSupport" vmw:value="true"/>')
    + item(28, 4711, ElementName="flux capacitor")
)  # fmt: skip


def test_other_devices() -> None:
    data = packages.descriptor(DEVICES, hardware='<vmw:Config vmw:key="tools.syncTimeWithHost" vmw:value="true"/>')
    found, report = root(data), plan(data).report
    assert [each.get("model") for each in found.iterfind("devices/controller[@type='usb']")] == [
        "ich9-ehci1", "ich9-uhci1", "ich9-uhci2", "ich9-uhci3", "qemu-xhci",
    ]  # fmt: skip
    assert (
        found.find("devices/sound").get("model") == "es1370"
        and found.find("devices/tpm/backend").get("version") == "2.0"
    )
    assert found.find("devices/video/model").get("vram") == "65536"
    assert not list(found.iterfind("devices/*/source[@file]")) and not list(found.iterfind("devices/*/source[@path]"))
    ignored = {row["item"] for row in report.ignored}
    assert {"flux capacitor", "GPU", "nvdimm", "vmw:Config tools.syncTimeWithHost", "medium of floppy"} <= ignored
    told = "\n".join(map(str, report.warnings))
    assert all(word in told for word in ("BitLocker", "3D", "GPU", "nvdimm"))
    assert all(row["from"] and row["to"] for row in report.replaced) and all(row["note"] for row in report.ignored)


@pytest.mark.parametrize(
    "data",
    [
        packages.descriptor(DEVICES),
        packages.descriptor(DEVICES, hardware='<vmw:Config vmw:key="firmware" vmw:value="efi"/>'),
    ],
)
@pytest.mark.parametrize("kvm", [False, True])
@pytest.mark.parametrize("bus", ["", "virtio", "scsi"])
def test_valid_and_harmless(data: bytes, kvm: bool, bus: str) -> None:
    """libvirt's schema takes it, and a restore that does not trust the package keeps all of it."""
    made = plan(data, disk_bus=bus)
    domain_xml = made.domain_xml if kvm else hardware.emulated(made.domain_xml)
    parsed = _xml.parse(domain_xml, "the definition")
    assert parsed.get("type") == ("kvm" if kvm else "qemu") and ("host-model" in domain_xml) == kvm
    assert not host_exposure.only_allowed(parsed).skipped
    if SCHEMA.exists():
        schema = etree.RelaxNG(etree.parse(str(SCHEMA)))
        schema.assertValid(etree.fromstring(domain_xml))


PPC = "<x:architecture xmlns:x='y'>ppc64le</x:architecture>"


@pytest.mark.parametrize(
    "data, why",
    [
        (packages.descriptor(family="IBM:POWER:AIXLINUX"), "no PC"),
        (packages.descriptor(family="openvz"), "container"),
        (packages.descriptor(os=f"<OperatingSystemSection>{PPC}</OperatingSystemSection>"), "ppc64le"),
    ],
)  # fmt: skip
def test_what_is_no_pc(data: bytes, why: str) -> None:
    with pytest.raises(KvmopsError, match=why):
        plan(data)


def test_options_that_do_not_fit() -> None:
    secure = packages.descriptor(hardware='<vmw:Config vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="true"/>')
    with pytest.raises(RefusedError, match="needs the machine type q35"):
        plan(secure, machine="pc")
    assert plan(secure, machine="pc", firmware="bios")
    with pytest.raises(RefusedError, match="has no IDE"):
        plan(packages.descriptor(), machine="q35", disk_bus="ide")
