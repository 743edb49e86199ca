# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a descriptor (.ovf) says about one of its virtual systems, as plain values. Pure; trusts nothing.

Elements and attributes are taken by their local names: products write OVF 0.9, 1.x and 2.x namespaces, prefixed or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, HostileError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import units

MAX_DEVICES = 256
MAX_TEXT = 4096
CPU, MEMORY, OTHER = 3, 4, 1
IDE, SCSI, STORAGE = 5, 6, 20
NIC, FLOPPY, CD, DVD, DISK, STORAGE_EXTENT, LOGICAL_DISK = 10, 14, 15, 16, 17, 19, 31
SERIAL, PARALLEL, USB, GRAPHICS, SOUND = 21, 22, 23, 24, 35
DISKS = (DISK, STORAGE_EXTENT, LOGICAL_DISK)
CONTROLLERS = (IDE, SCSI, STORAGE)

_XSI_TYPE = "{http://www.w3.org/2001/XMLSchema-instance}type"
_ENVELOPES = re.compile(
    r"(http://schemas\.dmtf\.org/ovf/envelope/\d+/?|http://www\.vmware\.com/schema/ovf/\d+/envelope|)"
)
_PROPERTY = re.compile(r"\$\{([^${}]{1,256})\}")
_DECLARATION = re.compile(r"^\s*<\?xml[^>]*\?>")
_ENCODING = re.compile(rb"""^\s*<\?xml[^>]{1,99}encoding\s*=\s*["']([A-Za-z0-9._-]{1,40})["']""")


@dataclass(frozen=True)
class File:
    """A row of the references. `size_bytes` None: not told; `chunk_bytes` 0: one piece."""

    id: str
    href: str
    size_bytes: int | None = None
    compression: str = ""
    chunk_bytes: int = 0


@dataclass(frozen=True)
class DiskRow:
    """A row of the disk section. `file` "": an empty disk; `capacity_bytes` None: not told; `interface`: oVirt's bus."""

    id: str
    file: str = ""
    capacity_bytes: int | None = None
    format: str = ""
    parent: str = ""
    interface: str = ""


@dataclass(frozen=True)
class Item:
    """A row of the hardware section. `position` counts the rows; `subtypes`: in lower case; `quantity`: as it is written."""

    id: str
    type: int
    position: int
    subtypes: tuple[str, ...] = ()
    name: str = ""
    address: str = ""
    address_on_parent: str = ""
    parent: str = ""
    resources: tuple[str, ...] = ()
    connections: tuple[str, ...] = ()
    quantity: str = ""
    unit: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name or (f"item {self.id}" if self.id else f"item number {self.position + 1}")

    @property
    def number_on_parent(self) -> int | None:
        """Its place on its controller."""
        return units.number(self.address_on_parent)


@dataclass(frozen=True)
class Machine:
    """What VirtualBox adds in an element of its own."""

    firmware: str = ""
    boot: tuple[str, ...] = ()
    video_bytes: int = 0
    accelerate_3d: bool = False
    memory_bytes: int = 0
    cpus: int = 0
    secure_boot: bool = False
    tpm: str = ""
    localtime: bool = False


@dataclass(frozen=True)
class System:
    """One virtual system, with the hardware of one configuration.

    `config` and `extra`: vmw:Config and vmw:ExtraConfig of the hardware section (see `setting`). `boot`: item id and kind.
    `firmware`, `secure_boot` and `machine_type` ("" for not told): as oVirt and XenServer have them.
    """

    id: str
    name: str
    items: tuple[Item, ...]
    family: str = ""
    os_id: str = ""
    os_type: str = ""
    os_text: str = ""
    architecture: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)
    machine: Machine | None = None
    boot: tuple[tuple[str, str], ...] = ()
    firmware: str = ""
    secure_boot: bool = False
    machine_type: str = ""


@dataclass(frozen=True)
class Descriptor:
    """What is used of a descriptor. `configuration`: the chosen one, "" where there is none. `sections`: the ignored ones."""

    system: System
    systems: tuple[str, ...]
    files: Mapping[str, File]
    disks: Mapping[str, DiskRow]
    networks: tuple[str, ...]
    configuration: str = ""
    configurations: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    warnings: tuple[Notice, ...] = ()


