# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The temporary snapshot of a backup: from three agreeing views of the VM's disks back to three agreeing views."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _ownership, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    KvmopsError,
    QuiesceError,
    RefusedError,
    SplitViewError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import (
    agent,
    blockjobs,
    files,
    memory_blockers,
    snapshots,
    standing,
    views,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    again,
    is_connection_lost,
    libvirt,
    lives,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import original_disk, overlays, undo
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import (
    OriginalDisk,
    Overlay,
    SnapshotFacts,
    SnapshotPhase,
    SnapshotPlan,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.watchdog import Watchdog

__all__ = ("Overlay", "SnapshotPlan", "Taken", "remove", "require_ready", "take")

OPERATION = "a snapshot"  # of vm_snapshot


@dataclass(frozen=True)
class Taken:
    """The snapshot as libvirt describes it; the guest was frozen for at most ``frozen_ms``; ``timestamp`` is unix time.

    At ``since`` (monotonic, in seconds) nobody wrote to the disks below it any more.
    """

    snapshot_xml: str
    frozen_ms: int
    timestamp: int
    since: float


def take(conn: Connection, domain: Domain, plan: SnapshotPlan, journal: Journal[SnapshotFacts]) -> Taken:
    """Take the snapshot (VM running or off). Everything it makes is in the journal before it exists.

    Raises RefusedError or BusyError with nothing touched, QuiesceError when the agent could not freeze, else KvmopsError:
    after everything was put back (journal.facts.is_clean then), or with exactly what is left in its text (the next
    run settles it).
    """
    with ExitStack() as stack:
        # its process starts while we look
        watchdog = stack.enter_context(closing(Watchdog(conn.getURI(), plan.vm_uuid))) if plan.quiesce else None
        return _take(conn, domain, plan, journal, watchdog)


def _take(
    conn: Connection, domain: Domain, plan: SnapshotPlan, journal: Journal[SnapshotFacts], watchdog: Watchdog | None
) -> Taken:
    require_ready(conn, domain, plan)
    journal.record(
        plan=plan,
        originals=_originals(domain, plan),
        stood_on=next((node.name for node in snapshots.tree(domain) if node.current), ""),
        phase=SnapshotPhase.TAKING,
    )
    try:
        taken = _create(domain, plan, watchdog)
        _require_agreement(conn, domain, plan)
    except (KvmopsError, libvirt.libvirtError) as error:
        what = f"The snapshot {plan.name} of {plan.vm_name}"
        if is_connection_lost(error) and not (plan.quiesce and lives(conn)):
            why = f"{error}; whether it was made is not known"
            raise KvmopsError(what, why, "The next run of this task puts the VM back on its disks.") from error
        try:
            undo.undo(conn, domain, plan, journal, Progress())
        except KvmopsError as left:
            raise KvmopsError(what, f"{error}; not yet put back: {left}") from error
        journal.record(phase=SnapshotPhase.PUT_BACK)
        if isinstance(error, KvmopsError):
            raise
        if plan.quiesce and agent.is_agent_failure(error):
            why = "the guest agent's answer was too long" if is_connection_lost(error) else str(error)
            raise QuiesceError(what, why, "Mend the guest agent, or use another consistency.") from error
        raise translate(error, what) from error
    files.sync(conn.getURI(), plan.vm_name)
    frozen = {each.target: overlays.content_of(each.base_path) for each in plan.overlays}
    journal.record(phase=SnapshotPhase.TAKEN, frozen=frozen)
    return taken


def remove(conn: Connection, domain: Domain, plan: SnapshotPlan, journal: Journal[SnapshotFacts], progress: Progress) -> None:
    """Merge the overlays back into their bases, one disk at a time, and forget the snapshot; resumes what was begun.

    The memory image is removed too. libvirtd may have been restarted since take(). Raises BusyError when somebody else's
    job is at work on a disk, SplitViewError when QEMU, the live and the persistent definition disagree, else KvmopsError;
    the next run settles it.
    """
    conn, domain = again(conn, domain)
    journal.record(phase=SnapshotPhase.REMOVING)
    undo.undo(conn, domain, plan, journal, progress)


def _create(domain: Domain, plan: SnapshotPlan, watchdog: Watchdog | None) -> Taken:
    pairs = [(each.target, each.overlay_path) for each in plan.overlays]
    document = snapshots.document(plan.name, plan.description, pairs, plan.excluded_targets, plan.memory_path)
    memory = bool(plan.memory_path)
    frozen_ms = 0
    for each in plan.overlays:
        # libvirt takes a file that is there and empty, and leaves it to its owner
        _ownership.create_like(each.overlay_path, each.base_path)
    if watchdog:
        with watchdog, agent.bounded(domain), agent.apart(domain) as quiesced:
            begin = time.monotonic()
            xml = snapshots.create(quiesced, document, memory=memory, quiesce=True)
            frozen_ms = round((time.monotonic() - begin) * 1000)
            if agent.freeze_status(domain):
                agent.thaw(domain)
    else:
        xml = snapshots.create(domain, document, memory=memory, quiesce=False)
    return Taken(xml, frozen_ms, snapshots.describe(xml, current=True).created, time.monotonic())


def require_ready(conn: Connection, domain: Domain, plan: SnapshotPlan) -> None:
    """Everything that can be known to go wrong, before anything is touched. Raises RefusedError, BusyError or SplitViewError."""
    what = f"The VM {plan.vm_name}"
    seen = views.gather(conn, domain)
    if seen.managed_save:
        hint = f"Start it (virsh start {plan.vm_name}) or give its memory up (virsh managedsave-remove {plan.vm_name})."
        raise RefusedError(what, "it has a managed-save image: its memory belongs to its disks as they are now", hint)
    if not seen.running:
        snapshots.require_no_checkpoints(domain)
        views.require_really_off(domain, [(each.base_path, each.base_format) for each in plan.overlays])
        if plan.quiesce or plan.memory_path:
            raise RefusedError(what, "it is off: there is neither memory nor a guest agent")
    if snapshots.exists(domain, plan.name):
        raise RefusedError(what, f"it already has a snapshot {plan.name}")
    for path in [each.overlay_path for each in plan.overlays] + [plan.memory_path]:
        if path and os.path.lexists(path):
            raise RefusedError(what, f"{path} already exists", "Move it away: nothing is ever written over.")
    if seen.running:
        standing.require_freezable(standing.of(domain), plan.vm_name, what)
        if plan.memory_path:
            memory_blockers.require_none(domain, what)
        blockjobs.require_idle(domain, what)
        blockjobs.require_open(domain, what)
    _require_all_disks(domain, plan)
    for overlay in plan.overlays:
        disk = seen.disk(overlay.target)
        if not disk.agree or _active(disk) != views.real(overlay.base_path):
            raise SplitViewError(
                f"The disk {overlay.target} of {plan.vm_name}",
                f"QEMU has {_name(disk.qemu)}, the live definition {_name(disk.live)}, the persistent one "
                f"{_name(disk.persistent)}; expected {overlay.base_path}",
                "Nothing was touched. A configuration change that waits for the next start is applied by a restart.",
            )
    if plan.quiesce:
        state = agent.available(domain)
        if state is agent.AgentState.FROZEN:
            why = "the guest's file systems are already frozen by somebody else"
            raise RefusedError(what, why, f"Wait until that job is done, or run: virsh domfsthaw {plan.vm_name}")
        if state is not agent.AgentState.OK:
            raise RefusedError(what, state.value)


def _require_all_disks(domain: Domain, plan: SnapshotPlan) -> None:
    """A disk that is not listed would be given an overlay by libvirt itself."""
    there = {disk.target for disk in domain_xml.parse(domain.XMLDesc(0)).disks}
    listed = {each.target for each in plan.overlays} | set(plan.excluded_targets)
    if there != listed:
        raise RefusedError(
            f"The VM {plan.vm_name}",
            f"its disks have changed: {', '.join(sorted(there ^ listed))} was attached or detached since the plan was made",
            "Run the task again.",
        )


def _require_agreement(conn: Connection, domain: Domain, plan: SnapshotPlan) -> None:
    """After the snapshot: the guest writes to the overlays in all views, each directly on its base."""
    seen = views.gather(conn, domain)
    for overlay in plan.overlays:
        disk = seen.disk(overlay.target)
        chain = disk.qemu if seen.running else disk.persistent
        fine = disk.agree and _active(disk) == views.real(overlay.overlay_path)
        if not fine or (seen.running and chain[1:2] != (views.real(overlay.base_path),)):
            raise SplitViewError(
                f"The disk {overlay.target} of {plan.vm_name}",
                f"after the snapshot QEMU has {_name(disk.qemu)}, the live definition {_name(disk.live)}, the "
                f"persistent one {_name(disk.persistent)}",
            )


def _active(disk: views.DiskView) -> str:
    return next((chain[0] for chain in (disk.qemu, disk.live, disk.persistent) if chain), "")


def _name(chain: tuple[str, ...]) -> str:
    return chain[0] if chain else "nothing"


def _originals(domain: Domain, plan: SnapshotPlan) -> dict[str, OriginalDisk]:
    disks: dict[str, str] = {}
    if domain.isPersistent():
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        root = _xml.parse(domain.XMLDesc(flags), "The domain XML")
        for disk in root.iterfind("devices/disk"):
            disks[domain_xml.target_of(disk)] = etree.tostring(disk, encoding="unicode", with_tail=False)
    return {each.target: OriginalDisk(disks.get(each.target, ""), original_disk.owner_of(each.base_path)) for each in plan.overlays}
