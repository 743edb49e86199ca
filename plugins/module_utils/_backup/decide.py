# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Increment or full, and why: which archive a run goes on with, if any."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ansible_collections.kvmops.backup.plugins.module_utils._archive import digests
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._backup import chain_facts
from ansible_collections.kvmops.backup.plugins.module_utils._backup.archives import full_owed
from ansible_collections.kvmops.backup.plugins.module_utils._backup.members import Base
from ansible_collections.kvmops.backup.plugins.module_utils._backup.model import VmFacts
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import BackupRequest, Mode
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection, Domain
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._template import find
from ansible_collections.kvmops.backup.plugins.module_utils._vm_state import Evidence

_DAY_S = 86400


@dataclass(frozen=True)
class ModeDecision:
    """`base` None: a full. `reason` says why this mode; `proved` is evidence found on the way, worth keeping."""

    reason: str
    base: Base | None = None
    proved: Mapping[str, Evidence] = field(default_factory=dict)


def decide(
    conn: Connection,
    domain: Domain,
    facts: VmFacts,
    directory: str,
    views: Sequence[ArchiveView],
    request: BackupRequest,
    now: int,
    context: Context,
) -> ModeDecision:
    """What this run makes in a directory with these archives of the VM. Changes nothing.

    Raises RefusedError where an increment was asked for and cannot be.
    """
    if request.mode is Mode.FULL:
        return ModeDecision("full backup as asked")
    if facts.thin.marked:
        return _no_increment(request, facts, "it is a template, of which there are full backups only")
    if facts.shared:
        return _no_increment(
            request, facts, find.why_not_beside(facts.shared), find.way_out_of_sharing(facts.shared)
        )
    if request.increment_limit == 1:
        return ModeDecision("increment_limit is 1: every run is a full")
    owed = full_owed(views, request.full_weekday, now)
    if owed:
        return ModeDecision(owed)
    path = request.archive or newest_of(views, {state.name for state in facts.snapshots}, now)
    if not path:
        why = f"no archive in {directory} was made incrementable for this VM ({facts.uuid})"
        return _no_increment(request, facts, why)
    if request.archive and not os.path.isabs(path):
        path = os.path.join(directory, path)
    try:
        found = chain_facts.stands(conn, domain, facts, path, context.progress, threads=request.threads)
        damage = catalog.look(path).found
        if damage and not damage.ok:
            when = catalog.iso_time(damage.at)
            return _no_increment(
                request, facts, f"{path} is not continued: its verification of {when} has found damage"
            )
        if found.reason:
            return _no_increment(request, facts, f"{path} cannot be continued: {found.reason}")
        with open_archive(path) as reader:
            if request.digest not in (digests.AUTO, reader.algorithm.name):
                why = f"{path} is not continued: its digests are {reader.algorithm.name}, {request.digest} is asked for"
                return _no_increment(request, facts, why, "Use digest: auto, or make a full one.")
            base = Base(
                path=path,
                compressed=reader.compressed,
                points=reader.points,
                names=frozenset(entry.name for entry in reader.entries),
                same_files=found.same_files,
                size_bytes=reader.size_bytes,
            )
    except ArchiveError as error:
        return _no_increment(request, facts, f"{path} cannot be continued: {error}")
    return ModeDecision(f"the VM still stands on point {base.newest.timestamp} of {path}", base, found.proved)


def newest_of(views: Sequence[ArchiveView], snapshots: set[str], now: int) -> str:
    """The newest archive of those made incrementable, "" if there is none; `snapshots`: names of those on the VM. Pure.

    An archive from the future (the clock was wrong once) counts only while the VM has its snapshot: it would keep every
    later archive from being continued.
    """

    def counts(view: ArchiveView) -> bool:
        return view.newest.timestamp <= now + _DAY_S or view.newest.snapshot in snapshots

    made = [view for view in views if view.newest.incrementable]
    usable = [view for view in made if counts(view)] or made
    return max(usable, key=lambda view: view.newest.timestamp).path if usable else ""


def not_before(views: Sequence[ArchiveView], now: int) -> int:
    """The unix time for a new point: after every point of the VM in this place, unless those are from a far future. Pure."""
    known = [point.timestamp for view in views for point in view.points if point.timestamp <= now + 2 * _DAY_S]
    return max([now, *(timestamp + 1 for timestamp in known)])


def _no_increment(request: BackupRequest, facts: VmFacts, why: str, way_out: str = "") -> ModeDecision:
    if request.mode is Mode.INCREMENTAL:
        otherwise = "Make a full one with mode: auto, or with mode: full and incrementable: true."
        raise RefusedError(f"Incremental backup of VM {facts.name}", why, way_out or otherwise)
    return ModeDecision(why)
