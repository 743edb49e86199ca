# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of situations: every named one, and what must never happen in any of the others."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import BusyError, RefusedError, SplitViewError
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import Step
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.situation import (
    Act,
    Action,
    Blocked,
    Content,
    DiskSituation,
    JobSeen,
    Power,
    SeenActive,
    Situation,
    can_wait,
    decide,
)

B, O, X, N = SeenActive.BASE, SeenActive.OVERLAY, SeenActive.OTHER, SeenActive.NONE  # noqa: E741
RUNNING, OFF = Power.RUNNING, Power.OFF


def disk(qemu: SeenActive, live: SeenActive, persistent: SeenActive, content: Content, **others: object) -> DiskSituation:
    facts = {"job": JobSeen.NONE, "step": Step.NONE, **others}
    return DiskSituation("vda", qemu, live, persistent, content=content, **facts)  # type: ignore[arg-type]


def situation(power: Power, *disks: DiskSituation, **others: object) -> Situation:
    facts = {"listed": False, "memory_image": False, "thaw": False, **others}
    return Situation(power, disks=disks, **facts)  # type: ignore[arg-type]


def acts(found: Situation) -> list[str]:
    return [f"{action.act.value} {action.target}".strip() for action in decide(found)]


# what is found, and what is done about it
TABLE = {
    "nothing happened yet": (RUNNING, disk(B, B, B, Content.MISSING), []),
    "overlay file made, not used": (RUNNING, disk(B, B, B, Content.EMPTY), ["unlink vda"]),
    "overlay opened by QEMU, not used": (RUNNING, disk(B, B, B, Content.EMPTY, stray=True), ["drop vda", "unlink vda"]),
    "snapshot taken": (RUNNING, disk(O, O, O, Content.DATA), ["merge vda", "unlink vda"]),
    "snapshot taken, definition not written": (RUNNING, disk(O, O, B, Content.DATA), ["merge vda", "unlink vda"]),
    "snapshot of a transient VM": (RUNNING, disk(O, O, N, Content.DATA), ["merge vda", "unlink vda"]),
    "libvirtd died in QEMU's transaction": (RUNNING, disk(O, B, B, Content.DATA), ["merge_qemu vda", "unlink vda"]),
    "the same, killed in our own merge": (
        RUNNING,
        disk(O, B, B, Content.DATA, job=JobSeen.OURS_QEMU, step=Step.COMMITTING),
        ["finish_qemu vda", "unlink vda"],
    ),
    "the same, killed after it": (
        RUNNING,
        disk(B, B, B, Content.DATA, job=JobSeen.OURS_QEMU, step=Step.PIVOTING_BLIND, stray=True),
        ["finish_qemu vda", "drop vda", "unlink vda"],
    ),
    "killed in the merge": (
        RUNNING,
        disk(O, O, O, Content.DATA, job=JobSeen.OURS, step=Step.COMMITTING),
        ["finish vda", "unlink vda"],
    ),
    "merge given up by QEMU": (RUNNING, disk(O, O, O, Content.DATA, step=Step.COMMITTING), ["merge vda", "unlink vda"]),
    "killed after the pivot": (RUNNING, disk(B, B, B, Content.DATA, step=Step.PIVOTING), ["unlink vda"]),
    "killed after the pivot, definition not written": (
        RUNNING,
        disk(B, B, O, Content.DATA, step=Step.PIVOTING),
        ["redefine vda", "unlink vda"],
    ),
    "libvirtd died in the pivot": (
        RUNNING,
        disk(B, O, O, Content.DATA, step=Step.PIVOTING, stray=True),
        ["rejoin vda"],
    ),
    "libvirt died in the pivot and believes in the job": (
        RUNNING,
        disk(B, O, O, Content.DATA, step=Step.PIVOTING, ghost=True, stray=True),
        ["redefine vda"],
    ),
    "off, definition on the overlay": (OFF, disk(N, N, O, Content.DATA), ["merge_off vda", "unlink vda"]),
    "off in mid-merge": (OFF, disk(N, N, O, Content.DATA, step=Step.COMMITTING), ["merge_off vda", "unlink vda"]),
    "off, merged, definition not written": (
        OFF,
        disk(N, N, O, Content.MERGED, step=Step.PIVOTED),
        ["redefine vda", "unlink vda"],
    ),
    "off at the pivot, overlay written last": (
        OFF,
        disk(N, N, O, Content.NEWER, step=Step.PIVOTING),
        ["merge_off vda", "unlink vda"],
    ),
    "off, libvirt never knew the overlay": (OFF, disk(N, N, B, Content.NEWER), ["merge_off vda", "unlink vda"]),
    "off, nothing in the overlay": (OFF, disk(N, N, B, Content.EMPTY), ["unlink vda"]),
    "off after the pivot": (OFF, disk(N, N, B, Content.DATA, step=Step.PIVOTING), ["unlink vda"]),
    "unplugged while on the overlay": (RUNNING, disk(N, N, O, Content.NEWER), ["merge_off vda", "unlink vda"]),
    "unplugged for good": (RUNNING, disk(N, N, N, Content.NEWER), ["merge_off vda", "unlink vda"]),
    "unplugged for good, another disk in its place": (OFF, disk(N, N, X, Content.NEWER), ["merge_off vda", "unlink vda"]),
    "unplugged for good, nothing in the overlay": (RUNNING, disk(N, N, N, Content.EMPTY), ["unlink vda"]),
    "unplugged for good, merged by us": (RUNNING, disk(N, N, N, Content.MERGED, step=Step.PIVOTED), ["unlink vda"]),
    "unplugged for good, base written to since": (RUNNING, disk(N, N, N, Content.OLDER), ["leave vda"]),
    "unplugged for good, another VM has it": (
        RUNNING,
        disk(N, N, N, Content.DATA, claimed="the VM b"),
        ["leave vda"],
    ),
    "unplugged for good, another VM has the empty overlay": (
        RUNNING,
        disk(N, N, N, Content.EMPTY, claimed="the VM b"),
        ["leave vda"],
    ),
    "unplugged for good, somebody has it open": (RUNNING, disk(N, N, N, Content.DATA, in_use=True), ["leave vda"]),
    "unplugged for good, internal snapshots in the overlay": (
        RUNNING,
        disk(N, N, N, Content.NEWER, inside=("mine",)),
        ["leave vda"],
    ),
    "unplugged for good, left": (RUNNING, disk(N, N, N, Content.DATA, step=Step.LEFT), []),
    "VM gone, nothing lost": (Power.GONE, disk(N, N, N, Content.EMPTY), ["unlink vda"]),
    "managed save, but not on the overlay": (Power.SAVED, disk(N, N, B, Content.MISSING), []),
}

