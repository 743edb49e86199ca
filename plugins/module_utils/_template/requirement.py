# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The content of templates as archives name it."""

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    TemplateDisk,
    TemplateRequirement,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._template import digests, find
from ansible_collections.kvmops.backup.plugins.module_utils._template.find import BaseDisk, Template
from ansible_collections.kvmops.backup.plugins.module_utils._template.match import Match, match


def disks(template: Template, progress: Progress, *, threads: int = 0) -> tuple[TemplateDisk, ...]:
    """The content of a VM's disks. Raises SourceError and ImageError as `digests.of_disk`."""
    return tuple(
        TemplateDisk(
            each.target, each.virtual_size_bytes, digests.of_disk(each.path, each.format, progress, threads=threads)
        )
        for each in template.disks
    )


def known_disks(template: Template) -> tuple[TemplateDisk, ...] | None:
    """The same without reading anything; None where it is not known."""
    found = []
    for each in template.disks:
        digest = digests.cached(each.path, each.format)
        if digest is None:
            return None
        found.append(TemplateDisk(each.target, each.virtual_size_bytes, digest))
    return tuple(found)


def of(template: Template, content: tuple[TemplateDisk, ...]) -> TemplateRequirement:
    """What a clone of the template requires."""
    return TemplateRequirement(template.uuid, template.name, content)


def match_on_host(conn: Connection, required: TemplateRequirement, progress: Progress, *, thorough: bool) -> Match:
    """The template of this host that fits. `thorough`: digests that are not known are computed."""

    def digest_of(disk: BaseDisk) -> str | None:
        if thorough and disk.virtual_size_bytes:
            return digests.of_disk(disk.path, disk.format, progress)
        return digests.cached(disk.path, disk.format)

    return match(required, find.templates(conn), digest_of)
