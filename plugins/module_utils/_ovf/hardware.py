# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The definition of the VM that a descriptor describes, and the report of what was replaced and ignored. Pure."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import descriptor as ovf
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import mapping, units

CHECK = Notice(
    Code.OTHER_HARDWARE, "Check the VM's configuration before its first start: it stands on replaced hardware."
)
BUSES = ("sata", "scsi", "virtio", "ide")
MAX_VCPUS = 1024
MAX_MEMORY_BYTES = 64 << 40
MIN_MEMORY_BYTES = 1 << 20
_IDE_DRIVES = 4
_PER_SCSI = 7  # fewer than a controller takes, so that the first is never full
_PREFIXES = {"ide": "hd", "virtio": "vd"}
_LIBOSINFO = "http://libosinfo.org/xmlns/libvirt/domain/1.0"
_UUIDS = uuid.UUID("5f0c8f3e-63b8-5d2e-9c0e-4b5d0c6f2a11")
_MAC = re.compile(r"(?:[0-9a-f]{2}[:-]?){5}[0-9a-f]{2}")
_HDD = re.compile(r"(ide|scsi|sata|nvme)(\d{1,4}):(\d{1,4})")
_AGENT = "org.qemu.guest_agent.0"


@dataclass(frozen=True)
class Options:
    """What the user wants otherwise than the descriptor and the mapping; "" for nothing. `kvm`: the host has KVM."""

    name: str = ""
    disk_bus: str = ""
    nic_model: str = ""
    networks: Mapping[str, str] = field(default_factory=dict)
    firmware: str = ""
    machine: str = ""
    kvm: bool = True


@dataclass(frozen=True)
class Drive:
    """A disk or CD of the VM: `file` (id of a file of the package, "" for an empty disk of `capacity_bytes`)."""

    target: str
    device: str
    file: str
    disk: ovf.Disk
    item: ovf.Item
    boots: bool = False


@dataclass
class Report:
    """What became of the original's hardware: rows as the modules return them."""

    replaced: list[dict[str, str]] = field(default_factory=list)
    ignored: list[dict[str, str]] = field(default_factory=list)
    warnings: list[Notice] = field(default_factory=list)

    def replace(self, of: str, to: str, note: str = "") -> None:
        """A line about what was replaced."""
        self.replaced.append({"from": of, "to": to, "note": note})

    def ignore(self, item: str, note: str) -> None:
        """A line about what was ignored."""
        self.ignored.append({"item": item, "note": note})

    def warn(self, code: Code, text: str) -> None:
        """A warning, told once."""
        notice = Notice(code, text)
        if notice not in self.warnings:
            self.warnings.append(notice)


@dataclass(frozen=True)
class Hardware:
    """The VM: its definition without paths of disks, its drives with a medium, and the report."""

    name: str
    uuid: str
    domain_xml: str
    drives: tuple[Drive, ...]
    report: Report
    efi: bool


def plan(described: ovf.Descriptor, data: bytes, what: str, options: Options) -> Hardware:
    """The VM that ``described``, read from ``data``, becomes. Raises ArchiveError for what makes no sense, RefusedError for what
    no PC is, or an option that does not fit."""
    return _Builder(described, data, what, options).build()


@dataclass(eq=False)
class _Slot:
    """A drive on its way: `key` orders drives as the original's firmware counts them."""

    item: ovf.Item
    device: str
    bus: str
    key: tuple[int, int, int, int, int]
    label: str
    note: str = ""
    disk: ovf.Disk = field(default_factory=lambda: ovf.Disk(""))
    file: str = ""
    target: str = ""
    family: str = ""
    order: int = 0


