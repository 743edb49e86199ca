# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What there is to say about the template that a point needs, for those who only look. Changes nothing."""

from __future__ import annotations

from typing import Protocol

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import TemplateRequirement
from ansible_collections.kvmops.backup.plugins.module_utils._errors import CancelledError, KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection, connect
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._template import requirement


class PointOfClone(Protocol):
    """What is looked at of a point."""

    @property
    def requires(self) -> TemplateRequirement | None:
        """The template that it stands on."""


class AboutTemplate:
    """Compares with the templates of one libvirt. `thorough`: content that is not known is read."""

    def __init__(self, uri: str, context: Context, *, thorough: bool) -> None:
        self._uri, self._context, self._thorough = uri, context, thorough
        self._conn: Connection = None
        self._known: dict[TemplateRequirement, list[str]] = {}

    def __call__(self, point: PointOfClone) -> list[str]:
        """Warnings about a point; the same three reasons for which a restore refuses it."""
        required = point.requires
        if required is None:
            return []
        if required not in self._known:
            try:
                self._known[required] = self._look(required)
            except CancelledError:
                raise
            except KvmopsError as error:
                self._known[required] = [f"the template {required.name} was not checked here: {error}"]
        return self._known[required]

    def _look(self, required: TemplateRequirement) -> list[str]:
        self._conn = self._conn or connect(self._uri)
        found = requirement.match_on_host(self._conn, required, self._context.progress, thorough=self._thorough)
        if not found.text:
            return []
        return [f"{found.text} (refresh reads it)" if found.unchecked else found.text]