# what is found, and the error
BLOCKED = {
    "foreign job": (RUNNING, disk(O, O, O, Content.DATA, job=JobSeen.FOREIGN), BusyError),
    "foreign job on the base": (RUNNING, disk(B, B, B, Content.MISSING, job=JobSeen.FOREIGN), BusyError),
    "other disk in QEMU": (RUNNING, disk(X, O, O, Content.DATA), SplitViewError),
    "other disk in the live definition": (RUNNING, disk(O, X, O, Content.DATA), SplitViewError),
    "other disk in the persistent definition": (RUNNING, disk(O, O, X, Content.DATA), SplitViewError),
    "base started, overlay lost": (RUNNING, disk(B, B, B, Content.DATA), SplitViewError),
    "base started, overlay lost after our QEMU merge": (
        RUNNING,
        disk(B, B, B, Content.DATA, step=Step.PIVOTING_BLIND),
        SplitViewError,
    ),
    "pivoted though nobody asked": (RUNNING, disk(B, O, O, Content.DATA), SplitViewError),
    "libvirt believes in a job": (RUNNING, disk(B, O, B, Content.DATA, step=Step.PIVOTING, ghost=True), SplitViewError),
    "libvirt believes in a job on the overlay": (RUNNING, disk(O, O, O, Content.DATA, ghost=True), SplitViewError),
    "libvirt lost the VM": (OFF, disk(N, N, O, Content.DATA, in_use=True), SplitViewError),
    "base written without the overlay": (OFF, disk(N, N, B, Content.OLDER), SplitViewError),
    "both may be right at the pivot": (OFF, disk(N, N, O, Content.OLDER, step=Step.PIVOTING), SplitViewError),
    "started again on a merged overlay": (OFF, disk(N, N, O, Content.NEWER, step=Step.PIVOTED), SplitViewError),
    "overlay gone, definition names it": (OFF, disk(N, N, O, Content.MISSING), SplitViewError),
    "VM gone, overlay holds data": (Power.GONE, disk(N, N, N, Content.NEWER), SplitViewError),
    "unplugged, libvirt lost the VM": (OFF, disk(N, N, N, Content.DATA, in_use=True), SplitViewError),
    "unplugged, but perhaps not in its saved memory": (Power.SAVED, disk(N, N, N, Content.NEWER), RefusedError),
    "saved to disk on the overlay": (Power.SAVED, disk(N, N, O, Content.NEWER), RefusedError),
}