def parse(data: bytes, what: str, *, system: str = "", configuration: str = "") -> Descriptor:
    """The chosen system (by id or name; "": the only one) in the chosen configuration ("": the default).

    Raises HostileError for XML that no product writes, ArchiveError for what is no descriptor or contradicts itself, RefusedError
    where there is a choice to make.
    """
    return _Parser(data, what).descriptor(system, configuration)


def systems(data: bytes, what: str) -> list[str]:
    """Ids of its virtual systems. Raises as `parse`."""
    parser = _Parser(data, what)
    return [attribute(each, "id") or _text(each, "Name") for each in parser.systems(parser.root, 0)]


def local(element: etree._Element) -> str:
    """An element's name without its namespace; sections of OVF 0.9 by the type that they name."""
    name = _plain(element.tag) if isinstance(element.tag, str) else ""
    if name in ("Section", "Content"):
        kind = element.get(_XSI_TYPE) or ""
        return kind.rpartition(":")[2].removesuffix("_Type") or name
    return name


def attribute(element: etree._Element, name: str) -> str:
    """An attribute by its local name; "" without it."""
    for key, value in element.attrib.items():
        if _plain(str(key)) == name:
            return str(value).strip()
    return ""


def _plain(name: str) -> str:
    """Without namespace, and without a prefix that nobody has declared."""
    return name.rpartition("}")[2].rpartition(":")[2]


def _children(element: etree._Element, *names: str) -> list[etree._Element]:
    return [child for child in element if local(child) in names]


def _text(element: etree._Element, name: str) -> str:
    return next(((child.text or "").strip() for child in _children(element, name)), "")[:MAX_TEXT]


