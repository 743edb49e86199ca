# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The archives of one VM in a place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _policy
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, select
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError


class VmArchives:
    """The archives of ours that belong to the VM of this UUID, as they are; those of other VMs are not opened again and again.

    `distrusted`: those that say they are of the VM and are not ours to trust, with the reason.
    """

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self.distrusted: dict[str, str] = {}
        self._of_others: set[tuple[str, tuple[int, ...]]] = set()

    def views(self, directory: str) -> list[ArchiveView]:
        """Those in this directory now; what cannot be read is nobody's."""
        found = []
        for path in catalog.find([directory]):
            if catalog.surely_of_others(path, self._uuid):
                continue
            with suppress(KvmopsError, OSError):
                seen = (path, _files.evidence(path))
                if seen in self._of_others:
                    continue
                view = catalog.look(path)
                if view.ours and view.newest.vm_uuid == self._uuid:
                    found.append(view)
                    continue
                self._of_others.add(seen)
                if view.distrust and view.newest.vm_uuid == self._uuid:
                    self.distrusted[path] = view.distrust
        return select.without_twins(found)


def full_owed(views: Sequence[ArchiveView], weekday: str, now: int) -> str:
    """Why the weekly policy wants a full of the VM whose archives these are, "" if it does not; `weekday` "": no such policy."""
    if not weekday:
        return ""
    fulls = (point.timestamp for view in views for point in view.good_points if point.mode == "full")
    return _policy.full_owed(fulls, now, weekday)
