# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Safe XML: the only place of the collection that turns bytes into an element tree."""

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree

MAX_XML_BYTES = 16 * 2**20


def parse(data: bytes | str, what: str = "XML", limit_bytes: int = MAX_XML_BYTES) -> etree._Element:
    """Root element of a document; no entities, no network, no DTD, no huge trees.

    Raises HostileError for documents that are too large, too deep, carry a DOCTYPE or are not well-formed.
    """
    raw = data.encode() if isinstance(data, str) else data
    if len(raw) > limit_bytes:
        raise HostileError(what, f"{len(raw)} bytes of XML are more than the {limit_bytes} allowed")
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        huge_tree=False,
        remove_comments=False,
        remove_pis=True,
    )
    try:
        root = etree.fromstring(raw, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise HostileError(what, f"not well-formed XML ({error})") from error
    if root.getroottree().docinfo.doctype:  # type: ignore[union-attr]
        raise HostileError(what, "a document type declaration has no place here")
    return root


def text(root: etree._Element) -> str:
    """The element as a string without an XML declaration, as libvirt prints it."""
    return etree.tostring(root, encoding="unicode")
