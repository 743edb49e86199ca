# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What to do about a temporary snapshot: the table of situations, as a pure function."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    BusyError,
    KvmopsError,
    RefusedError,
    SplitViewError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import Step


class Power(str, Enum):
    """What libvirt says about the VM."""

    RUNNING = "running"
    OFF = "off"
    SAVED = "off with a managed-save image"
    GONE = "not defined any more"


class SeenActive(str, Enum):
    """Which image one view has as the disk's active one."""

    BASE = "base"
    OVERLAY = "overlay"
    OTHER = "other"
    NONE = "none"  # the view does not have the disk


class JobSeen(str, Enum):
    """The block job on the disk."""

    NONE = "none"
    OURS = "ours"  # libvirt's merge of our overlay, started by us
    OURS_QEMU = "ours_qemu"  # our merge without libvirt's knowledge
    FOREIGN = "foreign"


class Content(str, Enum):
    """What an overlay holds that its base does not; NEWER and OLDER say which of the two was written last."""

    MISSING = "missing"  # there is no such file
    EMPTY = "empty"  # nothing was ever written to it
    MERGED = "merged"  # all it holds is in the base too
    NEWER = "newer"
    OLDER = "older"
    DATA = "data"  # something; not compared, because it cannot be or need not be


@dataclass(frozen=True)
class DiskSituation:
    """One disk of the snapshot as it is found."""

    target: str
    qemu: SeenActive
    live: SeenActive
    persistent: SeenActive
    job: JobSeen
    step: Step
    content: Content
    in_use: bool = False  # a process has the images open though no view has the disk
    ghost: bool = False  # libvirt believes in a block job that QEMU does not have
    stray: bool = False  # QEMU has block nodes of the overlay, but the disk does not stand on them
    inside: tuple[str, ...] = ()  # internal snapshots in the layers to merge: a merge would lose them
    claimed: str = ""  # the disk was unplugged, and this uses one of its files now

    @property
    def unplugged(self) -> bool:
        """Whether the VM does not have the disk any more, under either file."""
        running_has_it = (self.qemu, self.live) != (SeenActive.NONE, SeenActive.NONE)
        return not running_has_it and self.persistent in (SeenActive.NONE, SeenActive.OTHER)


@dataclass(frozen=True)
class Situation:
    """The VM as it is found.

    ``listed``: our snapshot is in libvirt's list. ``thaw``: it is frozen, and by us. ``taking``: the dead run had asked for
    the snapshot, so that libvirt may still be at it. ``stale_jobs``: QEMU has ended jobs of a snapshot that libvirtd
    did not live to see.
    """

    power: Power
    listed: bool
    memory_image: bool
    thaw: bool
    disks: tuple[DiskSituation, ...]
    domain_job: str = ""
    taking: bool = False
    stale_jobs: bool = False


class Act(str, Enum):
    """What can be done."""

    THAW = "thaw"
    MERGE = "merge"  # through libvirt
    FINISH = "finish"  # the merge that runs already
    MERGE_QEMU = "merge_qemu"  # libvirt does not know the overlay
    FINISH_QEMU = "finish_qemu"
    DISMISS = "dismiss"  # the ended jobs
    DROP = "drop"  # stray block nodes: libvirt will want their names again
    REJOIN = "rejoin"  # QEMU is back on the base, libvirt does not know
    MERGE_OFF = "merge_off"
    REDEFINE = "redefine"  # the persistent definition back to the base
    LEAVE = "leave"  # the files of an unplugged disk stay as they are
    FORGET = "forget"  # the snapshot's bookkeeping
    UNLINK = "unlink"  # the overlay's file
    UNLINK_MEMORY = "unlink_memory"


@dataclass(frozen=True)
class Action:
    """One act, on one disk where it is about a disk; ``why`` where a person has to know."""

    act: Act
    target: str = ""
    why: str = ""


class Blocked(Exception):
    """decide() found no way on: ``kind`` is the error to raise, ``target`` the disk, ``way_out`` what a person can do."""

    def __init__(self, kind: type[KvmopsError], why: str, target: str = "", way_out: WayOut | None = None) -> None:
        super().__init__(why)
        self.kind, self.why, self.target = kind, why, target
        self.way_out = way_out or (WayOut.WAIT if kind is BusyError else WayOut.JUDGE)