class _Parser:
    def __init__(self, data: bytes, what: str) -> None:
        self.what = what
        self.warnings: list[str] = []
        self.root = self._envelope(data)
        self.properties: dict[str, str] = {}

    def _envelope(self, data: bytes) -> etree._Element:
        root = self._parsed(data)
        name, namespace = local(root), str(root.tag).rpartition("}")[0].lstrip("{")
        if name != "Envelope" or not _ENVELOPES.fullmatch(namespace):
            raise ArchiveError(
                self.what,
                f"it is no OVF descriptor, its root element is <{name}> of {namespace or 'no namespace'}",
                "A descriptor is an <Envelope>; export the VM as OVF or OVA.",
            )
        return root

    def _parsed(self, data: bytes) -> etree._Element:
        try:
            root = _xml.parse(data, self.what, namespaces=False)
        except HostileError as error:
            if "not well-formed" not in error.why:
                raise
            root = self._in_another_encoding(data, error)
        etree.strip_elements(root, etree.Comment, with_tail=False)  # one in a value would cut it
        return root

    def _in_another_encoding(self, data: bytes, error: HostileError) -> etree._Element:
        """For encodings that the XML parsers do not know, and those that a descriptor declares and is not written in."""
        declared = _ENCODING.match(data)
        names = [declared[1].decode()] if declared else []
        for name in (*names, "utf-8-sig", "cp1252"):
            try:
                text = str(data, name, "strict" if name != "cp1252" else "replace")
                root = _xml.parse(_DECLARATION.sub("", text, count=1).encode(), self.what, namespaces=False)
            except (HostileError, LookupError, ValueError):
                continue
            if name not in names:
                self.warnings.append("the descriptor is not written in the encoding that it declares")
            return root
        raise error

    def descriptor(self, system: str, configuration: str) -> Descriptor:
        systems = list(self.systems(self.root, 0))
        chosen = self._chosen_system(systems, system)
        if any(_children(section, "EncryptedData") for section in _children(self.root, "EncryptionSection")):
            raise RefusedError(self.what, "the package is encrypted", "Export the VM without encryption.")
        options = [
            e
            for section in _children(self.root, "DeploymentOptionSection")
            for e in _children(section, "Configuration")
        ]
        names = tuple(attribute(each, "id") for each in options)
        if configuration and configuration not in names:
            known = f"It has {', '.join(names)}." if names else "It has none."
            raise RefusedError(self.what, f"it has no configuration {configuration!r}", known)
        default = next((attribute(e, "id") for e in options if attribute(e, "default") in ("true", "1")), "")
        picked = configuration or default or (names[0] if names else "")
        for element in self._sections_above(chosen):
            self._add_properties(element, picked)
        known_ids = tuple(attribute(each, "id") or _text(each, "Name") for each in systems)
        disks = self._disks()
        return Descriptor(
            system=self._system(chosen, picked),
            systems=known_ids,
            files=self._files(),
            disks=disks,
            networks=self._networks(),
            configuration=picked,
            configurations=names,
            sections=tuple(self._ignored_sections(chosen)),
            warnings=tuple(Notice(Code.ODD_PACKAGE, text) for text in self.warnings),
        )

    # which system

    def systems(self, element: etree._Element, depth: int) -> Iterator[etree._Element]:
        if depth > 16:
            raise HostileError(self.what, "its collections are nested more than 16 deep")
        for child in element:
            if local(child) == "VirtualSystem":
                yield child
            elif local(child) == "VirtualSystemCollection":
                yield from self.systems(child, depth + 1)

    def _chosen_system(self, systems: Sequence[etree._Element], wanted: str) -> etree._Element:
        if not systems:
            raise ArchiveError(self.what, "it describes no virtual system")
        names = [(attribute(each, "id"), _text(each, "Name")) for each in systems]
        told = ", ".join(id_ if not name or name == id_ else f"{id_} ({name})" for id_, name in names[:50])
        if not wanted:
            if len(systems) > 1:
                raise RefusedError(
                    self.what,
                    f"it describes {len(systems)} virtual systems: {told}",
                    "Choose one with the option 'system'.",
                )
            return systems[0]
        for by in (0, 1):
            found = [each for each, known in zip(systems, names) if known[by] == wanted]
            if len(found) == 1:
                return found[0]
            if found:
                raise RefusedError(
                    self.what, f"{len(found)} of its virtual systems are called {wanted!r}", f"It has {told}."
                )
        raise RefusedError(self.what, f"it has no virtual system {wanted!r}", f"It has {told}.")

    def _sections_above(self, system: etree._Element) -> list[etree._Element]:
        """The system and everything that it stands in, outermost first."""
        return [*reversed(list(system.iterancestors())), system]

    def _ignored_sections(self, system: etree._Element) -> Iterator[str]:
        used = {"VirtualHardwareSection", "OperatingSystemSection", "DiskSection", "NetworkSection", "BootOrderSection",
                "DeploymentOptionSection", "AnnotationSection"}  # fmt: skip
        seen = set()
        for above in self._sections_above(system):
            for child in above:
                name = local(child)
                if name.endswith("Section") and name not in used and name not in seen:
                    seen.add(name)
                    yield name

    # values

    def _add_properties(self, element: etree._Element, configuration: str) -> None:
        for section in _children(element, "ProductSection"):
            prefix, suffix = attribute(section, "class"), attribute(section, "instance")
            for each in _children(section, "Property"):
                value = attribute(each, "value")
                for other in _children(each, "Value"):
                    if attribute(other, "configuration") == configuration and configuration:
                        value = attribute(other, "value")
                key = ".".join(filter(None, (prefix, attribute(each, "key"), suffix)))
                self.properties[key] = value
                self.properties.setdefault(attribute(each, "key"), value)

    def _value(self, text: str, of: str) -> str:
        """A text with its property put in. Raises ArchiveError where the descriptor gives it no value."""
        match = _PROPERTY.fullmatch(text.strip())
        if match is None:
            return text
        value = self.properties.get(match.group(1), "")
        if not value:
            raise ArchiveError(
                self.what,
                f"{of} is the property {match.group(1)}, which has no value in it",
                "Fill it in, or export the VM again with values.",
            )
        return value

    def _number(self, text: str, of: str) -> int:
        found = units.number(self._value(text, of))
        if found is None:
            raise ArchiveError(self.what, f"{of} is no number: {text[:60]!r}")
        return found

    def _bytes(self, number: int, unit: str, of: str) -> int:
        factor = units.factor(unit) if unit else 1
        if factor is None:
            raise ArchiveError(self.what, f"{of} is given in an unknown unit: {unit[:60]!r}")
        if number * factor > units.MAX_NUMBER:
            raise ArchiveError(self.what, f"{of} is absurd: {number} * {factor} bytes")
        return number * factor

    # files, disks, networks

    def _files(self) -> dict[str, File]:
        found: dict[str, File] = {}
        for each in (e for section in _children(self.root, "References") for e in _children(section, "File")):
            id_, href = attribute(each, "id"), attribute(each, "href")
            if not href:
                raise ArchiveError(self.what, f"the file {id_!r} has no href")
            if id_ in found:
                raise HostileError(self.what, f"two of its files have the id {id_!r}")
            size = attribute(each, "size")
            number = units.number(size)
            if size and number is None:
                self.warnings.append(f"the size of {href} is no number ({size[:40]!r}); the file's own size counts")
            chunk = attribute(each, "chunkSize")
            found[id_] = File(
                id_,
                href,
                number,
                attribute(each, "compression").strip().lower(),
                self._number(chunk, f"the chunk size of {href}") if chunk else 0,
            )
        return found

    def _disks(self) -> dict[str, DiskRow]:
        found: dict[str, DiskRow] = {}
        for each in (e for section in _children(self.root, "DiskSection") for e in _children(section, "Disk")):
            id_ = attribute(each, "diskId")
            if id_ in found:
                raise HostileError(self.what, f"two of its disks have the id {id_!r}")
            capacity, unit = attribute(each, "capacity"), attribute(each, "capacityAllocationUnits")
            of = f"the capacity of the disk {id_}"
            if capacity and not unit and self._is_of_ovirt():
                unit = "byte * 2^30" if units.number(capacity) is not None and int(capacity) < 2**20 else ""
            found[id_] = DiskRow(
                id_,
                attribute(each, "fileRef"),
                self._bytes(self._number(capacity, of), unit, of) if capacity else None,
                attribute(each, "volume-format") or attribute(each, "format"),  # oVirt's format is always the same
                attribute(each, "parentRef"),
                attribute(each, "disk-interface"),
            )
        return found

    def _is_of_ovirt(self) -> bool:
        return "http://www.ovirt.org/ovf" in self.root.nsmap.values()

    def _networks(self) -> tuple[str, ...]:
        sections = _children(self.root, "NetworkSection")
        return tuple(attribute(e, "name")[:MAX_TEXT] for section in sections for e in _children(section, "Network"))

    # the system

    def _system(self, element: etree._Element, configuration: str) -> System:
        sections = [
            each
            for each in _children(element, "VirtualHardwareSection")
            if _applies(attribute(each, "configuration"), configuration)
        ]
        if not sections:
            raise ArchiveError(self.what, "the virtual system has no hardware section")
        hardware = max(sections, key=_fitness)  # the first of those that fit best
        if len(sections) > 1:
            self.warnings.append(
                f"the system has {len(sections)} hardware sections; the one for {_family(hardware) or 'any host'} was taken"
            )
        os_section = next(iter(_children(element, "OperatingSystemSection")), None)
        firmware, secure_boot, machine_type = _platform(element, hardware)
        return System(
            id=attribute(element, "id"),
            name=_text(element, "Name") or attribute(element, "id") or _identifier(hardware),
            items=self._items(hardware, configuration),
            family=_family(hardware),
            os_id="" if os_section is None else attribute(os_section, "id"),
            os_type="" if os_section is None else attribute(os_section, "osType") or _text(os_section, "OSType"),
            os_text="" if os_section is None else _text(os_section, "Description"),
            architecture="" if os_section is None else _text(os_section, "architecture"),
            config=_settings(hardware, "Config"),
            extra={**_settings(element, "ExtraConfig"), **_settings(hardware, "ExtraConfig")},
            machine=self._machine(element),
            boot=tuple(
                (attribute(each, "instanceId"), attribute(each, "type"))
                for each in _children(element, "BootOrderSection")
            ),
            firmware=firmware,
            secure_boot=secure_boot,
            machine_type=machine_type,
        )

    def _items(self, hardware: etree._Element, configuration: str) -> tuple[Item, ...]:
        found: dict[str, tuple[Item, bool]] = {}
        for position, element in enumerate(_children(hardware, "Item", "StorageItem", "EthernetPortItem")):
            wanted = attribute(element, "configuration")
            if not _applies(wanted, configuration) or attribute(element, "bound") in ("min", "max"):
                continue
            item = self._item(element, position)
            key = item.id or f"\0{position}"
            known, special = found.get(key, (None, False))
            if known is not None and special == bool(wanted):
                raise HostileError(
                    self.what,
                    f"two of its items have the InstanceID {item.id!r}",
                    "Which of them others refer to cannot be known. Export the VM again, or give each its own InstanceID.",
                )
            if known is None:
                found[key] = (item, bool(wanted))
            elif wanted:  # what the configuration says wins over what holds for all
                found[key] = (_over(known, item), True)
            else:
                found[key] = (_over(item, known), True)
        if len(found) > MAX_DEVICES:
            raise HostileError(self.what, f"the system has {len(found)} items of hardware, {MAX_DEVICES} are allowed")
        items = tuple(item for item, _special in found.values())
        self._check_parents(items)
        return items

    def _item(self, element: etree._Element, position: int) -> Item:
        fields: dict[str, str] = {}
        lists: dict[str, list[str]] = {"HostResource": [], "Connection": []}
        for child in element:
            name, text = local(child), (child.text or "").strip()[:MAX_TEXT]
            if text and name in lists:
                lists[name].append(text)
            if text or name not in fields:
                fields.setdefault(name, text)
        kind = fields.get("ResourceType", "")
        number = units.number(kind)
        id_ = fields.get("InstanceID") or fields.get("InstanceId") or ""
        if number is None and kind:
            raise ArchiveError(
                self.what, f"the resource type of item {id_ or position + 1} is no number: {kind[:40]!r}"
            )
        subtype = re.split(r"[\s,]+", fields.get("ResourceSubType", "").lower())
        return Item(
            id=id_,
            type=OTHER if number is None else number,
            position=position,
            subtypes=tuple(filter(None, subtype)),
            name=fields.get("ElementName") or fields.get("Caption") or fields.get("Description") or "",
            address=fields.get("Address") or fields.get("MACAddress") or "",  # the latter is oVirt's
            address_on_parent=fields.get("AddressOnParent", ""),
            parent=fields.get("Parent", ""),
            resources=tuple(lists["HostResource"]),
            connections=tuple(lists["Connection"]),
            quantity=self._value(fields.get("VirtualQuantity", ""), f"the quantity of item {id_}"),
            unit=fields.get("AllocationUnits", ""),
            config=_settings(element, "Config"),
            fields=fields,
        )

    def _check_parents(self, items: Iterable[Item]) -> None:
        parents = {item.id: item.parent for item in items if item.id}
        checked: set[str] = set()
        for begin in parents:
            way: set[str] = set()
            here = begin
            while here in parents and parents[here] and here not in checked:
                if here in way:
                    raise HostileError(self.what, f"the item {here} is its own parent, by way of others")
                way.add(here)
                here = parents[here]
            checked |= way

    def _machine(self, system: etree._Element) -> Machine | None:
        machine = next(iter(_children(system, "Machine")), None)
        hardware = next(iter(_children(machine, "Hardware")), None) if machine is not None else None
        if hardware is None:
            return None
        parts = {local(each): each for each in hardware.iter() if isinstance(each.tag, str)}

        def value(part: str, name: str) -> str:
            return attribute(parts[part], name) if part in parts else ""

        orders = [
            (units.number(attribute(e, "position")) or 99, attribute(e, "device"))
            for e in hardware.iter()
            if local(e) == "Order"
        ]
        mebibytes = units.number(value("Memory", "RAMSize")) or 0
        return Machine(
            firmware=value("Firmware", "type") or value("BIOS", "firmware"),
            boot=tuple(device for _position, device in sorted(orders) if device not in ("None", "")),
            video_bytes=min(units.number(value("Display", "VRAMSize")) or 0, 2**20) * 2**20,
            accelerate_3d=value("Display", "accelerate3D") == "true",
            memory_bytes=min(mebibytes, 2**30) * 2**20,
            cpus=min(units.number(value("CPU", "count")) or 0, 2**20),
            secure_boot=value("SecureBoot", "enabled") == "true",
            tpm=value("TrustedPlatformModule", "type"),
            localtime=value("RTC", "localOrUTC") == "local",
        )


