# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Safe XML: the only place of the collection that turns bytes into an element tree."""

from __future__ import annotations

from xml.parsers import expat

from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree

MAX_XML_BYTES = 16 * 2**20
MAX_NODES = 200_000
MAX_ATTRIBUTES = 512
MAX_TAG_BYTES = 256 * 2**10
_PIECE_BYTES = 64 * 2**10


def parse(
    data: bytes | str, what: str = "XML", limit_bytes: int = MAX_XML_BYTES, *, namespaces: bool = True
) -> etree._Element:
    """Root element of a document; no entities, no network, no DTD, no huge trees.

    ``namespaces`` False: prefixes that nobody has declared and namespaces that are no URIs are taken as they are.
    Raises HostileError for documents that are too large, too deep, carry a DOCTYPE or are not well-formed.
    """
    raw = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    if len(raw) > limit_bytes:
        raise HostileError(what, f"{len(raw)} bytes of XML are more than the {limit_bytes} allowed")
    _count_nodes(raw, what)
    parser = _parser(recover=False)
    try:
        return etree.fromstring(raw, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        if not namespaces and _only_namespaces(parser):
            parser = _parser(recover=True)
            root = etree.fromstring(raw, parser)
            if _only_namespaces(parser):
                return root
        raise HostileError(what, f"not well-formed XML ({error})") from error


def _parser(*, recover: bool) -> etree.XMLParser:
    return etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        huge_tree=False,
        recover=recover,
        remove_comments=False,
        remove_pis=True,
    )


def _only_namespaces(parser: etree.XMLParser) -> bool:
    """Whether a document has been found faulty, but for nothing else than its namespaces."""
    faults = list(parser.error_log)
    return bool(faults) and all(fault.domain == etree.ErrorDomains.NAMESPACE for fault in faults)


def parent_of(element: etree._Element) -> etree._Element:
    """The element's parent. Raises ValueError for a root."""
    parent = element.getparent()
    if parent is None:
        raise ValueError(f"<{element.tag}> is a root element")
    return parent


def text(root: etree._Element) -> str:
    """The element as a string without an XML declaration, as libvirt prints it."""
    return etree.tostring(root, encoding="unicode")


def _count_nodes(raw: bytes, what: str) -> None:
    """Refuses what would cost lxml memory or time without bound, before lxml sees it.

    Measured with libxml2 2.9: 16 MiB of empty elements become 560 MiB, one tag with 57,000 attributes takes 70 s.
    """
    nodes = 0

    def count(number: int) -> None:
        nonlocal nodes
        nodes += number
        if nodes > MAX_NODES:
            raise HostileError(what, f"more than {MAX_NODES} elements and attributes")

    def start(_name: str, attributes: list[str]) -> None:
        if len(attributes) > 2 * MAX_ATTRIBUTES:
            raise HostileError(what, f"an element with more than {MAX_ATTRIBUTES} attributes")
        count(1 + len(attributes) // 2)

    def doctype(*_declaration: object) -> None:
        raise HostileError(what, "a document type declaration has no place here")

    parser = expat.ParserCreate()
    parser.ordered_attributes = True
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = doctype
    parser.CommentHandler = lambda _text: count(1)
    parser.ProcessingInstructionHandler = lambda _target, _data: count(1)
    try:
        for begin in range(0, len(raw), _PIECE_BYTES):
            parser.Parse(raw[begin : begin + _PIECE_BYTES], False)
            if begin - parser.CurrentByteIndex > MAX_TAG_BYTES:
                raise HostileError(what, f"a tag of more than {MAX_TAG_BYTES} bytes")
        parser.Parse(b"", True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise HostileError(what, f"not well-formed XML ({error})") from error