class _Builder:
    def __init__(self, described: ovf.Descriptor, data: bytes, what: str, options: Options) -> None:
        self.described, self.system, self.what, self.options = described, described.system, what, options
        self.machine_ = self.system.machine or ovf.Machine()
        self.report = Report(warnings=list(described.warnings))
        self.items = self.system.items
        self.by_id = {item.id: item for item in self.items if item.id}
        self._refuse_other_architectures()
        self.name = self._name()
        digest = hashlib.sha256(data).hexdigest()
        self.uuid = str(uuid.uuid5(_UUIDS, f"{digest}\n{self.system.id}\n{described.configuration}\n{self.name}"))
        self.secure_boot = False
        self.efi = self._is_efi()
        self.machine = options.machine or ("q35" if self.efi else "pc")
        self._check_machine()
        self.windows = bool(re.match(r"(microsoft )?win", self.system.os_type.lower() or self.system.os_text.lower()))

    def build(self) -> Hardware:
        slots = self._slots()
        root = self._root()
        devices = etree.SubElement(root, "devices")
        for slot in sorted(slots, key=lambda each: (each.device != "disk", each.target)):
            self._drive(devices, slot)
        self._controllers(devices, slots)
        self._nics(devices)
        self._usb(devices)
        self._others(devices)
        self._characters(devices)
        self._video(devices)
        self._ignored()
        self._hints()
        first = min((slot for slot in slots if slot.device == "disk"), key=lambda slot: slot.order, default=None)
        drives = tuple(
            Drive(slot.target, slot.device, slot.file, slot.disk, slot.item, slot is first)
            for slot in slots
            if slot.device == "disk" or slot.file
        )
        return Hardware(self.name, self.uuid, _xml.text(root), drives, self.report, self.efi)

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

    def _name(self) -> str:
        name = self.options.name or " ".join(self.system.name.split(" ")).strip()
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
            or ""
        ).lower()
        found = said.startswith(("efi", "uefi"))
        if (
            ovf.setting(self.system.config, "bootoptions.efisecurebootenabled").lower() == "true"
            or self.machine_.secure_boot
        ):
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
        root = etree.Element("domain", {"type": "kvm" if self.options.kvm else "qemu"})
        _add(root, "name", self.name)
        _add(root, "uuid", self.uuid)
        known = mapping.SYSTEMS.get(self.system.os_type.lower())
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
        if self.windows and self.options.kvm:
            hyperv = _add(features, "hyperv", mode="custom")
            for name in ("relaxed", "vapic"):
                _add(hyperv, name, state="on")
            _add(hyperv, "spinlocks", state="on", retries="8191")
        if self.secure_boot:
            _add(features, "smm", state="on")
        cpu = (
            _add(root, "cpu", mode="host-model", check="partial")
            if self.options.kvm
            else _add(root, "cpu", mode="maximum")
        )
        if cores:
            _add(cpu, "topology", sockets=str(sockets), cores=str(cores), threads="1")
        clock = _add(root, "clock", offset="localtime" if self.windows or self.machine_.localtime else "utc")
        _add(clock, "timer", name="rtc", tickpolicy="catchup")
        _add(clock, "timer", name="pit", tickpolicy="delay")
        _add(clock, "timer", name="hpet", present="no")
        if self.windows and self.options.kvm:
            _add(clock, "timer", name="hypervclock", present="yes")
        for name, action in (("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")):
            _add(root, name, action)
        if not self.options.kvm:
            self.report.warn(
                Code.OTHER_HARDWARE,
                "this host has no KVM: the VM is one of type qemu, which is slow; change it where there is KVM"
            )
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

    # drives

    def _slots(self) -> list[_Slot]:
        slots = []
        floppies = 0
        for item in self.items:
            if item.type in ovf.DISKS:
                slot = self._disk_slot(item)
                slots += [slot] if slot else []
            elif item.type in (ovf.CD, ovf.DVD):
                slots.append(self._cd_slot(item))
            elif item.type == ovf.FLOPPY:
                floppies += 1
                self._no_medium(item, "floppy")
                if floppies <= 2:
                    slots.append(_Slot(item, "floppy", "fdc", (9, 0, 0, 0, item.position), str(item)))
        disks = sorted((slot for slot in slots if slot.device == "disk"), key=lambda slot: slot.key)
        for first, second in zip(disks, disks[1:]):
            if first.key[:4] == second.key[:4] and first.item.parent:
                self.report.warn(
                    Code.ODD_PACKAGE,
                    f"{first.item} and {second.item} have the same place on their controller; both are kept"
                )
        used = {slot.disk.id for slot in slots if slot.disk.id}
        for left in (disk for disk in self.described.disks if disk not in used):
            if len(self.described.systems) == 1:
                self.report.warn(Code.ODD_PACKAGE, f"the disk {left} belongs to no item of the hardware and is left out")
        ordered = [*disks, *(slot for slot in slots if slot.device != "disk")]
        self._name_targets(ordered)
        self._boot_order(ordered)
        return ordered

    def _controller(self, item: ovf.Item) -> tuple[ovf.Item | None, mapping.Rule | None]:
        parent = self.by_id.get(item.parent)
        if parent is None or parent.type not in ovf.CONTROLLERS:
            return None, None
        return parent, mapping.rule(mapping.CONTROLLERS, parent.type, parent.subtypes)

    def _on(self, rule: mapping.Rule) -> str:
        return rule.pc if self.machine == "pc" else rule.q35

    def _key(
        self, item: ovf.Item, controller: ovf.Item | None, rule: mapping.Rule | None
    ) -> tuple[int, int, int, int, int]:
        number = item.number_on_parent
        place = item.position if number is None else number
        if controller is None or rule is None:
            return (4, 0, 0, place, item.position)
        address = units.number(controller.address)
        return (
            rule.rank,
            controller.position if address is None else address,
            controller.position,
            place,
            item.position,
        )

    def _disk_slot(self, item: ovf.Item) -> _Slot | None:
        disk = self._disk_of(item)
        if disk is None:
            self.report.ignore(str(item), "it names no disk and has no size")
            self.report.warn(Code.ODD_PACKAGE, f"{item} names no disk and has no size; it is left out")
            return None
        if disk.parent:
            raise RefusedError(
                self.what,
                f"the disk {disk.id} stands on the disk {disk.parent}",
                "Export the VM without snapshots or linked clones.",
            )
        controller, rule = self._controller(item)
        kind = str(controller.subtypes[0] if controller and controller.subtypes else controller or "no controller")
        note = ""
        if self.options.disk_bus:
            bus, note = self.options.disk_bus, "as the option disk_bus says"
        elif rule is not None:
            bus, note = self._on(rule), rule.note
            if rule.warning:
                self.report.warn(Code.OTHER_HARDWARE, rule.warning)
        elif disk.interface.lower() in mapping.OVIRT_BUSES:
            bus = mapping.OVIRT_BUSES[disk.interface.lower()][self.machine != "pc"]
            kind = disk.interface
        else:
            bus, note = "sata", "it names no controller that is known"
        return _Slot(
            item,
            "disk",
            bus,
            self._key(item, controller, rule),
            f"{item} on {kind}",
            note,
            disk,
            disk.file,
            family=self._family(controller),
        )

    @staticmethod
    def _family(controller: ovf.Item | None) -> str:
        if controller is None:
            return ""
        kind = {ovf.IDE: "ide", ovf.SCSI: "scsi"}.get(
            controller.type, "nvme" if "nvme" in "".join(controller.subtypes) else "sata"
        )
        return f"{kind}{units.number(controller.address) or 0}"

    def _disk_of(self, item: ovf.Item) -> ovf.Disk | None:
        for resource in item.resources:
            kind, id_ = _reference(resource)
            if kind == "file":
                if id_ not in self.described.files:
                    raise ArchiveError(self.what, f"{item} names the file {id_!r}, which the descriptor does not have")
                return ovf.Disk("", id_)
            disk = self.described.disks.get(id_) or self.described.disks.get(id_.rpartition("/")[2])
            if disk is None:
                raise ArchiveError(self.what, f"{item} names the disk {id_!r}, which the descriptor does not have")
            return self._with_file(disk, item)
        size = ovf.quantity_bytes(item, self.what)
        return None if not size else ovf.Disk("", "", size)

    def _with_file(self, disk: ovf.Disk, item: ovf.Item) -> ovf.Disk:
        if not disk.file:
            if not disk.capacity_bytes:
                raise ArchiveError(self.what, f"the disk {disk.id} of {item} has neither a file nor a capacity")
            return disk
        files = self.described.files
        name = next((each for each in (disk.file, disk.file.rpartition("/")[2]) if each in files), "")
        if not name:
            name = next((id_ for id_, file in files.items() if file.href == disk.file), "")
        if not name:
            raise ArchiveError(
                self.what, f"the disk {disk.id} names the file {disk.file!r}, which the descriptor does not have"
            )
        return replace(disk, file=name)

    def _cd_slot(self, item: ovf.Item) -> _Slot:
        controller, rule = self._controller(item)
        file = ""
        for resource in item.resources:
            kind, id_ = _reference(resource)
            if kind == "file" and id_ in self.described.files:
                file = id_
            elif kind == "disk" and id_ in self.described.disks and self.described.disks[id_].file:
                file = self._with_file(self.described.disks[id_], item).file
        if not file:
            self._no_medium(item, "CD drive")
        bus = "ide" if self.machine == "pc" and rule is not None and rule.pc == "ide" else "sata"
        return _Slot(item, "cdrom", bus, self._key(item, controller, rule), str(item), file=file)

    def _no_medium(self, item: ovf.Item, what: str) -> None:
        named = [each for each in item.resources if each]
        if (
            named
            or any("passthrough" in subtype or "remote" in subtype for subtype in item.subtypes)
            or ovf.setting(item.config, "backing")
        ):
            self.report.ignore(f"medium of {item}", "it is not in the package")
            self.report.replace(str(item), f"an empty {what}")

    def _name_targets(self, slots: Sequence[_Slot]) -> None:
        for slot in [each for each in slots if each.bus == "ide"][_IDE_DRIVES:]:
            slot.bus, slot.note = "sata", f"an IDE controller takes {_IDE_DRIVES} drives"
        # CDs keep the last place of an IDE channel free for nobody: names only have to be unique and in order
        counts: dict[str, int] = {}
        for slot in slots:
            prefix = "fd" if slot.bus == "fdc" else _PREFIXES.get(slot.bus, "sd")
            slot.target = prefix + _letters(counts.get(prefix, 0))
            counts[prefix] = counts.get(prefix, 0) + 1
            if slot.device == "disk":
                self.report.replace(slot.label, f"{slot.bus} disk {slot.target}", slot.note)

    def _boot_order(self, slots: Sequence[_Slot]) -> None:
        """What the descriptor names, then its order of kinds, then disks and CDs. Firmware passes over empty drives."""
        disks = [slot for slot in slots if slot.device == "disk"]
        cds = [slot for slot in slots if slot.device == "cdrom"]
        named = {id_ for id_, _kind in self.system.boot}
        order = [slot for slot in (*disks, *cds) if slot.item.id in named]
        for match in _HDD.finditer(ovf.setting(self.system.extra, "bios.hddorder").lower()):
            place = (match[1] + match[2], int(match[3]))
            order += [disk for disk in disks if (disk.family, disk.item.number_on_parent) == place]
        kinds = {"harddisk": disks, "hdd": disks, "dvd": cds, "cdrom": cds}
        for kind in self.machine_.boot or re.split(r"[,\s]+", ovf.setting(self.system.extra, "bios.bootorder")):
            order += kinds.get(kind.lower(), [])
        for number, slot in enumerate(dict.fromkeys([*order, *disks, *cds]), 1):
            slot.order = number

    def _drive(self, devices: etree._Element, slot: _Slot) -> None:
        element = _add(devices, "disk", type="file", device=slot.device)
        _add(element, "driver", name="qemu", type="qcow2" if slot.device == "disk" else "raw")
        _add(element, "target", dev=slot.target, bus=slot.bus)
        if slot.device == "cdrom":
            _add(element, "readonly")
        if slot.device == "disk":
            known = f"{self.uuid}\n{slot.disk.id or slot.item.id or slot.item.position}"
            _add(element, "serial", hashlib.sha256(known.encode()).hexdigest()[:20])
        if slot.order:
            _add(element, "boot", order=str(slot.order))

    def _controllers(self, devices: etree._Element, slots: Sequence[_Slot]) -> None:
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
        items = [item for item in self.items if item.type == ovf.NIC]
        for item in sorted(
            items, key=lambda each: (each.number_on_parent is None, each.number_on_parent or 0, each.position)
        ):
            subtypes = tuple(mapping.OVIRT_NICS.get(each, each) for each in item.subtypes)
            rule = mapping.rule(mapping.NICS, ovf.NIC, subtypes)
            if rule is None:
                raise AssertionError("there is a rule for every network card")
            model = self.options.nic_model or self._on(rule)
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
        items = [item for item in self.items if item.type == ovf.USB and item.fields.get("UsbPolicy", "") != "Disabled"]
        models = []
        for item in items:
            rule = mapping.rule(mapping.USB_CONTROLLERS, ovf.USB, item.subtypes)
            if rule is not None and self._on(rule) not in models:
                models.append(self._on(rule))
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
            becomes = "sound" if item.type == ovf.SOUND else self._on(rule) if rule else ""
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
            _add(devices, "sound", model=self._on(rule))
            self.report.replace(str(item), f"sound card {self._on(rule)}", rule.note)

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

    # the report

    def _ignored(self) -> None:
        known = {
            ovf.CPU, ovf.MEMORY, ovf.NIC, ovf.FLOPPY, ovf.CD, ovf.DVD, *ovf.DISKS, *ovf.CONTROLLERS, ovf.SERIAL, ovf.PARALLEL,
            ovf.USB, ovf.GRAPHICS, ovf.SOUND, ovf.OTHER,
        }  # fmt: skip
        for item in self.items:
            if item.type not in known:
                self.report.ignore(str(item), f"resource type {item.type} has no counterpart")
            for name in ("Reservation", "Limit", "Weight"):
                if (units.number(item.fields.get(name, "")) or 0) > 0 and item.type in (ovf.CPU, ovf.MEMORY):
                    self.report.ignore(f"{name.lower()} of {item}", "reservations and shares are the host's to give")
        for prefix, settings in (("vmw:Config", self.system.config), ("vmw:ExtraConfig", self.system.extra)):
            for key in settings:
                if key.lower() not in mapping.UNDERSTOOD:
                    self.report.ignore(f"{prefix} {key}", mapping.why_ignored(key.lower()))
        for key in dict.fromkeys(
            key for item in self.items for key in item.config if key.lower() not in mapping.UNDERSTOOD
        ):
            self.report.ignore(f"vmw:Config {key} of devices", mapping.why_ignored(key.lower()))
        for section in self.described.sections:
            self.report.ignore(
                section, "it is for people or for other products; scripts and properties of a package are not used"
            )

    def _hints(self) -> None:
        used = {self.described.disks[id_].file for id_ in self.described.disks} | {
            _reference(each)[1] for item in self.items for each in item.resources
        }
        for id_, file in self.described.files.items():
            if file.href.lower().endswith(".nvram"):
                self.report.ignore(f"file {file.href}", "VMware's firmware settings cannot be read by others")
                if self.efi:
                    self.report.warn(
                        Code.OTHER_HARDWARE,
                        "the boot entries of the original's firmware are not taken over; the firmware here looks for the "
                        "fallback loader EFI/BOOT/BOOTX64.EFI"
                    )
            elif id_ not in used and len(self.described.systems) == 1:
                self.report.ignore(f"file {file.href}", "nothing in the hardware section needs it")


