# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Archives made elsewhere: which member is what, told by the Domain XML, file names and image headers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Callable, Optional

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.tar import Entry
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError, KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ReadAt, probe

IMAGE_SUFFIXES = (".qcow2", ".snapshot", ".raw", ".img")
_ROLES = {".memory": Role.MEMORY, ".iso": Role.ISO, ".nvram": Role.NVRAM}
_NUMBERED = re.compile(r"^(.+)_(\d+)\.(?:qcow2|snapshot)$")


MAX_CONFIGURATIONS = 256
_CLOCK_S = 5  # a layer is frozen a moment after the point got its time
MAX_PAIRS = 20_000  # disks times images of one configuration: bounds the time to match them


@dataclass(frozen=True)
class _Disk:
    target: str
    path: str
    device: str


def _disks(configuration: Configuration) -> list[_Disk]:
    root = _xml.parse(configuration.domain_xml, f"configuration {configuration.member_name}")
    found = []
    for element in root.findall("devices/disk"):
        source, target = element.find("source"), element.find("target")
        attributes: dict[str, str] = {} if source is None else {str(key): str(value) for key, value in source.items()}
        path = attributes.get("file") or attributes.get("dev") or attributes.get("volume") or ""
        found.append(_Disk("" if target is None else target.get("dev") or "", path, element.get("device") or "disk"))
    return found


@dataclass(frozen=True)
class Images:
    """The disk images of an archive by member name, and why others cannot be told what they are."""

    good: dict[str, Member]
    bad: dict[str, str]


def images(entries: Iterable[Entry], read_at: Callable[[str], ReadAt]) -> Images:
    """Looks at the header of every member whose name is that of an image."""
    found: dict[str, Member] = {}
    bad: dict[str, str] = {}
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            try:
                info = probe(read_at(entry.name), entry.size_bytes)
            except KvmopsError as error:
                bad[entry.name] = str(error)
                continue
            backing = os.path.basename(info.backing_file)
            found[entry.name] = Member(
                entry.name,
                Role.LAYER if backing else Role.DISK,
                entry.size_bytes,
                virtual_size_bytes=info.virtual_size_bytes,
                image_format=info.format,
                original_format=info.format,
                parent=backing,
            )
    stems = {os.path.splitext(name)[0]: name for name in found}
    return Images({name: replace(m, parent=_parent(m, found, stems)) for name, m in found.items()}, bad)


def _parent(member: Member, images: dict[str, Member], stems: dict[str, str]) -> str:
    """The member that a layer stands on: the name in its header, else the one numbered before it."""
    if not member.parent:
        return ""
    number = _NUMBERED.match(member.name)
    candidates = [member.parent, stems.get(os.path.splitext(member.parent)[0], "")]
    if number and int(number.group(2)):
        before = f"{number.group(1)}_{int(number.group(2)) - 1}"
        candidates += [f"{before}.snapshot", f"{before}.qcow2"]
    return next((name for name in candidates if name in images and name != member.name), member.parent)


def _top(disk: _Disk, images: dict[str, Member]) -> Optional[str]:
    """The member that holds what `disk` showed last: by the name of its file, else by its target's name."""
    base = os.path.basename(disk.path)
    if base in images:
        return base
    same = {name for name in images if base and os.path.splitext(name)[0] == os.path.splitext(base)[0]}
    own = {n for n in images if disk.target and re.match(rf"{re.escape(disk.target)}(?:[._-]|$)", n)}
    for candidates in (same, own):
        tops = sorted(candidates - {images[name].parent for name in candidates})
        if len(tops) == 1:
            return tops[0]
    return None


def _top_then(top: str, images: dict[str, Member], written: dict[str, int], timestamp: int) -> Optional[str]:
    """Of a disk's layers, the one that an older point ended in: the highest that was not written to after it."""
    return next((m.name for m in reversed(_chain(top, images)) if written[m.name] <= timestamp + _CLOCK_S), None)


def _chain(top: str, images: dict[str, Member]) -> list[Member]:
    chain: dict[str, Member] = {}
    name = top
    while name in images and name not in chain:
        chain[name] = images[name]
        name = images[name].parent
    return list(reversed(chain.values()))


def complete(
    configuration: Configuration, entries: tuple[Entry, ...], found: Images, *, newest: bool = True
) -> Configuration:
    """The point with its member table, and a warning for each thing that could not be matched.

    `newest`: no other point of the archive is younger. An older one must not be given what was written after it.
    """
    images = found.good
    disks = _disks(configuration)
    if len(disks) * len(images) > MAX_PAIRS:
        raise HostileError(
            f"configuration {configuration.member_name}", f"it has {len(disks)} disks for {len(images)} images"
        )
    members: list[Member] = []
    warnings = [f"member {name} is left out: {why}" for name, why in found.bad.items()]
    tops = {disk.target: _top(disk, images) for disk in disks if disk.device == "disk"}
    open_disks = [disk for disk in disks if disk.device == "disk" and tops[disk.target] is None]
    used = {member.name for top in tops.values() if top for member in _chain(top, images)}
    free = sorted(set(images) - used - {images[name].parent for name in images})
    if open_disks and len(open_disks) == len(free):
        for disk, name in zip(open_disks, free):
            tops[disk.target] = name
            warnings.append(f"disk {disk.target} ({disk.path}) was matched with {name} by order only")
    written = {entry.name: entry.mtime for entry in entries}
    for disk in disks if not newest else ():
        top = tops.get(disk.target)
        if top and top != os.path.basename(disk.path) and len(_chain(top, images)) > 1:
            tops[disk.target] = then = _top_then(top, images, written, configuration.timestamp)
            how = f"was matched with {then} by time only" if then else "has no layer that is old enough for this point"
            warnings.append(f"disk {disk.target} ({disk.path}) {how}")
    for disk in disks:
        top = tops.get(disk.target)
        if top:
            chain = _chain(top, images)
            members += [
                replace(m, target=disk.target, active=m.name == top, former_path=disk.path if m.name == top else "")
                for m in chain
            ]
        elif disk.device == "disk":
            warnings.append(f"disk {disk.target} ({disk.path or 'no file'}) is not in the archive")
    for entry in entries:
        name = entry.name
        role = _ROLES.get(os.path.splitext(name)[1].lower())
        if role is Role.ISO:
            member = _iso(entry, disks)
            members.append(member)
        elif role:
            members.append(Member(name, role, entry.size_bytes))
    return replace(configuration, members=tuple(members), warnings=tuple(warnings))


def _iso(entry: Entry, disks: list[_Disk]) -> Member:
    """A CD image, with the target of the CD drive that had it in."""
    for disk in disks:
        base = os.path.basename(disk.path)
        if disk.device == "cdrom" and base and re.fullmatch(rf"(?:\d+_)?{re.escape(base)}", entry.name):
            return Member(
                entry.name,
                Role.ISO,
                entry.size_bytes,
                target=disk.target,
                image_format="raw",
                original_format="raw",
                former_path=disk.path,
                active=True,
            )
    return Member(entry.name, Role.ISO, entry.size_bytes, image_format="raw", original_format="raw")
