# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""From the domain XML of an archive to the one that is defined here. Pure: an element tree is changed, nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Skipped
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import boot_files
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import target_of
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._restore import disks as disk_rules
from ansible_collections.kvmops.backup.plugins.module_utils._restore import host_exposure
from ansible_collections.kvmops.backup.plugins.module_utils._restore.identity import Identity
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import HostFacts, PlannedDisk

_MAC = re.compile(r"[0-9a-f]{1,2}(?::[0-9a-f]{1,2}){5}")
#: The VM can do without these.
_DISPENSABLE = ("ACPI table", "firmware configuration", "option ROM")


@dataclass(frozen=True)
class NewDisk(PlannedDisk):
    """A restored disk in its place; ``pool`` and ``volume`` where it is again the volume that the definition named."""

    pool: str = ""
    volume: str = ""


@dataclass(frozen=True)
class Changes:
    """All decisions that the definition has to show. ``nvram_path`` "": the VM has no NVRAM; ``trusted``: as in Circumstances."""

    identity: Identity
    genid: str
    fates: Mapping[str, disk_rules.Fate]
    disks: Mapping[str, NewDisk]
    networks: Mapping[str, str]
    nvram_path: str = ""
    trusted: bool = True


@dataclass
class Remarks:
    """What the user has to know about the rewriting."""

    warnings: list[Notice] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def mac_addresses(root: etree._Element) -> list[str]:
    """Address of each interface in document order and lower case, "" where the definition gives none."""
    found = (interface.find("mac") for interface in root.findall("devices/interface"))
    addresses = ((mac.get("address") or "").lower() if mac is not None else "" for mac in found)
    return [address if _MAC.fullmatch(address) else "" for address in addresses]


def host_file_names(root: etree._Element, pools: Mapping[str, str]) -> set[str]:
    """Every file of the host that the definition names and a plan may want to look at. ``pools``: their directories."""
    drives = [disk for disk in disk_rules.elements(root) if disk.device in ("cdrom", "floppy")]
    names = {disk_rules.file_of(drive, pools) for drive in drives}
    names |= {each.path for each in boot_files.named(root)} | {(root.findtext("os/loader") or "").strip()}
    nvram = root.find("os/nvram")
    if nvram is not None:
        names.add(nvram.get("template") or "")
    return {name for name in names if name.startswith("/")}


def apply(root: etree._Element, changes: Changes, facts: HostFacts) -> Remarks:
    """Rewrites a definition in place; what reaches out of the VM has been dealt with before (host_exposure.apply)."""
    outcome = Remarks()
    _identity(root, changes)
    for element in root.findall("devices/disk"):
        _disk(element, changes, outcome)
    for element, mac in zip(root.findall("devices/interface"), changes.identity.macs):
        _interface(element, mac, changes, facts)
    _firmware(root, changes, facts, outcome)
    _guest_readable(root, facts, outcome)
    _runtime_traces(root)
    if changes.identity.new:
        _shared_numbers(root, outcome)
    return outcome


def _identity(root: etree._Element, changes: Changes) -> None:
    identity = changes.identity
    root.attrib.pop("id", "")
    former = (root.findtext("uuid") or "").strip()
    _first(root, "name").text = identity.name
    _first(root, "uuid").text = identity.uuid
    genid = root.find("genid")
    if genid is not None:
        genid.text = changes.genid  # Windows has to notice that it was taken back in time
    for entry in root.iterfind("sysinfo/system/entry"):
        if entry.get("name") == "uuid" or (former and (entry.text or "").strip().lower() == former.lower()):
            entry.text = identity.uuid


def _first(root: etree._Element, tag: str) -> etree._Element:
    element = root.find(tag)
    if element is None:
        element = etree.Element(tag)
        root.insert(0, element)
    return element


def _disk(element: etree._Element, changes: Changes, outcome: Remarks) -> None:
    target = target_of(element)
    fate = changes.fates[target]
    parent = _xml.parent_of(element)
    for tag in ("backingStore", "mirror"):
        for child in element.findall(tag):
            element.remove(child)
    if isinstance(fate, disk_rules.Dropped):
        outcome.skipped.append(Skipped(target, fate.reason))
        parent.remove(element)
    elif isinstance(fate, disk_rules.Emptied):
        outcome.skipped.append(Skipped(target, fate.reason))
        for source in element.findall("source"):
            element.remove(source)
        element.set("type", "file")
    elif isinstance(fate, disk_rules.Restored):
        _restored_disk(element, changes.disks[target], outcome)
    else:
        _kept_disk(element, fate.source, changes.trusted)