@pytest.mark.parametrize("name", TABLE)
def test_named_situation(name: str) -> None:
    power, found, expected = TABLE[name]
    assert acts(situation(power, found)) == expected


@pytest.mark.parametrize("name", BLOCKED)
def test_named_block(name: str) -> None:
    power, found, kind = BLOCKED[name]
    with pytest.raises(Blocked) as caught:
        decide(situation(power, found))
    assert caught.value.kind is kind
    assert caught.value.target == "vda"


def test_one_blocked_disk_keeps_the_others_untouched() -> None:
    fine = disk(O, O, O, Content.DATA)
    bad = replace(disk(X, O, O, Content.DATA), target="vdb")
    with pytest.raises(Blocked):
        decide(situation(RUNNING, fine, bad))


def test_files_go_last_and_the_bookkeeping_before_them() -> None:
    second = replace(disk(B, B, B, Content.DATA, step=Step.PIVOTED), target="vdb")
    found = situation(RUNNING, disk(O, O, O, Content.DATA), second, listed=True, memory_image=True, thaw=True)
    assert acts(found) == ["thaw", "merge vda", "forget", "unlink vda", "unlink vdb", "unlink_memory"]


def test_other_work_on_the_whole_vm_is_waited_for() -> None:
    with pytest.raises(Blocked) as caught:
        decide(situation(RUNNING, disk(O, O, O, Content.DATA), domain_job="a backup job"))
    assert caught.value.kind is BusyError and "a backup job" in caught.value.why
    assert acts(situation(RUNNING, disk(B, B, B, Content.MISSING), domain_job="a backup job")) == []
    with pytest.raises(Blocked):  # nothing to be seen yet, but libvirt may be about to make it
        decide(situation(RUNNING, disk(B, B, B, Content.MISSING), domain_job="a snapshot being taken", taking=True))


@functools.cache
def every_disk() -> list[DiskSituation]:
    """All that observe() can report."""
    flags = [
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (False, True, True),
    ]
    rows = itertools.product(SeenActive, SeenActive, SeenActive, JobSeen, Step, Content, flags)
    fields = ((*row[:-1], *row[-1]) for row in rows)
    return [found for found in (DiskSituation("vda", *each) for each in fields) if _observable(found)]


def _observable(found: DiskSituation) -> bool:
    attached = found.qemu is not N or found.live is not N
    if not attached:
        known = not found.in_use or found.content not in COMPARED
        return found.job is JobSeen.NONE and not found.stray and not found.ghost and known
    if found.qemu is O and (found.stray or found.content is not Content.DATA):
        return False
    return not found.in_use and found.content not in COMPARED


COMPARED = (Content.MERGED, Content.NEWER, Content.OLDER)


def test_no_situation_loses_writes() -> None:
    """An overlay is only removed when nothing in it can be missed."""
    seen = 0
    for power, found in itertools.product(Power, every_disk()):
        try:
            actions = decide(situation(power, found))
        except Blocked:
            continue
        seen += 1
        merged = found.content in (Content.EMPTY, Content.MERGED) or found.step in (Step.PIVOTING, Step.PIVOTED)
        brings_back = [each for each in actions if each.act in MERGING]
        if Action(Act.UNLINK, "vda") in actions:
            assert merged or brings_back, (power, found)
            assert not found.in_use, (power, found)
        if found.qemu is O:
            assert brings_back, (power, found)
        assert len(brings_back) <= 1, (power, found)
    assert seen > 200  # the test would say nothing if everything were blocked


MERGING = (Act.MERGE, Act.FINISH, Act.MERGE_QEMU, Act.FINISH_QEMU, Act.REJOIN, Act.MERGE_OFF)


def test_nothing_of_others_is_touched() -> None:
    for power, found in itertools.product(Power, every_disk()):
        foreign = found.job is JobSeen.FOREIGN and (found.qemu is not N or found.live is not N)
        other = X in (found.qemu, found.live)
        if foreign or other:
            with pytest.raises(Blocked):
                decide(situation(power, found))


def test_offline_merge_needs_an_image_that_nobody_has() -> None:
    for power, found in itertools.product(Power, every_disk()):
        try:
            actions = decide(situation(power, found))
        except Blocked:
            continue
        if Action(Act.MERGE_OFF, "vda") in actions:
            assert (found.qemu, found.live, found.in_use) == (N, N, False)


