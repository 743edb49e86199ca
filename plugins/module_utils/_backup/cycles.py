# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Where cycles of full and increments end: snapshots that serve no archive any more, and the merge at the limit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ansible_collections.kvmops.backup.plugins.module_utils import _vm_state
from ansible_collections.kvmops.backup.plugins.module_utils._backup import chain_facts
from ansible_collections.kvmops.backup.plugins.module_utils._backup.model import VmFacts
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import Deletes
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    CancelledError,
    KvmopsError,
    RefusedError,
    SplitViewError,
    UnmergedError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection, Domain, again
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.operations import Unmerged
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import backup_snapshots, merge
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import unmerged as unmerge

_NOTHING_DONE = (RefusedError, UnmergedError)  # the snapshots are all there, and the VM may be backed up
_LONG_LAYERS = 20
TOO_MANY_LAYERS = 24


@dataclass(frozen=True)
class Served:
    """An archive that snapshots of a VM serve. `stands` None: not known here; `needs`: the tree of its newest point."""

    states: tuple[str, ...]
    stands: bool | None
    same_place: bool
    needs: frozenset[str]


def obsolete(served: Mapping[str, Served]) -> tuple[list[str], list[str]]:
    """Snapshots of ours that a full starting a new cycle merges, and the archives whose standing chain that ends. Pure.

    `served`: by path of the archive. In the place of the new archive the new cycle takes over from the older ones. Elsewhere
    a chain that stands is left alone, unless it stands on what goes anyway.
    """
    gone = {path for path, each in served.items() if each.same_place or each.stands is False}
    while True:
        names = {name for path in gone for name in served[path].states}
        more = {path for path, each in served.items() if path not in gone and each.needs & names}
        if not more:
            break
        gone |= more
    ended = [path for path in sorted(gone) if served[path].stands and not served[path].same_place]
    return [name for path, each in served.items() if path in gone for name in each.states], ended


def clear_old(
    conn: Connection, domain: Domain, facts: VmFacts, directory: str, context: Context, unmerged: Unmerged
) -> tuple[str, ...]:
    """Before a full that starts a cycle: merges the snapshots that obsolete() names; those that went.

    What cannot be merged stays: the backup is worth more than a short chain. After a merge that stops half-way the error is
    raised; the next run's recovery goes on from there.
    """
    served = served_archives(conn, domain, facts, directory, context)
    names, ended = obsolete(served)
    if not names:
        return ()
    for path in ended:
        text = f"{path} cannot be continued any more: the snapshots that it stands on are being merged"
        context.warn(Notice(Code.NO_INCREMENT, text))
    state = _vm_state.load(facts.uuid)
    begun = [backup_snapshots.first_point(each.states) for each in served.values() if not set(each.states) & set(names)]
    others = tuple(full for full in begun if not state.why_ended(full))
    _vm_state.save(facts.uuid, replace(state, ended=f"a new archive was begun in {directory}", begun=others))
    try:
        return _remove(conn, domain, names, context)
    except _NOTHING_DONE as error:
        unmerged.add(names, error)
        return ()


def served_archives(
    conn: Connection, domain: Domain, facts: VmFacts, directory: str, context: Context
) -> dict[str, Served]:
    """The archives that the VM's snapshots were made for, by the path that they had then."""
    states: dict[str, list[str]] = {}
    for state in backup_snapshots.of_vm(facts.snapshots):
        states.setdefault(state.archive, []).append(state.name)
    found = {}
    for path, names in states.items():
        same_place = os.path.realpath(os.path.dirname(path)) == os.path.realpath(directory)
        there = _where(path)
        stands: bool | None = None
        needs: frozenset[str] = frozenset()
        if there:
            try:
                reason = chain_facts.stands(conn, domain, facts, there, context.progress, read_limit_bytes=0).reason
                stands = not reason
                needs = frozenset(catalog.look(there).newest.snapshots)
            except ArchiveError:
                stands = False
        elif _is_gone(path):
            stands = False
        elif not same_place:
            text = f"{', '.join(names)} stay on the VM: they serve {path}, and its directory cannot be looked at now"
            context.warn(Notice(Code.SNAPSHOT_STAYS, text))
        found[path] = Served(tuple(names), stands, same_place, needs)
    return found


