# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a report says about each VM, from what hosts have told. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._policy import FUTURE_S
from ansible_collections.kvmops.backup.plugins.module_utils._units import duration_s

#: What becomes of facts that no module of ours has told; a host is not believed that they are.
ODD_FACTS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class State(Enum):
    """How a VM stands, the worst first; the value is what people read."""

    DAMAGED = "damaged"
    NEVER = "no backup"
    LATE = "late"
    GOOD = "good"
    GONE = "VM gone"


@dataclass(frozen=True)
class ReportedPoint:
    """One restorable moment. `at`: unix time; `lost`: a verification has found damage that costs it."""

    at: int
    full: bool
    size_bytes: int
    consistency: str
    lost: bool = False


@dataclass(frozen=True)
class ReportedArchive:
    """One archive. `verified_at` None: never, as far as the host knows; `added_since`: it has points that no verification saw."""

    path: str
    size_bytes: int
    protected: bool
    incrementable: bool
    points: tuple[ReportedPoint, ...]
    verified_at: int | None = None
    verified_ok: bool = True
    added_since: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vm:
    """One VM with its archives, oldest first.

    `host` "": on none of the hosts. `newest`: the newest good point that is not from the future; `objective_s`: how old it may be.
    """

    name: str
    uuid: str
    host: str
    running: bool
    objective_s: int
    newest: ReportedPoint | None
    age_s: int | None
    state: State
    archives: tuple[ReportedArchive, ...]
    warnings: tuple[str, ...] = ()

    @property
    def points(self) -> list[ReportedPoint]:
        """All points, oldest first."""
        return sorted((point for each in self.archives for point in each.points), key=lambda point: point.at)

    @property
    def size_bytes(self) -> int:
        """What its archives take."""
        return sum(each.size_bytes for each in self.archives)


@dataclass(frozen=True)
class Report:
    """All VMs, those in trouble first; files that nobody can read; archives that are not ours and count for nothing; hosts
    that did not answer."""

    now: int
    vms: tuple[Vm, ...]
    unreadable: tuple[tuple[str, str], ...] = ()
    silent_hosts: tuple[str, ...] = field(default=())
    not_ours: tuple[tuple[str, str], ...] = ()

    def count(self, state: State) -> int:
        """How many VMs are in this state."""
        return sum(vm.state is state for vm in self.vms)


def report(
    hosts: Sequence[Mapping[str, Any]], *, now: int, max_age: str, objectives: Mapping[str, str] | None = None
) -> Report:
    """The report of what hosts have told.

    `hosts`: for each ``{host, vms, archives}`` as ``vm_info`` and ``backup_info`` return them; without them it did not answer.
    `max_age`: how old the newest good point of a VM may be, ``26h``; `objectives`: the same for names and globs, the first
    that fits.
    Raises RefusedError for what is no duration.
    """
    limits = [(glob, duration_s(text, "objectives")) for glob, text in (objectives or {}).items()]
    default_s = duration_s(max_age, "max_age")
    where: dict[str, tuple[str, Mapping[str, Any]]] = {}
    archives: dict[str, dict[tuple[Any, ...], ReportedArchive]] = {}
    names: dict[str, str] = {}
    unreadable, not_ours = [], []
    for host in hosts:
        for vm in host.get("vms") or ():
            where.setdefault(str(vm["uuid"]), (str(host["host"]), vm))
            names[str(vm["uuid"])] = str(vm["name"])
        for entry in host.get("archives") or ():
            if not entry.get("vm"):
                unreadable.append((str(entry["path"]), "; ".join(map(str, entry["warnings"]))))
                continue
            if entry.get("not_ours"):
                not_ours.append((str(entry["path"]), str(entry["not_ours"])))
                continue
            found = _archive(entry, now)
            uuid = str(entry["vm"]["uuid"]) or str(entry["vm"]["name"])
            names.setdefault(uuid, str(entry["vm"]["name"]))
            # A place that hosts share is seen by each of them: who knows of a verification goes before.
            same = archives.setdefault(uuid, {})
            key = (found.path, found.points[0].at if found.points else 0)
            if key not in same or same[key].verified_at is None:
                same[key] = found

    vms = []
    for uuid, name in names.items():
        limit_s = next((limit for glob, limit in limits if fnmatch.fnmatchcase(name, glob)), default_s)
        own = sorted(
            archives.get(uuid, {}).values(), key=lambda each: (each.points[-1].at if each.points else 0, each.path)
        )
        vms.append(_vm(name, uuid, where.get(uuid), limit_s, own, now))
    order = list(State)
    vms.sort(key=lambda vm: (order.index(vm.state), vm.name, vm.uuid))
    silent = [str(host["host"]) for host in hosts if host.get("vms") is None or host.get("archives") is None]
    return Report(now, tuple(vms), tuple(sorted(set(unreadable))), tuple(silent), tuple(sorted(set(not_ours))))


def _vm(
    name: str,
    uuid: str,
    found: tuple[str, Mapping[str, Any]] | None,
    limit_s: int,
    archives: Sequence[ReportedArchive],
    now: int,
) -> Vm:
    good = [point for each in archives for point in each.points if not point.lost and point.at <= now + FUTURE_S]
    newest = max(good, key=lambda point: point.at, default=None)
    age_s = max(0, now - newest.at) if newest else None
    if any(not each.verified_ok for each in archives):
        state = State.DAMAGED
    elif found is None:
        state = State.GONE
    elif age_s is None:
        state = State.NEVER
    else:
        state = State.LATE if age_s > limit_s else State.GOOD
    host, facts = found if found else ("", {})
    running, told = facts.get("state") == "running", tuple(_about_attached(facts.get("attached") or ()))
    return Vm(name, uuid, host, running, limit_s, newest, age_s, state, tuple(archives), told)


def _about_attached(disks: Iterable[Mapping[str, Any]]) -> list[str]:
    """What keeps the VM from being backed up."""
    return [
        f"{disk['target']} is attached to {disk['receiver']}{', past its lease' if disk['expired'] else ''}: no backups meanwhile"
        for disk in disks
    ]


def _archive(entry: Mapping[str, Any], now: int) -> ReportedArchive:
    verified = entry.get("verified") or {}
    lost = set(verified.get("lost") or ())
    points = [
        ReportedPoint(
            int(row["point"]),
            row["mode"] == "full",
            int(row["size"]),
            str(row["consistency"] or ""),
            row["point"] in lost,
        )
        for row in entry["points"]
    ]
    return ReportedArchive(
        path=str(entry["path"]),
        size_bytes=int(entry["size"]),
        protected=bool(entry["protected"]),
        incrementable=bool(entry["incrementable"]),
        points=tuple(points),
        verified_at=_unix_time(str(verified["time"])) if verified else None,
        verified_ok=bool(verified.get("ok", True)),
        added_since=bool(verified) and not verified["current"],
        warnings=tuple(_worth_telling(entry)),
    )


def _worth_telling(entry: Mapping[str, Any]) -> list[str]:
    """That an older archive is not continued is how it should be."""
    usual = entry["incrementable_reason"] if entry["incrementable"] is False else ""
    return [str(text) for text in entry["warnings"] if text != usual]


def _unix_time(text: str) -> int:
    return int(datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp())
