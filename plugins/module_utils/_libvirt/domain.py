# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a domain XML says, as plain values. Pure: needs neither libvirt nor a host."""

from __future__ import annotations

from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree

_UNITS_BYTES = {
    "b": 1, "bytes": 1, "KB": 10**3, "k": 2**10, "KiB": 2**10, "MB": 10**6, "M": 2**20, "MiB": 2**20,
    "GB": 10**9, "G": 2**30, "GiB": 2**30, "TB": 10**12, "T": 2**40, "TiB": 2**40,
}  # fmt: skip
_MAX_DIGITS = 20
_AGENT_CHANNEL = "org.qemu.guest_agent.0"


@dataclass(frozen=True)
class ChainLink:
    """One image of a disk's chain; ``path`` is "" for a network source and for a volume of a pool."""

    path: str
    format: str
    pool: str = ""
    volume: str = ""


@dataclass(frozen=True)
class Disk:
    """One <disk>. ``path`` is the local file or device ("" for an empty drive, a network source or an unresolved volume)."""

    target: str  # vda
    device: str  # disk, cdrom, floppy, lun
    type: str  # file, block, volume, network, dir, nvme, vhostuser, vhostvdpa
    path: str
    format: str  # the driver's type; "" where the XML does not say
    bus: str
    readonly: bool
    shareable: bool
    transient: bool
    pool: str  # of type volume, else ""
    volume: str
    chain: tuple[ChainLink, ...]  # the images below `path`, nearest first, as far as the XML lists them
    chain_complete: bool  # the list ends with <backingStore/>: there is nothing further below
    encrypted: bool  # any <encryption> in the disk (LUKS and others)
    has_data_file: bool  # a qcow2 with an external data file (<dataStore>)
    has_slices: bool  # the image is a part of its file
    network: str  # protocol/name of a network source, else ""
    mirror: str  # job type of a running <mirror> ("copy", "active-commit"), else ""
    mirror_ready: bool
    alias: str  # of a running VM, else ""
    index: str  # of a running VM: QEMU's nodes of the active image are libvirt-INDEX-format and -storage
    serial: str

    @property
    def name(self) -> str:
        """For messages: target and where it is."""
        where = self.path or self.network or (f"{self.pool}/{self.volume}" if self.volume else "empty")
        return f"{self.target} ({where})"


@dataclass(frozen=True)
class Nic:
    """One <interface>."""

    mac: str
    type: str  # network, bridge, direct, user, hostdev, vdpa, …
    source: str  # name of the network, bridge or device; "" for user
    model: str


@dataclass(frozen=True)
class Hostdev:
    """One <hostdev>: a device of the host given to the VM."""

    kind: str  # pci, usb, mdev, scsi, …
    description: str  # address, vendor:product or uuid, for messages


@dataclass(frozen=True)
class Filesystem:
    """One <filesystem>: a directory of the host shared with the VM; never part of a backup."""

    driver: str
    source: str
    target: str


@dataclass(frozen=True)
class DomainView:
    """A domain definition, live or persistent."""

    name: str
    uuid: str
    title: str
    type: str  # kvm, qemu
    memory_bytes: int
    vcpus: int
    arch: str
    machine: str
    cpu_mode: str
    emulator: str
    firmware: str  # bios, efi, or "" when the XML leaves it to libvirt
    loader_path: str
    nvram_path: str
    nvram_type: str  # file, block or network; "" where there is no NVRAM or the XML leaves it to libvirt
    tpm: str  # backend type (emulator, passthrough, external) or ""
    tpm_persistent: bool
    tpm_version: str  # 1.2, 2.0, or "" when the XML leaves it to libvirt
    tpm_source: str  # directory of its state where the XML names one, else ""
    tpm_file: str  # file with its state (libvirt >= 10.10) where the XML names one, else ""
    tpm_encrypted: bool
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    hostdevs: tuple[Hostdev, ...]
    filesystems: tuple[Filesystem, ...]
    vsock: bool
    agent_channel: bool
    agent_connected: bool  # only a running VM's XML says so

    def disk(self, target: str) -> Disk | None:
        """The disk of that target, if there is one."""
        return next((disk for disk in self.disks if disk.target == target), None)


def parse(xml: bytes | str) -> DomainView:
    """The view of a <domain> document. Raises HostileError for what is not XML or not a domain."""
    root = _xml.parse(xml, "The domain XML")
    if root.tag != "domain":
        raise HostileError("The domain XML", f"its root element is <{root.tag}>, not <domain>")
    return view(root)


