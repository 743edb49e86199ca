# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The engine that merges what the guest writes to into its base: for a backup's snapshot, for snapshots that are removed, for
what killed runs, dead libvirtds and power-offs have left of either.

One loop: look at QEMU, the live and the persistent definition (`active_disks`), let a pure function say what is next (`situation`),
do that one thing, look again. Only overlays that the journal of our own run names are ever touched.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ansible_collections.kvmops.backup.plugins.module_utils import _ownership
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    BusyError,
    CancelledError,
    KvmopsError,
    SplitViewError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import (
    apparmor,
    blockjobs,
    status_xml,
    views,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import original_disk, overlays
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.active_disks import (
    ActiveMerge,
    observe,
    seen_active,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import (
    MergeFacts,
    Overlay,
    Step,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.situation import (
    Act,
    Action,
    Blocked,
    Power,
    SeenActive,
    Situation,
    WayOut,
    can_wait,
    decide,
)

# what a living libvirtd passes through in moments, and a dead one leaves for good
CATCH_UP_S = 2.0
# libvirt goes on with the snapshot that a killed worker has asked for, the guest's freeze in it
JOB_PATIENCE_S = 60.0
_NAMED = 4  # so many disks have room in a line of progress
_SIDE_BY_SIDE = (
    frozenset({Act.MERGE, Act.FINISH}),
    frozenset({Act.MERGE_QEMU, Act.FINISH_QEMU}),
    frozenset({Act.MERGE_OFF}),
    frozenset({Act.DROP}),
    frozenset({Act.UNLINK}),
)
UNUSUAL = frozenset({Act.MERGE_QEMU, Act.REJOIN, Act.DROP, Act.DISMISS, Act.REDEFINE})


@dataclass(frozen=True)
class Work:
    """What every act needs."""

    conn: Connection
    domain: Domain
    merge: ActiveMerge
    journal: Journal[MergeFacts]
    progress: Progress

    def overlay(self, target: str) -> Overlay:
        """The one of this disk."""
        return next(each for each in self.merge.overlays if each.target == target)

    def steps(self, targets: Sequence[str], step: Step) -> None:
        """How far the merges of these disks have come, durably."""
        self.journal.record(steps={**self.journal.facts.steps, **dict.fromkeys(targets, step)})

    def look(self) -> Situation:
        """How the disks are now."""
        return observe(self.conn, self.domain, self.merge, self.journal.facts)


Acts = Mapping[Act, Callable[[Work, list[str]], None]]


def merge_active(
    conn: Connection, domain: Domain | None, merge: ActiveMerge, journal: Journal[MergeFacts], progress: Progress
) -> list[str]:
    """Merge the overlays, and nothing else: snapshots stay listed, and all files where they are.

    Goes on where an earlier run stopped. A wish to cancel is not heard: a VM is not left between its disks. Returns what a person
    should know: that libvirtd had to be restarted. Raises BusyError, SplitViewError or RefusedError before the next act on what
    it cannot judge, else KvmopsError.
    """
    return run(Work(conn, domain, merge, journal, progress), Work.look, MERGES, lambda _action: "")[1]


def may_wait(look: Callable[[], Situation]) -> bool:
    """Whether the VM may go on as it is, after a merge has failed: it is whole, on its overlays."""
    try:
        return soon(lambda: can_wait(look()))
    except (KvmopsError, libvirt.libvirtError):
        return False


def run(
    work: Work, look: Callable[[Work], Situation], acts: Acts, tell: Callable[[Action], str]
) -> tuple[Work, list[str]]:
    """Decide and do what of it is in ``acts``, until nothing is left to do.

    ``tell``: a sentence about what was done, "" for none. Returns these, with one for each restart of libvirtd, and the work on a
    connection that lives. A disk that has to be left as it is, by those that cannot, is an error.
    """
    merge = work.merge
    done: list[str] = []
    mended: set[str] = set()
    actions: list[Action] = []
    # every disk needs at most: rejoin, merge, redefine, drop, unlink; then the snapshot, its memory image, the thaw
    for _dummy in range(5 * len(merge.overlays) + 5):
        try:
            actions = _decide_lasting(work, look)
        except Blocked as blocked:
            if blocked.target in mended or blocked.way_out not in (WayOut.FIND, WayOut.GHOST):
                raise _blocked(blocked, work) from blocked
            work = _mended(work, blocked)
            mended.add(blocked.target)
            done.append(f"{merge.vm_name}: {_MENDED[blocked.way_out].format(blocked.target)}")
            continue
        for action in actions:
            if action.act is Act.LEAVE and Act.LEAVE not in acts:
                why = f"the VM has it no more, and its files cannot be merged: {action.why}"
                raise _blocked(Blocked(SplitViewError, why, action.target), work)
        actions = [action for action in actions if action.act in acts]
        if not actions:
            _restore_disks(work)
            return work, done
        group = _together(actions)
        acts[group[0].act](work, [action.target for action in group])
        done += filter(None, map(tell, group))
    raise SplitViewError(
        f"The VM {merge.vm_name}",
        f"{actions[0].act.value} {actions[0].target} has no lasting effect",
        "Look at the VM by hand.",
    )


def _restore_disks(work: Work) -> None:
    """Definitions and owners of the disks as they were before."""
    _restore_definition(work)
    running = work.domain is not None and bool(work.domain.isActive())
    for overlay in work.merge.overlays:
        if work.journal.facts.step(overlay.target) is not Step.LEFT:  # others may have that one now
            original_disk.restore_owner(overlay.base_path, work.merge.originals[overlay.target].owner, running=running)


def _together(actions: list[Action]) -> list[Action]:
    """The first of them, with those that follow and are done side by side with it."""
    kinds = next((kinds for kinds in _SIDE_BY_SIDE if actions[0].act in kinds), frozenset())
    return [*actions[:1], *itertools.takewhile(lambda action: action.act in kinds, actions[1:])]


def _decide_lasting(work: Work, look: Callable[[Work], Situation]) -> list[Action]:
    """decide(), of what is unusual only when it lasts: a libvirtd that has just started may still be catching up with QEMU."""
    before = None
    since = begin = time.monotonic()
    while True:
        found = look(work)
        actions: list[Action] = []
        blocked = None
        try:
            actions = decide(found)
        except Blocked as error:
            blocked = error
        usual = found.power is not Power.RUNNING or not actions or actions[0].act not in UNUSUAL
        if blocked is None and usual:
            return actions
        if found != before:
            before, since = found, time.monotonic()
        now = time.monotonic()
        if blocked is not None and blocked.kind is BusyError:
            patience_s = JOB_PATIENCE_S if found.domain_job else 0.0
        else:
            patience_s = CATCH_UP_S
        if now - since > patience_s or now - begin > JOB_PATIENCE_S + CATCH_UP_S:
            if blocked is not None:
                raise blocked
            return actions
        time.sleep(0.1)


_MENDED = {
    WayOut.FIND: "restarted libvirtd, which had lost the running VM when it died in a merge of {}",
    WayOut.GHOST: "restarted libvirtd, which took the merge of {} that has ended for one that goes on",
}


def _mended(work: Work, blocked: Blocked) -> Work:
    """The same work with a libvirtd that sees the VM as it is. Raises the error for ``blocked`` where that cannot be done."""
    ghosts = (blocked.target,) if blocked.way_out is WayOut.GHOST else ()
    if work.domain is not None:
        try:
            conn, domain = status_xml.mend(work.conn, work.domain, ghosts)
        except KvmopsError as error:
            raise _blocked(blocked, work, unmended=str(error)) from error
        return replace(work, conn=conn, domain=domain)
    raise _blocked(blocked, work)


def _blocked(blocked: Blocked, work: Work, unmended: str = "") -> KvmopsError:
    merge = work.merge
    if not blocked.target:
        return blocked.kind(f"The VM {merge.vm_name}", blocked.why, "Wait until it has finished.")
    overlay = work.overlay(blocked.target)
    seen = views.gather(work.conn, work.domain) if work.domain is not None else views.NOWHERE
    found = seen.disk(blocked.target)
    of = f"of {merge.snapshot} " if merge.snapshot else ""
    where = (
        f"QEMU has {_first(found.qemu)}, the live definition {_first(found.live)}, the persistent one {_first(found.persistent)}; "
        f"the VM's own file is {overlay.base_path}, the overlay {of}is {overlay.overlay_path}"
    )
    note = status_xml.path_of(merge.vm_name)
    mend = f"stop libvirtd, delete the <mirror> element of {blocked.target} in {note}, start libvirtd"
    hints = {
        WayOut.WAIT: "Wait until it has finished.",
        WayOut.START: f"Start the VM (virsh start {merge.vm_name}) and run the task again.",
        WayOut.JUDGE: "Nothing was touched: keep both files, and decide by hand which one the VM shall have.",
        WayOut.FIND: "Do not start the VM. "
        + (f"{mend.capitalize()}" if status_xml.is_unreadable(merge.vm_name) else _FIND)
        + _AGAIN,
        WayOut.REMOVE: "Remove them first (virsh snapshot-delete) and run the task again.",
        WayOut.GHOST: f"Shut the VM down and start it, or: {mend}" + _AGAIN,
    }
    hint = hints[blocked.way_out]
    tried = f". It could not be put right by itself ({unmended})" if unmended else ""
    return blocked.kind(f"The disk {blocked.target} of {merge.vm_name}", f"{blocked.why}. {where}{tried}", hint)


_FIND = "Shut its guest down from inside (or end its QEMU process)"
_AGAIN = ", and run the task again."


def _first(chain: tuple[str, ...]) -> str:
    return chain[0] if chain else "nothing"


_SENTENCES = {
    Act.MERGE: "merged the overlay of {} into its base",
    Act.FINISH: "finished the merge of {}",
    Act.MERGE_QEMU: "merged the overlay of {}, unknown to libvirt, into its base",
    Act.FINISH_QEMU: "finished the merge of {}, unknown to libvirt",
    Act.DROP: "removed unused block nodes of {}",
    Act.REJOIN: "told libvirt and QEMU the same about {}",
    Act.MERGE_OFF: "merged the overlay of {} into its base with qemu-img",
    Act.REDEFINE: "pointed the persistent definition of {} back to its base",
}


def sentence(merge: ActiveMerge, action: Action) -> str:
    """What was done to a disk."""
    return f"{merge.vm_name}: {_SENTENCES[action.act].format(action.target)}"


def _merge(work: Work, targets: list[str]) -> None:
    """All commits begin before the first pivot, and each pivot waits for all: either all disks are merged, or none.

    A security driver may deny a base from the first pivot on. A merge that cannot be done leaves every disk on its overlay.
    """
    running = {job.target for job in blockjobs.jobs(work.domain)}
    fresh = [target for target in targets if target not in running]
    limit = blockjobs.Limit(work.domain, work.progress.merge_bps, work.progress.merge_within_s)
    apparmor.lift(work.domain, [work.overlay(target).base_path for target in fresh])
    work.steps(fresh, Step.COMMITTING)
    try:
        for target in fresh:
            overlay = work.overlay(target)
            share = limit.share(target, len(targets))
            blockjobs.start_commit(work.domain, target, overlay.base_path, overlay.overlay_path, share)
        blockjobs.wait_ready(work.domain, targets, reporter(work.progress, targets), limit)
    except KvmopsError:
        blockjobs.give_up(work.domain, targets)
        raise
    _pivot(work, targets)


def _pivot(work: Work, targets: list[str]) -> None:
    seen = views.gather(work.conn, work.domain)
    for number, target in enumerate(targets):
        blind = seen_active(seen.disk(target).persistent, work.overlay(target)) is SeenActive.BASE
        work.steps([target], Step.PIVOTING_BLIND if blind else Step.PIVOTING)
        try:
            blockjobs.pivot(work.domain, target)
        except KvmopsError:
            blockjobs.give_up(work.domain, targets[number + 1 :])
            raise
    _require_on_base(work, targets)


def _merge_qemu(work: Work, targets: list[str]) -> None:
    running = {job.target for job in blockjobs.jobs(work.domain)}
    for target in targets:
        if target not in running:
            overlay = work.overlay(target)
            work.steps([target], Step.COMMITTING)
            limit_bps = work.progress.merge_bps
            blockjobs.start_commit_qemu(work.domain, target, overlay.overlay_path, overlay.base_path, limit_bps)
    for target in targets:
        on_bytes = reporter(work.progress, [target])
        before_pivot = functools.partial(work.steps, [target], Step.PIVOTING_BLIND)
        blockjobs.finish_commit_qemu(work.domain, target, on_bytes, before_pivot)
        _require_on_base(work, [target])
        blockjobs.dismiss_own(work.domain, target)


def _require_on_base(work: Work, targets: list[str]) -> None:
    seen = views.gather(work.conn, work.domain)
    for target in targets:
        disk, overlay = seen.disk(target), work.overlay(target)
        if seen_active(disk.qemu, overlay) is not SeenActive.BASE or seen_active(disk.live, overlay) is not SeenActive.BASE:
            raise SplitViewError(
                f"The disk {target} of {work.merge.vm_name}",
                f"after the merge QEMU has {_first(disk.qemu)}, the live definition {_first(disk.live)}; "
                f"expected {overlay.base_path}",
                "The next run of this task looks again.",
            )
    work.steps(targets, Step.PIVOTED)


def _drop(work: Work, targets: list[str]) -> None:
    blockjobs.drop_nodes(work.domain, [path for target in targets for path in work.overlay(target).layers])


def _rejoin(work: Work, targets: list[str]) -> None:
    """QEMU left the overlay, libvirt did not see it: an empty overlay of the same name makes libvirt right again."""
    [target] = targets
    overlay = work.overlay(target)
    disk = domain_xml.parse(work.domain.XMLDesc(0)).disk(target)
    if disk is None or not disk.index:
        raise SplitViewError(
            f"The disk {target} of {work.merge.vm_name}", "libvirt does not say which nodes it is made of"
        )
    _drop(work, [target])
    _renew_overlay(overlay)
    work.steps([target], Step.NONE)
    blockjobs.insert_overlay(work.domain, overlay.overlay_path, overlay.base_path, disk.index)


def _renew_overlay(overlay: Overlay) -> None:
    """An empty overlay in place of the merged one, for the same user."""
    fresh = f"{overlay.overlay_path}.new"
    with suppress(FileNotFoundError):
        os.unlink(fresh)
    qemu_img.create_overlay(fresh, overlay.base_path, overlay.base_format)
    _ownership.give(fresh, _ownership.of(overlay.base_path, running=True))
    os.replace(fresh, overlay.overlay_path)


def _require_as_frozen(work: Work, target: str) -> None:
    """While the VM was off another one may have been started on the base: what either has written would spoil the other."""
    frozen = work.merge.frozen.get(target)
    untouched = work.journal.facts.step(target) is Step.NONE
    overlay = work.overlay(target)
    if frozen and untouched and overlays.content_of(overlay.base_path) != frozen:
        raise SplitViewError(
            f"The disk {target} of {work.merge.vm_name}",
            f"{overlay.base_path} was written to since the snapshot {work.merge.snapshot} has frozen it; the VM's own writes since "
            f"are in {overlay.overlay_path}",
            "Nothing was merged. Another VM has that file as a disk, or somebody has written to it: keep both files, and decide "
            "by hand which one the VM shall have.",
        )


def _merge_off(work: Work, targets: list[str]) -> None:
    for target in targets:
        _require_as_frozen(work, target)
    for target in targets:
        overlay = work.overlay(target)
        work.steps([target], Step.COMMITTING)
        commit_off(overlay.layers, overlay.base_path, work.progress)
        work.steps([target], Step.PIVOTING)  # whoever starts the VM after the next line starts it on the base, rightly
        if work.domain is not None:
            kept = views.gather(work.conn, work.domain).disk(target).persistent
            if seen_active(kept, overlay) is SeenActive.OVERLAY:
                _redefine(work, [target])
        work.steps([target], Step.PIVOTED)


def _redefine(work: Work, targets: list[str]) -> None:
    _define_originals(work, [work.overlay(target) for target in targets])


def _restore_definition(work: Work) -> None:
    """libvirt may leave an empty <backingStore/> where there was none."""
    if work.domain is not None and work.domain.isPersistent():
        kept = views.gather(work.conn, work.domain)
        on_base = [each for each in work.merge.overlays if seen_active(kept.disk(each.target).persistent, each) is SeenActive.BASE]
        _define_originals(work, on_base)


def _define_originals(work: Work, overlay_list: list[Overlay]) -> None:
    """The persistent definition with these disks' images as they were; defined only if that is a change."""
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
    try:
        now = work.domain.XMLDesc(flags)
        xml = now
        for overlay in overlay_list:
            xml = original_disk.with_original_source(xml, overlay, work.merge.originals[overlay.target].disk_xml)
        if original_disk.words(xml) != original_disk.words(now):
            work.conn.defineXML(xml)
    except libvirt.libvirtError as error:
        raise translate(error, f"The definition of {work.merge.vm_name}") from error


MERGES: Acts = {
    Act.MERGE: _merge,
    Act.FINISH: _merge,
    Act.MERGE_QEMU: _merge_qemu,
    Act.FINISH_QEMU: _merge_qemu,
    Act.DROP: _drop,
    Act.REJOIN: _rejoin,
    Act.MERGE_OFF: _merge_off,
    Act.REDEFINE: _redefine,
}


def soon(true: Callable[[], bool]) -> bool:
    """Whether it becomes true while a living libvirtd catches up with QEMU."""
    end = time.monotonic() + CATCH_UP_S
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def reporter(progress: Progress, targets: Sequence[str]) -> blockjobs.OnBytes:
    """Tell the progress of merges that begin side by side; a wish to cancel is not heard."""
    named = ", ".join(targets) if len(targets) <= _NAMED else f"{len(targets)} disks"
    reported = announced = 0
    with suppress(CancelledError):
        progress.phase("merge", named)

    def report(done_bytes: int, total_bytes: int) -> None:
        nonlocal reported, announced
        if total_bytes > 1.1 * announced:  # it grows while the guest writes
            announced, reported = total_bytes, 0
            with suppress(CancelledError):
                progress.phase("merge", named, total_bytes)
        with suppress(CancelledError):
            progress.advance(max(0, done_bytes - reported))
        reported = max(reported, done_bytes)

    return report


def commit_off(paths: Sequence[str], base: str, progress: Progress) -> None:
    """Merge layers, the top first, into their base, none of them in use."""
    size_bytes = sum(os.stat(path).st_blocks * 512 for path in paths)
    qemu_img.commit(paths[0], base, blockjobs.least_bps(progress.merge_bps, size_bytes, progress.merge_within_s))
