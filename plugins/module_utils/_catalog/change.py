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
from dataclasses import dataclass, replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _capabilities, _filenames, _journal, _locks, _mounts
from ansible_collections.kvmops.backup.plugins.module_utils._archive import (
    convert,
    partials,
    reader,
    sidecars,
    trash,
    verify,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import TemplateRequirement
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, retention, select
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import ChangeRequest
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView
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
class ArchiveState:
    """An archive as it is, or as it shall be. `view` None: it cannot be read.

    `doubt`: why nobody can say that it is an archive at all; "" for one, also for one of ours that is damaged.
    """

    path: str
    size_bytes: int
    compressed: bool | None
    protected: bool
    notes: str
    view: ArchiveView | None
    doubt: str = ""

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
    and DamagedError for an archive that cannot be converted, RefusedError for one that must not be deleted and for other files.
    """
    archive = _filenames.absolute(request.archive)
    if not archive.endswith(catalog.SUFFIXES):
        raise RefusedError(
            f"File {archive}",
            f"backup_archive is for archives of VMs, and their names end with {' or '.join(catalog.SUFFIXES)}",
            "Check the path: backup_info lists the archives of a place.",
        )
    _writable_place(os.path.dirname(archive), request.uri)
    context.progress.about(os.path.basename(archive))
    partials.settle(OPERATION, context, check_mode=request.check_mode)
    retention.settle(os.path.dirname(archive), request.check_mode, context)
    path = _existing(archive, request.compressed)
    if path is None:
        if request.present:
            raise ArchiveError(
                f"Archive {archive}", "there is no such file", "backup_info lists the archives of a place."
            )
        return {"changed": False}
    if os.path.islink(path):
        raise RefusedError(
            f"Archive {path}",
            f"it is a symbolic link to {os.path.realpath(path)}, and what is done to the link does not reach the archive",
            "Name the archive itself, or remove the link with other means.",
        )
    before = _state(path)
    if not request.present:
        return _delete(before, request, context)
    after = _wanted(before, request)
    _refuse_other_archive(before, after)
    if before.doubt and ((after.protected and not before.protected) or (after.notes and after.notes != before.notes)):
        raise RefusedError(
            f"File {path}",
            f"it cannot be read as an archive: {before.doubt}",
            "Only archives are protected and annotated.",
        )
    result: dict[str, Any] = {"changed": before != after}
    if result["changed"] and not request.check_mode:
        with _lock(before, f"changing the archive {before.path}"):
            after = _apply(before, after, request, context)
    result["archive"] = after.result()
    if request.diff:
        result["diff"] = {"before": before.result(), "after": after.result()}
    return result


def _writable_place(directory: str, uri: str) -> None:
    """Raises TargetError; where libvirt does not answer, its pools are not looked at."""
    try:
        conn = connection.connect(uri)
    except KvmopsError:
        conn = None
    storage.resolve_target(conn, path=directory)


def _existing(archive: str, compressed: bool | None) -> str | None:
    """The archive's path: as named, or as it is called since it was converted; None if it is not there."""
    if _filenames.is_there(archive, follow=False):
        return archive
    if compressed is not None:
        converted = convert.converted_path(archive, compressed)
        if _filenames.is_there(converted, follow=False):
            return converted
    return None


def _state(path: str) -> ArchiveState:
    view: ArchiveView | None = None
    doubt = ""
    try:
        view = catalog.look(path)
    except ArchiveError as error:
        doubt = "" if reader.is_damaged_native(path) else str(error)
    size = os.stat(path).st_size
    compressed = view.compressed if view else None
    return ArchiveState(path, size, compressed, sidecars.is_protected(path), sidecars.notes(path), view, doubt)


def _wanted(before: ArchiveState, request: ChangeRequest) -> ArchiveState:
    """The state after the change; its size is known only then. Raises ArchiveError if the archive cannot be read."""
    compressed, path = before.compressed, before.path
    if request.compressed is not None and request.compressed != before.compressed:
        if before.view is not None and before.view.distrust and not request.trust:
            raise convert.not_ours(before.path, before.view.distrust)
        compressed, path = request.compressed, convert.converted_path(before.path, request.compressed)
        if before.view is None:
            catalog.look(before.path)  # raises, with the reason
    return replace(
        before,
        path=path,
        compressed=compressed,
        protected=before.protected if request.protected is None else request.protected,
        notes=before.notes if request.notes is None else request.notes,
    )


def _refuse_other_archive(before: ArchiveState, after: ArchiveState) -> None:
    """Raises TargetError if the converted archive's name is taken by anything else than itself.

    Itself is there when a conversion was killed before its last step.
    """
    if after.path == before.path or not os.path.lexists(after.path):
        return
    try:
        other = catalog.look(after.path)
        same = before.view is not None and other.identity == before.view.identity and other.ours >= before.view.ours
    except ArchiveError:
        same = False
    if not same:
        raise TargetError(after.path, "it is in the way and not the same archive", "Move one of the two elsewhere.")


def _apply(before: ArchiveState, after: ArchiveState, request: ChangeRequest, context: Context) -> ArchiveState:
    if after.path != before.path:
        _refuse_other_archive(before, after)
        if os.path.lexists(after.path):
            _finish_conversion(before.path, after.path, request, context)
        else:
            _convert(before.path, request, context)
    if sidecars.is_protected(after.path) != after.protected:
        sidecars.set_protected(after.path, after.protected)
    if sidecars.notes(after.path) != after.notes:
        sidecars.set_notes(after.path, after.notes)
    return _state(after.path)


def _convert(path: str, request: ChangeRequest, context: Context) -> None:
    _capabilities.probe(os.path.dirname(path))
    journal = _journal.Journal.open(os.path.dirname(path), OPERATION, partials.PartialFacts(path))

    def on_partial(partial: str) -> None:
        journal.record(partial=partial, place=_mounts.identity(os.path.dirname(partial)))

    try:
        if request.compressed:
            convert.compress(
                path,
                request.compress_level,
                threads=request.threads,
                progress=context.progress,
                on_partial=on_partial,
                trust=request.trust,
            )
        else:
            convert.uncompress(
                path, threads=request.threads, progress=context.progress, on_partial=on_partial, trust=request.trust
            )
    finally:
        journal.done()


def _finish_conversion(old: str, new: str, request: ChangeRequest, context: Context) -> None:
    report = verify.verify_file(new, progress=context.progress, threads=request.threads)
    if not report.ok:
        raise DamagedError(
            f"Archive {new}", f"it is damaged, so {old} was not removed", "Delete it and run the task again."
        )
    sidecars.move(old, new)
    trash.delete(old)


def _delete(before: ArchiveState, request: ChangeRequest, context: Context) -> dict[str, Any]:
    path, what = before.path, f"deleting the archive {before.path}"
    with contextlib.ExitStack() as locks:
        if not request.check_mode:
            locks.enter_context(_lock(before, what))
            # neither two of us nor retention: each would count on what the other deletes
            locks.enter_context(retention.alone(os.path.dirname(path), context, "deleting an archive"))
            if not os.path.lexists(path):
                return {"changed": False}
            before = replace(before, protected=sidecars.is_protected(path))
        if not request.force:
            _refuse_to_delete(before)
        if not request.check_mode:
            trash.delete(path)
    result: dict[str, Any] = {"changed": True, "archive": before.result()}
    if request.diff:
        result["diff"] = {"before": before.result(), "after": {}}
    return result


def _refuse_to_delete(before: ArchiveState) -> None:
    what, view = f"Archive {before.path}", before.view
    if before.protected:
        hint = "Take the protection away (protected: false), or delete it all the same with force: true."
        raise RefusedError(what, "it is protected", hint)
    if before.doubt:
        raise RefusedError(
            f"File {before.path}",
            f"it cannot be read as an archive: {before.doubt}",
            "If this is the file to delete, say so with force: true.",
        )
    if view is None:
        return  # one of ours without a good point
    directory = os.path.dirname(before.path)
    holds_template = any(point.provides for point in view.points)
    others = []
    for path in catalog.find([directory]):
        if path == before.path or (not holds_template and catalog.surely_of_others(path, view.newest.vm_uuid)):
            continue
        with contextlib.suppress(ArchiveError):
            others.append(catalog.look(path))
    clones = needing(view, others)
    if clones:
        raise RefusedError(
            what,
            f"it is the only one here of the template that these archives of thin clones need: {', '.join(clones)}",
            "To delete it all the same, use force: true.",
        )
    if _is_last(view, others):
        raise RefusedError(
            what,
            f"it is the last {'good ' if view.ours else ''}archive of {view.newest.vm_name or 'its VM'} in {directory}",
            "To delete it all the same, use force: true.",
        )


def _is_last(view: ArchiveView, others: Sequence[ArchiveView]) -> bool:
    """Whether the VM has no other good archive among these, and for a foreign one no other foreign one either. Pure."""
    if view.damaged:
        return False  # it is not a good one
    stay = [each for each in others if each.good or not (view.ours or each.damaged)]
    own = select.of_vm([view, *stay], view.newest.vm_name, view.newest.vm_uuid)
    return len(select.without_twins(own)) < 2


def needing(template: ArchiveView, others: Sequence[ArchiveView]) -> list[str]:
    """Archives of thin clones that can be restored on no other good archive's template than this one. Pure."""
    found = []
    for view in others:
        for point in view.points:
            fits = point.requires is not None and _provides(template, point.requires)
            if fits and point.requires and not any(each.good and _provides(each, point.requires) for each in others):
                found.append(view.path)
                break
    return found


def _provides(view: ArchiveView, required: TemplateRequirement) -> bool:
    return any(point.template and required.fits(point.provides) for point in view.points)


def _lock(state: ArchiveState, what: str) -> contextlib.AbstractContextManager[None]:
    """The lock of the archive's VM; of the path where the VM is not known. Raises BusyError."""
    name = state.view.newest.vm_uuid if state.view else ""
    try:
        name = _locks.of_vm(str(uuid.UUID(name)))
    except ValueError:
        name = "archive-" + hashlib.sha256(os.fsencode(state.path)).hexdigest()[:32]
    return _locks.hold(name, of=f"Archive {state.path}", what=what)
