# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which drives the VM gets: on which bus, in which order, with which names, and which of them boots. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import descriptor as ovf
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import mapping, units
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.report import HardwareReport

_IDE_DRIVES = 4
_PREFIXES = {"ide": "hd", "virtio": "vd"}
_HDD = re.compile(r"(ide|scsi|sata|nvme)(\d{1,4}):(\d{1,4})")


@dataclass(eq=False)
class DriveSlot:
    """A drive on its way: `key` orders drives as the original's firmware counts them."""

    item: ovf.Item
    device: str
    bus: str
    key: tuple[int, int, int, int, int]
    label: str
    note: str = ""
    disk: ovf.DiskRow = field(default_factory=lambda: ovf.DiskRow(""))
    file: str = ""
    target: str = ""
    family: str = ""


def plan(described: ovf.Descriptor, what: str, machine: str, disk_bus: str, report: HardwareReport) -> list[DriveSlot]:
    """The drives, disks first, each as the original's firmware counts them. Raises ArchiveError for references that lead nowhere,
    RefusedError for disks that stand on others."""
    return _Planner(described, what, machine, disk_bus, report).plan()


class _Planner:
    def __init__(self, described: ovf.Descriptor, what: str, machine: str, disk_bus: str, report: HardwareReport) -> None:
        self.described, self.system, self.what, self.report = described, described.system, what, report
        self.machine, self.disk_bus = machine, disk_bus
        self.items = self.system.items
        self.by_id = {item.id: item for item in self.items if item.id}

    def plan(self) -> list[DriveSlot]:
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
                self._floppy(item)
                if floppies <= 2:
                    slots.append(DriveSlot(item, "floppy", "fdc", (9, 0, 0, 0, item.position), str(item)))
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
                self.report.warn(Code.LEFT_OUT, f"the disk {left} belongs to no item of the hardware and is left out")
        ordered = [*disks, *(slot for slot in slots if slot.device != "disk")]
        self._name_targets(ordered)
        return ordered

    def _controller(self, item: ovf.Item) -> tuple[ovf.Item | None, mapping.Rule | None]:
        parent = self.by_id.get(item.parent)
        if parent is None or parent.type not in ovf.CONTROLLERS:
            return None, None
        return parent, mapping.rule(mapping.CONTROLLERS, parent.type, parent.subtypes)

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

    def _disk_slot(self, item: ovf.Item) -> DriveSlot | None:
        disk = self._disk_of(item)
        if disk is None:
            self.report.ignore(str(item), "it names no disk and has no size")
            self.report.warn(Code.LEFT_OUT, f"{item} names no disk and has no size; it is left out")
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
        if self.disk_bus:
            bus, note = self.disk_bus, "as the option disk_bus says"
        elif rule is not None:
            bus, note = rule.on(self.machine), rule.note
            if rule.warning:
                self.report.warn(Code.OTHER_HARDWARE, rule.warning)
        elif disk.interface.lower() in mapping.OVIRT_BUSES:
            bus = mapping.OVIRT_BUSES[disk.interface.lower()][self.machine != "pc"]
            kind = disk.interface
        else:
            bus, note = "sata", "it names no controller that is known"
        return DriveSlot(
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

    def _disk_of(self, item: ovf.Item) -> ovf.DiskRow | None:
        for resource in item.resources:
            kind, id_ = ovf.reference(resource)
            if kind == "file":
                if id_ not in self.described.files:
                    raise ArchiveError(self.what, f"{item} names the file {id_!r}, which the descriptor does not have")
                known = (disk for disk in self.described.disks.values() if disk.file == id_)
                return next(known, ovf.DiskRow("", id_))
            disk = self.described.disks.get(id_) or self.described.disks.get(id_.rpartition("/")[2])
            if disk is None:
                raise ArchiveError(self.what, f"{item} names the disk {id_!r}, which the descriptor does not have")
            return self._with_file(disk, item)
        size = ovf.quantity_bytes(item, self.what)
        return None if not size else ovf.DiskRow("", "", size)

    def _with_file(self, disk: ovf.DiskRow, item: ovf.Item) -> ovf.DiskRow:
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

    def _cd_slot(self, item: ovf.Item) -> DriveSlot:
        controller, rule = self._controller(item)
        file, disk = "", ovf.DiskRow("")
        for resource in item.resources:
            kind, id_ = ovf.reference(resource)
            if kind == "file" and id_ in self.described.files:
                file = id_
            elif kind == "disk" and id_ in self.described.disks and self.described.disks[id_].file:
                file, disk = self._with_file(self.described.disks[id_], item).file, ovf.DiskRow(id_)
        if not file:
            self._no_medium(item, "CD drive")
        bus = "ide" if self.machine == "pc" and rule is not None and rule.pc == "ide" else "sata"
        return DriveSlot(item, "cdrom", bus, self._key(item, controller, rule), str(item), disk=disk, file=file)

    def _floppy(self, item: ovf.Item) -> None:
        for kind, id_ in map(ovf.reference, item.resources):
            if kind == "file" and id_ in self.described.files:
                href = self.described.files[id_].href
                self.report.ignore(f"file {href}", "images of floppies are not taken over")
                self.report.warn(Code.LEFT_OUT, f"{item} is empty: its image {href} is left out")
                return
        self._no_medium(item, "floppy")

    def _no_medium(self, item: ovf.Item, what: str) -> None:
        named = [each for each in item.resources if each]
        if (
            named
            or any("passthrough" in subtype or "remote" in subtype for subtype in item.subtypes)
            or ovf.setting(item.config, "backing")
        ):
            self.report.ignore(f"medium of {item}", "it is not in the package")
            self.report.replace(str(item), f"an empty {what}")

    def _name_targets(self, slots: Sequence[DriveSlot]) -> None:
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


def boot_order(system: ovf.System, slots: Sequence[DriveSlot]) -> dict[int, int]:
    """Place in the boot order by the position of the item: what the descriptor names, then its order of kinds, then disks and CDs.

    Firmware passes over empty drives. A network card boots only where the descriptor says so.
    """
    disks = [slot.item.position for slot in slots if slot.device == "disk"]
    cds = [slot.item.position for slot in slots if slot.device == "cdrom"]
    nics = [item.position for item in in_order(system.items, ovf.NIC)]
    kinds = {
        "harddisk": disks, "hdd": disks, "disk": disks, "dvd": cds, "cdrom": cds, "network": nics, "net": nics, "ethernet": nics,
    }  # fmt: skip
    by_id = {item.id: item.position for item in system.items if item.id}
    order = []
    for id_, kind in system.boot:
        order += [by_id[id_]] if id_ in by_id else kinds.get(kind.lower(), [])
    numbered = [(units.number(item.fields.get("BootOrder", "")) or 0, item.position) for item in system.items]  # oVirt's
    order += [position for number, position in sorted(numbered) if number]
    for match in _HDD.finditer(ovf.setting(system.extra, "bios.hddorder").lower()):
        place = (match[1] + match[2], int(match[3]))
        order += [slot.item.position for slot in slots if (slot.family, slot.item.number_on_parent) == place]
    own = system.machine or ovf.Machine()
    for kind in own.boot or re.split(r"[,\s]+", ovf.setting(system.extra, "bios.bootorder")):
        order += kinds.get(kind.lower().rstrip("0123456789"), [])
    order = [position for position in order if position in {*disks, *cds, *nics}]
    return {position: number for number, position in enumerate(dict.fromkeys([*order, *disks, *cds]), 1)}


def in_order(items: Sequence[ovf.Item], kind: int) -> list[ovf.Item]:
    """Items of a type in the order of their slots, those without one at the end."""
    found = [item for item in items if item.type == kind]
    return sorted(found, key=lambda item: (item.number_on_parent is None, item.number_on_parent or 0, item.position))


def _letters(index: int) -> str:
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(97 + rest) + letters
    return letters
