# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What became of the original's hardware, told to the user: what was replaced, what was ignored, and warnings. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import descriptor as ovf
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import mapping, units


@dataclass
class HardwareReport:
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


def lines(report: HardwareReport) -> Iterator[str]:
    """The report as text, a line for each row."""
    for row in report.replaced:
        note = f" ({row['note']})" if row["note"] else ""
        yield f"{row['from']} -> {row['to']}{note}"
    for row in report.ignored:
        yield f"{row['item']}: ignored, {row['note']}"


def tell_ignored(report: HardwareReport, described: ovf.Descriptor, *, efi: bool) -> None:
    """Rows for everything in the descriptor that has no part in the VM here."""
    _hardware(report, described.system)
    for section in described.sections:
        report.ignore(section, "it is for people or for other products; scripts and properties of a package are not used")
    _files(report, described, efi)


def _hardware(report: HardwareReport, system: ovf.System) -> None:
    known = {
        ovf.CPU, ovf.MEMORY, ovf.NIC, ovf.FLOPPY, ovf.CD, ovf.DVD, *ovf.DISKS, *ovf.CONTROLLERS, ovf.SERIAL, ovf.PARALLEL,
        ovf.USB, ovf.GRAPHICS, ovf.SOUND, ovf.OTHER,
    }  # fmt: skip
    for item in system.items:
        if item.type not in known:
            report.ignore(str(item), f"resource type {item.type} has no counterpart")
        for name in ("Reservation", "Limit", "Weight"):
            if (units.number(item.fields.get(name, "")) or 0) > 0 and item.type in (ovf.CPU, ovf.MEMORY):
                report.ignore(f"{name.lower()} of {item}", "reservations and shares are the host's to give")
    for prefix, settings in (("vmw:Config", system.config), ("vmw:ExtraConfig", system.extra)):
        for key in settings:
            if key.lower() not in mapping.UNDERSTOOD:
                report.ignore(f"{prefix} {key}", mapping.why_ignored(key.lower()))
    for key in dict.fromkeys(
        key for item in system.items for key in item.config if key.lower() not in mapping.UNDERSTOOD
    ):
        report.ignore(f"vmw:Config {key} of devices", mapping.why_ignored(key.lower()))


def _files(report: HardwareReport, described: ovf.Descriptor, efi: bool) -> None:
    used = {described.disks[id_].file for id_ in described.disks} | {
        ovf.reference(each)[1] for item in described.system.items for each in item.resources
    }
    for id_, file in described.files.items():
        if file.href.lower().endswith(".nvram"):
            report.ignore(f"file {file.href}", "VMware's firmware settings cannot be read by others")
            if efi:
                report.warn(
                    Code.OTHER_HARDWARE,
                    "the boot entries of the original's firmware are not taken over; the firmware here looks for the "
                    "fallback loader EFI/BOOT/BOOTX64.EFI"
                )
        elif id_ not in used and len(described.systems) == 1:
            report.ignore(f"file {file.href}", "nothing in the hardware section needs it")