def finish_merge(
    conn: Connection, domain: Domain, uuid: str, context: Context, unmerged: Unmerged
) -> tuple[str, ...]:
    """What an earlier run has decided to merge and could not; those that went. What cannot be merged now either stays."""
    if not _vm_state.load(uuid).to_merge:
        return ()
    names = unmerge.still_there(domain)

    def begin() -> None:
        # archives that were begun or continued since stand on them too
        _vm_state.end_cycle(uuid, f"snapshots that it stood on were merged: {', '.join(names)}")

    try:
        merged = _remove(conn, domain, names, context, begin) if names else ()
    except _NOTHING_DONE as error:
        unmerged.add(names, error)
        return ()
    _vm_state.save(uuid, replace(_vm_state.load(uuid), to_merge=()))
    return merged


def chosen_at_limit(
    states: Sequence[snapshots.Snapshot], deletes: Deletes
) -> tuple[snapshots.Snapshot, ...]:
    """Which snapshots of a VM are merged when an archive has reached its limit. Pure."""
    ours = {each.name for each in backup_snapshots.of_vm(states)}
    return tuple(each for each in states if deletes is Deletes.ALL or each.name in ours)


def merge_at_limit(
    conn: Connection,
    domain: Domain,
    uuid: str,
    archive: str,
    deletes: Deletes,
    context: Context,
    unmerged: Unmerged,
) -> tuple[str, ...]:
    """The archive has reached its limit: its cycle ends and the VM's snapshots are merged; those that went.

    What cannot be merged stays for the next run. Raises SplitViewError, CancelledError.
    """
    conn, domain = again(conn, domain)  # libvirtd may have been restarted while the backup ran
    chosen = chosen_at_limit(snapshots.tree(domain, secrets=False), deletes)
    names = [each.name for each in chosen]
    state = replace(
        _vm_state.load(uuid),
        ended=f"{archive} has reached its increment_limit",
        begun=(),
        to_merge=tuple(unmerge.key(each) for each in chosen),
    )
    _vm_state.save(uuid, state)
    try:
        merged = _remove(conn, domain, names, context)
    except (SplitViewError, CancelledError):
        raise
    except KvmopsError as error:
        with suppress(KvmopsError):
            names = unmerge.still_there(again(conn, domain)[1])
        unmerged.add(names or ["layers"], error)
        return ()
    _vm_state.save(uuid, replace(_vm_state.load(uuid), to_merge=()))
    return merged


def longest_chain(facts: VmFacts) -> tuple[str, int]:
    """The disk of the VM that stands on most images, and how many there are; of a template's only the uppermost counts. Pure."""
    lengths = {}
    for disk in facts.view.disks:
        path = disk.path
        seen: set[str] = set()
        while path in facts.images and path not in seen:
            seen.add(path)
            path = facts.images[path].backing_path
        lengths[disk.target] = max(len(seen), 1 + len(disk.chain) if disk.path else 0)
    return max(lengths.items(), key=lambda each: each[1], default=("", 0))


def about_length(target: str, layers: int, vm: str) -> str:
    """What is told about a long chain of images, "" for a short one. Pure."""
    if layers < _LONG_LAYERS:
        return ""
    return (
        f"{target} stands on {layers} images: libvirt 10.8 to 11.10 does not start a VM with more than about 25. Merge them: "
        f"kvmops.backup.vm_snapshot with vm: {vm}, snapshot: all and state: absent; and let increment_limit keep them few"
    )


def _remove(
    conn: Connection,
    domain: Domain,
    names: Sequence[str],
    context: Context,
    begin: Callable[[], None] = lambda: None,
) -> tuple[str, ...]:
    context.progress.phase("merge")
    removed = merge.remove_snapshots(conn, domain, names, context, begin)
    for note in removed.notes:
        context.warn(note)
    return tuple(removed.names)


def _where(path: str) -> str:
    """Where the archive is now: it may have been compressed or uncompressed since; "" if it is not there."""
    twin = path[: -len(".zst")] if path.endswith(".zst") else f"{path}.zst"
    return next((each for each in (path, twin) if os.path.isfile(each)), "")


def _is_gone(path: str) -> bool:
    """Whether its directory is there and holds other things: an empty one may be a place that is not mounted."""
    try:
        names = os.listdir(os.path.dirname(path))
    except OSError:
        return False
    return bool(names) and os.path.basename(path) not in names  # one that is listed and is no file cannot be looked at
