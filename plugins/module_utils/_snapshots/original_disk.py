# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a disk was before the snapshot, and how it becomes that again: its definition, its file's owner and labels."""

from __future__ import annotations

import os
import stat

from ansible_collections.kvmops.backup.plugins.module_utils import _ownership, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import target_of
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import Overlay, Owner


def owner_of(path: str) -> Owner:
    """Owner, mode and libvirt's labels of a file."""
    found = os.stat(path)
    try:
        names = [name for name in os.listxattr(path) if name.startswith(_ownership.REMEMBERED)]
        labels = tuple((name, os.getxattr(path, name).decode("ascii", "replace")) for name in sorted(names))
    except OSError:  # a file system without extended attributes
        labels = ()
    return Owner(found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), labels)


def restore_owner(path: str, former: Owner, *, running: bool) -> None:
    """The file's owner, mode and labels as before; of a VM that is off now, as libvirt would have left them."""
    if owner_of(path) == former:
        return
    uid, gid, labels = former.uid, former.gid, former.labels
    if labels and not running:
        remembered = dict(labels).get(_ownership.REMEMBERED + "dac", "")
        uid, gid = _ownership.ids(remembered, (uid, gid))
        labels = ()
    os.chown(path, uid, gid)
    os.chmod(path, former.mode)
    for name, value in labels:
        os.setxattr(path, name, value.encode())


def with_original_source(xml: str, overlay: Overlay, former: str) -> str:
    """The domain XML with the disk's image (type, format, source, chain) as in ``former`` and all else as it is. Pure."""
    root = _xml.parse(xml, "The domain XML")
    for disk in root.iterfind("devices/disk"):
        if target_of(disk) == overlay.target:
            _replace_image(disk, former, overlay)
    return _xml.text(root)


def _replace_image(disk: etree._Element, former: str, overlay: Overlay) -> None:
    driver, source = disk.find("driver"), disk.find("source")
    for backing in disk.findall("backingStore"):
        disk.remove(backing)
    if former:
        old = _xml.parse(former, "A disk")
    else:
        old = etree.Element("disk", type="file")
        etree.SubElement(old, "source", file=overlay.base_path)
    disk.set("type", old.get("type", "file"))
    if driver is not None:
        driver.set("type", overlay.base_format)
    for name in ("source", "backingStore"):
        element = old.find(name)
        if element is None:
            continue
        if name == "source" and source is not None:
            disk.replace(source, element)
        else:
            position = disk.find("source")
            disk.insert(0 if position is None else disk.index(position) + 1, element)


def words(xml: str) -> list[str]:
    """The document without its line breaks and indentation, for comparison. Pure."""
    return [line.strip() for line in _xml.text(_xml.parse(xml, "The domain XML")).split(">")]
