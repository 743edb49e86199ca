# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The definition that a point keeps: the persistent one, with the disks as they are attached now. Pure."""

from __future__ import annotations

from copy import deepcopy

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import target_of
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice

_RUNTIME_ONLY = ("alias", "backingStore", "mirror", "privateData")


def of_point(persistent_xml: str, live_xml: str) -> tuple[str, tuple[Notice, ...]]:
    """The definition of a point, and warnings about where the running VM differs from it.

    `persistent_xml` "" for a transient VM, `live_xml` "" for one that is off. Targets tell which disk is which.
    """
    if not live_xml:
        return persistent_xml, ()
    if not persistent_xml:
        transient = "the VM is transient: it has no persistent definition, the running one is kept"
        return _without_runtime(live_xml), (Notice(Code.NOT_AS_DEFINED, transient),)
    root, live = _xml.parse(persistent_xml, "persistent definition"), _xml.parse(live_xml, "live definition")
    devices = root.find("devices")
    if devices is None:
        devices = etree.SubElement(root, "devices")
    known = {target_of(disk): disk for disk in devices.findall("disk")}
    warnings = []
    for disk in live.findall("devices/disk"):
        target, own = target_of(disk), known.get(target_of(disk))
        if own is None:
            devices.append(_clean(disk))
            warnings.append(f"disk {target} is attached to the running VM only; the backup has it in the definition")
        elif _source(own) != _source(disk):
            devices.replace(own, _clean(disk))
            warnings.append(
                f"disk {target} will have another source after the next start; the backup has the present one"
            )
    return _xml.text(root), tuple(Notice(Code.NOT_AS_DEFINED, text) for text in warnings)


def only_persistent(persistent_xml: str, live_xml: str) -> tuple[str, ...]:
    """Targets of disks that a running VM gets only at its next start."""
    if not live_xml or not persistent_xml:
        return ()
    live = {target_of(disk) for disk in _xml.parse(live_xml).findall("devices/disk")}
    return tuple(t for t in map(target_of, _xml.parse(persistent_xml).findall("devices/disk")) if t not in live)


def _source(disk: etree._Element) -> dict[str, str]:
    source = disk.find("source")
    names = ("file", "dev", "pool", "volume", "protocol", "name")
    return {} if source is None else {str(key): str(value) for key, value in source.attrib.items() if key in names}


def _clean(disk: etree._Element) -> etree._Element:
    copy = deepcopy(disk)
    for tag in _RUNTIME_ONLY:
        for element in copy.findall(tag):
            copy.remove(element)
    source = copy.find("source")
    if source is not None and "index" in source.attrib:
        del source.attrib["index"]
    return copy


def _without_runtime(live_xml: str) -> str:
    root = _xml.parse(live_xml, "live definition")
    if "id" in root.attrib:
        del root.attrib["id"]
    for disk in root.findall("devices/disk"):
        _xml.parent_of(disk).replace(disk, _clean(disk))
    return _xml.text(root)
