# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The temporary saved state of a backup: from three agreeing views of the VM's disks back to three agreeing views."""

from __future__ import annotations

from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection, Domain
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress


@dataclass(frozen=True)
class Overlay:
    """One disk of the saved state: ``base_path`` is frozen, the guest goes on writing to ``overlay_path`` (a new qcow2)."""

    target: str
    base_path: str
    base_format: str
    overlay_path: str


@dataclass(frozen=True)
class SavedStatePlan:
    """A saved state to take. Every disk of the VM is in ``overlays`` or in ``excluded_targets``."""

    vm_uuid: str
    vm_name: str
    name: str
    description: str
    overlays: tuple[Overlay, ...]
    excluded_targets: tuple[str, ...]
    memory_path: str  # "" without a memory image
    quiesce: bool  # freeze the guest's file systems through its agent


@dataclass(frozen=True)
class Taken:
    """The saved state as libvirt describes it; the guest was frozen for at most ``frozen_ms``; ``timestamp`` is unix time."""

    snapshot_xml: str
    frozen_ms: int
    timestamp: int


def take(conn: Connection, domain: Domain, plan: SavedStatePlan, journal: Journal) -> Taken:
    """Take the saved state (VM running or off). Everything it makes is in the journal before it exists.

    Raises RefusedError or BusyError with nothing touched, else KvmopsError after everything was put back, or with exactly
    what is left in its text.
    """
    raise NotImplementedError


def remove(conn: Connection, domain: Domain, plan: SavedStatePlan, journal: Journal, progress: Progress) -> None:
    """Merge the overlays back into their bases, one disk at a time, and forget the saved state; resumes what was begun.

    The memory image is removed too. Raises BusyError when somebody else's job is at work on a disk, SplitViewError when
    QEMU, the live and the persistent definition disagree, else KvmopsError; the next recover.settle() goes on from there.
    """
    raise NotImplementedError
