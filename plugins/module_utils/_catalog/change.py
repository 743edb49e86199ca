# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What ``backup_archive`` does: compress, uncompress, protect, annotate and delete one archive."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _journal, _locks
from ansible_collections.kvmops.backup.plugins.module_utils._archive import convert, edit, trash, verify
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import TemplateRequirement
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, select
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import ChangeRequest
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    DamagedError,
    KvmopsError,
    RefusedError,
    TargetError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection, storage
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context

OPERATION = "backup_archive"


@dataclass(frozen=True)
class State:
    """An archive as it is, or as it shall be. `view` None: it cannot be read."""

    path: str
    size_bytes: int
    compressed: bool | None
    protected: bool
    notes: str
    view: catalog.View | None

    def result(self) -> dict[str, Any]:
        """In the shape of INTERFACE.md's ``archive``."""
        return {
            "path": self.path,
            "size": self.size_bytes,
            "compressed": self.compressed,
            "protected": self.protected,
            "notes": self.notes,
        }


def change(request: ChangeRequest, context: Context) -> dict[str, Any]:
    """The result of ``backup_archive``.

    Raises TargetError for a place that cannot be written to, BusyError while another operation is at work on the VM, ArchiveError
    and DamagedError for an archive that cannot be converted, RefusedError for one that must not be deleted.
    """
    archive = os.path.abspath(request.archive)
    _writable_place(os.path.dirname(archive), request.uri)
    context.progress.about(os.path.basename(archive))
    if request.check_mode:
        for facts in _journal.Journal.peek(_left_by_us):
            context.warn(f"A dead run has left {facts['partial']}; the next run outside check mode removes it")
        for gone in trash.pending():
            context.warn(f"A dead run had begun to remove {gone}; the next run outside check mode finishes that")
    else:
        settle()
    path = _existing(archive, request.compressed)
    if path is None:
        if request.present:
            raise ArchiveError(
                f"Archive {archive}", "there is no such file", "backup_info lists the archives of a place."
            )
        return {"changed": False}
    before = _state(path)
    if not request.present:
        return _delete(before, request)
    after = _wanted(before, request)
    _refuse_other_archive(before, after)
    result: dict[str, Any] = {"changed": before != after}
    if result["changed"] and not request.check_mode:
        with _lock(before, f"changing the archive {before.path}"):
            after = _apply(before, after, request, context)
    result["archive"] = after.result()
    if request.diff:
        result["diff"] = {"before": before.result(), "after": after.result()}
    return result


def settle() -> list[str]:
    """Removes the partial files of conversions whose process has died, and finishes removals; returns the paths."""
    removed = trash.settle()
    for journal in _journal.Journal.left_behind(_left_by_us):
        partial = str(journal.facts.get("partial") or "")
        if partial:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            removed.append(partial)
        journal.done()
    return removed


def _left_by_us(facts: dict[str, Any]) -> bool:
    return facts.get("operation") == OPERATION


def _writable_place(directory: str, uri: str) -> None:
    """Raises TargetError; where libvirt does not answer, its pools are not looked at."""
    try:
        conn = connection.connect(uri)
    except KvmopsError:
        conn = None
    storage.resolve_target(conn, path=directory)


def _existing(archive: str, compressed: bool | None) -> str | None:
    """The archive's path: as named, or as it is called since it was converted; None if it is not there."""
    if os.path.lexists(archive):
        return archive
    if compressed is not None:
        converted = convert.converted_path(archive, compressed)
        if os.path.lexists(converted):
            return converted
    return None


def _state(path: str) -> State:
    try:
        view: catalog.View | None = catalog.look(path)
    except ArchiveError:
        view = None
    size = os.stat(path).st_size
    return State(path, size, view.compressed if view else None, edit.is_protected(path), edit.notes(path), view)


def _wanted(before: State, request: ChangeRequest) -> State:
    """The state after the change; its size is known only then. Raises ArchiveError if the archive cannot be read."""
    compressed, path = before.compressed, before.path
    if request.compressed is not None and request.compressed != before.compressed:
        compressed, path = request.compressed, convert.converted_path(before.path, request.compressed)
        if before.view is None:
            catalog.look(before.path)  # raises, with the reason
    return State(
        path,
        before.size_bytes,
        compressed,
        before.protected if request.protected is None else request.protected,
        before.notes if request.notes is None else request.notes,
        before.view,
    )