def _kept_disk(element: etree._Element, source: Mapping[str, str], trusted: bool) -> None:
    """A medium or a LUN of this host: of all that names one, only what was judged stays.

    One that a definition not ours names is read as it is and only read, and libvirt does not give it to QEMU's user.
    """
    former = element.find("source")
    for child in element.findall("source"):
        element.remove(child)
    if not source:
        return
    driver = _driver(element)
    if not driver.get("type"):
        driver.set("type", "raw")
    new = etree.Element("source", dict(source))
    element.set("type", "file" if "file" in source else element.get("type") or "file")
    element.insert(element.index(driver) + 1, new)
    if trusted:
        new.extend(list(former) if former is not None else [])
        return
    for child in element.findall("driver")[1:]:
        element.remove(child)
    driver.set("type", "raw")
    etree.SubElement(new, "seclabel", model="dac", relabel="no")
    if element.find("readonly") is None:
        etree.SubElement(element, "readonly")


def _driver(element: etree._Element) -> etree._Element:
    driver = element.find("driver")
    if driver is None:
        driver = etree.Element("driver", {"name": "qemu"})
        element.insert(0, driver)
    return driver


def _restored_disk(element: etree._Element, disk: NewDisk, outcome: Remarks) -> None:
    former = element.find("source")
    encryption = former.find("encryption") if former is not None else None
    for child in [*element.findall("source"), *element.findall("auth")]:
        element.remove(child)
    for attribute in ("rawio", "sgio"):  # of block devices
        element.attrib.pop(attribute, "")
    if disk.volume:
        element.set("type", "volume")
        source = etree.Element("source", {"pool": disk.pool, "volume": disk.volume})
    else:
        element.set("type", "file")
        source = etree.Element("source", {"file": disk.path})
    if encryption is not None:
        source.append(encryption)
    driver = _driver(element)
    driver.set("name", "qemu")
    driver.set("type", disk.format)
    source.tail = driver.tail
    element.insert(element.index(driver) + 1, source)
    shareable = element.find("shareable")
    if shareable is not None and disk.format != "raw":
        element.remove(shareable)
        text = f"{disk.target} is no longer shareable: libvirt shares raw disks only."
        outcome.warnings.append(Notice(Code.CHANGED, text))


def _interface(element: etree._Element, mac: str, changes: Changes, facts: HostFacts) -> None:
    address = element.find("mac")
    if address is None:
        address = etree.Element("mac")
        element.insert(0, address)
    address.set("address", mac)
    target = element.find("target")
    if target is not None and (changes.identity.new or (target.get("dev") or "").startswith(("vnet", "macvtap"))):
        target.attrib.pop("dev", "")
        if not target.attrib:
            element.remove(target)
    source = element.find("source")
    kind = element.get("type")
    if source is None or kind not in ("network", "bridge", "direct"):
        return
    if kind == "network":
        for live in ("portid", "bridge"):
            source.attrib.pop(live, "")
    attribute = {"network": "network", "bridge": "bridge", "direct": "dev"}[kind]
    former = source.get(attribute) or ""
    if former not in changes.networks:
        return
    name = changes.networks[former]
    if kind == "network" and name not in facts.networks and name in facts.interfaces:
        kind, attribute = "bridge", "bridge"
    elif kind != "network" and name in facts.networks and name not in facts.interfaces:
        kind, attribute = "network", "network"
    element.set("type", kind)
    for key in ("network", "bridge", "dev", "mode", "portgroup"):
        if key != "mode" or kind != "direct":
            source.attrib.pop(key, "")
    source.set(attribute, name)


