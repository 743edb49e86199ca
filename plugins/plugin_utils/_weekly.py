# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What the role weekly_backup decides: each VM's backup, what stays of earlier ones, who tells of failures. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import backup_snapshots
from ansible_collections.kvmops.backup.plugins.plugin_utils._outcomes import FAILED

TEMPLATE_MAX_AGE = "164h"  # a template does not change: its weekly full is enough
_HELD_BACK = (
    "{} keeps the snapshots of earlier increments (kvmops-…), so it cannot be migrated live: "
    "delete each with kvmops.backup.vm_snapshot and state: absent"
)

Vms = Sequence[Mapping[str, Any]]  # as vm_info returns them


def choices(vms: Vms, full_only: Vms = ()) -> list[dict[str, str]]:
    """What ``vm_backup_many`` is to do with these VMs; ``full_only``: those that get full backups only, and perhaps others."""
    fulls = _names(full_only)
    modes = [
        {"vm": str(vm["name"]), "mode": "full" if vm["name"] in fulls else "auto"} for vm in vms if not vm["template"]
    ]
    templates = [str(vm["name"]) for vm in vms if vm["template"]]
    return modes + [{"vm": name, "mode": "full", "max_age": TEMPLATE_MAX_AGE} for name in templates]


def held_back(vms: Vms, full_only: Vms) -> list[str]:
    """A line for each VM that had increments once: a full leaves their snapshots alone, the archive they serve may be wanted."""
    chosen = _names(vms)
    return [
        _HELD_BACK.format(vm["name"])
        for vm in full_only
        if vm["name"] in chosen and any(map(backup_snapshots.is_name, vm["snapshots"]))
    ]


def failures(
    results: Mapping[str, Vms], host: str, hosts: Sequence[str], batch: Sequence[str], all_hosts: Sequence[str]
) -> dict[str, Any]:
    """Rows of failed VMs that this host tells of, and their whole number: its own, or of all in the last of several batches.

    Ansible starts no further batch after one whose hosts have all failed, so that one that is not the last tells of nothing.
    ``turn``: whether it tells of any. ``results``: rows of each host that has come so far; ``hosts``: those that still answer,
    ``all_hosts``: of the play.
    """
    elsewhere = [each for each in hosts if each not in batch]
    is_last = all_hosts[-1] in batch or set(results) >= set(hosts)
    if elsewhere and not is_last:
        return {"turn": False, "failed": [], "of": 0}
    telling = [host, *(elsewhere if host == batch[0] else ())]
    rows = [row for each in telling for row in results.get(each, ())]
    return {"turn": True, "failed": [dict(row) for row in rows if row["result"] == FAILED], "of": len(rows)}


def _names(vms: Vms) -> set[str]:
    return {str(vm["name"]) for vm in vms}