def memory_bytes(item: Item, what: str) -> tuple[int, str]:
    """Size of a memory item, and a warning ("" for none). Raises ArchiveError for numbers and units that make no sense."""
    quantity = units.number(item.quantity)
    if quantity is None:
        raise ArchiveError(what, f"the memory size is no number: {item.quantity[:60]!r}")
    factor = units.factor(item.unit) if item.unit else 1
    if factor is None:
        raise ArchiveError(what, f"the memory size is given in an unknown unit: {item.unit[:60]!r}")
    if not item.unit and quantity < 2**20:
        return (
            quantity * 2**20,
            f"the memory size has no unit; {quantity} bytes cannot be meant, {quantity} MiB were taken",
        )
    return quantity * factor, ""


def quantity_bytes(item: Item, what: str) -> int | None:
    """Size of a disk item that brings its own capacity; None where it has none. Raises ArchiveError."""
    if not item.quantity:
        return None
    reserved = units.number(item.fields.get("Reservation", "")) or 0
    if reserved and item.quantity == "1":  # OVF 2.0: a count of extents, whose size is what is reserved
        item = replace(item, quantity=str(reserved))
    quantity, factor = units.number(item.quantity), units.factor(item.unit) if item.unit else None
    if quantity is None or factor is None or quantity * factor > units.MAX_NUMBER:
        return None if not item.unit else _absurd(item, what)
    return quantity * factor


