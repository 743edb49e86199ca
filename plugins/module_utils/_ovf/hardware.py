# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The definition of the VM that a descriptor describes, and the report of what was replaced and ignored. Pure."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import descriptor as ovf
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import drives, mapping, units
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.drives import DriveSlot
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.report import HardwareReport, tell_ignored

CHECK = Notice(
    Code.OTHER_HARDWARE, "Check the VM's configuration before its first start: it stands on replaced hardware."
)
BUSES = ("sata", "scsi", "virtio", "ide")
MAX_VCPUS = 1024
MAX_MEMORY_BYTES = 64 << 40
MIN_MEMORY_BYTES = 1 << 20
_PER_SCSI = 7  # fewer than a controller takes, so that the first is never full
_LIBOSINFO = "http://libosinfo.org/xmlns/libvirt/domain/1.0"
_UUIDS = uuid.UUID("5f0c8f3e-63b8-5d2e-9c0e-4b5d0c6f2a11")
_ARM = re.compile(r"^arm-|(?:^|[^a-z])(arm-?(32|64)|aarch64)", re.IGNORECASE)
_SEPARATORS = re.compile(r"[:.-]")
_MAC = re.compile(r"[0-9a-f]{12}")
_AGENT = "org.qemu.guest_agent.0"


@dataclass(frozen=True)
class Options:
    """What the user wants otherwise than the descriptor and the mapping; "" for nothing."""

    name: str = ""
    disk_bus: str = ""
    nic_model: str = ""
    networks: Mapping[str, str] = field(default_factory=dict)
    firmware: str = ""
    machine: str = ""


@dataclass(frozen=True)
class Drive:
    """A disk or CD of the VM: `file` (id of a file of the package, "" for an empty disk of `capacity_bytes`)."""

    target: str
    device: str
    file: str
    disk: ovf.DiskRow
    item: ovf.Item
    boots: bool = False


@dataclass(frozen=True)
class Hardware:
    """The VM: its definition without paths of disks, its drives with a medium, and the report."""

    name: str
    uuid: str
    domain_xml: str
    drives: tuple[Drive, ...]
    report: HardwareReport
    efi: bool


def plan(described: ovf.Descriptor, data: bytes, what: str, options: Options) -> Hardware:
    """The VM that ``described``, read from ``data``, becomes. Raises ArchiveError for what makes no sense, RefusedError for what
    no PC is, or an option that does not fit."""
    return _Builder(described, data, what, options).build()


def emulated(domain_xml: str) -> str:
    """A definition of `plan` for a host without KVM."""
    root = _xml.parse(domain_xml, "the definition")
    root.set("type", "qemu")
    for cpu in root.findall("cpu"):
        cpu.attrib.pop("check", "")
        cpu.set("mode", "maximum")
    for path in ("features/hyperv", "clock/timer[@name='hypervclock']"):
        for element in root.findall(path):
            _xml.parent_of(element).remove(element)
    return _xml.text(root)


