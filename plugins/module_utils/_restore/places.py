# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which directory each restored file goes to: decided per former pool, so that its disks stay together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import HostFacts, RestorePlace

# A configuration comes from outside: it must not choose a directory in which a file by itself does something.
_SYSTEM_DIRECTORIES = (
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr",
    "/var/cache", "/var/log", "/var/run", "/var/spool", "/var/lib/kvmops-backup", "/var/lib/libvirt/qemu",
)  # fmt: skip


@dataclass(frozen=True)
class PlaceDecision:
    """Place of each member by its name; ``problems``: why there is none for some of them."""

    places: Mapping[str, RestorePlace]
    warnings: tuple[Notice, ...] = ()
    problems: tuple[str, ...] = ()


def former_key(member: Member) -> str:
    """Where the member was: the name of its pool, its directory if that was in none, "" if nothing is known."""
    if member.pool:
        return member.pool
    return os.path.dirname(_filenames.tidy(member.former_path)) if member.former_path.startswith("/") else ""


def directory_problem(place: RestorePlace) -> str:
    """Why a directory that no pool stands for is not taken from an archive; "" if nothing speaks against it."""
    for directory in (place.path, place.real_path):
        if any(part.startswith(".") for part in directory.split("/")):
            return "is a hidden directory"
        if any(directory == system or directory.startswith(f"{system}/") for system in _SYSTEM_DIRECTORIES):
            return "belongs to the operating system and is no storage pool"
    return ""


def unknown(members: Iterable[Member], facts: HostFacts) -> list[str]:
    """Why former directories are not taken from an archive that is not ours: nothing says that VMs have files there."""
    if facts.target is not None:
        return []
    known = {os.path.dirname(path) for vm in facts.vms for path in vm.disk_files}
    keys = dict.fromkeys(former_key(member) for member in members)
    found = ((key, facts.former.get(key)) for key in keys if key.startswith("/"))
    return [
        f"the former directory {key} is no storage pool, and no VM of this host has a disk in it, so a foreign archive "
        "does not choose it (name it, or another place, with 'pool' or 'path')"
        for key, place in found
        if place is not None and not place.pool and not {place.path, place.real_path} & known and not directory_problem(place)
    ]


def exposed(places: Iterable[RestorePlace]) -> list[str]:
    """Why nothing is restored where every user may put another file, or a link, in the place of a disk."""
    found = dict.fromkeys((_name(place), place.open_to_all) for place in places if place.open_to_all)
    return [
        f"every user may replace files in {name}, as {directory} can be written to by all (chmod o-w {directory}, or chmod +t; "
        "'trust: true' takes it as it is)"
        for name, directory in found
    ]


def decide(members: Sequence[Member], facts: HostFacts) -> PlaceDecision:
    """Places of ``members``; each counts with the size it has in the archive, which its file hardly exceeds."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault("" if facts.target is not None else former_key(member), []).append(member)
    used: dict[str, int] = {}
    places: dict[str, RestorePlace] = {}
    warnings: list[Notice] = []
    problems: list[str] = []
    for key, group in groups.items():
        need = sum(member.size_bytes for member in group)
        if facts.target is not None:
            place, reason = facts.target, _unfit(facts.target, need, used)
            if reason:
                problems.append(f"{_name(place)} {reason}")
        else:
            place, reason = _former_or_archive(key, need, facts, used, warnings)
            if reason:
                problems.append(reason)
        used[place.filesystem] = used.get(place.filesystem, 0) + need
        places.update({member.name: place for member in group})
    return PlaceDecision(places, tuple(warnings), tuple(problems))


def _former_or_archive(
    key: str, need: int, facts: HostFacts, used: dict[str, int], warnings: list[Notice]
) -> tuple[RestorePlace, str]:
    """The former place, or the archive's with a warning; the second value says why neither will do."""
    what = ""
    if key:
        former = facts.former.get(key)
        kind = "directory" if key.startswith("/") else "storage pool"
        if former is None:
            reason = "is not on this host"
        elif not former.pool and directory_problem(former):
            reason = directory_problem(former)
        else:
            reason = _unfit(former, need, used)
        if former is not None and not reason:
            return former, ""
        what = f"the former {kind} {key} {reason}"
    place = facts.archive_place
    reason = _unfit(place, need, used)
    if reason:
        instead = f"{what}, and " if what else ""
        return place, f"{instead}{_name(place)}, which holds the source, {reason} (name another with 'pool' or 'path')"
    if what:
        text = f"{what[0].upper()}{what[1:]}: the disks go to {_name(place)}, which holds the source."
        warnings.append(Notice(Code.OTHER_PLACE, text))
    return place, ""


def _unfit(place: RestorePlace, need: int, used: Mapping[str, int]) -> str:
    if place.problem:
        return place.problem
    free = place.free_bytes - used.get(place.filesystem, 0)
    if need > free:
        return f"has {max(free, 0)} bytes free, {need} are needed"
    return ""


def _name(place: RestorePlace) -> str:
    return f"the pool {place.pool} ({place.path})" if place.pool else f"the directory {place.path}"
