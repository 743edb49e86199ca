# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What vm_backup_many takes and returns, and what it tells meanwhile: for the module on the host, and for the action plugin.

In the control directory, ``at_work/<number>`` are links to the status files of those at work, and ``results.jsonl`` has a
line ``[number, process id, result]`` for each that has ended, as soon as it has. ``looked``: when the controller has looked last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._errors import CancelledError, KvmopsError

ARGUMENT_SPEC = {
    "vms": {"type": "list", "elements": "dict", "required": True},
    "defaults": {"type": "dict", "default": {}},
    "at_once": {"type": "int", "default": 0},
}

AT_WORK = "at_work"
RESULTS = "results.jsonl"
LOOKED = "looked"


def of_vm(vm: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """An element of ``backups``, of what vm_backup returns."""
    told = {"failed": False, "changed": False, **result, "vm": vm}
    told.pop("exception", None)
    return told


def without_result(vm: str, why: str, *, cancelled: bool = False) -> dict[str, Any]:
    """An element of ``backups`` for a backup that has returned nothing."""
    what = f"The backup of VM {vm}"
    error = KvmopsError(what, why, "Run the task again: it puts right what this run has left.")
    if cancelled:
        error = CancelledError(what, why, "Run the task again.")
    return of_vm(vm, {**error.result(), "warnings": []})


def summary(backups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result of the task. Pure."""
    bad = [str(each["vm"]) for each in backups if each["failed"]]
    done: dict[str, Any] = {"changed": any(each["changed"] for each in backups), "backups": list(backups)}
    if bad:
        done.update(failed=True, msg=f"{len(bad)} of {len(backups)} VMs failed: {', '.join(bad)}")
    return done
