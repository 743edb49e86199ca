# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Where the chain of a thin clone ends for a backup: at the disks of its template, which is named and not stored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _files
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import TemplateDisk, TemplateRequirement
from ansible_collections.kvmops.backup.plugins.module_utils._backup.disks import Image
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError, SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._template import digests, find, requirement
from ansible_collections.kvmops.backup.plugins.module_utils._template.find import Template


@dataclass(frozen=True)
class Thin:
    """What templates mean for the backup of a VM.

    `marked`: it is a template itself. `base`: the template that its disks stand on, None for any other VM; `base_trouble`: why
    that cannot be relied on now, as a clause about the template. `foreign`: files below its disks that belong to VMs which are
    no templates, or that templates have below their disks, with the names of these VMs. `requires` and `provides` are known
    after `with_content`, as `_archive.model.Configuration` has them; `files`: evidence of the files that they were read from.
    """

    marked: bool = False
    base: Template | None = None
    base_trouble: str = ""
    foreign: Mapping[str, str] = field(default_factory=dict)
    requires: TemplateRequirement | None = None
    provides: tuple[TemplateDisk, ...] = ()
    files: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def look(host: find.Host, name: str, uuid: str, images: Mapping[str, Image]) -> tuple[Thin, dict[str, Image]]:
    """Finds the template below a VM's images, and the images without those of the template.

    Raises RefusedError where there are two: an archive names one.
    """
    below = {os.path.realpath(image.backing_path) for image in images.values() if image.backing_path}
    owners = host.owners(below, uuid) if below else {}
    kept: dict[str, Image] = {}
    bases: dict[str, Template] = {}
    foreign: dict[str, str] = {}
    for path in [each for each in images if os.path.realpath(each) not in below]:
        while path in images and path not in kept:
            kept[path] = image = images[path]
            path = os.path.realpath(image.backing_path) if image.backing_path else ""
            owner = owners.get(path)
            number = find.numbers(owner).get(path, 0) if owner and owner.marked else 0
            if owner and number:
                bases[owner.uuid] = owner
                kept[image.path] = replace(image, backing_path="", template_disk=number)
                break
            if owner:
                foreign[path] = owner.name
    if len(bases) > 1:
        names = " and ".join(sorted(base.name for base in bases.values()))
        hint = "Give it disks on one template only, or merge one of them (virsh blockpull)."
        raise RefusedError(f"Backup of VM {name}", f"its disks stand on several templates: {names}", hint)
    base = next(iter(bases.values()), None)
    return Thin(base=base, base_trouble=_trouble(base) if base else "", foreign=foreign), kept


def with_content(thin: Thin, own: Template | None, progress: Progress, *, threads: int = 0) -> Thin:
    """With the digests of the template's disks; `own`: the VM itself where it is marked. Reads what is not known."""
    source = own or thin.base
    if source is None or thin.base_trouble:
        return thin
    every: list[find.BaseDisk] = []
    for template in filter(None, (own, thin.base)):
        lost = next((disk.path or disk.target for disk in template.disks if not _filenames.is_there(disk.path)), "")
        if lost:
            hint = "Put it back, or restore the template from its archive."
            raise SourceError(f"The template {template.name}", f"its disk {lost} is not there", hint)
        every += template.disks
    files = {path: _files.evidence(path) for path in find.files(every)}
    requires = thin.requires
    if thin.base:
        requires = requirement.of(thin.base, requirement.disks(thin.base, progress, threads=threads))
    provides = requirement.disks(own, progress, threads=threads) if own else ()
    return replace(thin, requires=requires, provides=provides, files=files)


def unread_bytes(thin: Thin) -> int:
    """What would have to be read to know the content of the template; 0: it is known."""
    if thin.base is None or thin.requires is not None:
        return 0
    unknown = [disk for disk in thin.base.disks if digests.cached(disk.path, disk.format) is None]
    return sum(os.stat(path).st_blocks * 512 for path in find.files(unknown))


def _trouble(base: Template) -> str:
    if base.running:
        return "is running, so what its clones stand on changes"
    if base.suspended:
        return "has a managed-save image, so what its clones stand on changes when it goes on"
    if any(qemu_img.is_in_use(disk.path, disk.format) for disk in base.disks):
        return "is off for libvirt, but a process writes to its disks"
    return ""
