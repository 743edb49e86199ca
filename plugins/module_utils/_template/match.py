# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which template of this host is the one that a thin clone needs, or why there is none. Pure but for the digests it asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Optional

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import TemplateRequirement
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError
from ansible_collections.kvmops.backup.plugins.module_utils._template.find import BaseDisk, Template
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

#: Digest of a disk's content; None: not known without reading it.
DigestOf = Callable[[BaseDisk], Optional[str]]
_UNREADABLE = ""


class Mismatch(str, Enum):
    """Why a thin clone cannot stand on what this host has."""

    NO_TEMPLATE = "no template"
    DIFFERS = "template differs"
    DISKS = "disks do not correspond"


@dataclass(frozen=True)
class Match:
    """`template` fits where `mismatch` is None, unless `unchecked`: then only its content is not known.

    `text`: a clause about the mismatch; it begins with the words of `mismatch`.
    """

    template: Template | None
    mismatch: Mismatch | None = None
    text: str = ""
    unchecked: bool = False


def match(required: TemplateRequirement, templates: Sequence[Template], digest_of: DigestOf) -> Match:
    """Names and uuids do not decide; they tell which of several that do not fit is meant."""

    def read(disk: BaseDisk) -> str | None:
        try:
            return digest_of(disk)
        except ImageError:  # one of several templates, such as one on a template that runs
            return _UNREADABLE

    judged = [_judge(required, template, read) for template in sorted(templates, key=_nearness(required))]
    for found in judged:
        if found.mismatch is None and not found.unchecked:
            return found
    for found in judged:
        if found.unchecked:
            meant = judged[0].template
            if judged[0].mismatch and meant and (meant.uuid == required.uuid or meant.name == required.name):
                return replace(judged[0], text=f"{judged[0].text}; {found.text}")
            return found
    for found in judged:
        template = found.template
        if template and (
            template.uuid == required.uuid or template.name == required.name or _shares(required, template, read)
        ):
            return found
    return Match(
        None,
        Mismatch.NO_TEMPLATE,
        f"{Mismatch.NO_TEMPLATE.value}: {required.name} ({required.uuid}) is not on this host, or it is not marked as a template",
    )


def _nearness(required: TemplateRequirement) -> Callable[[Template], tuple[bool, bool, str]]:
    return lambda template: (template.uuid != required.uuid, template.name != required.name, template.uuid)


def _judge(required: TemplateRequirement, template: Template, digest_of: DigestOf) -> Match:
    def no(mismatch: Mismatch, why: str) -> Match:
        return Match(template, mismatch, f"{mismatch.value}: the template {template.name} {why}")

    if len(template.disks) != len(required.disks):
        count = "1 disk" if len(template.disks) == 1 else f"{len(template.disks)} disks"
        return no(Mismatch.DISKS, f"has {count}, {len(required.disks)} required")
    unread = [disk for disk in template.disks if not disk.virtual_size_bytes]
    if unread:
        return no(Mismatch.DIFFERS, f"has lost its disk {unread[0].target}: {unread[0].path or 'it'} cannot be read")
    here = [disk.virtual_size_bytes for disk in template.disks]
    there = [disk.virtual_size_bytes for disk in required.disks]
    if here != there:
        if sorted(here) == sorted(there):
            return no(Mismatch.DISKS, "has its disks in another order")
        number = next(n for n, sizes in enumerate(zip(here, there)) if sizes[0] != sizes[1])
        sizes = f"{human_bytes(here[number])}, {human_bytes(there[number])} are required"
        return no(Mismatch.DIFFERS, f"has another disk {template.disks[number].target}: it has {sizes}")
    if template.running:
        return no(Mismatch.DIFFERS, "is running, so what it holds is not what it was")
    if template.suspended:
        return no(Mismatch.DIFFERS, "has a managed-save image, so it is in the middle of its work")
    if template.snapshots:
        return no(Mismatch.DIFFERS, "has snapshots, and nothing can stand on disks that these may change")
    found = [digest_of(disk) for disk in template.disks]
    if None in found:
        text = f"whether the template {template.name} is still the one it needs was not checked here"
        return Match(template, text=text, unchecked=True)
    if _UNREADABLE in found:
        return no(Mismatch.DIFFERS, "cannot be read now: what it stands on is in use or not there")
    wanted = [disk.digest for disk in required.disks]
    if found == wanted:
        return Match(template)
    if sorted(map(str, found)) == sorted(wanted):
        return no(Mismatch.DISKS, "has its disks in another order")
    changed = ", ".join(disk.target for disk, one, other in zip(template.disks, found, wanted) if one != other)
    return no(Mismatch.DIFFERS, f"has other content on {changed} than when the backup was made")


def _shares(required: TemplateRequirement, template: Template, digest_of: DigestOf) -> bool:
    """Whether one of the disks is what is required: then it is this template, whatever it is called by now."""
    wanted = {(disk.virtual_size_bytes, disk.digest) for disk in required.disks}
    sizes = {size for size, _digest in wanted}
    return any((d.virtual_size_bytes, digest_of(d)) in wanted for d in template.disks if d.virtual_size_bytes in sizes)
