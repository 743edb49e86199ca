# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""vm_backup_many on the host: everything is imported once, then a process is forked for each VM (_forks)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import (
    _argspec,
    _backup_options,
    _backup_results,
    _forks,
    _libraries,
    _progress,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup import cycles, incrementable, run
from ansible_collections.kvmops.backup.plugins.module_utils._errors import CancelledError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context

# What vm_backup imports only where it is needed is imported here, once for all.
_IMPORTED = (cycles, incrementable, run, *(getattr(_libraries, each) for each in ("libvirt_qemu", "etree", "xxhash")))


def backups(params: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """The module's return values. Raises RefusedError."""
    tasks = [{**params["defaults"], **each} for each in params["vms"]]
    if not all(each.get("vm") for each in tasks):
        raise RefusedError("Option vms", "an element has no vm", "Each needs vm, the name or UUID of a virtual machine.")
    if params["at_once"] < 0:
        raise RefusedError("Option at_once", f"{params['at_once']} is no number of backups", "Use 0 for all.")
    vms, parent, control = [str(each["vm"]) for each in tasks], os.getpid(), _progress.control_directory()
    if control:
        _prepare(control)

    def work(number: int) -> dict[str, Any]:
        return _argspec.run_within(
            "kvmops.backup.vm_backup",
            _backup_options.ARGUMENT_SPEC,
            tasks[number],
            _backup_options.operation,
            lambda vm: _progress.for_child(vm, os.path.join(_backup_results.AT_WORK, str(number)), parent),
            check_mode=params["check_mode"],
            diff=params["diff"],
            **_backup_options.RULES,
        )

    def stopped() -> str:
        try:
            context.progress.check()
        except CancelledError as error:
            return error.why
        return ""

    results: dict[int, dict[str, Any]] = {}
    for end in _forks.side_by_side(len(tasks), work, at_once=params["at_once"] or _forks.bearable(), stopped=stopped):
        results[end.number] = _result(vms[end.number], end)
        if control:
            _tell(control, end, results[end.number])
    return _backup_results.summary([results[number] for number in range(len(tasks))])


def _prepare(control: str) -> None:
    os.makedirs(os.path.join(control, _backup_results.AT_WORK), mode=0o700, exist_ok=True)
    looked = os.path.join(control, _backup_results.LOOKED)
    with open(looked, "w", encoding="ascii"):
        pass
    os.utime(looked, (0, 0))


def _result(vm: str, end: _forks.End) -> dict[str, Any]:
    if end.value is not None:
        return _backup_results.of_vm(vm, end.value)
    _progress.remove_left_behind()
    return _backup_results.without_result(vm, end.why, cancelled=end.cancelled)


def _tell(control: str, end: _forks.End, result: Mapping[str, Any]) -> None:
    # A controller that has gone has taken the directory along: no reason to fail.
    with contextlib.suppress(OSError):
        with open(os.path.join(control, _backup_results.RESULTS), "a", encoding="ascii") as file:
            file.write(json.dumps([end.number, end.pid, result]) + "\n")
        os.unlink(os.path.join(control, _backup_results.AT_WORK, str(end.number)))