def _absurd(item: Item, what: str) -> int:
    raise ArchiveError(what, f"the size of {item} makes no sense: {item.quantity[:40]!r} {item.unit[:40]!r}")


def _applies(wanted: str, configuration: str) -> bool:
    return not wanted or configuration in wanted.split()


def _over(base: Item, special: Item) -> Item:
    """An item with what another one of the same id says instead."""
    changes = {
        name: getattr(special, name)
        for name in ("type", "subtypes", "name", "address", "address_on_parent", "parent", "resources", "connections",
                     "quantity", "unit")
        if getattr(special, name) and not (name == "type" and "ResourceType" not in special.fields)
    }  # fmt: skip
    return replace(base, **changes, config={**base.config, **special.config}, fields={**base.fields, **special.fields})


def _family(hardware: etree._Element) -> str:
    system = next(iter(_children(hardware, "System")), None)
    return "" if system is None else _text(system, "VirtualSystemType")


def _identifier(hardware: etree._Element) -> str:
    system = next(iter(_children(hardware, "System")), None)
    return "" if system is None else _text(system, "VirtualSystemIdentifier")


def _fitness(hardware: etree._Element) -> int:
    """How well a hardware section fits a KVM host, by the families that it names."""
    families = [each.lower() for each in re.split(r"[\s,]+", _family(hardware)) if each]
    ranks = (("kvm", 4), ("qemu", 4), ("vmx-", 3), ("virtualbox", 2))
    return max(
        (rank for family in families for name, rank in ranks if family.startswith(name)), default=0 if families else 1
    )