def _add(parent: etree._Element, tag: str, text: str = "", **attributes: str) -> etree._Element:
    element = etree.SubElement(parent, tag, attributes)
    if text:
        element.text = text
    return element


def _reference(resource: str) -> tuple[str, str]:
    """``ovf:/disk/ID`` in all its notations: the kind (disk, file) and the id."""
    text = resource.strip()
    text = text[4:] if text.lower().startswith("ovf:") else text
    match = re.fullmatch(r"/+(disk|file)/(.+)", text)
    return (match[1], match[2]) if match else ("disk", text)


def _letters(index: int) -> str:
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(97 + rest) + letters
    return letters


def _mac(text: str) -> str:
    """A fixed address as libvirt writes it; "" for what is none, or that of a group or of nobody."""
    plain = text.strip().lower()
    digits = re.sub(r"[:-]", "", plain)
    if not _MAC.fullmatch(plain) or len(digits) != 12 or int(digits[1], 16) & 1 or not int(digits, 16):
        return ""
    return ":".join(digits[index : index + 2] for index in range(0, 12, 2))


def lines(report: Report) -> Iterator[str]:
    """The report as text, a line for each row."""
    for row in report.replaced:
        note = f" ({row['note']})" if row["note"] else ""
        yield f"{row['from']} -> {row['to']}{note}"
    for row in report.ignored:
        yield f"{row['item']}: ignored, {row['note']}"
