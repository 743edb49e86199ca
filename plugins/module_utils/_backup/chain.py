# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Does a VM still stand on an archive's newest point, and if not, why. Pure; `chain_facts` gathers what it needs.

A wrong "yes" would make a wrong increment, so everything that the point says about the VM is compared: identity,
snapshots with their creation data, where the VM is in their tree, disks, what each disk stands on, sizes, and the bytes of every
frozen file. A wrong "no" costs a full backup.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Member,
    Role,
    SnapshotNode,
    TemplateRequirement,
    chain_of,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import target_of
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import Snapshot
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes
from ansible_collections.kvmops.backup.plugins.module_utils._vm_state import VmState

FROZEN_ROLES = (Role.DISK, Role.LAYER, Role.MEMORY)
_SOURCE_ATTRIBUTES = ("file", "dev", "pool", "volume", "protocol", "name")


@dataclass(frozen=True)
class DiskNow:
    """A disk that a backup stores, as it is now. Chains are real paths, the active image first.

    `headers`: what its definition lists, or else the images themselves say; `qemu`: what a running QEMU has open, () for a VM
    that is off. Both end above the disk of a template, `template_disk` as in `disks.Image`.
    """

    target: str
    headers: tuple[str, ...]
    virtual_size_bytes: int
    qemu: tuple[str, ...] = ()
    template_disk: int = 0


@dataclass(frozen=True)
class VmNow:
    """The VM as it is now, as far as a chain depends on it."""

    name: str
    uuid: str
    snapshots: tuple[Snapshot, ...]
    disks: tuple[DiskNow, ...]
    requires: TemplateRequirement | None = None


def judge(points: Sequence[Configuration], now: VmNow, state: VmState) -> str:
    """Why the archive with these points (oldest first) cannot be continued; "" if nothing but its files can speak against it.

    The reason is a clause that makes sense after "the archive cannot be continued:".
    """
    point = points[-1]
    own = next((each for each in point.snapshots if each.current), None)
    if not point.incrementable or own is None:
        return "it was not made incrementable"
    if point.vm_uuid != now.uuid:
        return f"it is an archive of another VM ({point.vm_uuid})"
    return (
        state.why_ended(points[0].timestamp)
        or ("" if point.vm_name == now.name else f"the VM was renamed from {point.vm_name} to {now.name}")
        or _snapshots(point, now)
        or _reverted(own, now)
        or _disk_set(point, now)
        or _template(point, now)
        or next(filter(None, (_disk(disk, point, own) for disk in now.disks)), "")
    )


def frozen_files(point: Configuration) -> tuple[Member, ...]:
    """The members whose files on the VM's side must not have changed since the point."""
    return tuple(member for member in point.members if member.role in FROZEN_ROLES and member.former_path)


def suspects(
    point: Configuration, state: VmState, found: Mapping[str, tuple[int, ...]], distrusted: frozenset[str] = frozenset()
) -> tuple[Member, ...]:
    """Those frozen files that must be read again: nothing proves that they are what they were.

    `found`: evidence of the files as they are now, by path; `distrusted`: files whose evidence is not enough this time.
    """
    return tuple(
        member
        for member in frozen_files(point)
        if member.former_path in distrusted or not _is_proved(member, state, found.get(member.former_path))
    )


def _is_proved(member: Member, state: VmState, found: tuple[int, ...] | None) -> bool:
    known = state.frozen.get(member.former_path)
    return known is not None and known.digest == member.digest and known.stat == found


def _snapshots(point: Configuration, now: VmNow) -> str:
    there = {each.name: each for each in now.snapshots}
    gone = [each.name for each in point.snapshots if each.name not in there]
    if gone:
        return f"snapshot {', '.join(gone)} is gone, which the VM had at point {point.timestamp}"
    for each in point.snapshots:
        if _identity(each.xml) != _identity(there[each.name].xml):
            return f"snapshot {each.name} is not the one that the VM had at point {point.timestamp}"
    return ""


def _identity(xml: str) -> tuple[object, ...]:
    """What stays the same about a snapshot as long as it is the same."""
    root = _xml.parse(xml, "snapshot")
    memory = root.find("memory")
    return (
        root.findtext("name"),
        root.findtext("creationTime"),
        root.findtext("parent/name") or "",
        root.findtext("state"),
        ("no", "") if memory is None else (memory.get("snapshot", "no"), memory.get("file", "")),
        sorted(
            (disk.get("name") or "", disk.get("snapshot") or "", _source(disk))
            for disk in root.iterfind("disks/disk")
            if disk.get("snapshot") != "no"
        ),
        sorted((target_of(disk), _source(disk)) for disk in root.iterfind("domain/devices/disk")),
    )


