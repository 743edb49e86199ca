# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What ``backup_retention`` does, and what ``vm_backup`` does of it: look at a place, judge (_retention), remove what may go."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional

from ansible_collections.kvmops.backup.plugins.module_utils import _capabilities, _files, _locks, _retention
from ansible_collections.kvmops.backup.plugins.module_utils._archive import archive_locks, sidecars, trash
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import TemplateDisk
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, select
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import RetentionRequest
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    BusyError,
    CancelledError,
    KvmopsError,
    TargetError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection, storage
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

#: Of the archives of one VM, the path of the one that a backup with mode auto would go on with; "" for none.
Continued = Callable[[Sequence[ArchiveView]], str]
Verdicts = list[_retention.RetentionVerdict]
Decide = Callable[[Sequence[_retention.ArchiveFacts]], Optional[Verdicts]]
_OTHERS_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class RemovedArchive:
    """An archive that is gone (in check mode: would be), why, and the bytes that this has given back."""

    path: str
    reason: str
    freed_bytes: int

    def result(self) -> dict[str, str]:
        """In the shape of INTERFACE.md's ``removed``."""
        return {"path": self.path, "reason": self.reason}


@dataclass(frozen=True)
class RetentionPlace:
    """A directory as it was looked at. `views`: its native archives by path. `twins`: the other names that an archive has while
    it is converted. `evidence`: how each file was then; what has changed since is not removed. `continued`: see Continued;
    `goes_on`: its answers so far, by VM. `read`: archives that the index told of and that were read since, as they are.
    """

    directory: str
    archives: tuple[_retention.ArchiveFacts, ...]
    views: dict[str, ArchiveView] = field(default_factory=dict)
    twins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    evidence: dict[str, tuple[int, ...]] = field(default_factory=dict)
    continued: Continued = lambda _views: ""
    goes_on: dict[str, str] = field(default_factory=dict)
    read: dict[str, _retention.ArchiveFacts] = field(default_factory=dict)

    def decide(self, archives: Sequence[_retention.ArchiveFacts], verdicts_of: Decide) -> Verdicts | None:
        """What is decided about archives of this place once they were read, and it is known which mode auto would go on with.

        For both, all archives of a VM are read, and the VM is looked at with all its files; so only those VMs are of which an
        archive would go otherwise. Where an archive of a template would go, everything is read that may need it.
        """
        asked: set[str] = set()
        while True:
            known = [self._as_it_is(each, asked) for each in archives]
            verdicts = verdicts_of([replace(each, continued=self._is_continued(each, asked)) for each in known])
            kept = {each.path for each in verdicts or () if each.keep}
            going = [each for each in known if verdicts is not None and each.path not in kept]
            all_vms = {each.vm_uuid for each in known if any(one.provides for one in going)}
            more = {*(each.vm_uuid for each in going), *all_vms} - asked
            if not more:
                return verdicts
            asked |= more

    def _as_it_is(self, archive: _retention.ArchiveFacts, asked: Collection[str]) -> _retention.ArchiveFacts:
        view = self.views.get(archive.path)
        if view and view.glanced and archive.vm_uuid in asked:
            del self.views[archive.path]
            read, self.read[archive.path] = _read(archive.path, self.twins.get(archive.path, ()))
            if read:
                self.views[archive.path] = read
        known = self.read.get(archive.path)
        if known is None:
            return archive
        return replace(known, in_use=archive.in_use or known.in_use, continued=archive.continued)

    def _is_continued(self, archive: _retention.ArchiveFacts, asked: Collection[str]) -> bool:
        uuid = archive.vm_uuid
        if archive.continued or uuid not in asked:
            return archive.continued
        if uuid not in self.goes_on:
            own = [view for view in self.views.values() if view.newest.vm_uuid == uuid]
            self.goes_on[uuid] = self.continued(own) if own else ""
        return archive.path == self.goes_on[uuid]

    def of_vms(self, uuids: Collection[str]) -> list[_retention.ArchiveFacts]:
        """The archives of some VMs."""
        return [each for each in self.archives if each.vm_uuid in uuids]