class WayOut(str, Enum):
    """What a person can do about a blocked situation."""

    WAIT = "wait for the other job"
    JUDGE = "decide which file is the right one"
    START = "start the VM"
    FIND = "make libvirt find the running VM again"
    GHOST = "make libvirt forget the job"
    REMOVE = "remove the internal snapshots"


_MERGES = {JobSeen.NONE: Act.MERGE, JobSeen.OURS: Act.FINISH}
_MERGES_QEMU = {JobSeen.NONE: Act.MERGE_QEMU, JobSeen.OURS_QEMU: Act.FINISH_QEMU}
_ENDS_OF_OVERLAYS = (Act.MERGE, Act.MERGE_QEMU, Act.MERGE_OFF, Act.REDEFINE)  # its file is removed after each
_NOTHING_MORE = (Content.EMPTY, Content.MERGED)


def decide(situation: Situation) -> list[Action]:
    """What is left to do, in order; [] when the VM is back on its own disks and nothing of ours is left. Pure.

    Raises Blocked for what has no written recovery, before anything is done to any disk.
    """
    actions = [Action(Act.THAW)] if situation.thaw else []
    merges = []
    staying = set()
    for disk in situation.disks:
        attached = disk.qemu is not SeenActive.NONE or disk.live is not SeenActive.NONE
        why = ""
        if disk.unplugged and situation.power is not Power.GONE:
            act, why = _unplugged(disk, situation.power)
            if why:
                staying.add(disk.target)
        else:
            act = _attached(disk) if attached else _detached(disk, situation.power)
        if disk.inside and act in _ENDS_OF_OVERLAYS:
            why = f"the merge would lose internal snapshots in its overlay: {', '.join(disk.inside)}"
            raise Blocked(RefusedError, why, disk.target, WayOut.REMOVE)
        if act is not None:
            merges.append(Action(act, disk.target, why))
    if situation.domain_job and (merges or situation.taking):
        raise Blocked(BusyError, f"{situation.domain_job} is at work on it")
    if situation.stale_jobs:
        actions.append(Action(Act.DISMISS))
    actions += merges
    if any(disk.qemu is SeenActive.BASE and disk.live is SeenActive.OVERLAY for disk in situation.disks):
        return actions  # what comes after depends on what libvirt makes of it
    actions += [Action(Act.DROP, disk.target) for disk in situation.disks if disk.stray]
    if situation.listed:
        actions.append(Action(Act.FORGET))
    actions += [
        Action(Act.UNLINK, disk.target)
        for disk in situation.disks
        if disk.content is not Content.MISSING and disk.target not in staying
    ]
    if situation.memory_image:
        actions.append(Action(Act.UNLINK_MEMORY))
    return actions


def can_wait(situation: Situation) -> bool:
    """Whether the VM may go on as it is, its snapshot unmerged: all views agree that every disk is on its overlay, whole. Pure."""
    quiet = not (situation.domain_job or situation.thaw or situation.stale_jobs)
    power = situation.power
    return quiet and situation.listed and all(_is_whole(disk, power) for disk in situation.disks)


def _is_whole(disk: DiskSituation, power: Power) -> bool:
    if disk.job is not JobSeen.NONE or disk.ghost or disk.stray or disk.in_use or disk.inside:
        return False
    if power is Power.RUNNING:
        kept = disk.persistent in (SeenActive.OVERLAY, SeenActive.NONE)
        return kept and disk.qemu is SeenActive.OVERLAY and disk.live is SeenActive.OVERLAY
    there = disk.content is not Content.MISSING and disk.step in (Step.NONE, Step.COMMITTING)
    detached = disk.qemu is SeenActive.NONE and disk.live is SeenActive.NONE
    return power is Power.OFF and detached and there and disk.persistent is SeenActive.OVERLAY


