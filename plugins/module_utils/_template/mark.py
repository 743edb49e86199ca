# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The mark of a template: one element of our own in the metadata of its definition. Pure."""

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree

#: Not that of archives: libvirt keeps one element of each namespace.
NAMESPACE = "urn:kvmops:template:1"
PREFIX = "kvmops-template"
ELEMENT = "<template/>"
_TAG = "{%s}template" % NAMESPACE  # noqa: UP031 - braces in an f-string would hide the name


def is_marked(root: etree._Element) -> bool:
    """Whether a definition is that of a template."""
    return root.find(f"metadata/{_TAG}") is not None


def is_marked_xml(domain_xml: str) -> bool:
    """The same of a definition as text."""
    return is_marked(_xml.parse(domain_xml, "the definition of a VM"))


def put(root: etree._Element, marked: bool) -> None:
    """Gives a definition the mark, or takes it away."""
    metadata = root.find("metadata")
    if metadata is not None:
        for element in metadata.findall(_TAG):
            metadata.remove(element)
    if marked:
        if metadata is None:
            metadata = etree.Element("metadata")
            root.insert(0, metadata)
        etree.SubElement(metadata, _TAG, nsmap={PREFIX: NAMESPACE})
    elif metadata is not None and not len(metadata):
        root.remove(metadata)
