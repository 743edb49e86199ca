# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Back from a snapshot of ours to the VM's own disks: its overlays are merged, and all that was made for it goes."""

from __future__ import annotations

import functools
from dataclasses import replace

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _files, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, SplitViewError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import agent, blockjobs, files, snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection, Domain
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import active_disks, active_merge
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.active_disks import ActiveMerge
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.active_merge import Acts, Work
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import (
    SnapshotFacts,
    SnapshotPhase,
    SnapshotPlan,
    Step,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.situation import Act, Action, Power, Situation


def undo(
    conn: Connection, domain: Domain | None, plan: SnapshotPlan, journal: Journal[SnapshotFacts], progress: Progress
) -> list[str]:
    """Bring the VM back to its own disks and remove everything of ours; returns what was done, one sentence each.

    Goes on where an earlier run stopped. A wish to cancel is not heard: a VM is not left between its disks.
    Raises BusyError, SplitViewError or RefusedError before the next act on what it cannot judge, else KvmopsError.
    """
    merge = _merge_of(plan, journal.facts)

    def look(work: Work) -> Situation:
        return _observe(work.conn, work.domain, plan, journal.facts, merge)

    acts: Acts = {
        **active_merge.MERGES,
        Act.THAW: _thaw,
        Act.DISMISS: _dismiss,
        Act.LEAVE: _leave,
        Act.FORGET: functools.partial(_forget, plan),
        Act.UNLINK: _unlink,
        Act.UNLINK_MEMORY: functools.partial(_unlink_memory, plan),
    }
    work = Work(conn, domain, merge, journal, progress)
    work, done = active_merge.run(work, look, acts, functools.partial(_sentence, merge))
    return done + _stand_again(work.domain, plan, journal.facts.stood_on)


def may_wait(conn: Connection, domain: Domain | None, plan: SnapshotPlan, facts: SnapshotFacts) -> bool:
    """Whether the VM may go on with the snapshot, after undo() has failed: it is whole, on its overlays."""
    return active_merge.may_wait(lambda: _observe(conn, domain, plan, facts, _merge_of(plan, facts)))


def _merge_of(plan: SnapshotPlan, facts: SnapshotFacts) -> ActiveMerge:
    return ActiveMerge(
        plan.vm_uuid,
        plan.vm_name,
        plan.overlays,
        facts.originals,
        expendable=plan.expendable,
        snapshot=plan.name,
        frozen=facts.frozen,
    )


def _observe(
    conn: Connection, domain: Domain | None, plan: SnapshotPlan, facts: SnapshotFacts, merge: ActiveMerge
) -> Situation:
    """The situation of the VM for decide(), with all that belongs to the snapshot."""
    found = active_disks.observe(conn, domain, merge, facts)
    taking = facts.phase is SnapshotPhase.TAKING
    in_taking = taking and found.power is Power.RUNNING
    return replace(
        found,
        listed=domain is not None and _is_listed(domain, plan),
        memory_image=bool(plan.memory_path) and _filenames.is_there(plan.memory_path, follow=False),
        thaw=bool(in_taking and plan.quiesce and agent.freeze_status(domain)),
        taking=taking,
        stale_jobs=in_taking and any(map(blockjobs.is_stale_creation, blockjobs.jobs(domain))),
    )


def _is_listed(domain: Domain, plan: SnapshotPlan) -> bool:
    """Whether libvirt lists our snapshot: the name, and our overlays in it."""
    ours = {overlay.overlay_path for overlay in plan.overlays}
    for node in snapshots.tree(domain):
        if node.name == plan.name:
            sources = _xml.parse(node.xml, "A snapshot").iterfind("disks/disk/source")
            if not ours <= {source.get("file") for source in sources}:
                raise SplitViewError(
                    f"The snapshot {plan.name} of {plan.vm_name}",
                    "it does not consist of the files that our journal names",
                    "Nothing was touched. Rename or remove it: virsh snapshot-delete --metadata.",
                )
            return True
    return False


def _stand_again(domain: Domain | None, plan: SnapshotPlan, stood_on: str) -> list[str]:
    """The snapshot that the VM stood on is the current one again; where libvirt refuses, the next increment is a full."""
    if domain is None or not stood_on:
        return []
    try:
        told = snapshots.stand_on(domain, stood_on)
    except KvmopsError as error:
        return [f"{plan.vm_name}: libvirt does not accept snapshot {stood_on} as the current one again: {error}"]
    return [f"{plan.vm_name}: told libvirt again that the VM stands on snapshot {stood_on}"] if told else []


def _sentence(merge: ActiveMerge, action: Action) -> str:
    texts = {
        Act.THAW: "thawed the guest's file systems",
        Act.DISMISS: "dismissed ended jobs",
        Act.FORGET: f"removed the snapshot {merge.snapshot}",
        Act.UNLINK: f"removed the overlay file of {action.target}",
        Act.UNLINK_MEMORY: "removed the memory image",
    }
    if action.act in texts:
        return f"{merge.vm_name}: {texts[action.act]}"
    if action.act is Act.LEAVE:
        overlay = next(each for each in merge.overlays if each.target == action.target)
        return (
            f"{merge.vm_name}: {action.target} was unplugged, and its files stay as they are because {action.why}: "
            f"{overlay.overlay_path} holds what the guest wrote last, and stands on {overlay.base_path}"
        )
    return active_merge.sentence(merge, action)


def _thaw(work: Work, _targets: list[str]) -> None:
    agent.thaw(work.domain)


def _dismiss(work: Work, _targets: list[str]) -> None:
    blockjobs.dismiss_stale_creations(work.domain)


def _leave(work: Work, targets: list[str]) -> None:
    work.steps(targets, Step.LEFT)


def _forget(plan: SnapshotPlan, work: Work, _targets: list[str]) -> None:
    snapshots.forget(work.domain, plan.name)


def _unlink(work: Work, targets: list[str]) -> None:
    files.forget_transient(work.domain)
    files.sync(work.conn.getURI(), work.merge.vm_name)
    for target in targets:
        _files.remove(work.overlay(target).overlay_path)


def _unlink_memory(plan: SnapshotPlan, work: Work, _targets: list[str]) -> None:
    files.sync(work.conn.getURI(), plan.vm_name)
    _files.remove(plan.memory_path)