def _attached(disk: DiskSituation) -> Act | None:
    """A disk that QEMU has, or that libvirt believes it has."""
    where = (disk.qemu, disk.live)
    if disk.job is JobSeen.FOREIGN:
        raise Blocked(BusyError, "a block job that kvmops.backup did not start is at work on it", disk.target)
    known = disk.persistent is not SeenActive.OTHER
    asked = disk.step in (Step.PIVOTING, Step.PIVOTING_BLIND, Step.PIVOTED)
    if disk.ghost and disk.job is JobSeen.NONE:
        if where == (SeenActive.BASE, SeenActive.OVERLAY) and asked and disk.persistent is SeenActive.OVERLAY:
            return Act.REDEFINE  # so that the next start, at least, is right
        why = "libvirt believes in a block job that QEMU does not have, and refuses every other one"
        raise Blocked(SplitViewError, why, disk.target, WayOut.GHOST)
    if where == (SeenActive.OVERLAY, SeenActive.OVERLAY) and known and disk.job in _MERGES:
        return _MERGES[disk.job]
    if where == (SeenActive.OVERLAY, SeenActive.BASE) and known and disk.job in _MERGES_QEMU:
        return _MERGES_QEMU[disk.job]
    if where == (SeenActive.BASE, SeenActive.OVERLAY) and known and asked and disk.job is JobSeen.NONE:
        return Act.REJOIN
    if where == (SeenActive.BASE, SeenActive.BASE) and known and disk.job is JobSeen.OURS_QEMU:
        return Act.FINISH_QEMU
    if where == (SeenActive.BASE, SeenActive.BASE) and known and disk.job is JobSeen.NONE:
        # PIVOTING_BLIND is no proof: the VM may have been off in between and started on the base
        merged = disk.step in (Step.PIVOTING, Step.PIVOTED)
        if not merged and disk.content not in (Content.MISSING, Content.EMPTY):
            raise Blocked(
                SplitViewError, "the guest runs on the base, but the overlay holds what it wrote before", disk.target
            )
        return Act.REDEFINE if disk.persistent is SeenActive.OVERLAY else None
    raise Blocked(SplitViewError, "this has no written recovery", disk.target)


def _detached(disk: DiskSituation, power: Power) -> Act | None:
    """A disk that no running QEMU known to libvirt has."""
    _refuse_in_use(disk)
    if power is Power.SAVED and disk.persistent is SeenActive.OVERLAY:
        raise Blocked(RefusedError, "the VM was saved to disk while it ran on the overlay", disk.target, WayOut.START)
    if disk.content is Content.MISSING:
        if disk.persistent is SeenActive.OVERLAY:
            raise Blocked(SplitViewError, "the definition names an overlay that is not there", disk.target)
        return None
    if disk.persistent is SeenActive.OVERLAY:
        if disk.content in _NOTHING_MORE:
            return Act.REDEFINE
        if disk.step in (Step.NONE, Step.COMMITTING):
            return Act.MERGE_OFF
        if disk.step is Step.PIVOTING and disk.content is Content.NEWER:
            return Act.MERGE_OFF
        raise Blocked(SplitViewError, "both files were written to since, and either may be the right one", disk.target)
    if disk.persistent is SeenActive.BASE:
        if disk.content in _NOTHING_MORE or disk.step in (Step.PIVOTING, Step.PIVOTED):
            return None
        if disk.content is Content.NEWER:
            return Act.MERGE_OFF
        why = "the guest wrote to the overlay, and later to the base without it"
        raise Blocked(SplitViewError, why, disk.target)
    if disk.content in _NOTHING_MORE:
        return None
    raise Blocked(SplitViewError, "the VM is not defined any more, and the overlay holds what it wrote", disk.target)


def _refuse_in_use(disk: DiskSituation) -> None:
    if disk.in_use:
        why = "libvirt says the VM is off or without this disk, but a process has its images open"
        raise Blocked(SplitViewError, why, disk.target, WayOut.FIND)


def _unplugged(disk: DiskSituation, power: Power) -> tuple[Act | None, str]:
    """A disk that the VM does not have any more; the text says why its files stay, "" if they do not."""
    if disk.content is Content.MISSING:
        return None, ""
    if disk.step is Step.LEFT:
        return None, "a person was told"
    if disk.claimed:
        return Act.LEAVE, f"{disk.claimed} uses them now"
    if disk.in_use and power is Power.RUNNING:
        return Act.LEAVE, "another process has them open"
    _refuse_in_use(disk)
    if disk.content in _NOTHING_MORE:
        return None, ""
    if power is Power.SAVED:
        why = "the VM was saved to disk, and may have been on the overlay of this disk then"
        raise Blocked(RefusedError, why, disk.target, WayOut.START)
    if disk.inside:
        return Act.LEAVE, f"internal snapshots lie in the overlay ({', '.join(disk.inside)}), which a merge would lose"
    if disk.content is Content.NEWER and disk.step is not Step.PIVOTED:
        return Act.MERGE_OFF, ""
    return Act.LEAVE, "both were written to since, and either may be the right one"
