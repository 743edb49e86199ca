# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Snapshots that should have been merged and could not be: remembered for a later run, told at the end of this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ansible_collections.kvmops.backup.plugins.module_utils import _vm_state
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Domain


def key(state: snapshots.Snapshot) -> str:
    """What a snapshot is remembered by: one of the same name that was made since is not meant."""
    return f"{state.created} {state.name}"


def name(remembered: str) -> str:
    """The name of a remembered one. Pure."""
    return remembered.partition(" ")[2]


def remember(domain: Domain, names: Sequence[str]) -> None:
    """Keep in mind, durably, that they are to be merged; no archive is continued once they are."""
    uuid = str(domain.UUIDString())
    state = _vm_state.load(uuid)
    keys = [key(each) for each in snapshots.tree(domain, secrets=False) if each.name in names]
    _vm_state.save(uuid, replace(state, to_merge=tuple(dict.fromkeys([*state.to_merge, *keys]))))


def still_there(domain: Domain) -> list[str]:
    """The names of those that are remembered and still there, parents first."""
    wanted = _vm_state.load(str(domain.UUIDString())).to_merge
    return [each.name for each in snapshots.tree(domain, secrets=False) if key(each) in wanted] if wanted else []
