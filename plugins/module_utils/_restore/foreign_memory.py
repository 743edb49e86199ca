# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The memory image of a foreign archive: it becomes a snapshot that the restored VM can be reverted to.

Such archives have no tree of snapshots. What an image belongs to is told by the definition in it: the VM and the disks of
exactly one point. The snapshot is then read and rewritten by the same rules as those of our own archives.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Member,
    Role,
    SnapshotNode,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import memory_image
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import target_of
from ansible_collections.kvmops.backup.plugins.module_utils._restore import disks

Read = Callable[[str, int, int], bytes]


def adopt(configuration: Configuration, read: Read) -> Configuration:
    """The point with the snapshot of its memory image; as it was where there is none or where it cannot be told.

    ``read``: bytes of a member from an offset.
    """
    images = [member for member in configuration.members if member.role is Role.MEMORY]
    if configuration.format_version or configuration.snapshots or not images:
        return configuration
    root = _xml.parse(configuration.domain_xml, f"the configuration {configuration.member_name}")
    found = ((member, _definition(member, read)) for member in images)
    matching = [(member, domain) for member, domain in found if domain is not None and _fits(domain, root)]
    if len(matching) != 1:
        return configuration
    member, domain = matching[0]
    top = next((each for each in configuration.members if each.active and each.role is not Role.ISO), None)
    path = os.path.join(os.path.dirname(top.former_path if top is not None else "") or "/", member.name)
    members = tuple(replace(each, former_path=path) if each is member else each for each in configuration.members)
    name = names.stem(os.path.splitext(member.name)[0])
    state = SnapshotNode(name, _document(name, configuration.timestamp, path, domain), current=True)
    return replace(configuration, members=members, snapshots=(state,))


def _definition(member: Member, read: Read) -> etree._Element | None:
    """The definition in a memory image; None where it is no image of libvirt's."""
    what = f"The memory image {member.name}"
    try:
        length = memory_image.head_bytes(read(member.name, 0, memory_image.HEADER_BYTES), what)
        return _xml.parse(memory_image.parse(read(member.name, 0, length), what).xml, what)
    except HostileError:
        return None


def _fits(domain: etree._Element, point: etree._Element) -> bool:
    """Whether it is the same VM on the same files."""
    return domain.tag == "domain" and (domain.findtext("uuid"), _sources(domain)) == (
        point.findtext("uuid"),
        _sources(point),
    )


def _sources(root: etree._Element) -> dict[str, str]:
    return {disk.target: disk.source for disk in disks.elements(root) if disk.device == "disk"}


def _document(name: str, created: int, path: str, domain: etree._Element) -> str:
    root = etree.Element("domainsnapshot")
    etree.SubElement(root, "name").text = name
    etree.SubElement(root, "state").text = "running"
    etree.SubElement(root, "creationTime").text = str(created)
    etree.SubElement(root, "memory", snapshot="external", file=path)
    listed = etree.SubElement(root, "disks")
    read_only = {target_of(disk) for disk in domain.findall("devices/disk") if disk.find("readonly") is not None}
    for target in _sources(domain):
        mode = "no" if target in read_only else "external"
        etree.SubElement(listed, "disk", name=target, snapshot=mode)
    root.append(domain)
    return _xml.text(root)
