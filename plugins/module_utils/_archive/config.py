# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Configuration XML of a point: a libvirt Domain XML with one element of our own under <metadata>.

See docs/FORMAT.md, "Configuration XML", for the element, attribute by attribute.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import replace
from typing import Optional

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive import digests, names, tar
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    Configuration,
    Consistency,
    Conversion,
    Member,
    Role,
    Skipped,
    SnapshotNode,
    TemplateDisk,
    TemplateRequirement,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    DamagedError,
    HostileError,
    RefusedError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice

MAX_BYTES = 8 * 2**20
MAX_TEXT = 4 * 2**20  # of a definition or a snapshot: what libvirt takes
MAX_NAME = 1024
NAMESPACE = "urn:kvmops:backup:1"
_PREFIX = "{" + NAMESPACE + "}"
_ROOT = _PREFIX + "backup"
_NO_DIGEST = b"0" * 64
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _child(parent: etree._Element, tag: str, attributes: dict[str, str], text: str = "") -> etree._Element:
    element = etree.SubElement(parent, _PREFIX + tag, {key: value for key, value in attributes.items() if value})
    if text:
        element.text = text
    return element


def _free(text: str) -> str:
    """A text for people; what XML cannot hold (control characters, broken Unicode) becomes U+FFFD."""
    return _NOT_XML.sub("\ufffd", text)


def encode(configuration: Configuration) -> tuple[bytes, str]:
    """The member's bytes, padded with blanks to a multiple of 4096, and their digest.

    `member_name` and `digest` of the argument are not looked at; both are known only once the bytes are. Raises RefusedError for
    what no reader would take: a name or path that XML cannot hold, or more than 8 MiB.
    """
    try:
        data, digest = _encode(configuration)
    except ValueError as error:
        raise RefusedError(
            f"The configuration of {_free(configuration.vm_name)}",
            f"a name or path in it cannot be written as XML ({error})",
            "Rename the file or the snapshot with the control character in its name.",
        ) from error
    if len(data) > MAX_BYTES:
        raise RefusedError(
            f"The configuration of {configuration.vm_name}",
            f"it has {len(data)} bytes, readers take {MAX_BYTES}",
            "Delete snapshots of the VM; each is in it with two definitions.",
        )
    return data, digest


def _encode(configuration: Configuration) -> tuple[bytes, str]:
    root = _xml.parse(configuration.domain_xml, f"domain XML of {configuration.vm_name}")
    metadata = root.find("metadata")
    if metadata is None:
        metadata = etree.SubElement(root, "metadata")
    for old in metadata.findall(_ROOT):
        metadata.remove(old)
    placeholder = secrets.token_hex(32)
    own = etree.SubElement(
        metadata,
        _ROOT,
        {
            "version": str(FORMAT_VERSION),
            "tool": configuration.tool_version,
            "created": configuration.created,
            "point": str(configuration.timestamp),
            "mode": configuration.mode,
            "consistency": configuration.consistency.value,
            "incrementable": _yes(configuration.incrementable),
            "template": _yes(configuration.template),
            "autostart": _yes(configuration.autostart),
            "digest-algorithm": configuration.digest_algorithm,
            "digest": placeholder,
        },
        nsmap={"kvmops": NAMESPACE},
    )
    members = _child(
        own,
        "members",
        {
            "chunk": str(CHUNK_BYTES),
            "digests": configuration.digests_member,
            "digests-digest": configuration.digests_digest,
        },
    )
    for member in configuration.members:
        _child(
            members,
            "member",
            {
                "name": member.name,
                "role": member.role.value,
                "target": member.target,
                "size": str(member.size_bytes),
                "virtual-size": str(member.virtual_size_bytes or ""),
                "format": member.image_format,
                "original-format": member.original_format,
                "parent": member.parent,
                "active": _yes(member.active),
                "former-path": member.former_path,
                "pool": member.pool,
                "template-disk": str(member.template_disk or ""),
                "digest": member.digest,
            },
        )
    if configuration.requires:
        required = configuration.requires
        _disks(_child(own, "requires", {"uuid": required.uuid, "name": required.name}), required.disks)
    if configuration.provides:
        _disks(_child(own, "provides", {}), configuration.provides)
    for state in configuration.snapshots:
        _child(
            own, "snapshot", {"name": state.name, "parent": state.parent, "current": _yes(state.current)}, state.xml
        )
    for skipped in configuration.skipped:
        _child(own, "skipped", {"device": skipped.device, "reason": _free(skipped.reason)})
    for warning in configuration.warnings:
        _child(own, "warning", {}, _free(warning.text))
    if configuration.parent_digest:
        _child(own, "parent", {"point": str(configuration.parent_point), "digest": configuration.parent_digest})
    if configuration.conversion:
        _encode_conversion(own, configuration.conversion)
    if configuration.live_xml:
        _child(own, "live", {}, configuration.live_xml)
    data = etree.tostring(root, encoding="utf-8") + b"\n"
    data += b" " * (tar.round_up(len(data), tar.ALIGN) - len(data))
    digest = hashlib.sha256(data.replace(placeholder.encode(), _NO_DIGEST)).hexdigest()
    return data.replace(placeholder.encode(), digest.encode()), digest


