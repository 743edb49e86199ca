# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Backups of several VMs of a host side by side, all in one run of the module, with live progress of all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _backup_results, _json
from ansible_collections.kvmops.backup.plugins.module_utils._text import printable
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes
from ansible_collections.kvmops.backup.plugins.plugin_utils import _progress_action as base


class ActionModule(base.ProgressActionModule):  # type: ignore[misc, unused-ignore]
    """See the documentation of the module of the same name."""

    _supports_async = False

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """All backups; a failed one never stops the others."""
        # before the module is started, which adds to the arguments
        _checked, options = self.validate_argument_spec(_backup_results.ARGUMENT_SPEC)
        self._vms = [str({**options["defaults"], **each}.get("vm", "")) for each in options["vms"]]
        return super().run(tmp, task_vars)

    def _watch(self, job: base.Job, host: str) -> ManyWatch:
        return ManyWatch(job, host, self._vms)


class ManyWatch(base.Watch):
    """The progress of each VM, and how it ended, as soon as that is known."""

    def __init__(self, job: base.Job, host: str, vms: Sequence[str]) -> None:
        self._title, self._vms = f"[{host}] vm_backup", vms
        super().__init__(job, self._title, time.monotonic())
        # by process id
        self._reporters: dict[int, base.Reporter] = {}
        self._statuses: dict[int, dict[str, Any]] = {}
        self._ended: dict[int, dict[str, Any]] = {}

    def command(self, quote: Any) -> str:
        """Shows what has changed since the last look only: hundreds of VMs may be at work."""
        control = quote(self.job.control)
        looked = f"{control}/{_backup_results.LOOKED}"
        changed = (
            f"touch {looked}.new; find -L {control}/{_backup_results.AT_WORK} -type f -newer {looked} -exec cat {{}} +; "
            f"mv {looked}.new {looked}"
        )
        results = f"tail -n +{len(self._ended) + 1} {control}/{_backup_results.RESULTS}"
        return base.look_command(self.job, quote, f"{{ {changed}; }}", results)

    def seen(self, output: str, now: float) -> base.Seen:
        """A line for each that has ended, and for those at work as they go on."""
        parts = base.parts_of(output, self.job.separator, 3)
        if not parts:
            return base.Seen([], None)
        statuses, ends, text = parts
        result = base.result_of(text)
        for status in filter(None, map(base.status_of, statuses.splitlines())):
            self._take(status, now)
        lines = []
        for number, pid, ended in filter(None, map(_end, ends.splitlines())):
            self._statuses.pop(pid, None)
            lines += self._told(number, ended)
        if result is not None:
            result = self._whole(result)
            for number, ended in enumerate(result.get("backups", [])):
                lines += self._told(number, ended) if isinstance(ended, dict) else []
            return base.Seen(lines, result)
        at_work = (self._reporters[pid].line(status, now) for pid, status in self._statuses.items())
        return base.Seen([*lines, *filter(None, at_work)], None)

    def _take(self, status: dict[str, Any], now: float) -> None:
        pid = status.get("pid")
        if isinstance(pid, int):
            self._statuses[pid] = status
            if pid not in self._reporters:
                self._reporters[pid], self.working_since = base.Reporter(self._title, now), now

    def _told(self, number: int, ended: dict[str, Any]) -> list[str]:
        if number in self._ended:
            return []
        self._ended[number] = ended
        return [printable(f"{self._title} {ended.get('vm')}: {outcome(ended)}")]

    def _whole(self, result: dict[str, Any]) -> dict[str, Any]:
        """The module's result, or where it was killed that of the VMs that had ended before."""
        if "backups" in result or "cmd" not in result:
            return result
        why = "the module that ran it has ended without a result"
        rest = {number: _backup_results.without_result(vm, why) for number, vm in enumerate(self._vms)}
        return _backup_results.summary([{**rest, **self._ended}[number] for number in range(len(self._vms))])


def _end(line: str) -> tuple[int, int, dict[str, Any]] | None:
    """What a line of the results says; one that is not whole yet will be seen again."""
    try:
        number, pid, result = _json.parse(line)
    except (ValueError, TypeError):
        return None
    whole = isinstance(number, int) and isinstance(pid, int) and isinstance(result, dict)
    return (number, pid, result) if whole else None


def outcome(result: Mapping[str, Any]) -> str:
    """How a backup ended, in one line."""
    if result.get("failed"):
        return f"FAILED: {result.get('msg', 'no message')}"
    if not result.get("changed"):
        return f"nothing to do, {result.get('reason', '')}"
    return f"{result.get('mode')}, {human_bytes(int(result.get('bytes_written') or 0))} written, {result.get('duration')} s"