def retain(request: RetentionRequest, context: Context, continued: Continued) -> dict[str, Any]:
    """The result of ``backup_retention``.

    Raises TargetError for a place that cannot be written to and where `free_space` cannot be had, ArchiveError for a place that
    cannot be listed; nothing is removed then.
    """
    directory = _directory(request)
    settle(directory, request.check_mode, context)
    with alone(directory, context, check_mode=request.check_mode):
        place = look(directory, request.uri, context, continued)
        uuids = _uuids(request, place, context)
        verdicts = judge(place, request.rules, uuids)
        if request.free_space_bytes:
            verdicts = _with_room(place, verdicts, request.free_space_bytes)
        removed = carry_out(
            place,
            verdicts,
            context,
            check_mode=request.check_mode,
            wanted_bytes=request.free_space_bytes,
        )
    if not request.check_mode:
        _refuse_too_little(directory, request.free_space_bytes, removed, context)
    gone = {each.path for each in removed}
    shown = place.archives if uuids is None else place.of_vms({*uuids, *_vms_of(place, gone)})
    reasons = {each.path: each.reason for each in verdicts}
    kept = [{"path": each.path, "reason": reasons[each.path]} for each in shown if each.path not in gone]
    result: dict[str, Any] = {
        "changed": bool(removed),
        "kept": kept,
        "removed": [each.result() for each in removed],
        "freed_bytes": sum(each.freed_bytes for each in removed),
    }
    if request.diff:
        result["diff"] = _diff(shown, gone, {**reasons, **{each.path: each.reason for each in removed}})
    return result


def settle(directory: str, check_mode: bool, context: Context) -> None:
    """Removes what earlier runs have left in a directory to be removed; in check mode only says so."""
    if check_mode:
        for path in trash.pending(directory):
            context.warn(Notice(Code.TO_PUT_RIGHT, f"An earlier run has left {path} to be removed; the next run does that"))
        return
    _capabilities.sweep(directory)
    for path in trash.settle(directory):
        context.put_right(f"removed {path}")


def look(directory: str, uri: str, context: Context, continued: Continued, of_vm: str = "") -> RetentionPlace:
    """What is named like an archive in a place; with `of_vm` only what matters to the archives of this VM, and that was read.

    Raises ArchiveError if the place cannot be listed.
    """
    paths = catalog.find([directory])
    evidence: dict[str, tuple[int, ...]] = {}
    views, unknown = _views(paths, evidence, context, of_vm)
    if of_vm and any(_provides(view) for view in views):
        views, unknown = _views(paths, evidence, context, "", all_read=True)  # others may need what they hold
    single = select.without_twins(views)
    names = {view.path for view in single}
    twins = {
        view.path: tuple(each.path for each in views if each.path not in names and each.identity == view.identity)
        for view in single
    }
    archives = [*(_facts(view, twins[view.path]) for view in single), *unknown]
    if any(each.provides for each in archives):
        try:
            archives += _clones_elsewhere(directory, uri, context)
        except CancelledError:
            raise
        except KvmopsError as error:
            why = f"perhaps the archive of a thin clone in another place needs it ({error})"
            context.warn(Notice(Code.NOT_REMOVED, f"Archives of templates stay: {error}"))
            archives = [replace(each, in_use=why) if each.provides else each for each in archives]
    archives.sort(key=lambda each: each.path)
    return RetentionPlace(directory, tuple(archives), {view.path: view for view in single}, twins, evidence, continued)


def _views(
    paths: Sequence[str],
    evidence: dict[str, tuple[int, ...]],
    context: Context,
    of_vm: str,
    *,
    all_read: bool = False,
) -> tuple[list[ArchiveView], list[_retention.ArchiveFacts]]:
    """Archives of ours, and what else is there. `of_vm`: those that are surely of other VMs are left out; `all_read`: nothing is
    taken from the index."""
    views: list[ArchiveView] = []
    unknown: list[_retention.ArchiveFacts] = []
    for path in paths:
        if of_vm and catalog.surely_of_others(path, of_vm):
            continue
        with contextlib.suppress(FileNotFoundError):
            try:
                evidence[path] = _evidence(path)
                if of_vm or all_read:
                    context.progress.phase("read", path)
                    view = catalog.look(path)
                else:
                    view = catalog.glance(path, context.progress)
            except ArchiveError as error:
                unknown.append(_unreadable(path, error))
                continue
            why = _not_ours(view)
            if why:
                unknown.append(_spared(view, why))
            else:
                views.append(view)
    return views, unknown


