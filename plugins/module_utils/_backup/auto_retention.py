# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which older archives go for a backup: for its space before it, by the rules for its VM after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import BackupRequest
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import retention
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView
from ansible_collections.kvmops.backup.plugins.module_utils._errors import CancelledError, KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._retention import ArchiveFacts, Rules
from ansible_collections.kvmops.backup.plugins.module_utils._slots import Slot
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

if TYPE_CHECKING:
    from ansible_collections.kvmops.backup.plugins.module_utils._backup.model import BackupPlan, TargetFacts


class Keeper:
    """Removes archives for one run of ``vm_backup``; `removed` are those so far (in check mode: that would be)."""

    def __init__(self, request: BackupRequest, context: Context) -> None:
        self._request, self._context = request, context
        self.removed: list[retention.RemovedArchive] = []

    def with_room(self, draft: BackupPlan, target: TargetFacts, slot: Slot | None) -> TargetFacts:
        """The target with what is free there for a planned backup, once older archives have made room for it (`free_space`).

        Removes the oldest beside it until it fits; nothing where that cannot be, and the target's hint says so.
        """
        if slot:
            slot.claim(draft.needed_bytes)
        if not self._request.free_space:
            if draft.needed_bytes <= target.free_bytes:
                return target
            # some file systems know only after a sync what a removal has given back
            return replace(target, free_bytes=_files.free_bytes(target.directory))

        def measure() -> int:
            """What is free there beside what the others at work there will still write."""
            return max(0, _files.free_bytes(target.directory) - (slot.others_bytes() if slot else 0))

        free = measure()
        if draft.needed_bytes <= free:
            return replace(target, free_bytes=free)
        if not self._make_room(draft, measure):
            hint = "Removing what may go beside it (free_space) would not be enough, so nothing was removed."
            others = slot.others_bytes() if slot else 0
            if others:
                hint += f" Other backups at work there still need {human_bytes(others)}."
            return replace(target, free_bytes=free, hint=hint)
        still_there = sum(each.freed_bytes for each in self.removed) if self._request.check_mode else 0
        return replace(target, free_bytes=measure() + still_there)

    def _make_room(self, draft: BackupPlan, measure: Callable[[], int]) -> bool:
        """Removes the oldest archives beside a planned one until it fits; False, with nothing removed, where that cannot be."""
        with retention.alone(draft.directory, self._context, check_mode=self._request.check_mode):
            free = measure()
            if draft.needed_bytes <= free:  # another backup has made room meanwhile
                return True
            place = self._look(draft.directory)
            if draft.base:  # it is about to take the point
                path = draft.base.path
                grown = (replace(each, in_use="this backup") if each.path == path else each for each in place.archives)
                place = replace(place, archives=tuple(grown))
            verdicts = retention.make_room(place, draft.needed_bytes, free)
            if verdicts is None:
                return False
            self.removed += retention.carry_out(
                place,
                verdicts,
                self._context,
                check_mode=self._request.check_mode,
                wanted_bytes=draft.needed_bytes,
                measure=measure,
            )
        return True

    def remove_old(self, directory: str, uuid: str, planned: BackupPlan | None = None) -> None:
        """Removes what `keep_last` and `keep_days` do not keep of the VM; `planned`: a point to be counted that is not there yet.

        The backup is made by now: what goes wrong here is told as a warning.
        """
        rules = Rules(last=self._request.keep_last, days=self._request.keep_days)
        if rules == Rules():
            return
        try:
            with retention.alone(directory, self._context, check_mode=self._request.check_mode):
                place = self._look(directory, uuid)
                gone = {each.path for each in self.removed}  # still there in check mode
                place = replace(place, archives=tuple(each for each in place.archives if each.path not in gone))
                if planned:
                    place = replace(place, archives=_with(place.archives, planned))
                verdicts = retention.judge(place, rules, [uuid])
                self.removed += retention.carry_out(place, verdicts, self._context, check_mode=self._request.check_mode)
        except CancelledError:
            raise
        except (KvmopsError, OSError) as error:
            self._context.warn(Notice(Code.NOT_REMOVED, f"No old archives were removed: {error}"))

    def _look(self, directory: str, of_vm: str = "") -> retention.RetentionPlace:
        uri, context = self._request.uri, self._context

        def continued(views: Sequence[ArchiveView]) -> str:
            # Asked only where an archive would go: all about the VM hangs on it.
            from ansible_collections.kvmops.backup.plugins.module_utils._backup.incrementable import Judge

            return Judge(uri, context, thorough=False).continued(views)

        return retention.look(directory, uri, context, continued, of_vm)


def _with(archives: tuple[ArchiveFacts, ...], planned: BackupPlan) -> tuple[ArchiveFacts, ...]:
    """The archives as they will be when the plan is carried out."""
    new = ArchiveFacts(planned.archive_path, planned.vm_uuid, planned.timestamp, continued=planned.stays)
    return (*(each for each in archives if each.path != new.path), new)