class _Builder:
    def __init__(self, described: ovf.Descriptor, data: bytes, what: str, options: Options) -> None:
        self.described, self.system, self.what, self.options = described, described.system, what, options
        self.machine_ = self.system.machine or ovf.Machine()
        self.report = HardwareReport(warnings=list(described.warnings))
        self.items = self.system.items
        self.by_id = {item.id: item for item in self.items if item.id}
        self._refuse_other_architectures()
        self.name = self._name()
        digest = hashlib.sha256(data).hexdigest()
        self.uuid = str(uuid.uuid5(_UUIDS, f"{digest}\n{self.system.id}\n{described.configuration}\n{self.name}"))
        self.secure_boot = False
        self.efi = self._is_efi()
        self.machine = options.machine or ("q35" if self.efi else self.system.machine_type or "pc")
        self._check_machine()
        told = (self.system.os_type or self.system.os_text).lower()
        self.windows = told.startswith(("win", "microsoft win")) or (not told and self.system.os_id in mapping.WINDOWS_IDS)

    def build(self) -> Hardware:
        slots = drives.plan(self.described, self.what, self.machine, self.options.disk_bus, self.report)
        self.boot = drives.boot_order(self.system, slots)
        root = self._root()
        devices = etree.SubElement(root, "devices")
        for slot in sorted(slots, key=lambda each: (each.device != "disk", each.target)):
            self._drive(devices, slot)
        self._controllers(devices, slots)
        if self.windows and self.options.disk_bus in ("virtio", "scsi"):
            lost = f"Windows starts from a {self.options.disk_bus} disk only if its driver is installed already (virtio-win)"
            self.report.warn(Code.OTHER_HARDWARE, f"{lost}; disk_bus: sata needs none")
        self._nics(devices)
        self._usb(devices)
        self._others(devices)
        self._characters(devices)
        self._video(devices)
        tell_ignored(self.report, self.described, efi=self.efi)
        first = min(
            (slot for slot in slots if slot.device == "disk"), key=lambda slot: self.boot[slot.item.position], default=None
        )
        found = tuple(
            Drive(slot.target, slot.device, slot.file, slot.disk, slot.item, slot is first)
            for slot in slots
            if slot.device == "disk" or slot.file
        )
        return Hardware(self.name, self.uuid, _xml.text(root), found, self.report, self.efi)

    # the whole

    def _refuse_other_architectures(self) -> None:
        family, architecture = self.system.family.lower(), self.system.architecture.lower()
        hint = "Only VMs of PCs (x86) are converted."
        if family.startswith("ibm:"):
            raise RefusedError(self.what, f"it is for {self.system.family}, which is no PC", hint)
        if family.startswith(("openvz", "lxc")):
            raise RefusedError(self.what, f"it is a container ({self.system.family}), not a VM", hint)
        if architecture and architecture not in ("x86_64", "amd64", "x86-64", "x86", "i386", "i686"):
            raise RefusedError(self.what, f"its architecture is {self.system.architecture}", hint)
        for guest in (self.system.os_type, self.system.os_text):
            if _ARM.search(guest):
                raise RefusedError(self.what, f"its guest is for ARM ({guest[:60]})", hint)

    def _name(self) -> str:
        name = self.options.name or self.system.name.strip()
        if (
            not name
            or any(ord(letter) < 32 or letter in "/\x7f" for letter in name)
            or len(name) > 200
            or name in (".", "..")
        ):
            raise RefusedError(
                self.what, f"{name[:80]!r} is not a name for a VM", "Give a plain one with the option 'name'."
            )
        return name

    def _is_efi(self) -> bool:
        said = (
            ovf.setting(self.system.config, "firmware")
            or ovf.setting(self.system.extra, "firmware")
            or self.machine_.firmware
            or self.system.firmware
        ).lower()
        found = said.startswith(("efi", "uefi"))
        secure = (
            ovf.setting(self.system.config, "bootoptions.efisecurebootenabled"),
            ovf.setting(self.system.extra, "uefi.secureboot.enabled"),
        )
        if "true" in map(str.lower, secure) or self.machine_.secure_boot or self.system.secure_boot:
            self.secure_boot = found or not said
            found = found or not said
        if self.options.firmware:
            wanted = self.options.firmware == "efi"
            if wanted != found:
                self.report.replace(
                    f"firmware {'efi' if found else 'bios'}", self.options.firmware, "as the option says"
                )
            self.secure_boot = self.secure_boot and wanted
            return wanted
        return found

    def _check_machine(self) -> None:
        if self.secure_boot and self.machine == "pc":
            raise RefusedError(
                "Option machine", "secure boot needs the machine type q35", "Use machine: q35, or firmware: bios."
            )
        if self.options.disk_bus == "ide" and self.machine == "q35":
            raise RefusedError(
                "Option disk_bus", "the machine type q35 has no IDE", "Use disk_bus: sata, or machine: pc."
            )

    def _root(self) -> etree._Element:
        vcpus, sockets, cores = self._cpus()
        root = etree.Element("domain", {"type": "kvm"})
        _add(root, "name", self.name)
        _add(root, "uuid", self.uuid)
        known = mapping.SYSTEMS.get(self.system.os_type.lower()) or mapping.SYSTEMS_BY_ID.get(self.system.os_id)
        if known:
            metadata = etree.SubElement(root, "metadata")
            info = etree.SubElement(metadata, f"{{{_LIBOSINFO}}}libosinfo", nsmap={"libosinfo": _LIBOSINFO})
            etree.SubElement(info, f"{{{_LIBOSINFO}}}os", {"id": known})
        _add(root, "memory", str(self._memory() // 1024), unit="KiB")
        _add(root, "vcpu", str(vcpus))
        os_element = etree.SubElement(root, "os", {"firmware": "efi"} if self.efi else {})
        _add(os_element, "type", "hvm", arch="x86_64", machine=self.machine)
        if self.efi:
            firmware = etree.SubElement(os_element, "firmware")
            state = "yes" if self.secure_boot else "no"
            _add(firmware, "feature", enabled=state, name="secure-boot")
            if self.secure_boot:
                _add(firmware, "feature", enabled="yes", name="enrolled-keys")
                _add(os_element, "loader", secure="yes")
        features = etree.SubElement(root, "features")
        for name in ("acpi", "apic", "pae"):
            _add(features, name)
        if self.windows:
            hyperv = _add(features, "hyperv", mode="custom")
            for name in ("relaxed", "vapic"):
                _add(hyperv, name, state="on")
            _add(hyperv, "spinlocks", state="on", retries="8191")
        if self.secure_boot:
            _add(features, "smm", state="on")
        cpu = _add(root, "cpu", mode="host-model", check="partial")
        if cores:
            _add(cpu, "topology", sockets=str(sockets), cores=str(cores), threads="1")
        clock = _add(root, "clock", offset="localtime" if self.windows or self.machine_.localtime else "utc")
        _add(clock, "timer", name="rtc", tickpolicy="catchup")
        _add(clock, "timer", name="pit", tickpolicy="delay")
        _add(clock, "timer", name="hpet", present="no")
        if self.windows:
            _add(clock, "timer", name="hypervclock", present="yes")
        for name, action in (("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")):
            _add(root, name, action)
        return root

    def _cpus(self) -> tuple[int, int, int]:
        """Number of virtual CPUs, and sockets and cores of each (0: not told)."""
        items = [item for item in self.items if item.type == ovf.CPU]
        cores = 0
        if items:
            fields = items[0].fields
            if items[0].quantity:
                vcpus = units.number(items[0].quantity)
                cores = units.number(fields.get("CoresPerSocket", "")) or 0
            else:  # oVirt
                sockets, cores = (
                    units.number(fields.get("num_of_sockets", "")),
                    units.number(fields.get("cpu_per_socket", "")) or 0,
                )
                threads = units.number(fields.get("threads_per_cpu", "")) or 1
                vcpus = None if sockets is None else sockets * (cores or 1) * threads
                cores *= threads
            if vcpus is None:
                raise ArchiveError(self.what, f"the number of CPUs is no number: {items[0].quantity[:60]!r}")
            if len(items) > 1:
                self.report.warn(Code.ODD_PACKAGE, f"the descriptor has {len(items)} CPU items; the first counts")
        elif self.machine_.cpus:
            vcpus = self.machine_.cpus
            self.report.warn(
                Code.ODD_PACKAGE, f"the hardware section names no CPUs; {vcpus} were taken from VirtualBox's own section"
            )
        else:
            vcpus = 1
            self.report.warn(Code.ODD_PACKAGE, "the descriptor does not say how many CPUs the VM has; it gets 1")
        if not 1 <= vcpus <= MAX_VCPUS:
            raise ArchiveError(self.what, f"{vcpus} CPUs make no sense", f"1 to {MAX_VCPUS} are possible.")
        if cores and vcpus % cores:
            self.report.warn(Code.ODD_PACKAGE, f"{cores} cores per socket do not fit {vcpus} CPUs; the topology is not taken over")
            cores = 0
        return vcpus, vcpus // cores if cores else 0, cores

    def _memory(self) -> int:
        items = [item for item in self.items if item.type == ovf.MEMORY]
        if items:
            size, warning = ovf.memory_bytes(items[0], self.what)
            if warning:
                self.report.warn(Code.ODD_PACKAGE, warning)
            if len(items) > 1:
                self.report.warn(Code.ODD_PACKAGE, f"the descriptor has {len(items)} memory items; the first counts")
        elif self.machine_.memory_bytes:
            size = self.machine_.memory_bytes
            self.report.warn(
                Code.ODD_PACKAGE,
                f"the hardware section names no memory; {size >> 20} MiB were taken from VirtualBox's own section"
            )
        else:
            size = 1 << 30
            self.report.warn(Code.ODD_PACKAGE, "the descriptor does not say how much memory the VM has; it gets 1024 MiB")
        if not MIN_MEMORY_BYTES <= size <= MAX_MEMORY_BYTES:
            raise ArchiveError(self.what, f"{size} bytes of memory make no sense")
        return size

    def _drive(self, devices: etree._Element, slot: DriveSlot) -> None:
        element = _add(devices, "disk", type="file", device=slot.device)
        _add(element, "driver", name="qemu", type="qcow2" if slot.device == "disk" else "raw")
        _add(element, "target", dev=slot.target, bus=slot.bus)
        if slot.device == "cdrom":
            _add(element, "readonly")
        if slot.device == "disk":
            known = f"{self.uuid}\n{slot.disk.id}\n{slot.item.id or slot.item.position}"  # two items may name one disk
            _add(element, "serial", hashlib.sha256(known.encode()).hexdigest()[:20])
        self._boots(element, slot.item)

    def _boots(self, element: etree._Element, item: ovf.Item) -> None:
        if item.position in self.boot:
            _add(element, "boot", order=str(self.boot[item.position]))

    def _controllers(self, devices: etree._Element, slots: Sequence[DriveSlot]) -> None:
        count = sum(slot.bus == "scsi" for slot in slots)
        for index in range(-(-count // _PER_SCSI)):
            _add(devices, "controller", type="scsi", index=str(index), model="virtio-scsi")
        used = {slot.item.parent for slot in slots}
        for item in self.items:
            if (
                item.type in ovf.CONTROLLERS
                and item.id not in used
                and mapping.rule(mapping.CONTROLLERS, item.type, item.subtypes)
            ):
                self.report.ignore(str(item), "nothing is on this controller")

    # the other devices

    def _nics(self, devices: etree._Element) -> None:
        taken = set()
        for item in drives.in_order(self.items, ovf.NIC):
            subtypes = tuple(mapping.OVIRT_NICS.get(each, each) for each in item.subtypes)
            rule = mapping.rule(mapping.NICS, ovf.NIC, subtypes)
            if rule is None:
                raise AssertionError("there is a rule for every network card")
            model = self.options.nic_model or rule.on(self.machine)
            network = self._network(item)
            element = _add(devices, "interface", type="network")
            mac = _mac(item.address)
            if mac and mac not in taken:
                taken.add(mac)
                _add(element, "mac", address=mac)
            elif item.address:
                self.report.ignore(
                    f"MAC address of {item}", f"{item.address[:40]!r} is no address of one card, or taken twice"
                )
            _add(element, "source", network=network)
            _add(element, "model", type=model)
            self._boots(element, item)
            if item.fields.get("AutomaticAllocation", "").lower() == "false":
                _add(element, "link", state="down")
                self.report.warn(
                    Code.OTHER_HARDWARE, f"{item} is not connected, as in the original; 'virsh domif-setlink' connects it"
                )
            note = "as the option nic_model says" if self.options.nic_model else rule.note
            if "pcnet32" in subtypes and model != "pcnet" and not self.options.nic_model:
                note = "there is no PCnet card on this machine type"
                lost = f"{item} becomes an {model}: a guest that only knows the PCnet card has no network"
                self.report.warn(Code.OTHER_HARDWARE, lost)
            self.report.replace(
                f"{item} ({subtypes[0] if subtypes else 'no model'})", f"{model} on the network {network}", note
            )

    def _network(self, item: ovf.Item) -> str:
        name = item.connections[0] if item.connections else ""
        if not name:
            name = self.described.networks[0] if len(self.described.networks) == 1 else "unnamed"
            self.report.warn(Code.ODD_PACKAGE, f"{item} names no network; it is put on {name!r}")
        if len(item.connections) > 1:
            self.report.warn(Code.ODD_PACKAGE, f"{item} names {len(item.connections)} networks; the first counts")
        mapped = self.options.networks.get(name, name).strip()
        return "".join(letter for letter in mapped if ord(letter) >= 32).replace("/", "_") or "unnamed"

    def _usb(self, devices: etree._Element) -> None:
        items = [item for item in self.items if item.type == ovf.USB and item.fields.get("UsbPolicy", "").lower() != "disabled"]
        models = []
        for item in items:
            rule = mapping.rule(mapping.USB_CONTROLLERS, ovf.USB, item.subtypes)
            if rule is not None and rule.on(self.machine) not in models:
                models.append(rule.on(self.machine))
            self.report.replace(str(item), f"USB controller {models[-1]}")
        for index, model in enumerate(models):
            _add(devices, "controller", type="usb", index=str(index), model=model)
            for number, port in ((1, 0), (2, 2), (3, 4)) if model == "ich9-ehci1" else ():
                _add(
                    _add(devices, "controller", type="usb", index=str(index), model=f"ich9-uhci{number}"),
                    "master",
                    startport=str(port),
                )
        if models:
            _add(devices, "input", type="tablet", bus="usb")
        else:
            _add(devices, "controller", type="usb", index="0", model="none")

    def _others(self, devices: etree._Element) -> None:
        tpm = self.machine_.tpm not in ("", "None")
        sound: ovf.Item | None = None
        for item in self.items:
            controller = item.type in ovf.CONTROLLERS and mapping.rule(mapping.CONTROLLERS, item.type, item.subtypes)
            if item.type not in (ovf.SOUND, ovf.OTHER, ovf.STORAGE) or controller:
                continue
            rule = mapping.rule(mapping.OTHERS, item.type, item.subtypes)
            becomes = "sound" if item.type == ovf.SOUND else rule.on(self.machine) if rule else ""
            if rule and rule.warning:
                self.report.warn(Code.OTHER_HARDWARE, f"{item}: {rule.warning}")
            if becomes == "tpm":
                tpm = True
            elif becomes == "sound" and sound is None:
                sound = item
            elif becomes == "sound":
                self.report.ignore(str(item), "the VM has one sound card here")
            else:
                self.report.ignore(str(item), rule.note if rule else mapping.NO_SUCH_HARDWARE)
        if sound is not None:
            self._sound(devices, sound)
        if tpm:
            element = _add(devices, "tpm", model="tpm-crb")
            _add(element, "backend", type="emulator", version="2.0")
            self.report.replace("TPM", "an emulated TPM 2.0", "it is empty")
            if self.machine_.tpm:
                self.report.warn(Code.OTHER_HARDWARE, next(rule.warning for rule in mapping.OTHERS if rule.pc == "tpm"))

    def _sound(self, devices: etree._Element, item: ovf.Item) -> None:
        subtypes = tuple(subtype.rpartition(".")[2] for subtype in item.subtypes)  # VMware's are vmware.soundcard.…
        rule = mapping.rule(mapping.SOUND_CARDS, ovf.SOUND, subtypes)
        if rule is not None:
            _add(devices, "sound", model=rule.on(self.machine))
            self.report.replace(str(item), f"sound card {rule.on(self.machine)}", rule.note)

    def _characters(self, devices: etree._Element) -> None:
        serials = [item for item in self.items if item.type == ovf.SERIAL]
        for item in serials[1:4]:
            self.report.replace(str(item), "a serial port", "what it was connected to on its host is not taken over")
        for port in range(max(1, min(len(serials), 4))):  # the first is the console of the VM
            _add(_add(devices, "serial", type="pty"), "target", port=str(port))
        if serials:
            self.report.replace(
                str(serials[0]), "a serial port", "what it was connected to on its host is not taken over"
            )
        for port, item in enumerate([item for item in self.items if item.type == ovf.PARALLEL][:3]):
            _add(_add(devices, "parallel", type="pty"), "target", port=str(port))
            self.report.replace(str(item), "a parallel port", "what it was connected to on its host is not taken over")
        _add(_add(devices, "channel", type="unix"), "target", type="virtio", name=_AGENT)

    def _video(self, devices: etree._Element) -> None:
        item = next((item for item in self.items if item.type == ovf.GRAPHICS), None)
        config = item.config if item is not None else {}
        size = (units.number(ovf.setting(config, "videoramsizeinkb")) or 0) * 1024 or self.machine_.video_bytes
        vram = 16 << 20
        while vram < min(size, 256 << 20):
            vram *= 2
        if ovf.setting(config, "enable3dsupport").lower() == "true" or self.machine_.accelerate_3d:
            self.report.warn(Code.OTHER_HARDWARE, "the VM had 3D graphics; its video card here has none")
        _add(devices, "graphics", type="vnc", port="-1", autoport="yes")
        _add(_add(devices, "video"), "model", type="vga", vram=str(vram // 1024), heads="1", primary="yes")
        if item is not None:
            self.report.replace(str(item), "video card vga")
        _add(devices, "memballoon", model="virtio")


def _add(parent: etree._Element, tag: str, text: str = "", **attributes: str) -> etree._Element:
    element = etree.SubElement(parent, tag, attributes)
    if text:
        element.text = text
    return element


def _mac(text: str) -> str:
    """A fixed address as libvirt writes it; "" for what is none, or that of a group or of nobody."""
    digits = _SEPARATORS.sub("", text.strip().lower())
    if not _MAC.fullmatch(digits) or int(digits[1], 16) & 1 or not int(digits, 16):
        return ""
    return ":".join(digits[index : index + 2] for index in range(0, 12, 2))
