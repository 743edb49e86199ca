# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Makes a backup that is due: decide, plan, freeze, copy, publish, merge or keep."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Union

from ansible_collections.kvmops.backup.plugins.module_utils import (
    _files,
    _mounts,
    _slots,
    _trust,
    _vm_state,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive import archive_locks, digests, sidecars
from ansible_collections.kvmops.backup.plugins.module_utils._archive.append import ArchiveAppender
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import (
    ArchiveWriter,
    Compression,
    PublishedArchive,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup import chain_facts, cycles, template_base
from ansible_collections.kvmops.backup.plugins.module_utils._backup import decide as mode
from ansible_collections.kvmops.backup.plugins.module_utils._backup import facts as vm_facts
from ansible_collections.kvmops.backup.plugins.module_utils._backup.backup import (
    Run,
    archive_row,
    nothing_due,
    published,
    what,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup.members import PlannedMember, memory_member
from ansible_collections.kvmops.backup.plugins.module_utils._backup.model import BackupPlan, TargetFacts, VmFacts
from ansible_collections.kvmops.backup.plugins.module_utils._backup.plan import in_archive
from ansible_collections.kvmops.backup.plugins.module_utils._backup.plan import plan as make_plan
from ansible_collections.kvmops.backup.plugins.module_utils._backup.recovery import OPERATION, BackupFacts, Keep
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import BackupRequest, ConsistencyWish, Mode
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    BusyError,
    CancelledError,
    KvmopsError,
    QuiesceError,
    RefusedError,
    SourceError,
    SplitViewError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import BytesSource, ImageSource
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, vm_key
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import firmware_state, storage
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.agent import AgentState
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Domain,
)
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import (
    snapshot,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import unmerged as unmerge
from ansible_collections.kvmops.backup.plugins.module_utils._template import find
from ansible_collections.kvmops.backup.plugins.module_utils._version import VERSION
from ansible_collections.kvmops.backup.plugins.module_utils._vm_state import Evidence

_ATTEMPTS = 3  # a VM may be started or stopped while it is copied; more often in a row is no accident
_SETTLED_S = 0.02  # the clock of file times ticks: what was written just before the freeze must not look like now
_ENDLESS_BYTES = 2**62
_SNAPSHOT_STAYS = Notice(
    Code.SNAPSHOT_STAYS,
    "the VM has snapshots now: it cannot be migrated live or undefined plainly until they are deleted "
    "(kvmops.backup.vm_snapshot with snapshot: all and state: absent), which ends the archive's cycle",
)

_Writer = Union[ArchiveWriter, ArchiveAppender]


@dataclass(frozen=True)
class _Done:
    """What a run has made: the archive with its point, how long the guest stood still, evidence of what was copied."""

    archive: PublishedArchive
    frozen_ms: int
    read_bytes: int
    copied: Mapping[str, Evidence] = field(default_factory=dict)
    stuck: KvmopsError | None = None  # why its own snapshot is still there


def made(run: Run, begin: float, merged: tuple[str, ...]) -> dict[str, Any]:
    """A backup and what follows it; the module's return values. `merged`: snapshots that are gone already. Raises KvmopsError."""
    request, context = run.request, run.context
    run.can(run.place.directory)  # raises for one that can take no archive, before a file is left in it
    with _slots.hold(
        run.place.directory,
        request.max_parallel,
        what=what(run.domain.name()),
        timeout_s=request.slot_timeout_s,
        context=context,
    ) as slot:
        try:
            planned, done, cleared = _attempt(replace(run, slot=slot))
        except KvmopsError:
            for each in run.keeper.removed:
                context.warn(Notice(Code.REMOVED, f"{each.path} was removed before the backup failed: {each.reason}"))
            raise
    merged += cleared
    limited = _reaches_limit(planned, request)
    try:
        merged += _afterwards(run, planned, done, limited=limited)
    except KvmopsError as error:
        result = _result(planned, done, begin, context, incrementable=planned.stays and not limited)
        raise published(error, {**result, **run.went(merged)}) from error
    result = _result(planned, done, begin, context, incrementable=planned.stays and not limited)
    return {**result, **run.went(merged)}


def _afterwards(run: Run, planned: BackupPlan, done: _Done, *, limited: bool) -> tuple[str, ...]:
    """What follows a published point; the snapshots that were merged. Raises KvmopsError: the point is there all the same."""
    request, context = run.request, run.context
    merged: tuple[str, ...] = ()
    if request.notes:
        try:
            sidecars.set_notes(done.archive.path, request.notes)
        except KvmopsError as error:  # what follows is worth more than its notes
            context.warn(Notice(Code.NO_NOTES, f"The archive has no notes: {error}"))
    distrust = _trust.doubt(done.archive.path)
    if distrust:
        text = f"{done.archive.path} will not be trusted: {distrust}. Later runs make a full each time, and retention spares it."
        context.warn(Notice(Code.FOREIGN, text))
    if done.stuck is not None and planned.snapshot:
        if isinstance(done.stuck, (SplitViewError, CancelledError)):
            raise done.stuck
        run.unmerged.add([planned.snapshot.name], done.stuck)
    if limited:
        deletes = request.increment_limit_deletes
        merged = cycles.merge_at_limit(
            run.conn, run.domain, planned.vm_uuid, done.archive.path, deletes, context, run.unmerged
        )
    elif planned.stays and planned.base is None:
        context.warn(_SNAPSHOT_STAYS)
    run.keeper.remove_old(planned.directory, planned.vm_uuid)
    return merged


def _reaches_limit(planned: BackupPlan, request: BackupRequest) -> bool:
    points = 1 + (len(planned.base.points) if planned.base else 0)
    return planned.stays and 0 < request.increment_limit <= points


def predicted(run: Run, begin: float, *, unsettled: bool) -> dict[str, Any]:
    """What the run would do, without doing any of it. ``unsettled``: what a dead run left is still on the VM."""
    uuid = str(run.domain.UUIDString())
    left = [unmerge.name(each) for each in _vm_state.load(uuid).to_merge]
    if left:
        run.context.warn(Notice(Code.UNMERGED, f"the next run will merge what an earlier one could not: {', '.join(left)}"))
    unchanged = nothing_due(run)
    if unchanged:
        return unchanged
    facts = _facts(run, agent=True)
    planned = _plan(run, facts, _decide(run, facts))
    if planned.snapshot and not unsettled and not left:
        snapshot.require_ready(run.conn, run.domain, planned.snapshot)
    names: list[str] = []
    if planned.stays and planned.base is None:
        served = cycles.served_archives(run.conn, run.domain, facts, run.place.directory, run.context)
        names, _ended = cycles.obsolete(served)
    _warn_of_length(run, facts, planned)
    limited = _reaches_limit(planned, run.request)
    if limited:
        names += [each.name for each in cycles.chosen_at_limit(facts.snapshots, run.request.increment_limit_deletes)]
        names += [planned.snapshot.name] if planned.snapshot else []
    run.keeper.remove_old(planned.directory, uuid, planned)
    result = _result(planned, None, begin, run.context, incrementable=planned.stays and not limited)
    return {**result, **run.went(sorted({*left, *names}))}


def _facts(run: Run, *, agent: bool) -> VmFacts:
    request = run.request
    wishes_agent = request.consistency in (ConsistencyWish.AUTO, ConsistencyWish.AGENT)
    found = vm_facts.gather(run.conn, run.domain, secrets=request.include_secrets, ask_agent=wishes_agent and agent)
    if found.running and wishes_agent and not agent:
        found = replace(found, agent=AgentState.CANNOT_FREEZE)
    own = find.of_domain(run.conn, run.domain) if found.thin.marked and not found.running else None
    return replace(found, thin=template_base.with_content(found.thin, own, run.context.progress, threads=request.threads))


def _decide(run: Run, facts: VmFacts) -> mode.ModeDecision:
    views = run.archives.views(run.place.directory)
    for path, why in run.archives.distrusted.items():
        run.context.warn(Notice(Code.FOREIGN, f"{path} is not trusted and counts for nothing: {why}"))
    decision = mode.decide(
        run.conn, run.domain, facts, run.place.directory, views, run.request, int(time.time()), run.context
    )
    too_long = _too_long(facts)
    if decision.base and too_long:
        if run.request.mode is not Mode.AUTO:
            raise RefusedError(f"Incremental backup of VM {facts.name}", too_long)
        return mode.ModeDecision(too_long)  # a new cycle, which merges the former one first
    return decision


def _plan(run: Run, facts: VmFacts, decision: mode.ModeDecision) -> BackupPlan:
    place = run.place
    if decision.base:
        directory = os.path.dirname(decision.base.path)
        if os.path.realpath(directory) != os.path.realpath(place.directory):
            place = storage.resolve_target(run.conn, pool="", path=directory)
        holder = archive_locks.writer(decision.base.path)
        if holder:
            raise BusyError(f"Archive {decision.base.path}", f"it is held by {holder}", "Wait until it has finished.")
    now = mode.not_before(run.archives.views(place.directory), int(time.time()))

    def make(target: TargetFacts) -> BackupPlan:
        return make_plan(
            facts, target, run.request, now=now, tool_version=VERSION, base=decision.base, reason=decision.reason
        )

    target = vm_facts.target_facts(place, run.can(place.directory))
    draft = make(replace(target, free_bytes=_ENDLESS_BYTES))
    return make(run.keeper.with_room(draft, target, run.slot if place is run.place else None))


def _attempt(run: Run) -> tuple[BackupPlan, _Done, tuple[str, ...]]:
    """Decides, plans and runs; again if the VM changed its power state under our hands, its agent could not freeze, or
    the archive turns out not to take another point. Returns the snapshots that were merged before, too."""
    agent, force_full = True, ""
    request, context = run.request, run.context
    cleared: tuple[str, ...] = ()
    for number in range(1, _ATTEMPTS + 1):
        context.progress.phase("plan")
        facts = _facts(run, agent=agent)
        decision = mode.ModeDecision(force_full) if force_full else _decide(run, facts)
        planned = _plan(run, facts, decision)  # refuses what can be refused before anything is touched
        if planned.stays and planned.base is None:
            gone = cycles.clear_old(run.conn, run.domain, facts, run.place.directory, context, run.unmerged)
            if gone:
                cleared += gone
                facts = _facts(run, agent=agent)
                planned = _plan(run, facts, decision)
        if planned.stays and _too_long(facts):
            planned = _standing_alone(run, facts, _too_long(facts))
        else:
            _warn_of_length(run, facts, planned)
        try:
            return planned, _execute(run, planned, decision.proved), cleared
        except QuiesceError as error:
            if number == _ATTEMPTS or not agent or request.consistency is not ConsistencyWish.AUTO:
                raise
            text = f"{error.what}: {error.why}; the backup has a memory image instead of frozen file systems"
            context.warn(Notice(Code.LOWER_CONSISTENCY, text))
            agent = False
        except ArchiveError as error:
            if number == _ATTEMPTS or planned.base is None or request.mode is not Mode.AUTO:
                raise
            force_full = f"{planned.base.path} cannot be continued: {error}"
        except SourceError as error:
            if number == _ATTEMPTS or planned.running or planned.snapshot or not run.domain.isActive():
                raise
            text = f"{error.what}: {error.why}; the VM was started meanwhile, so it is backed up as a running one"
            context.warn(Notice(Code.NOT_AS_DEFINED, text))
    raise AssertionError("the loop returns or raises")


def _too_long(facts: VmFacts) -> str:
    """Why no snapshot of ours may stay on top of the VM's images, "" if one may."""
    target, layers = cycles.longest_chain(facts)
    return cycles.about_length(target, layers, facts.name) if layers + 1 >= cycles.TOO_MANY_LAYERS else ""


def _warn_of_length(run: Run, facts: VmFacts, planned: BackupPlan) -> None:
    target, layers = cycles.longest_chain(facts)
    text = cycles.about_length(target, layers + int(planned.stays), facts.name)
    if text:
        run.context.warn(Notice(Code.MANY_LAYERS, text))


def _standing_alone(run: Run, facts: VmFacts, why: str) -> BackupPlan:
    """A full whose snapshot goes again, and which fails when it is published: somebody has to merge. Raises RefusedError."""
    if run.request.mode is not Mode.AUTO:
        raise RefusedError(f"Backup of VM {facts.name}", why)
    run.unmerged.urgent = why
    alone = replace(run, request=replace(run.request, mode=Mode.FULL, incrementable=False))
    return _plan(alone, facts, mode.ModeDecision(why))


def _execute(run: Run, planned: BackupPlan, proved: Mapping[str, Evidence]) -> _Done:
    """Carries the plan out, up to the published point; a snapshot that does not stay is merged away again."""
    with _journalled(run, planned) as at_work:
        if planned.base is None:
            # The file exists before the VM is touched: a place that cannot take it costs the guest nothing.
            at_work.writer = _new_archive(run, planned, at_work.journal)
        if planned.snapshot is None:
            return _copy(run, planned, at_work, None, proved)
        run.context.progress.phase("freeze")
        at_work.clean = False
        try:
            taken = snapshot.take(run.conn, run.domain, planned.snapshot, at_work.journal)
        except KvmopsError:
            at_work.clean = at_work.journal.facts.is_clean
            raise
        done: _Done | None = None
        try:
            done = _copy(run, replace(planned, members=_with_memory(planned)), at_work, taken, proved)
            if planned.stays:
                at_work.journal.record(published=True)
                at_work.clean = True
                _remember(run, planned, done, proved)
        finally:
            if not at_work.clean:
                try:
                    snapshot.remove(run.conn, run.domain, planned.snapshot, at_work.journal, run.context.progress)
                    at_work.clean = True
                except KvmopsError as error:
                    if done is None:
                        raise
                    done = replace(done, stuck=error)  # the next run looks again
        return done


@dataclass
class _AtWork:
    """What a run has open. ``clean``: nothing of it is on the VM, so that its journal has nothing more to say."""

    journal: Journal[BackupFacts]
    writer: _Writer | None = None
    clean: bool = True


@contextmanager
def _journalled(run: Run, planned: BackupPlan) -> Iterator[_AtWork]:
    """A journal for the block, which stays for the next run where something of this one does; an unpublished point goes."""
    keep = None
    if planned.stays:
        keep = Keep(planned.archive_path, planned.timestamp)
        _begin_cycle(planned)
    facts = BackupFacts({}, planned.vm_uuid, planned.vm_name, keep=keep)
    at_work = _AtWork(Journal.open(vm_key(planned.vm_uuid), OPERATION, facts))
    try:
        yield at_work
    finally:
        if at_work.writer:
            at_work.writer.abort()
        if at_work.clean:
            at_work.journal.done()
        else:
            at_work.journal.close()


def _copy(
    run: Run, planned: BackupPlan, at_work: _AtWork, taken: snapshot.Taken | None, proved: Mapping[str, Evidence]
) -> _Done:
    held = _held(planned.members)
    if at_work.writer is None:
        at_work.writer = _appender(run, planned, held, at_work.journal)
    return _write(run, planned, at_work.writer, taken, proved, held)


def _begin_cycle(planned: BackupPlan) -> None:
    """An end that was recorded for older archives does not mean the one that begins now."""
    state = _vm_state.load(planned.vm_uuid)
    if planned.base is None and state.ended:
        _vm_state.save(planned.vm_uuid, replace(state, begun=(*state.begun, planned.timestamp)))


def _remember(run: Run, planned: BackupPlan, done: _Done, proved: Mapping[str, Evidence]) -> None:
    """Evidence of the files that the point stands on; of others only while they are there."""
    state = _vm_state.load(planned.vm_uuid)
    kept = {path: each for path, each in state.frozen.items() if os.path.exists(path)}
    try:
        _vm_state.save(planned.vm_uuid, replace(state, frozen={**kept, **proved, **done.copied}))
    except KvmopsError as error:
        run.context.warn(Notice(Code.READ_AGAIN, f"{error} The next increment will read the VM's frozen files again."))


def _new_archive(run: Run, planned: BackupPlan, journal: Journal[BackupFacts]) -> ArchiveWriter:
    request = run.request
    writer = ArchiveWriter(
        planned.directory,
        planned.archive_name,
        compression=Compression(request.compress_level) if request.compress else None,
        timestamp=planned.timestamp,
        threads=request.threads,
        progress=run.context.progress,
        on_partial=lambda path: journal.record(
            partial=path, partial_place=_mounts.identity(planned.directory)
        ),
        bandwidth=request.bandwidth_bps,
        algorithm=digests.ALGORITHMS[planned.configuration.digest_algorithm],
    )
    if run.slot:
        run.slot.writes(writer.partial)
    return writer


def _appender(
    run: Run, planned: BackupPlan, held: Mapping[str, bytes], journal: Journal[BackupFacts]
) -> ArchiveAppender:
    """The archive, open for one more point: sizes are known, because nobody writes to the files any more."""
    sizes = []
    for each in planned.members:
        source = _source(run, each, held)
        sizes.append(source.size_bytes)
        source.close()
    if run.slot:
        run.slot.writes(planned.archive_path)
    return ArchiveAppender(
        planned.archive_path,
        timestamp=planned.timestamp,
        sizes=sizes,
        compression_level=run.request.compress_level,
        threads=run.request.threads,
        progress=run.context.progress,
        on_growth=lambda facts: journal.record(**facts),
        bandwidth=run.request.bandwidth_bps,
    )


def _with_memory(planned: BackupPlan) -> tuple[PlannedMember, ...]:
    """The members with the memory image of the point's own snapshot."""
    if not planned.snapshot or not planned.snapshot.memory_path:
        return planned.members
    number = 1 + sum(each.member.role is Role.MEMORY for each in planned.members)
    return (*planned.members, memory_member(planned.timestamp, number, planned.snapshot.memory_path))


def _held(members: Sequence[PlannedMember]) -> dict[str, bytes]:
    """The state of the firmware and the TPM, which the guest goes on writing to, as it is now; by path."""
    found = {}
    for each in members:
        if each.member.role is Role.NVRAM:
            found[each.path] = firmware_state.read_file(each.path)
        elif each.member.role is Role.TPM:
            found[each.path] = firmware_state.read_tpm(each.path)
    return found


def _source(run: Run, planned: PlannedMember, held: Mapping[str, bytes]) -> ImageSource:
    if planned.path in held:
        return BytesSource(held[planned.path])
    if planned.member.role is Role.MEMORY and not run.request.include_secrets:
        return chain_facts.open_memory(planned.path, run.context.warn)
    return chain_facts.open_source(planned.path, planned.from_raw)


def _write(
    run: Run,
    planned: BackupPlan,
    writer: _Writer,
    taken: snapshot.Taken | None,
    proved: Mapping[str, Evidence],
    held: Mapping[str, bytes],
) -> _Done:
    """Copies the files of the plan, which nobody writes to now, and publishes the point. `proved`: the files below them;
    `held`: files that were read already."""
    configuration = planned.configuration
    if taken and planned.snapshot and (planned.stays or planned.snapshot.memory_path):
        # the point's own snapshot is part of its tree
        tree = vm_facts.own_states(run.domain, secrets=run.request.include_secrets)
        configuration = replace(configuration, snapshots=in_archive(tree))
    if taken:
        time.sleep(max(0.0, taken.since + _SETTLED_S - time.monotonic()))
    before = {each.path: _vm_state.evidence(each.path) for each in planned.members if each.path not in held}
    below = {**planned.below, **{path: each.stat[:-1] for path, each in proved.items()}}
    with run.request.priority.lowered():
        stored = tuple(_add(run, writer, member, held) for member in planned.members)
        _refuse_changed(run.domain, planned, {**{path: each[:-1] for path, each in before.items()}, **below})
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(planned.timestamp))
        archive = writer.publish(replace(configuration, members=(*planned.kept, *stored), created=created))
    if run.slot:
        run.slot.claim(0)  # a merge may follow, which writes elsewhere
    copied = {
        each.former_path: Evidence(each.digest, before[each.former_path])
        for each in stored
        if each.former_path in before
    }
    return _Done(archive, taken.frozen_ms if taken else 0, sum(each.size_bytes for each in stored), copied)


def _add(run: Run, writer: _Writer, planned: PlannedMember, held: Mapping[str, bytes]) -> Member:
    source = _source(run, planned, held)
    try:
        return writer.add(planned.member, source)
    finally:
        source.close()


def _refuse_changed(domain: Domain, planned: BackupPlan, before: dict[str, tuple[int, ...]]) -> None:
    """Nothing of what was copied was written to meanwhile. Raises SourceError: the copy would be torn."""
    what = f"Backup of VM {planned.vm_name}"
    if not planned.running and not planned.snapshot and (domain.isActive() or domain.hasManagedSaveImage(0)):
        raise SourceError(what, "the VM was started or stopped while it was copied", "Run the backup again.")
    for path, evidence in before.items():
        with suppress(FileNotFoundError):
            if _files.evidence(path) == evidence:
                continue
        raise SourceError(what, f"{path} was written to while it was copied", "Run the backup again.")


def _result(
    planned: BackupPlan, done: _Done | None, begin: float, context: Context, *, incrementable: bool
) -> dict[str, Any]:
    """The module's return values; without `done` those of check mode."""
    for notice in planned.warnings:
        context.warn(notice)
    result: dict[str, Any] = {
        "changed": True,
        "mode": planned.configuration.mode,
        "reason": planned.reason,
        "consistency": planned.consistency.value,
        "estimated_bytes": planned.estimated_bytes,
        "skipped_devices": [{"device": each.device, "reason": each.reason} for each in planned.configuration.skipped],
        "diff": _diff(planned, done),
    }
    if done is None:
        archive: dict[str, Any] = {
            "path": planned.archive_path,
            "size": planned.estimated_bytes,
            "compressed": planned.archive_name.endswith(".zst"),
            "points": [],
            "digest": None,
            "digest_algorithm": planned.configuration.digest_algorithm,
        }
        if planned.base:
            archive = archive_row(catalog.describe(planned.base.path))
            archive["size"] += planned.estimated_bytes
        return {**result, "archive": {**archive, "incrementable": incrementable}}
    return {
        **result,
        "archive": {**archive_row(catalog.describe(done.archive.path)), "incrementable": incrementable},
        "point": done.archive.configuration.timestamp,
        "frozen_ms": done.frozen_ms,
        "bytes_read": done.read_bytes,
        "bytes_written": done.archive.bytes_written,
        "duration": round(time.monotonic() - begin, 2),
    }


def _diff(planned: BackupPlan, done: _Done | None) -> dict[str, str]:
    members: Sequence[str] = [planned_member.member.name for planned_member in planned.members]
    if done:
        before = planned.base.names if planned.base else ()
        members = [member.name for member in done.archive.configuration.members if member.name not in before]
    lines = [planned.archive_path, f"consistency: {planned.consistency.value}", *(f"  {name}" for name in members)]
    return {"before": "", "after": "\n".join(lines) + "\n"}