def _source(disk: etree._Element) -> tuple[tuple[str, str], ...]:
    source = disk.find("source")
    if source is None:
        return ()
    return tuple((name, source.get(name, "")) for name in _SOURCE_ATTRIBUTES if source.get(name))


def _reverted(own: SnapshotNode, now: VmNow) -> str:
    """The VM must have gone on from the point's own snapshot, through whatever was added since."""
    parents = {each.name: each.parent for each in now.snapshots}
    current = next((each.name for each in now.snapshots if each.current), "")
    if not current:
        return "libvirt no longer knows which snapshot the VM has gone on from"
    name, passed = current, set()
    while name and name not in passed:
        if name == own.name:
            return ""
        passed.add(name)
        name = parents.get(name, "")
    return f"the VM was reverted to snapshot {current}"


def _template(point: Configuration, now: VmNow) -> str:
    """A thin clone must stand on the content that it stood on."""
    before, after = point.requires, now.requires
    if before is None or after is None:
        if before == after:
            return ""
        return f"the VM stands on the template {after.name} now" if after else "the VM no longer stands on a template"
    return (
        "" if before.fits(after.disks) else f"the template {after.name} is not what it was at point {point.timestamp}"
    )


def _disk_set(point: Configuration, now: VmNow) -> str:
    before, after = set(_targets(point)), {disk.target for disk in now.disks}
    if after - before:
        return f"disk {', '.join(sorted(after - before))} was added since point {point.timestamp}"
    if before - after:
        return f"disk {', '.join(sorted(before - after))} was removed since point {point.timestamp}"
    return ""


def _targets(point: Configuration) -> list[str]:
    return [each.target for each in point.members if each.role in (Role.DISK, Role.LAYER) and each.active]


def _disk(disk: DiskNow, point: Configuration, own: SnapshotNode) -> str:
    """The disk must stand on the files of the point, with the overlay of its snapshot directly above them."""
    if disk.qemu and disk.qemu != disk.headers:
        return f"QEMU has disk {disk.target} on {_files(disk.qemu)}, its definition and the images say {_files(disk.headers)}"
    members = chain_of(point, disk.target)
    frozen = _paths(members)
    overlay = _overlay(own, disk.target)
    if not overlay:
        if disk.headers != frozen:
            return f"disk {disk.target} is {_files(disk.headers)} now and was {_files(frozen)}"
    elif disk.headers[-len(frozen) :] != frozen:
        other = next((t for t in _targets(point) if disk.headers[-1:] == _paths(chain_of(point, t))[-1:]), "")
        if other and other != disk.target:
            return f"disk {disk.target} has what was disk {other} at point {point.timestamp}"
        return (
            f"disk {disk.target} no longer stands on the files of point {point.timestamp}: "
            f"it has {_files(disk.headers)}, and {_files(frozen)} were frozen"
        )
    elif len(disk.headers) == len(frozen) or disk.headers[-len(frozen) - 1] != overlay:
        return (
            f"disk {disk.target} has not gone on in {overlay} since point {point.timestamp}: "
            f"the VM was reverted to snapshot {own.name}, or its layers were merged"
        )
    if disk.template_disk != members[-1].template_disk:
        return f"disk {disk.target} stands on another disk of the template than at point {point.timestamp}"
    if disk.virtual_size_bytes != members[0].virtual_size_bytes:
        before, after = human_bytes(members[0].virtual_size_bytes), human_bytes(disk.virtual_size_bytes)
        return f"disk {disk.target} was resized from {before} to {after}"
    return ""


def _paths(members: Sequence[Member]) -> tuple[str, ...]:
    return tuple(os.path.realpath(each.former_path) for each in members)


def _overlay(own: SnapshotNode, target: str) -> str:
    """The file that the snapshot made for a disk; "" if it left the disk alone."""
    for disk in _xml.parse(own.xml, f"snapshot {own.name}").iterfind("disks/disk[@snapshot='external']"):
        source = disk.find("source")
        if disk.get("name") == target and source is not None:
            return os.path.realpath(source.get("file", ""))
    return ""


def _files(paths: Sequence[str]) -> str:
    return ", ".join(paths) or "nothing"
