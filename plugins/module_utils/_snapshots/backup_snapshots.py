# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Snapshots that backups leave on a VM: which they are, and which archive each is for. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _text, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import Snapshot
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import overlays

_NAME = re.compile(r"kvmops-[0-9]{1,11}")
_SERVES = "Made by kvmops.backup for the archive "
_WARNING = "\nDeleting or reverting it ends the archive's cycle: the next backup is a full."
_FILE = re.compile(r"\.kvmops-[0-9]{1,11}\.(?:qcow2|memory)$")
_OVERLAY = re.compile(r"\.kvmops-[0-9]{1,11}\.qcow2$")


@dataclass(frozen=True)
class BackupSnapshot:
    """A snapshot that stays on a VM so that increments of `archive` (a path, as it was then) have something to stand on."""

    name: str
    archive: str


def name(timestamp: int) -> str:
    """The name of the snapshot of the point made at this unix time."""
    return f"kvmops-{timestamp}"


def is_name(name: str) -> bool:
    """Whether a snapshot of this name may be one of ours; its description tells (`of_vm`)."""
    return bool(_NAME.fullmatch(name))


def first_point(names: Iterable[str]) -> int:
    """Unix time of the full that the first of these snapshots of ours, all of one archive, was made with."""
    return min(int(each.rpartition("-")[2]) for each in names)


def description(archive_path: str) -> str:
    """What libvirt shows about a snapshot that stays."""
    return f"{_SERVES}{_text.shown(archive_path)}{_WARNING}"


def overlay_path(path: str, state: str, longest_name: int) -> str:
    """Where the guest goes on writing; the names of earlier overlays do not pile up in it."""
    return _files.suffixed(_OVERLAY.sub("", path), f".{state}{overlays.EXTENSION}", longest_name)


def is_file_name(name: str) -> bool:
    """Whether a file of this name may belong to a snapshot of ours, of whichever VM."""
    return bool(_FILE.search(name))


def of_vm(states: Iterable[Snapshot]) -> tuple[BackupSnapshot, ...]:
    """Those snapshots that were made to stay. Both name and description must be ours: a user may choose either."""
    found = []
    for state in states:
        text = _xml.parse(state.xml, f"snapshot {state.name}").findtext("description") or ""
        if _NAME.fullmatch(state.name) and text.startswith(_SERVES):
            found.append(BackupSnapshot(state.name, text[len(_SERVES) :].split("\n", 1)[0].strip()))
    return tuple(found)
