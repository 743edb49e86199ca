# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Archives made elsewhere: which member is what, told by the Domain XML, file names and image headers."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Callable, Optional

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.pairing import (
    IMAGE_SUFFIXES,
    DefinedDisk,
    chain,
    pair,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.tar import Entry
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError, KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._image.layers import named_file
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import QCOW2_MAGIC, ReadAt, probe
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

_ROLES = {".memory": Role.MEMORY, ".iso": Role.ISO, ".nvram": Role.NVRAM}
_NO_IMAGES = (*_ROLES, ".xml", ".digests")
_NUMBERED = re.compile(r"^(.+)_(\d+)\.(?:qcow2|snapshot)$")


MAX_CONFIGURATIONS = 256
_CLOCK_S = 5  # a layer is frozen a moment after the point got its time
MAX_PAIRS = 20_000  # disks times images of one configuration: bounds the time to match them


def _disks(configuration: Configuration) -> list[DefinedDisk]:
    root = _xml.parse(configuration.domain_xml, f"configuration {configuration.member_name}")
    found = []
    for element in root.findall("devices/disk"):
        source, target, driver = element.find("source"), element.find("target"), element.find("driver")
        attributes: dict[str, str] = {} if source is None else {str(key): str(value) for key, value in source.items()}
        path = attributes.get("file") or attributes.get("dev") or attributes.get("volume") or ""
        name = "" if target is None else target.get("dev") or ""
        image_format = "" if driver is None else driver.get("type") or ""
        network = attributes.get("name", "")
        found.append(DefinedDisk(name, path, element.get("device") or "disk", image_format, network))
    return found


@dataclass(frozen=True)
class Images:
    """The disk images of an archive by member name, and why others cannot be told what they are."""

    good: dict[str, Member]
    bad: dict[str, str]


def is_image(name: str, magic: Callable[[], bytes]) -> bool:
    """Whether a member is to be looked at as an image: by its name, else by its first 4 bytes (`magic`).

    libvirt calls the overlay of web01.qcow2 web01.STATE, and a disk may have no suffix at all.
    """
    suffix = os.path.splitext(name)[1].lower()
    return suffix in IMAGE_SUFFIXES or (suffix not in _NO_IMAGES and magic() == QCOW2_MAGIC)


def images(entries: Iterable[Entry], read_at: Callable[[str], ReadAt]) -> Images:
    """Looks at the header of every member that is an image by its name or its first bytes."""
    found: dict[str, Member] = {}
    bad: dict[str, str] = {}
    for entry in entries:
        read = read_at(entry.name)
        try:
            if not is_image(entry.name, functools.partial(read, 0, len(QCOW2_MAGIC))):
                continue
            info = probe(read, entry.size_bytes)
        except KvmopsError as error:
            bad[entry.name] = str(error)
            continue
        backing = os.path.basename(named_file(info.backing_file))
        found[entry.name] = Member(
            entry.name,
            Role.LAYER if backing else Role.DISK,
            entry.size_bytes,
            virtual_size_bytes=info.virtual_size_bytes,
            image_format=info.format,
            original_format=info.format,
            parent=backing,
        )
    stems: dict[str, list[str]] = {}
    for name in found:
        stems.setdefault(os.path.splitext(name)[0], []).append(name)
    return Images({name: replace(m, parent=_parent(m, found, stems)) for name, m in found.items()}, bad)


def _parent(member: Member, images: dict[str, Member], stems: dict[str, list[str]]) -> str:
    """The member that a layer stands on: the name in its header, else the one numbered before it."""
    if not member.parent:
        return ""
    stem, suffix = os.path.splitext(member.parent)
    number = _NUMBERED.match(member.name)
    candidates = [member.parent]
    # vm.state1 is another file than vm.qcow2, but vm.img may have become it
    for named in (member.parent, stem) if suffix.lower() in IMAGE_SUFFIXES else (member.parent,):
        others = [name for name in stems.get(named, ())[:3] if name != member.name]
        candidates += others if len(others) == 1 else []
    if number and int(number.group(2)):
        before = f"{number.group(1)}_{int(number.group(2)) - 1}"
        candidates += [f"{before}.snapshot", f"{before}.qcow2"]
    return next((name for name in candidates if name in images and name != member.name), member.parent)


def _top_then(layers: list[Member], written: dict[str, int], timestamp: int) -> Optional[str]:
    """Of a disk's layers, the one that an older point ended in: the highest that was not written to after it."""
    return next((m.name for m in reversed(layers) if written[m.name] <= timestamp + _CLOCK_S), None)


@dataclass(frozen=True)
class Completed:
    """A point with its member table. `undecided`: why the images of some disks are not known, "" for none such."""

    point: Configuration
    undecided: str = ""


def complete(
    configuration: Configuration,
    entries: tuple[Entry, ...],
    found: Images,
    *,
    newest: bool = True,
    said: Optional[Mapping[str, str]] = None,
) -> Completed:
    """The point with its member table, and a warning for each thing that could not be matched.

    `newest`: no other point of the archive is younger. An older one must not be given what was written after it.
    `said`: the image of a disk, by target, as the user says it; "" for none. Raises RefusedError where that cannot be.
    """
    images, said = found.good, said or {}
    disks = _disks(configuration)
    if len(disks) * len(images) > MAX_PAIRS:
        raise HostileError(
            f"configuration {configuration.member_name}", f"it has {len(disks)} disks for {len(images)} images"
        )
    own = [disk for disk in disks if disk.device == "disk"]
    _check_said(said, own, found)
    members: list[Member] = []
    warnings = [Notice(Code.LEFT_OUT, f"member {name} is left out: {why}") for name, why in found.bad.items()]
    pairs = pair(own, images, said)
    warnings += pairs.warnings
    undecided = _undecided(pairs.undecided, [images[name] for name in pairs.choices])
    warnings += [Notice(Code.UNDECIDED, f"{undecided}; a restore has to be told by disk_images")] if undecided else []
    written = {entry.name: entry.mtime for entry in entries}
    for disk in own:
        top = pairs.tops.get(disk.target)
        layers = chain(top, images) if top else []
        if top and not newest and disk.target not in {*pairs.named, *said} and len(layers) > 1:
            then = _top_then(layers, written, configuration.timestamp)
            if then:
                pairs.tops[disk.target] = then
                code, how = Code.MATCHED_BY_GUESS, f"was matched with {then} by time only"
            else:
                del pairs.tops[disk.target]
                code, how = Code.LEFT_OUT, "has no layer that is old enough for this point"
            warnings.append(Notice(code, f"disk {disk} {how}"))
    for disk in own:
        top = pairs.tops.get(disk.target)
        if top:
            layers = chain(top, images)
            if layers[0].parent and layers[0].parent not in images:
                text = f"{layers[0].name} needs {layers[0].parent}, which is not in the archive"
                warnings.append(Notice(Code.LEFT_OUT, text))
            if len(layers) == 1 and disk.format == "raw":  # a raw disk is stored as qcow2 there too
                layers = [replace(layers[0], original_format="raw")]
            members += [
                replace(m, target=disk.target, active=m.name == top, former_path=disk.path if m.name == top else "")
                for m in layers
            ]
        elif disk not in pairs.undecided:
            warnings.append(Notice(Code.LEFT_OUT, f"disk {disk} is not in the archive"))
    shown = set(pairs.tops.values())
    for member in images.values() if newest else ():
        if member.parent in shown and member.name not in shown:
            text = f"{member.name} stands on {member.parent}, which the configuration shows, and is left out"
            warnings.append(Notice(Code.LEFT_OUT, text))
    for entry in entries:
        name = entry.name
        role = _ROLES.get(os.path.splitext(name)[1].lower())
        if role is Role.ISO:
            member = _iso(entry, disks)
            members.append(member)
        elif role:
            members.append(Member(name, role, entry.size_bytes))
    return Completed(replace(configuration, members=tuple(members), warnings=tuple(warnings)), undecided)


def _check_said(said: Mapping[str, str], disks: list[DefinedDisk], found: Images) -> None:
    """Raises RefusedError for pairs of disks and images that cannot be."""
    there = ", ".join(found.good) or "none"
    for target, name in said.items():
        if target not in {disk.target for disk in disks}:
            known = ", ".join(disk.target for disk in disks)
            raise RefusedError("Option disk_images", f"the VM has no disk {target}", f"It has {known}.")
        if name and name not in found.good:
            why = found.bad.get(name) or "the archive has no such image"
            raise RefusedError("Option disk_images", f"{name} for {target}: {why}", f"The images are: {there}.")
        others = [other for other, its in said.items() if its == name and other != target]
        if name and others:
            raise RefusedError("Option disk_images", f"{name} is named for {target} and {others[0]}", "Name one each.")


def _undecided(disks: list[DefinedDisk], choices: list[Member]) -> str:
    if not disks:
        return ""
    told = " or ".join(f"{each.name} ({each.image_format}, {human_bytes(each.virtual_size_bytes)})" for each in choices)
    return f"nothing tells which image is that of disk {' and '.join(map(str, disks))}: {told}"


def _iso(entry: Entry, disks: list[DefinedDisk]) -> Member:
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