def _evidence(path: str) -> tuple[int, ...]:
    """Raises FileNotFoundError, ArchiveError where the storage does not answer."""
    try:
        return _files.evidence(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArchiveError(f"archive {path}", f"it cannot be looked at ({error.strerror})") from error


def _read(path: str, twins: Sequence[str]) -> tuple[ArchiveView | None, _retention.ArchiveFacts]:
    """An archive as it is, whatever the index says; None where it is none of ours."""
    try:
        view = catalog.look(path)
    except ArchiveError as error:
        return None, _unreadable(path, error)
    why = _not_ours(view)
    return (None, _spared(view, why)) if why else (view, _facts(view, twins))


def _unreadable(path: str, error: ArchiveError) -> _retention.ArchiveFacts:
    return _retention.ArchiveFacts(path, "", 0, not_ours=f"it cannot be read: {error}")


def _spared(view: ArchiveView, why: str) -> _retention.ArchiveFacts:
    # that it needs a template of ours is believed: nothing is lost by that
    return _retention.ArchiveFacts(view.path, "", 0, not_ours=why, needs=_needs(view))


def judge(
    place: RetentionPlace, rules: _retention.Rules, vm_uuids: Collection[str] | None = None, now: int | None = None
) -> Verdicts:
    """What the rules say, in the host's time zone."""
    now = now or int(time.time())
    return place.decide(place.archives, lambda each: _retention.judge(each, rules, now=now, tz=None, vm_uuids=vm_uuids)) or []


def carry_out(
    place: RetentionPlace,
    verdicts: Sequence[_retention.RetentionVerdict],
    context: Context,
    *,
    check_mode: bool = False,
    wanted_bytes: int = 0,
    measure: Callable[[], int] | None = None,
) -> list[RemovedArchive]:
    """Removes what the verdicts say; what has come into use or has changed since stays, with a warning.

    What goes for the sake of space only stays as soon as `wanted_bytes` are free by `measure` (None: the file system's own
    figure); where a removal gave back less than it seemed to, the next oldest goes too. The caller looks whether it was enough.
    """
    archives, decided = list(place.archives), {each.path: each for each in verdicts}
    removed: list[RemovedArchive] = []
    free = measure or (lambda: _files.free_bytes(place.directory))
    while True:
        going = _retention.in_order(each for each in archives if not decided[each.path].keep)
        if check_mode:
            return [RemovedArchive(each.path, decided[each.path].reason, each.frees_bytes) for each in going]
        stuck: set[str] = set()
        for archive in going:
            context.progress.phase("remove", archive.path)
            reason = decided[archive.path].reason
            before = free() if wanted_bytes else 0
            if reason == _retention.FOR_SPACE and before >= wanted_bytes:
                continue
            try:
                for path in (*place.twins.get(archive.path, ()), archive.path):
                    _remove(path, place.evidence[path])
            except (BusyError, ArchiveError) as error:
                text = f"{archive.path} was not removed although it should be ({reason}): {error}"
                context.warn(Notice(Code.NOT_REMOVED, text))
                stuck.add(archive.path)
                continue
            removed.append(RemovedArchive(archive.path, reason, archive.frees_bytes))
            if wanted_bytes:
                _files.wait_for_free(free, min(wanted_bytes, before + archive.frees_bytes))
        if not wanted_bytes or free() >= wanted_bytes:
            return removed
        gone = {each.path for each in removed}
        archives = [
            replace(each, in_use="it could not be removed") if each.path in stuck else each
            for each in archives
            if each.path not in gone
        ]
        kept = [replace(decided[each.path], keep=True) for each in archives]
        more = _more_room(place, archives, kept, wanted_bytes, free())
        if more is None:
            return removed
        decided = {each.path: each for each in more}


def _remove(path: str, evidence: tuple[int, ...]) -> None:
    with archive_locks.writing(path, f"removing {path}"):
        if _files.evidence(path) != evidence:
            raise BusyError(f"Archive {path}", "it has changed since it was looked at", "The next run looks again.")
        if sidecars.is_protected(path):
            raise BusyError(f"Archive {path}", "it has just been protected")
        trash.remove(path)


def make_room(place: RetentionPlace, wanted_bytes: int, free_bytes: int) -> Verdicts | None:
    """Verdicts that free `wanted_bytes` in the place at the cost of the oldest archives; None where that cannot be."""
    return _more_room(place, place.archives, judge(place, _retention.Rules()), wanted_bytes, free_bytes)


def _more_room(
    place: RetentionPlace,
    archives: Sequence[_retention.ArchiveFacts],
    verdicts: Sequence[_retention.RetentionVerdict],
    wanted_bytes: int,
    free_bytes: int,
) -> Verdicts | None:
    now = int(time.time())
    return place.decide(
        archives,
        lambda each: _retention.make_room(each, verdicts, wanted_bytes=wanted_bytes, free_bytes=free_bytes, now=now),
    )


@contextlib.contextmanager
def alone(directory: str, context: Context, what: str = "retention", *, check_mode: bool = False) -> Iterator[None]:
    """One run of retention in a place at a time, on this host; `what` is done there meanwhile. Check mode waits for nobody.

    The progress says who is waited for. Raises BusyError, CancelledError.
    """
    if check_mode:
        yield
        return
    status, progress = os.stat(directory), context.progress
    with _locks.hold(
        f"retention-{status.st_dev:x}-{status.st_ino:x}",
        of=f"The directory {directory}",
        what=f"{what} in {directory}",
        timeout_s=_OTHERS_TIMEOUT_S,
        on_wait=lambda who: progress.phase(f"wait for {who}"),
    ):
        yield


def _with_room(place: RetentionPlace, verdicts: Sequence[_retention.RetentionVerdict], wanted_bytes: int) -> Verdicts:
    free = _files.free_bytes(place.directory)
    made = _more_room(place, place.archives, verdicts, wanted_bytes, free)
    if made is None:
        raise TargetError(
            f"The directory {place.directory}",
            f"{human_bytes(wanted_bytes)} cannot be had: {human_bytes(free)} are free, and what may go is not enough",
            "Nothing was removed. Free space by other means, unprotect archives, or ask for less.",
        )
    return made


def _refuse_too_little(directory: str, wanted_bytes: int, removed: Sequence[RemovedArchive], context: Context) -> None:
    """Raises TargetError if less is free than was wanted, after all that was removed."""
    free = _files.free_bytes(directory) if wanted_bytes else 0
    if free >= wanted_bytes:
        return
    for each in removed:
        context.warn(Notice(Code.REMOVED, f"{each.path} was removed: {each.reason}"))
    raise TargetError(
        f"The directory {directory}",
        f"{human_bytes(wanted_bytes)} are wanted and {human_bytes(free)} are free, although {len(removed)} archives were removed",
        "Something else takes the space: files that others write there, snapshots of the file system, or archives that "
        "cannot be removed (see the warnings).",
    )


def _directory(request: RetentionRequest) -> str:
    try:
        conn = connection.connect(request.uri)
    except KvmopsError:
        if request.pool:
            raise
        conn = None  # its pools are not looked at then
    return storage.resolve_target(conn, pool=request.pool, path=request.path).directory


def _uuids(request: RetentionRequest, place: RetentionPlace, context: Context) -> set[str] | None:
    if not request.vm:
        return None
    selection = request.selection
    own = select.of_vm(list(place.views.values()), request.vm, select.vm_on_host(selection, context))
    if not own:
        context.warn(Notice(Code.NOTHING_FOUND, f"No archive in {place.directory} belongs to a VM {request.vm}"))
    return {view.newest.vm_uuid for view in own}


def _vms_of(place: RetentionPlace, paths: Collection[str]) -> set[str]:
    return {each.vm_uuid for each in place.archives if each.path in paths}


def _not_ours(view: ArchiveView) -> str:
    if view.not_ours:
        return f"not trusted: {view.distrust}" if view.distrust else view.not_ours
    return "" if view.newest.vm_uuid else "it does not say whose it is"


def _facts(view: ArchiveView, twins: Sequence[str]) -> _retention.ArchiveFacts:
    names = (view.path, *twins)
    return _retention.ArchiveFacts(
        path=view.path,
        vm_uuid=view.newest.vm_uuid,
        newest=view.newest.timestamp,
        frees_bytes=sum(map(_freed_bytes, names)),
        damaged=not view.good,
        protected=any(map(sidecars.is_protected, names)),
        in_use=next(filter(None, map(archive_locks.users, names)), ""),
        needs=_needs(view),
        provides=_provides(view),
    )


def _provides(view: ArchiveView) -> frozenset[str]:
    return frozenset(_version(point.provides) for point in view.points if point.provides)


def _needs(view: ArchiveView) -> frozenset[str]:
    return frozenset(_version(point.requires.disks) for point in view.points if point.requires)


def _version(disks: tuple[TemplateDisk, ...]) -> str:
    """What tells a template's content, as TemplateRequirement.fits compares it."""
    return " ".join(f"{disk.virtual_size_bytes}:{disk.digest}" for disk in disks)


def _freed_bytes(path: str) -> int:
    try:
        return _files.freed_bytes(path)
    except OSError:
        return 0


def _clones_elsewhere(directory: str, uri: str, context: Context) -> list[_retention.ArchiveFacts]:
    """Archives in other pools that need a template: what they need must not go. Raises KvmopsError where that cannot be told."""
    here = os.path.realpath(directory)
    found = []
    others = [each for each in select.pool_directories(storage.pools(connection.connect(uri)), "") if each != here]
    for path in select.mounted(others):
        context.progress.phase("read", path)
        with contextlib.suppress(ArchiveError):
            needs = _needs(catalog.look(path))
            if needs:
                found.append(_retention.ArchiveFacts(path, "", 0, not_ours="it is in another place", needs=needs))
    return found


def _diff(shown: Sequence[_retention.ArchiveFacts], gone: Collection[str], reasons: dict[str, str]) -> dict[str, str]:
    def lines(paths: Sequence[str]) -> str:
        return "".join(f"{path}\n" for path in paths)

    before = [each.path for each in shown]
    after = lines([path for path in before if path not in gone])
    return {"before": lines(before), "after": after + "".join(f"# {path}: {reasons[path]}\n" for path in sorted(gone))}