#: oVirt's numbers of machine types with their firmware: firmware, secure boot, machine type.
_OVIRT_BIOS_TYPES = {
    "1": ("bios", False, "pc"),
    "2": ("bios", False, "q35"),
    "3": ("efi", False, "q35"),
    "4": ("efi", True, "q35"),
}


def _platform(system: etree._Element, hardware: etree._Element) -> tuple[str, bool, str]:
    """Firmware, secure boot and machine type, where oVirt and XenServer tell them."""
    ovirt = _OVIRT_BIOS_TYPES.get(_text(system, "BiosType"))
    if ovirt:
        return ovirt
    xen = {
        attribute(each, "Name"): _text(each, "Value").lower().replace(" ", "").split(";")
        for each in _children(hardware, "VirtualSystemOtherConfigurationData")
    }
    efi = "firmware=uefi" in xen.get("HVM_boot_params", ())
    return "efi" if efi else "", efi and "secureboot=true" in xen.get("platform", ()), ""


def _settings(element: etree._Element, tag: str) -> dict[str, str]:
    return {attribute(each, "key"): attribute(each, "value")[:MAX_TEXT] for each in _children(element, tag)}


def setting(settings: Mapping[str, str], key: str) -> str:
    """A setting by its key in any case; "" without it."""
    return next((value for known, value in settings.items() if known.lower() == key.lower()), "")


def reference(resource: str) -> tuple[str, str]:
    """``ovf:/disk/ID`` in all its notations: the kind (disk, file) and the id."""
    text = resource.strip()
    text = text[4:] if text.lower().startswith("ovf:") else text
    match = re.fullmatch(r"/+(disk|file)/(.+)", text)
    return (match[1], match[2]) if match else ("disk", text)