def view(root: etree._Element) -> DomainView:
    """The view of a parsed <domain> element (also one inside a <domainsnapshot>)."""
    devices = root.find("devices")
    if devices is None:
        devices = etree.Element("devices")
    type_element = root.find("os/type")
    tpm = devices.find("tpm/backend")
    agent = next((each for each in devices.iterfind("channel/target") if each.get("name") == _AGENT_CHANNEL), None)
    loader = root.find("os/loader")
    return DomainView(
        name=root.findtext("name", ""),
        uuid=root.findtext("uuid", ""),
        title=root.findtext("title", ""),
        type=root.get("type", ""),
        memory_bytes=_memory_bytes(root.find("memory")),
        vcpus=_integer(root.findtext("vcpu")),
        arch="" if type_element is None else type_element.get("arch", ""),
        machine="" if type_element is None else type_element.get("machine", ""),
        cpu_mode=_attribute(root, "cpu", "mode"),
        emulator=devices.findtext("emulator", ""),
        firmware=_firmware(root),
        loader_path="" if loader is None else (loader.text or "").strip(),
        nvram_path=_nvram_path(root),
        nvram_type=_attribute(root, "os/nvram", "type"),
        tpm="" if tpm is None else tpm.get("type", ""),
        tpm_persistent=tpm is not None and tpm.get("persistent_state") == "yes",
        tpm_version="" if tpm is None else tpm.get("version", ""),
        tpm_source="" if tpm is None else _attribute(tpm, "source[@type='dir']", "path"),
        tpm_file="" if tpm is None else _attribute(tpm, "source[@type='file']", "path"),
        tpm_encrypted=tpm is not None and tpm.find("encryption") is not None,
        disks=tuple(_disk(each) for each in devices.iterfind("disk")),
        nics=tuple(_nic(each) for each in devices.iterfind("interface")),
        hostdevs=tuple(_hostdev(each) for each in devices.iterfind("hostdev")),
        filesystems=tuple(
            Filesystem(
                _attribute(each, "driver", "type"), _attribute(each, "source", "dir"), _attribute(each, "target", "dir")
            )
            for each in devices.iterfind("filesystem")
        ),
        vsock=devices.find("vsock") is not None,
        agent_channel=agent is not None,
        agent_connected=agent is not None and agent.get("state") == "connected",
    )


def _attribute(parent: etree._Element, path: str, name: str) -> str:
    element = parent.find(path)
    return "" if element is None else element.get(name, "")


def target_of(disk: etree._Element) -> str:
    """The target of a <disk>, "" if it has none."""
    target = disk.find("target")
    return "" if target is None else target.get("dev") or ""


def _integer(text: str | None) -> int:
    """A number that libvirt would have written; 0 for anything else."""
    digits = (text or "").strip()
    return int(digits) if digits.isdecimal() and len(digits) <= _MAX_DIGITS else 0


def _memory_bytes(element: etree._Element | None) -> int:
    if element is None:
        return 0
    return _integer(element.text) * _UNITS_BYTES.get(element.get("unit", "KiB"), 0)


def _firmware(root: etree._Element) -> str:
    os_element = root.find("os")
    if os_element is None:
        return ""
    if os_element.get("firmware"):
        return os_element.get("firmware", "")
    loader = os_element.find("loader")
    if loader is not None and loader.get("type") == "pflash":
        return "efi"
    return "bios" if loader is not None else ""


def _nvram_path(root: etree._Element) -> str:
    nvram = root.find("os/nvram")
    if nvram is None:
        return ""
    return _attribute(nvram, "source", "file") or (nvram.text or "").strip()


def _source_path(source: etree._Element | None) -> str:
    if source is None:
        return ""
    return source.get("file") or source.get("dev") or source.get("dir") or ""


def _disk(element: etree._Element) -> Disk:
    source = element.find("source")
    mirror = element.find("mirror")
    chain, complete = _chain(element)
    protocol = "" if source is None else source.get("protocol", "")
    return Disk(
        target=_attribute(element, "target", "dev"),
        device=element.get("device", "disk"),
        type=element.get("type", "file"),
        path=_source_path(source),
        format=_attribute(element, "driver", "type"),
        bus=_attribute(element, "target", "bus"),
        readonly=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        pool="" if source is None else source.get("pool", ""),
        volume="" if source is None else source.get("volume", ""),
        chain=chain,
        chain_complete=complete,
        encrypted=element.find(".//encryption") is not None,
        has_data_file=element.find(".//dataStore") is not None,
        has_slices=element.find(".//slices") is not None,
        network="" if source is None or not protocol else f"{protocol}:{source.get('name', '')}",
        mirror="" if mirror is None else mirror.get("job", ""),
        mirror_ready=mirror is not None and mirror.get("ready") == "yes",
        alias=_attribute(element, "alias", "name"),
        index="" if source is None else source.get("index", ""),
        serial=element.findtext("serial", ""),
    )


def _chain(disk: etree._Element) -> tuple[tuple[ChainLink, ...], bool]:
    links: list[ChainLink] = []
    backing = disk.find("backingStore")
    while backing is not None:
        source = backing.find("source")
        if source is None:
            return tuple(links), True
        image_format = _attribute(backing, "format", "type")
        links.append(ChainLink(_source_path(source), image_format, source.get("pool", ""), source.get("volume", "")))
        backing = backing.find("backingStore")
    return tuple(links), False


def _nic(element: etree._Element) -> Nic:
    source = element.find("source")
    name = ""
    if source is not None:
        name = next(
            (source.get(key, "") for key in ("network", "bridge", "dev", "path", "address") if source.get(key)), ""
        )
    return Nic(
        _attribute(element, "mac", "address"), element.get("type", ""), name, _attribute(element, "model", "type")
    )


def _hostdev(element: etree._Element) -> Hostdev:
    kind = element.get("type", "") or element.get("mode", "")
    source = element.find("source")
    if source is None:
        return Hostdev(kind, "")
    address = source.find("address")
    if address is not None:
        described = address.get("uuid", "") or " ".join(
            f"{key}={address.get(key, '')}" for key in sorted(map(str, address.keys()))
        )
        return Hostdev(kind, described)
    described = f"{_attribute(source, 'vendor', 'id')}:{_attribute(source, 'product', 'id')}"
    return Hostdev(kind, "" if described == ":" else described)
