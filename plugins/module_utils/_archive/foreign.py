# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Archives made elsewhere: which member is what, told by the Domain XML, file names and image headers."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Callable, Optional

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.tar import Entry
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError, KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._image.layers import named_file
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import QCOW2_MAGIC, ReadAt, probe

IMAGE_SUFFIXES = (".qcow2", ".snapshot", ".raw", ".img")
_ROLES = {".memory": Role.MEMORY, ".iso": Role.ISO, ".nvram": Role.NVRAM}
_NO_IMAGES = (*_ROLES, ".xml", ".digests")
_NUMBERED = re.compile(r"^(.+)_(\d+)\.(?:qcow2|snapshot)$")


MAX_CONFIGURATIONS = 256
_CLOCK_S = 5  # a layer is frozen a moment after the point got its time
MAX_PAIRS = 20_000  # disks times images of one configuration: bounds the time to match them


@dataclass(frozen=True)
class _Disk:
    target: str
    path: str
    device: str
    format: str


def _disks(configuration: Configuration) -> list[_Disk]:
    root = _xml.parse(configuration.domain_xml, f"configuration {configuration.member_name}")
    found = []
    for element in root.findall("devices/disk"):
        source, target, driver = element.find("source"), element.find("target"), element.find("driver")
        attributes: dict[str, str] = {} if source is None else {str(key): str(value) for key, value in source.items()}
        path = attributes.get("file") or attributes.get("dev") or attributes.get("volume") or ""
        name = "" if target is None else target.get("dev") or ""
        image_format = "" if driver is None else driver.get("type") or ""
        found.append(_Disk(name, path, element.get("device") or "disk", image_format))
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


def _top(disk: _Disk, images: dict[str, Member]) -> Optional[str]:
    """The member that holds what `disk` showed last: by the name of its file, else by its target's name."""
    if os.path.basename(disk.path) in images:
        return os.path.basename(disk.path)
    exact = [name for name in images if _is_named(name, disk.path)]
    if len(exact) == 1:
        return exact[0]
    base = os.path.splitext(os.path.basename(disk.path))[0]
    same = {name for name in images if base and os.path.splitext(name)[0] == base}
    own = {n for n in images if disk.target and re.match(rf"{re.escape(disk.target)}(?:[._-]|$)", n)}
    return _highest(same, images) or _highest(own, images)


def _is_named(name: str, path: str) -> bool:
    """Whether a member has the name of a file, or that with a suffix of its own: vm.state1.snapshot of /vms/vm.state1."""
    base = os.path.basename(path)
    return base != "" and (name == base or ("." in base and os.path.splitext(name)[0] == base))


def _is_guess(top: str, disk: _Disk, images: dict[str, Member]) -> bool:
    """Whether only the beginning of the file's name told the member of a disk, and its suffix is none of an image.

    web01.monday may be an overlay on web01.qcow2, which is older then.
    """
    stem, suffix = os.path.splitext(os.path.basename(disk.path))
    if _is_named(top, disk.path) or suffix.lower() in ("", *IMAGE_SUFFIXES):
        return False
    return any(os.path.splitext(member.name)[0] == stem for member in _chain(top, images))


def _highest(candidates: set[str], images: dict[str, Member]) -> Optional[str]:
    """The one image that stands on all the others of a disk, also where its name is of another kind than theirs."""
    tops = sorted(candidates - {images[name].parent for name in candidates})
    if len(tops) != 1:
        return None
    above: dict[str, list[str]] = {}
    for name, member in images.items():
        above.setdefault(member.parent, []).append(name)
    seen: set[str] = set()
    while len(tops) == 1 and tops[0] not in seen:
        seen.add(tops[0])
        tops = above.get(tops[0], tops)
    return tops[0] if len(tops) == 1 else None


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
    for disk in disks:
        top = tops.get(disk.target)
        if not top:
            continue
        if not newest and not _is_named(top, disk.path) and len(_chain(top, images)) > 1:
            tops[disk.target] = then = _top_then(top, images, written, configuration.timestamp)
            how = f"was matched with {then} by time only" if then else "has no layer that is old enough for this point"
            warnings.append(f"disk {disk.target} ({disk.path}) {how}")
        elif _is_guess(top, disk, images):
            how = f"was matched with {top} by the beginning of its name only; it may be newer than that"
            warnings.append(f"disk {disk.target} ({disk.path}) {how}")
    for disk in disks:
        top = tops.get(disk.target)
        if top:
            chain = _chain(top, images)
            if chain[0].parent and chain[0].parent not in images:
                warnings.append(f"{chain[0].name} needs {chain[0].parent}, which is not in the archive")
            if len(chain) == 1 and disk.format == "raw":  # a raw disk is stored as qcow2 there too
                chain = [replace(chain[0], original_format="raw")]
            members += [
                replace(m, target=disk.target, active=m.name == top, former_path=disk.path if m.name == top else "")
                for m in chain
            ]
        elif disk.device == "disk":
            warnings.append(f"disk {disk.target} ({disk.path or 'no file'}) is not in the archive")
    shown = {top for top in tops.values() if top}
    for member in images.values() if newest else ():
        if member.parent in shown and member.name not in shown:
            warnings.append(f"{member.name} stands on {member.parent}, which the configuration shows, and is left out")
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