def _refuse_other_archive(before: State, after: State) -> None:
    """Raises TargetError if the converted archive's name is taken by anything else than itself.

    Itself is there when a conversion was killed before its last step.
    """
    if after.path == before.path or not os.path.lexists(after.path):
        return
    try:
        same = before.view is not None and catalog.look(after.path).identity == before.view.identity
    except ArchiveError:
        same = False
    if not same:
        raise TargetError(after.path, "it is in the way and not the same archive", "Move one of the two elsewhere.")


def _apply(before: State, after: State, request: ChangeRequest, context: Context) -> State:
    if after.path != before.path:
        _refuse_other_archive(before, after)
        if os.path.lexists(after.path):
            _finish_conversion(before.path, after.path, request, context)
        else:
            _convert(before.path, request, context)
    if edit.is_protected(after.path) != after.protected:
        edit.set_protected(after.path, after.protected)
    if edit.notes(after.path) != after.notes:
        edit.set_notes(after.path, after.notes)
    return _state(after.path)


def _convert(path: str, request: ChangeRequest, context: Context) -> None:
    journal = _journal.Journal.open(os.path.dirname(path), OPERATION, {"archive": path})

    def on_partial(partial: str) -> None:
        journal.record(partial=partial)

    try:
        if request.compressed:
            convert.compress(
                path, request.compress_level, threads=request.threads, progress=context.progress, on_partial=on_partial
            )
        else:
            convert.uncompress(path, threads=request.threads, progress=context.progress, on_partial=on_partial)
    finally:
        journal.done()


def _finish_conversion(old: str, new: str, request: ChangeRequest, context: Context) -> None:
    report = verify.verify_file(new, progress=context.progress, threads=request.threads)
    if not report.ok:
        raise DamagedError(
            f"Archive {new}", f"it is damaged, so {old} was not removed", "Delete it and run the task again."
        )
    edit.move_sidecars(old, new)
    edit.delete(old)


def _delete(before: State, request: ChangeRequest) -> dict[str, Any]:
    if not request.force:
        _refuse_to_delete(before)
    if not request.check_mode:
        with _lock(before, f"deleting the archive {before.path}"):
            edit.delete(before.path)
    result: dict[str, Any] = {"changed": True, "archive": before.result()}
    if request.diff:
        result["diff"] = {"before": before.result(), "after": {}}
    return result


def _refuse_to_delete(before: State) -> None:
    if before.protected:
        raise RefusedError(f"Archive {before.path}", "it is protected", "Set protected to false first, or use force.")
    if before.view is None:
        return  # damaged: not the last good one
    others = []
    for path in catalog.find([os.path.dirname(before.path)]):
        if path == before.path:
            continue
        with contextlib.suppress(ArchiveError):
            others.append(catalog.look(path))
    name, vm_uuid = before.view.newest.vm_name, before.view.newest.vm_uuid
    clones = needing(before.view, others)
    if clones:
        raise RefusedError(
            f"Archive {before.path}",
            f"it is the only one here of the template that these archives of thin clones need: {', '.join(clones)}",
            "Use force to delete it all the same.",
        )
    own = select.of_vm([before.view, *others], name, vm_uuid)
    if len(select.without_twins(own)) < 2:
        raise RefusedError(
            f"Archive {before.path}",
            f"it is the last good archive of {name or 'its VM'} in {os.path.dirname(before.path)}",
            "Use force to delete it all the same.",
        )


def needing(template: catalog.View, others: Sequence[catalog.View]) -> list[str]:
    """Archives of thin clones that can be restored on no other archive's template than this one. Pure."""
    found = []
    for view in others:
        for point in view.points:
            fits = point.requires is not None and _provides(template, point.requires)
            if fits and point.requires and not any(_provides(each, point.requires) for each in others):
                found.append(view.path)
                break
    return found


def _provides(view: catalog.View, required: TemplateRequirement) -> bool:
    return any(point.template and required.fits(point.provides) for point in view.points)


def _lock(state: State, what: str) -> contextlib.AbstractContextManager[None]:
    """The lock of the archive's VM; of the path where the VM is not known. Raises BusyError."""
    name = state.view.newest.vm_uuid if state.view else ""
    try:
        name = f"vm-{uuid.UUID(name)}"
    except ValueError:
        name = "archive-" + hashlib.sha256(os.fsencode(state.path)).hexdigest()[:32]
    return _locks.hold(name, what=what)
