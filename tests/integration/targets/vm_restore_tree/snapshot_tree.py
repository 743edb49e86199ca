# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots as an administrator makes and reverts them with libvirt 9.0 and qemu-img, and the truth about each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import libvirt
from lxml import etree

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.vm import Lab, LabVm

SECURE = libvirt.VIR_DOMAIN_XML_SECURE
MARKER = "/run/snapshot"  # in the guest's memory, on no disk


@dataclass(frozen=True)
class Saved:
    """A snapshot: how it was made, and where its disks are: files (frozen, or with an internal snapshot in them)."""

    name: str
    internal: bool
    memory: bool
    files: dict[str, Path]


@dataclass
class Truth:
    """What every snapshot of a VM has to show: digest of each disk by name of the snapshot."""

    disks: dict[str, dict[str, str]] = field(default_factory=dict)


def sources(xml: str) -> dict[str, Path]:
    """File of each disk in a definition."""
    disks = etree.fromstring(xml).findall("devices/disk[@device='disk']")
    return {disk.find("target").get("dev"): Path(disk.find("source").get("file")) for disk in disks}


def take(vm: LabVm, name: str, *, internal: bool = False, memory: bool = False) -> Saved:
    """A new snapshot; with memory, the guest knows its name."""
    files, running = vm.disks(), vm.is_running()
    if memory:
        vm.agent.shell(f"echo {name} >{MARKER}")
    folder = files["vda"].parent
    xml = f"<domainsnapshot><name>{name}</name>"
    flags = 0
    if not internal:
        xml += f"<memory snapshot='external' file='{folder}/{name}.memory'/>" if memory else "<memory snapshot='no'/>"
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC | (
            0 if memory else libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        )
        disks = (
            f"<disk name='{target}' snapshot='external'><driver type='qcow2'/><source file='{folder}/{target}.{name}'/></disk>"
            for target in files
        )
        xml += f"<disks>{''.join(disks)}</disks>"
    vm.domain.snapshotCreateXML(xml + "</domainsnapshot>", flags)
    if running:
        vm.wait_for_marker(vm.wait_for_marker(1).number + 1)  # something is written after it
    return Saved(name, internal, memory, files)


def digests(saved: Saved) -> dict[str, str]:
    """What the disks of a snapshot hold, from its files."""
    found = {}
    for target, path in saved.files.items():
        if not saved.internal:
            found[target] = truth.content_sha256(path, "qcow2" if path.suffix != ".raw" else "raw")
            continue
        raw = path.with_name("inside.raw")
        run("qemu-img", "convert", "-f", "qcow2", "-l", f"snapshot.name={saved.name}", "-O", "raw", str(path), str(raw))
        found[target] = truth.raw_sha256(raw)
        raw.unlink()
    return found


def shown(vm: LabVm) -> dict[str, str]:
    """What the disks of a VM show now, be it off or paused."""
    return {t: truth.content_sha256(path, "qcow2", in_use=vm.is_running()) for t, path in vm.disks().items()}


def revert_outside(vm: LabVm, name: str, number: int, *, resume: bool = False) -> None:
    """To an external snapshot, as libvirt 9.0 cannot: fresh overlays on its files; with ``resume`` its memory too (paused)."""
    snapshot = vm.domain.snapshotLookupByName(name)
    xml = snapshot.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
    root = etree.fromstring(xml)
    overlays = {}
    for target, path in sources(etree.tostring(root.find("domain")).decode()).items():
        overlays[target] = path.with_name(f"{target}.again-{number}")
        image_format = root.find(f"domain/devices/disk/target[@dev='{target}']").getparent().find("driver").get("type")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", image_format, "-b", str(path), str(overlays[target]))

    def moved(definition: str) -> str:
        element = etree.fromstring(definition)
        for disk in element.findall("devices/disk[@device='disk']"):
            disk.find("source").set("file", str(overlays[disk.find("target").get("dev")]))
            disk.find("driver").set("type", "qcow2")
            for store in disk.findall("backingStore"):
                disk.remove(store)
        return etree.tostring(element, encoding="unicode")

    connection = vm.domain.connect()
    connection.defineXML(moved(vm.xml(inactive=True)))
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    vm.domain.snapshotCreateXML(xml, flags)
    if resume:
        image = root.find("memory").get("file")
        definition = moved(connection.saveImageGetXMLDesc(image, libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE))
        connection.restoreFlags(image, definition, libvirt.VIR_DOMAIN_SAVE_PAUSED)


def revert_inside(vm: LabVm, name: str) -> None:
    """To an internal snapshot, paused if it has memory."""
    snapshot = vm.domain.snapshotLookupByName(name)
    vm.domain.revertToSnapshot(snapshot, libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED if _runs(snapshot) else 0)


def _runs(snapshot: libvirt.virDomainSnapshot) -> bool:
    return etree.fromstring(snapshot.getXMLDesc()).findtext("state") == "running"


def remembers(vm: LabVm) -> str:
    """The name of the snapshot in the memory of a guest that goes on now."""
    vm.domain.resume()
    return remembered(vm)


def remembered(vm: LabVm) -> str:
    """The same of a guest that was just reverted; its agent is connected a moment later."""
    vm.wait_until_up()
    return vm.agent.shell(f"cat {MARKER}").strip()


def tree(lab: Lab, name: str) -> dict[str, tuple[str, bool]]:
    """Parent of each snapshot, and whether it is the current one."""
    found = {}
    for snapshot in lab.vm(name).domain.listAllSnapshots():
        parent = etree.fromstring(snapshot.getXMLDesc()).findtext("parent/name") or ""
        found[snapshot.getName()] = (parent, bool(snapshot.isCurrent()))
    return found
