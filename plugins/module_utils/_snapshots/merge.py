# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Removing snapshots for good: one disk at a time, base and top named, every step journalled, resumable.

The order keeps every moment safe: data into the base, then whoever stood on the top onto the base, then the definitions,
then the bookkeeping, the files last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Optional

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    BusyError,
    KvmopsError,
    SplitViewError,
    UnmergedError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, vm_key
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import (
    apparmor,
    blockjobs,
    files,
    snapshots,
    status_xml,
    views,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    again,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import (
    active_disks,
    active_merge,
    bookkeeping,
    copying,
    layers,
    original_disk,
    removal,
    retained_layers,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.active_disks import ActiveMerge
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import (
    MergeFacts,
    OriginalDisk,
    Overlay,
    Owner,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.removal import Merge, RemovalPlan

OPERATION = "removal of snapshots"


@dataclass(frozen=True)
class RemovalFacts(MergeFacts):
    """What the journal of a removal says.

    ``originals``: what the disks were before whose active image is merged, by target. ``started``: the top of the merge that was
    begun in QEMU, by target; ``committed``: tops of merges that are done; ``merged``: all are. ``wanted``: the snapshots that
    stay, as they are to be, by name.
    """

    plan: RemovalPlan
    originals: Mapping[str, OriginalDisk]
    started: Mapping[str, str] = field(default_factory=dict)
    committed: tuple[str, ...] = ()
    merged: bool = False
    wanted: Optional[Mapping[str, str]] = None


@dataclass(frozen=True)
class RemovedSnapshots:
    """What is gone: names of snapshots, children first; ``notes`` is what a person should know."""

    names: tuple[str, ...]
    notes: tuple[Notice, ...]


def _nothing() -> None:
    pass


def remove_snapshots(
    conn: Connection,
    domain: Domain,
    names: removal.Names,
    context: Context,
    begin: Callable[[], None] = _nothing,
) -> RemovedSnapshots:
    """Remove snapshots, VM running or off. The caller holds the VM's lock and has settled what dead runs left.

    ``begin`` is called before anything is touched, once it is known that nothing speaks against it.

    Raises RefusedError, BusyError or SplitViewError with nothing touched, UnmergedError when nothing was merged and all is as
    it was; after any other error the next run settles it.
    """
    conn, domain = again(conn, domain)
    found = layers.look(conn, domain)
    plan = removal.plan_removal(found, names)
    if not plan.names:
        return RemovedSnapshots((), ())
    require_removable(conn, domain, found, plan)
    begin()
    active = [merge for merge in plan.merges if merge.active]
    originals = {each.target: OriginalDisk(each.disk_xml, _owner_after(each)) for each in active}
    journal = Journal.open(vm_key(plan.vm_uuid), OPERATION, RemovalFacts({}, plan, originals))
    try:
        removed = remove(conn, domain, journal, context.progress)
        journal.done()
    except KvmopsError as error:
        if not may_wait(conn, domain, journal.facts):
            raise
        journal.done()
        raise UnmergedError(error.what, error.why, error.hint) from error
    finally:
        journal.close()
    return replace(removed, notes=(*plan.notes, *removed.notes))


def may_wait(conn: Connection, domain: Domain | None, facts: RemovalFacts) -> bool:
    """Whether the VM may go on with these snapshots, after remove() has failed: nothing has been merged, and all is whole."""
    plan = facts.plan
    if facts.merged or facts.committed or domain is None or not _stands(conn, domain, plan):
        return False
    merged = _active(facts)
    if not merged.overlays:
        return True
    # not one snapshot names the overlays: _stands() has seen that libvirt lists all of them
    return active_merge.may_wait(lambda: replace(active_disks.observe(conn, domain, merged, facts), listed=True))


def _stands(conn: Connection, domain: Domain, plan: RemovalPlan) -> bool:
    """The snapshots are all there, and QEMU and libvirt agree about the layers to merge."""
    try:
        there = {state.name for state in snapshots.tree(domain, secrets=False)}
        seen = views.gather(conn, domain)
    except (KvmopsError, libvirt.libvirtError):
        return False
    layered = all(
        seen.disk(merge.target).agree and merge.top_path in (seen.disk(merge.target).qemu or (merge.top_path,))
        for merge in plan.merges
        if merge.attached
    )
    return there >= set(plan.names) and layered and all(os.path.exists(path) for path in plan.replaced)


def require_removable(conn: Connection, domain: Domain, found: layers.Layers, plan: RemovalPlan) -> None:
    """Nobody is at work on the disks or has a file of the plan open, and QEMU would merge them.

    Raises RefusedError, BusyError or SplitViewError.
    """
    layers.require_quiet(conn, domain, found)
    if found.running:
        blockjobs.require_open(domain, f"The VM {found.vm_name}")
        apparmor.require_mergeable(domain, _written(merge for merge in plan.merges if merge.attached))
    elif plan.kept:
        snapshots.require_no_checkpoints(domain)
    _require_unused(found, plan)


def remove(conn: Connection, domain: Domain | None, journal: Journal[RemovalFacts], progress: Progress) -> RemovedSnapshots:
    """Carry the journal's plan out, from where an earlier run stopped. A wish to cancel is not heard."""
    plan = journal.facts.plan
    notes: list[str] = []
    if not journal.facts.merged:
        notes = _merge_all(conn, domain, plan, journal, progress)
        journal.record(merged=True)
    if domain is not None:
        conn, domain = again(conn, domain)
        wanted = journal.facts.wanted
        if wanted is None:
            wanted = _wanted(domain, plan)
            journal.record(wanted=wanted)
        _tidy_definition(conn, domain, plan)
        _delete_inner(conn, domain, plan)
        for name in plan.names:
            snapshots.forget(domain, name)
        _tidy_snapshots(domain, wanted)
    files.sync(conn.getURI(), plan.vm_name)
    _unlink(conn, plan)
    retained_layers.save(plan.vm_uuid, plan.left)
    return RemovedSnapshots(plan.names, tuple(Notice(Code.PUT_RIGHT, text) for text in notes))


def _owner_after(merge: Merge) -> Owner:
    """Of the base, when the guest writes to it again: libvirt moves what it remembers about owners with the active image."""
    return replace(original_disk.owner_of(merge.base_path), labels=original_disk.owner_of(merge.top_path).labels)


def _merge_all(
    conn: Connection, domain: Domain | None, plan: RemovalPlan, journal: Journal[RemovalFacts], progress: Progress
) -> list[str]:
    """Returns what a person should know, as merge_active() does."""
    work = _Work(conn, domain, plan, journal, progress)
    below = [merge for merge in plan.merges if not merge.active]
    if work.running:
        for merges in _rounds([merge for merge in below if merge.attached]):
            work = _merge_in_qemu(work, merges)
    for merge in below:
        _merge_below(work, merge)
    merged = _active(journal.facts)
    if not merged.overlays:
        return list(work.notes)
    return [*work.notes, *active_merge.merge_active(work.conn, work.domain, merged, journal, progress)]


@dataclass(frozen=True)
class _Work:
    conn: Connection
    domain: Domain | None
    plan: RemovalPlan
    journal: Journal[RemovalFacts]
    progress: Progress
    notes: tuple[str, ...] = ()  # what a person should know

    @property
    def running(self) -> bool:
        """Whether libvirt says so, now."""
        return self.domain is not None and bool(self.domain.isActive())

    def committed(self, merge: Merge) -> None:
        """It is done, durably."""
        self.journal.record(committed=(*self.journal.facts.committed, merge.top_path))


def _active(facts: RemovalFacts) -> ActiveMerge:
    """What the guest writes to goes through the same table of situations as a backup's own snapshot: layers that are merged are one
    overlay several files deep."""
    plan = facts.plan
    merges = [merge for merge in plan.merges if merge.active]
    merged = tuple(Overlay(each.target, each.base_path, each.base_format, each.top_path, each.between) for each in merges)
    return ActiveMerge(plan.vm_uuid, plan.vm_name, merged, facts.originals, expendable=plan.names)


# --- layers below, and on other branches ---------------------------------------------------------------------------


def _rounds(merges: Iterable[Merge]) -> list[list[Merge]]:
    """What can be done side by side: a disk takes one job at a time."""
    rounds: list[list[Merge]] = []
    for merge in merges:
        free = next((each for each in rounds if all(other.target != merge.target for other in each)), None)
        if free is None:
            rounds.append([merge])
        else:
            free.append(merge)
    return rounds


def _merge_below(work: _Work, merge: Merge) -> None:
    """Merge layers that neither the guest nor QEMU has open, unless that has been done; what stands on them stands on the base."""
    children = [child for child in merge.children if not _stands_on_base(child, merge)]
    for path in (merge.top_path, *children):
        _require_nobody(path, "qcow2", merge)
    # not every top has a child that would tell by standing on the base
    if merge.top_path not in work.journal.facts.committed:
        _require_nobody(merge.base_path, merge.base_format, merge)
        active_merge.reporter(work.progress, [merge.target])
        active_merge.commit_off(merge.gone, merge.base_path, work.progress)
        copying.sync(merge.base_path)
        work.committed(merge)
    for child in children:
        qemu_img.rebase_unsafe(child, merge.base_path, merge.base_format)
        copying.sync(child)


def _require_nobody(path: str, image_format: str, merge: Merge) -> None:
    if qemu_img.is_in_use(path, image_format):
        raise BusyError(f"Merging {merge.top_path} into {merge.base_path}", f"a process has {path} open")


def _merge_in_qemu(work: _Work, merges: Sequence[Merge]) -> _Work:
    """Merge layers of different disks, side by side. Returns the work to go on with."""
    domain = work.domain
    running = {job.target: job for job in blockjobs.jobs(domain)}
    seen = views.gather(work.conn, domain)
    fresh = []
    for merge in merges:
        job = running.get(merge.target)
        ours = work.journal.facts.started.get(merge.target) == merge.top_path
        if job and not (ours and job.type == "commit"):
            why = f"kvmops.backup did not start the block job {job.id}"
            raise BusyError(_what(work, merge), why, "Wait until it has finished.")
        if not job and merge.top_path in seen.disk(merge.target).qemu:
            fresh.append(merge)
    apparmor.lift(domain, _written(fresh))
    started = {merge.target: merge.top_path for merge in fresh}
    work.journal.record(started={**work.journal.facts.started, **started})
    limit = blockjobs.Limit(domain, work.progress.merge_bps, work.progress.merge_within_s)
    targets = [merge.target for merge in merges]
    try:
        for merge in fresh:
            share = limit.share(merge.target, len(merges))
            blockjobs.start_inner_commit(domain, merge.target, merge.base_path, merge.top_path, share)
        blockjobs.wait_ended(domain, targets, active_merge.reporter(work.progress, targets), limit)
    except KvmopsError:
        blockjobs.give_up(domain, targets)
        raise
    active_merge.soon(lambda: all(view.agree for view in _seen(work, merges)))
    for merge in merges:
        if not _seen(work, [merge])[0].agree:
            work = _learned(work, merge)
        if merge.top_path in _seen(work, [merge])[0].qemu:
            raise KvmopsError(
                _what(work, merge),
                "the block job ended before its end",
                "Look for a full file system or I/O errors under the disk; the next run tries again.",
            )
        work.committed(merge)
    # a libvirtd that missed the end left them, and with them the files' space
    blockjobs.drop_nodes(work.domain, [path for merge in merges for path in merge.gone])
    return work


def _written(merges: Iterable[Merge]) -> list[str]:
    """What QEMU opens for writing: bases, and what stands on the merged layers."""
    return [path for merge in merges for path in (merge.base_path, *merge.children)]


def _what(work: _Work, merge: Merge) -> str:
    return f"Merging {merge.top_path} of {work.plan.vm_name} into {merge.base_path}"


def _seen(work: _Work, merges: Sequence[Merge]) -> list[views.DiskView]:
    found = views.gather(work.conn, work.domain)
    return [found.disk(merge.target) for merge in merges]


def _learned(work: _Work, merge: Merge) -> _Work:
    """The same work with a libvirt that knows of the merge: a libvirtd that died at its end missed it, for good.

    Raises SplitViewError where that is not all, or cannot be mended.
    """
    [seen] = _seen(work, [merge])
    tried = ""
    hint = "Shut the VM down, start it, and run the task again."
    if tuple(path for path in seen.live if path not in merge.gone) == seen.qemu != seen.live:
        if seen.qemu[1] == merge.base_path:
            blockjobs.shorten(work.domain, merge.target, merge.base_path)  # without a restart of libvirtd
        else:
            try:
                conn, domain = status_xml.mend(work.conn, work.domain, merged={merge.target: merge.gone})
            except KvmopsError as error:
                tried = f". It could not be put right by itself ({error})"
                hint = f"See to that and run the task again, or: {hint[0].lower()}{hint[1:]}"
            else:
                note = f"restarted libvirtd, which had missed the end of a merge of {merge.target} when it died"
                work = replace(work, conn=conn, domain=domain, notes=(*work.notes, f"{work.plan.vm_name}: {note}"))
        [seen] = _seen(work, [merge])
    if not seen.agree:
        where = f"QEMU has {' on '.join(seen.qemu)}, the live definition {' on '.join(seen.live)}"
        raise SplitViewError(_what(work, merge), f"{where}{tried}", hint)
    return work


def _stands_on_base(child: str, merge: Merge) -> bool:
    return views.real(qemu_img.info(child, "qcow2").full_backing_file) == merge.base_path


# --- afterwards ----------------------------------------------------------------------------------------------------


def _wanted(domain: Domain, plan: RemovalPlan) -> dict[str, str]:
    """What libvirt shall know about the snapshots that stay, by name: the files that have their data then."""
    return {
        state.name: bookkeeping.replace_in_snapshot(state.xml, plan.replaced)
        for state in snapshots.tree(domain)
        if state.name in plan.kept
    }


def _tidy_definition(conn: Connection, domain: Domain, plan: RemovalPlan) -> None:
    """The VM's definition names the files that have the data now."""
    try:
        if domain.isPersistent():
            flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
            now = domain.XMLDesc(flags)
            then = bookkeeping.replace_in_domain(now, plan.replaced)
            if original_disk.words(then) != original_disk.words(now):
                conn.defineXML(then)
    except libvirt.libvirtError as error:
        raise translate(error, f"The definition of {plan.vm_name}") from error


def _tidy_snapshots(domain: Domain, wanted: Mapping[str, str]) -> None:
    """libvirt, told to forget one, assumes that its overlay became part of its base, and says so about all that stand on it."""
    for state in snapshots.tree(domain):
        if state.name in wanted:
            xml = bookkeeping.with_parent(wanted[state.name], state.parent)
            if original_disk.words(xml) != original_disk.words(state.xml):
                snapshots.redefine(domain, xml, current=state.current)


def _delete_inner(conn: Connection, domain: Domain, plan: RemovalPlan) -> None:
    """Internal snapshots out of the files that stay."""
    if not plan.inner:
        return
    now = layers.look(conn, domain)
    for state in plan.inner:
        if state.path not in now.files or state.name not in now.files[state.path].internal:
            continue
        if now.running and state.path in now.active.values():
            snapshots.delete_internal(domain, state.name)
        else:
            qemu_img.delete_internal(state.path, state.name)


def _unlink(conn: Connection, plan: RemovalPlan) -> None:
    """Remove the files that nobody needs any more; one that came into use since the plan was made stays."""
    used: dict[str, str] = {}
    for domain in conn.listAllDomains():
        for flag in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
            for disk in domain_xml.parse(domain.XMLDesc(flag)).disks:
                for path in (layers.path_of(conn, disk), *(views.real(link.path) for link in disk.chain)):
                    used[path] = str(domain.name())
    for path in plan.files:
        if path in used:
            raise SplitViewError(
                f"The file {path}",
                f"it shall be removed, but {used[path]} still has it",
                "Nothing more was done; look at that VM's disks.",
            )
        if not os.path.exists(path) or os.path.isfile(path):  # a block device is not ours to remove
            _files.remove(path)


def _require_unused(found: layers.Layers, plan: RemovalPlan) -> None:
    """Files of other branches are nobody's active image. Raises BusyError."""
    attached = {path for active in found.active.values() for path in found.chain(active)}
    for path in [*plan.files, *(state.path for state in plan.inner)]:
        layer = found.files.get(path)
        if layer is not None and path not in attached and qemu_img.is_in_use(path, layer.format):
            raise BusyError(f"The file {path} of {plan.vm_name}", "a process has it open and writes to it")