def missing_networks(root: etree._Element, networks: Mapping[str, str], facts: HostFacts) -> list[str]:
    """What the interfaces need after mapping and this host does not have."""
    missing = []
    for interface in root.iterfind("devices/interface"):
        source = interface.find("source")
        kind = interface.get("type")
        if source is None or kind not in ("network", "bridge", "direct"):
            continue
        former = source.get({"network": "network", "bridge": "bridge", "direct": "dev"}[kind]) or ""
        name = networks.get(former, former)
        here = facts.networks if kind == "network" else facts.interfaces
        if former in networks:
            here = facts.networks | facts.interfaces
        if name not in here:
            what = {"network": "the network", "bridge": "the bridge", "direct": "the network device"}[kind]
            missing.append(f"{what} {name}")
    return sorted(set(missing))


def _firmware(root: etree._Element, changes: Changes, facts: HostFacts, outcome: Remarks) -> None:
    os_element = root.find("os")
    if os_element is None:
        return
    loader, nvram = os_element.find("loader"), os_element.find("nvram")
    automatic = bool(os_element.get("firmware"))
    path = (loader.text or "").strip() if loader is not None else ""
    if loader is not None and loader.get("type") == "pflash" and not changes.trusted:
        loader.set("readonly", "yes")
    if loader is not None and automatic and not loader_is_here(path, facts, changes.trusted):
        text = f"The firmware {path} is not on this host; libvirt chooses one of its own."
        outcome.warnings.append(Notice(Code.CHANGED, text))
        os_element.remove(loader)
        if nvram is not None:
            nvram.attrib.pop("template", "")
    for source in root.findall("devices/tpm/backend[@type='emulator']/source"):
        _xml.parent_of(source).remove(source)  # its state goes to libvirt's own directory
    if nvram is None:
        return
    if nvram.get("template") and not _is_public(nvram.get("template") or "", facts):
        nvram.attrib.pop("template")
    for child in list(nvram):
        nvram.remove(child)
    nvram.attrib.pop("type", "")
    nvram.text = changes.nvram_path


def loader_is_here(path: str, facts: HostFacts, trusted: bool) -> bool:
    """Whether a firmware image is one of this host's; of a ``trusted`` archive a file that everybody may read will do."""
    return not path or path in facts.capabilities.firmware or (trusted and _is_public(path, facts))


def _is_public(path: str, facts: HostFacts) -> bool:
    file = facts.files.get(path)
    return file is not None and file.public


def _guest_readable(root: etree._Element, facts: HostFacts, outcome: Remarks) -> None:
    for each in list(boot_files.named(root)):
        if each.kind.name in _DISPENSABLE and not _is_public(each.path, facts):
            reason = f"{each.kind.name}: not on this host, or not a file that everybody may read"
            outcome.skipped.append(Skipped(each.path, reason))
            _xml.parent_of(each.element).remove(each.element)


def private_boot_files(root: etree._Element, facts: HostFacts) -> list[str]:
    """Kernel, initial RAM disk and device tree that are not here as files that everybody may read."""
    names = ((root.findtext(f"os/{tag}") or "").strip() for tag in ("kernel", "initrd", "dtb", "shim"))
    return [name for name in names if name and not _is_public(name, facts)]


def _runtime_traces(root: etree._Element) -> None:
    """What only a running definition says, and libvirt fills in anew."""
    for device in root.iterfind("devices/*"):
        if device.tag not in ("serial", "console", "parallel", "channel"):
            continue
        device.attrib.pop("tty", "")
        for source in device.findall("source"):
            if device.get("type") == "pty" or host_exposure.is_own_socket(source.get("path") or ""):
                device.remove(source)


def _shared_numbers(root: etree._Element, outcome: Remarks) -> None:
    """A copy must not ask for ports and numbers that the original has."""
    for graphics in root.iterfind("devices/graphics"):
        port = graphics.get("port") or "-1"
        if graphics.get("autoport") != "yes" and port not in ("-1", "0"):
            for attribute in ("port", "tlsPort"):
                graphics.attrib.pop(attribute, "")
            graphics.set("autoport", "yes")
            text = f"The copy's {graphics.get('type')} display takes a free port instead of {port}."
            outcome.warnings.append(Notice(Code.CHANGED, text))
    for cid in root.iterfind("devices/vsock/cid"):
        cid.attrib.pop("address", "")
        cid.set("auto", "yes")


def same_volume(element_pool: str, element_volume: str, pool: str, path: str) -> bool:
    """Whether a file is again the volume that the definition named."""
    return bool(element_pool) and element_pool == pool and element_volume == os.path.basename(path)