def _encode_conversion(own: etree._Element, conversion: Conversion) -> None:
    facts = {"source": conversion.source, "descriptor": conversion.descriptor, "options": conversion.options}
    element = _child(own, "conversion", {key: _free(value) for key, value in facts.items()})
    for name, algorithm, digest in conversion.files:
        _child(element, "file", {"name": _free(name), "algorithm": algorithm, "digest": digest})
    for former, here, note in conversion.replaced:
        _child(element, "replaced", {"from": _free(former), "to": _free(here), "note": _free(note)})
    for item, note in conversion.ignored:
        _child(element, "ignored", {"item": _free(item), "note": _free(note)})


def _conversion(own: etree._Element) -> Optional[Conversion]:
    element = own.find(_PREFIX + "conversion")
    if element is None:
        return None

    def rows(tag: str, *names: str) -> list[tuple[str, ...]]:
        return [tuple(each.get(name) or "" for name in names) for each in element.findall(_PREFIX + tag)]

    return Conversion(
        element.get("source") or "",
        element.get("descriptor") or "",
        element.get("options") or "",
        tuple((name, algorithm, digest) for name, algorithm, digest in rows("file", "name", "algorithm", "digest")),
        tuple((former, here, note) for former, here, note in rows("replaced", "from", "to", "note")),
        tuple((item, note) for item, note in rows("ignored", "item", "note")),
    )


def _disks(parent: etree._Element, disks: Sequence[TemplateDisk]) -> None:
    for disk in disks:
        size = str(disk.virtual_size_bytes)
        _child(parent, "template-disk", {"target": disk.target, "virtual-size": size, "digest": disk.digest})


def _number(element: etree._Element, attribute: str, what: str) -> int:
    value = element.get(attribute) or "0"
    if not value.isascii() or not value.isdigit() or len(value) > 20:
        raise HostileError(what, f"{attribute}={value[:30]!r} is not a number")
    return int(value)


def _member(element: etree._Element, what: str) -> Member:
    try:
        role = Role(element.get("role"))
    except ValueError as error:
        raise HostileError(what, f"the role {element.get('role')!r} of a member is not known") from error
    name = names.checked_member(element.get("name") or "")
    if not name:
        raise HostileError(what, "a member of its table has no name")
    return Member(
        name=name,
        role=role,
        size_bytes=_number(element, "size", what),
        digest=element.get("digest") or "",
        target=element.get("target") or "",
        virtual_size_bytes=_number(element, "virtual-size", what),
        image_format=element.get("format") or "",
        original_format=element.get("original-format") or "",
        parent=element.get("parent") or "",
        active=element.get("active") == "yes",
        former_path=element.get("former-path") or "",
        pool=element.get("pool") or "",
        template_disk=_number(element, "template-disk", what),
    )


def _template_disks(parent: Optional[etree._Element], what: str) -> tuple[TemplateDisk, ...]:
    if parent is None:
        return ()
    return tuple(
        TemplateDisk(each.get("target") or "", _number(each, "virtual-size", what), each.get("digest") or "")
        for each in parent.findall(_PREFIX + "template-disk")
    )


def _requirement(own: etree._Element, table: Sequence[Member], what: str) -> Optional[TemplateRequirement]:
    element = own.find(_PREFIX + "requires")
    disks = _template_disks(element, what)
    if any(member.template_disk > len(disks) or (member.template_disk and member.parent) for member in table):
        raise HostileError(what, "a member stands on a disk of a template that it does not name")
    if element is None:
        return None
    return TemplateRequirement(element.get("uuid") or "", element.get("name") or "", disks)


def _is_forest(parents: dict[str, str]) -> bool:
    """Whether every parent is there and no chain runs in a circle."""
    rooted = {""}
    for name in parents:
        chain: dict[str, None] = {}
        while name not in rooted:
            if name in chain or name not in parents:
                return False
            chain[name] = None
            name = parents[name]
        rooted.update(chain)
    return True


