# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The mark in a restored VM's metadata: which point it came from, and how its files were left.

It makes the same restore a second time no change, and tells a killed restore from a finished one (recovery.py).
"""

from __future__ import annotations

import hashlib

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.config import NAMESPACE
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import DiskState, Mark
from ansible_collections.kvmops.backup.plugins.module_utils._restore.recovery import MARK

_PREFIX = "{%s}" % NAMESPACE  # noqa: UP031 - braces in an f-string would hide the name


def configuration_digest(configuration: Configuration) -> str:
    """What tells one point from another: the configuration's own digest; of a foreign one, over its XML and members."""
    if configuration.digest:
        return configuration.digest
    digest = hashlib.sha256(configuration.domain_xml.encode())
    for member in configuration.members:
        digest.update(f"\0{member.name}\0{member.size_bytes}".encode())
    return digest.hexdigest()


def strip(root: etree._Element) -> None:
    """Removes every element of our namespace from a definition's metadata."""
    metadata = root.find("metadata")
    if metadata is None:
        return
    for element in list(metadata):
        if isinstance(element.tag, str) and element.tag.startswith(_PREFIX):
            metadata.remove(element)
    if not len(metadata):
        root.remove(metadata)


def add(domain_xml: str, mark: Mark) -> str:
    """The definition with the mark in its metadata."""
    root = _xml.parse(domain_xml, "domain XML")
    metadata = root.find("metadata")
    if metadata is None:
        metadata = etree.Element("metadata")
        root.insert(0, metadata)
    restored = etree.SubElement(
        metadata,
        MARK,
        {
            "point": str(mark.point),
            "configuration": mark.configuration,
            "token": mark.token,
            **({"flat": "yes"} if mark.flat else {}),
        },
        nsmap={"kvmops": NAMESPACE},
    )
    for disk in mark.disks:
        etree.SubElement(
            restored,
            f"{_PREFIX}disk",
            {
                "target": disk.target,
                "path": disk.path,
                "format": disk.format,
                "inode": str(disk.inode),
                "size": str(disk.size_bytes),
                "mtime": str(disk.mtime_ns),
                **({} if disk.top else {"top": "no"}),
            },
        )
    return _xml.text(root)


def read(root: etree._Element) -> Mark | None:
    """The mark of a definition; None where there is none that makes sense."""
    restored = root.find(f"metadata/{MARK}")
    if restored is None:
        return None
    try:
        disks = tuple(
            DiskState(
                target=disk.get("target") or "",
                path=disk.get("path") or "",
                format=disk.get("format") or "",
                inode=int(disk.get("inode") or 0),
                size_bytes=int(disk.get("size") or 0),
                mtime_ns=int(disk.get("mtime") or 0),
                top=disk.get("top") != "no",
            )
            for disk in restored.findall(f"{_PREFIX}disk")
        )
        point = int(restored.get("point") or 0)
    except ValueError:
        return None
    return Mark(
        point,
        restored.get("configuration") or "",
        restored.get("token") or "",
        disks,
        flat=restored.get("flat") == "yes",
    )
