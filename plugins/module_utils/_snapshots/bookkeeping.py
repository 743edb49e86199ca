# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Definitions that name files which are merged away: the VM's own, and those inside its snapshots. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import chain

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import views

Replaced = Mapping[
    str, tuple[str, str]
]  # resolved path of a file that goes: path and format of the one that has its data


def replace_in_domain(xml: str, replaced: Replaced) -> str:
    """A <domain> document whose disks no longer name what is replaced."""
    root = _xml.parse(xml, "The domain XML")
    for disk in root.iterfind("devices/disk"):
        _replace(disk, replaced)
    return _xml.text(root)


def replace_in_snapshot(xml: str, replaced: Replaced) -> str:
    """A <domainsnapshot> document whose definitions no longer name what is replaced."""
    root = _xml.parse(xml, "A snapshot")
    places = ("domain/devices/disk", "inactiveDomain/devices/disk", "disks/disk", "revertDisks/disk")
    for disk in chain.from_iterable(root.iterfind(place) for place in places):
        _replace(disk, replaced)
    return _xml.text(root)


def with_parent(xml: str, parent: str) -> str:
    """A <domainsnapshot> document under another parent that it has by now, "" for none."""
    root = _xml.parse(xml, "A snapshot")
    name, element = root.find("parent/name"), root.find("parent")
    if name is not None and parent:
        name.text = parent
    elif element is not None:
        root.remove(element)
    return _xml.text(root)


def _replace(disk: etree._Element, replaced: Replaced) -> None:
    """One disk, each link of its chain from the top."""
    link: etree._Element | None = disk
    while link is not None:
        path = _path(link)
        if path in replaced:
            _become(link, *replaced[path])
        link = link.find("backingStore")


def _path(link: etree._Element) -> str:
    source = link.find("source")
    return "" if source is None else views.real(source.get("file", ""))


def _become(link: etree._Element, path: str, image_format: str) -> None:
    """The link names another file; where the chain below lists that file, the links in between go."""
    below = link.find("backingStore")
    while below is not None and _path(below) != views.real(path):
        below = below.find("backingStore")
    for backing in link.findall("backingStore"):
        link.remove(backing)
    source = link.find("source")
    if source is None:
        return
    source.set("file", path)
    if link.tag == "disk":
        driver = link.find("driver")
        if driver is not None:
            driver.set("type", image_format)
    else:
        named = link.find("format")
        if named is not None:
            named.set("type", image_format)
    further = None if below is None else below.find("backingStore")
    if further is not None:
        source.addnext(deepcopy(further))