def decode(data: bytes, member_name: str, mtime: int = 0) -> Optional[Configuration]:
    """The point that a configuration member describes; None for XML that is no libvirt domain.

    Without our element the result has `format_version` 0 and no members. Raises DamagedError where the digest does not fit,
    HostileError for XML that no honest archive holds, ArchiveError for versions of the future.
    """
    what = f"configuration {member_name}"
    root = _xml.parse(data, what, MAX_BYTES)
    if root.tag != "domain":
        return None
    if any(len(element.text or "") > MAX_TEXT for element in root.iter()):
        raise HostileError(what, f"a text in it is longer than {MAX_TEXT} characters")
    name, uuid = root.findtext("name") or "", root.findtext("uuid") or ""
    if len(name) > MAX_NAME or len(uuid) > MAX_NAME:
        raise HostileError(what, f"a name in it is longer than {MAX_NAME} characters")
    found = root.findall(f"metadata/{_ROOT}")
    timestamp = names.point_of(member_name)
    if not found:
        return Configuration(
            timestamp=mtime if timestamp is None else timestamp,
            domain_xml=_xml.text(root),
            vm_name=name,
            vm_uuid=uuid,
            members=(),
            format_version=0,
            member_name=member_name,
        )
    own = found[0]
    if _number(own, "version", what) != FORMAT_VERSION:
        raise ArchiveError(
            what,
            f"it is of format version {own.get('version')}, this collection reads {FORMAT_VERSION}",
            "Use a newer release.",
        )
    digest = own.get("digest") or ""
    if (
        len(found) != 1
        or len(digest) != 64
        or hashlib.sha256(data.replace(digest.encode(), _NO_DIGEST)).hexdigest() != digest
    ):
        raise DamagedError(what, "its bytes do not fit its own digest", member=member_name, length=len(data))
    if own.get("digest-algorithm") not in digests.ALGORITHMS:
        raise ArchiveError(
            what,
            f"this release does not know its digest algorithm {own.get('digest-algorithm')}",
            "Use a newer release.",
        )
    if timestamp != _number(own, "point", what):
        raise HostileError(what, "its name and its content do not fit each other")
    configuration = _decode_own(own, what)
    for element in found:
        parent = _xml.parent_of(element)
        parent.remove(element)
        if not len(parent):
            root.remove(parent)
    return replace(
        configuration, domain_xml=_xml.text(root), vm_name=name, vm_uuid=uuid, member_name=member_name, digest=digest
    )


def of_file(path: str) -> tuple[Configuration, int]:
    """The definition in a file of its own, and the file's size. Raises ArchiveError where there is none, else as `decode`."""
    what = f"The configuration {path}"
    try:
        # Not blocking: a FIFO must not make us wait for its writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArchiveError(what, "it is not a regular file")
            data = file.read(_xml.MAX_XML_BYTES + 1)
    except OSError as error:
        raise ArchiveError(what, f"it cannot be read ({error.strerror})") from error
    point = decode(data, os.path.basename(path), int(status.st_mtime))
    if point is None:
        raise ArchiveError(what, "it is not the definition of a VM", "A libvirt domain XML begins with <domain>.")
    return point, status.st_size


def _decode_own(own: etree._Element, what: str) -> Configuration:
    members = own.find(_PREFIX + "members")
    if members is None or _number(members, "chunk", what) != CHUNK_BYTES:
        raise HostileError(what, "its member table is missing or of another chunk size")
    try:
        consistency = Consistency(own.get("consistency"))
    except ValueError as error:
        raise HostileError(what, f"the consistency {own.get('consistency')!r} is not known") from error
    parent = own.find(_PREFIX + "parent")
    table = tuple(_member(element, what) for element in members)
    if not _is_forest({member.name: member.parent for member in table}) or len({m.name for m in table}) != len(table):
        raise HostileError(what, "its member table contradicts itself")
    return Configuration(
        timestamp=_number(own, "point", what),
        domain_xml="",
        vm_name="",
        vm_uuid="",
        members=table,
        consistency=consistency,
        live_xml=own.findtext(_PREFIX + "live") or "",
        mode=own.get("mode") or "",
        incrementable=own.get("incrementable") == "yes",
        template=own.get("template") == "yes",
        autostart=own.get("autostart") == "yes",
        requires=_requirement(own, table, what),
        provides=_template_disks(own.find(_PREFIX + "provides"), what),
        snapshots=tuple(
            SnapshotNode(e.get("name") or "", e.text or "", e.get("parent") or "", e.get("current") == "yes")
            for e in own.iterchildren(_PREFIX + "snapshot", _PREFIX + "saved-state")  # the latter from before 0.1.0
        ),
        skipped=tuple(Skipped(e.get("device") or "", e.get("reason") or "") for e in own.findall(_PREFIX + "skipped")),
        warnings=tuple(Notice(Code.RECORDED, e.text or "") for e in own.findall(_PREFIX + "warning")),
        created=own.get("created") or "",
        tool_version=own.get("tool") or "",
        digest_algorithm=own.get("digest-algorithm") or "",
        digests_member=members.get("digests") or "",
        digests_digest=members.get("digests-digest") or "",
        conversion=_conversion(own),
        parent_point=_number(parent, "point", what) if parent is not None else 0,
        parent_digest=(parent.get("digest") or "") if parent is not None else "",
    )