def apply(found: DiskSituation, act: Act) -> DiskSituation:
    """What an act makes of a disk when it works."""
    effects = {
        Act.MERGE: {
            "qemu": B,
            "live": B,
            "persistent": B if found.persistent is O else found.persistent,
            "step": Step.PIVOTED,
        },
        Act.FINISH: {
            "qemu": B,
            "live": B,
            "persistent": B if found.persistent is O else found.persistent,
            "step": Step.PIVOTED,
        },
        Act.MERGE_QEMU: {"qemu": B, "stray": True, "step": Step.PIVOTED},
        Act.FINISH_QEMU: {"qemu": B, "job": JobSeen.NONE, "stray": True, "step": Step.PIVOTED},
        Act.DROP: {"stray": False},
        Act.REJOIN: {"qemu": O, "content": Content.DATA, "stray": False, "step": Step.NONE},
        Act.MERGE_OFF: {
            "persistent": B if found.persistent is O else found.persistent,
            "step": Step.PIVOTED,
            "content": Content.MERGED if found.unplugged else found.content,
        },
        Act.REDEFINE: {"persistent": B},
        Act.LEAVE: {"step": Step.LEFT},
        Act.UNLINK: {"content": Content.MISSING},
    }
    changed = {**effects[act]}
    if act in (Act.MERGE, Act.FINISH):
        changed["job"] = JobSeen.NONE
    return replace(found, **changed)


def test_every_way_comes_to_its_end() -> None:
    """Doing the first act and looking again ends with nothing to do, the views agreeing on the base and no file left."""
    for power, found in itertools.product((RUNNING, OFF), every_disk()):
        now = found
        try:
            actions = decide(situation(power, now))
        except Blocked:
            continue
        if found.ghost:
            continue  # ends in a refusal after the definition is right
        for _dummy in range(6):
            if not actions:
                break
            now = apply(now, actions[0].act)
            actions = decide(situation(power, now))
        assert not actions, (power, found, now, actions)
        assert O not in (now.qemu, now.live, now.persistent), (power, found, now)
        left = now.step is Step.LEFT and now.unplugged
        assert now.content is Content.MISSING or left, (power, found, now)


@pytest.mark.parametrize(
    ("power", "found"),
    [
        (RUNNING, disk(O, O, O, Content.DATA, inside=("mine",))),
        (RUNNING, disk(O, B, B, Content.DATA, inside=("mine",))),
        (OFF, disk(N, N, O, Content.DATA, inside=("mine",))),
        (OFF, disk(N, N, O, Content.EMPTY, inside=("mine",))),
    ],
)
def test_no_merge_loses_an_internal_snapshot(power: Power, found: DiskSituation) -> None:
    with pytest.raises(Blocked) as caught:
        decide(situation(power, disk(B, B, B, Content.MISSING), found))
    assert caught.value.kind is RefusedError and "mine" in caught.value.why
    assert acts(situation(power, replace(found, inside=()))) != []


WHOLE = (
    (RUNNING, disk(O, O, O, Content.DATA, step=Step.COMMITTING)),
    (RUNNING, disk(O, O, N, Content.DATA, step=Step.PIVOTING)),
    (OFF, disk(N, N, O, Content.DATA, step=Step.COMMITTING)),
    (OFF, disk(N, N, O, Content.EMPTY)),
)


def test_only_a_vm_that_is_whole_may_go_on_unmerged() -> None:
    for power, found in WHOLE:
        assert can_wait(situation(power, found, found, listed=True))
        for lack in ({"thaw": True}, {"domain_job": "a save"}, {"stale_jobs": True}, {"listed": False}):
            assert not can_wait(situation(power, found, **{"listed": True, **lack}))
        assert not can_wait(situation(Power.GONE, found, listed=True))
        assert not can_wait(situation(Power.SAVED, found, listed=True))
        for lack in (
            {"ghost": True},
            {"stray": True},
            {"in_use": True},
            {"inside": ("mine",)},
            {"job": JobSeen.OURS},
            {"job": JobSeen.FOREIGN},
        ):
            assert not can_wait(situation(power, found, replace(found, **lack), listed=True))


def test_no_vm_whose_views_differ_goes_on() -> None:
    fine = 0
    for power, found in itertools.product(Power, every_disk()):
        if can_wait(situation(power, found, listed=True)):
            fine += 1
            seen = {view for view in (found.qemu, found.live, found.persistent) if view is not N}
            assert seen == {O} and found.job is JobSeen.NONE, (power, found)
            assert (found.qemu is O) == (found.live is O) == (power is RUNNING)
            assert power in (RUNNING, OFF)
    assert fine
