# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Backups of several VMs of a host side by side, each by the module vm_backup, with live progress of all of them."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ansible.errors import AnsibleConnectionFailure

from ansible_collections.kvmops.backup.plugins.module_utils._text import printable
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes
from ansible_collections.kvmops.backup.plugins.plugin_utils import _progress_action as base

_MODULE = "kvmops.backup.vm_backup"
_TYPE = "__ansible_type"
_BETWEEN_STARTS_S = 0.5
_ARGUMENT_SPEC = {
    "vms": {"type": "list", "elements": "dict", "required": True},
    "defaults": {"type": "dict", "default": {}},
    "at_once": {"type": "int", "default": 0},
}


@dataclass
class _Running:
    """A backup at work: its place in the list, its job on the host and what prints its progress."""

    index: int
    job: base.Job
    reporter: base.Reporter
    begun_at: float


class ActionModule(base.ProgressActionModule):  # type: ignore[misc, unused-ignore]
    """See the documentation of the module of the same name."""

    _supports_async = False

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """All backups; a failed one never stops the others."""
        variables = task_vars or {}
        super(base.ProgressActionModule, self).run(tmp, variables)
        _checked, options = self.validate_argument_spec(_ARGUMENT_SPEC)
        tasks = [{**options["defaults"], **each} for each in options["vms"]]
        if not all(each.get("vm") for each in tasks):
            return {"failed": True, "msg": "each of vms must have vm, the name or UUID of a virtual machine"}
        self._host = str(variables.get("inventory_hostname", ""))
        if self._task.check_mode:
            results = [self._execute_module(_MODULE, each, task_vars=variables) for each in tasks]
            self._remove_tmp_path(self._connection._shell.tmpdir)
        else:
            with base._cancel_before_the_end():
                results = self._run_all(tasks, options["at_once"], variables)
        return summary(tasks, results)

    def _run_all(
        self, tasks: Sequence[dict[str, Any]], at_once: int, task_vars: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The results in the order of the tasks; `at_once` of them are at work, 0: all."""
        waiting = deque(enumerate(tasks))
        running: list[_Running] = []
        results: dict[int, dict[str, Any]] = {}
        seen_at, pause, playbook = time.monotonic(), base.FIRST_POLL_S, base.Playbook()
        polled_at = seen_at
        try:
            while waiting or running:
                playbook.check()
                try:
                    if waiting and (not at_once or len(running) < at_once):
                        # One at a time: between two starts the others are looked at, which is their sign of life to them.
                        index, arguments = waiting[0]
                        started = self._begin(index, arguments, task_vars)
                        waiting.popleft()
                        if isinstance(started, _Running):
                            running.append(started)
                        else:
                            results[index] = started
                        if time.monotonic() - polled_at < _BETWEEN_STARTS_S:
                            continue
                    else:
                        time.sleep(pause)
                        youngest = max((each.begun_at for each in running), default=0.0)
                        pause = base.next_pause(pause, time.monotonic() - youngest)
                    polled_at = time.monotonic()
                    polls = self._poll_all([each.job for each in running])
                    seen_at = time.monotonic()
                    for each, poll in zip(list(running), polls):
                        if poll.result is not None:
                            results[each.index] = _plain(poll.result)
                            running.remove(each)
                            self._remove(each.job)
                            self._say(f"{tasks[each.index]['vm']}: {outcome(results[each.index])}")
                            pause = base.FIRST_POLL_S
                        else:
                            line = each.reporter.line(poll.status, seen_at) if poll.status else None
                            if line:
                                base.display.display(line)
                except AnsibleConnectionFailure:
                    never = not (running or results)
                    if never or time.monotonic() - seen_at > base.LOST_CONNECTION_LIMIT_S:
                        raise
                    base.display.vvv("the host did not answer, trying again", host=self._host)
                    time.sleep(pause)
        finally:
            self._cancel_all([each.job for each in running])
        return [results[index] for index in range(len(tasks))]

    def _begin(self, index: int, arguments: dict[str, Any], task_vars: dict[str, Any]) -> _Running | dict[str, Any]:
        job = self._start(task_vars, _MODULE, arguments)
        if not isinstance(job, base.Job):
            self._say(f"{arguments['vm']}: {outcome(job)}")
            return job
        now = time.monotonic()
        return _Running(index, job, base.Reporter(f"[{self._host}] vm_backup", now), now)

    def _poll_all(self, jobs: Sequence[base.Job]) -> list[base.Poll]:
        if not jobs:
            return []
        quote = self._connection._shell.quote
        answer = self._low_level_execute_command("; ".join(base.poll_command(job, quote) for job in jobs))
        return [base.parse_poll(str(answer.get("stdout", "")), job.separator) for job in jobs]

    def _cancel_all(self, jobs: Sequence[base.Job]) -> None:
        """Asks all to stop before it waits for the first."""
        quote = self._connection._shell.quote
        with contextlib.suppress(AnsibleConnectionFailure):
            for job in jobs:
                self._low_level_execute_command(f": > {quote(job.control)}/cancel")
        for job in jobs:
            self._cancel(job)

    def _say(self, text: str) -> None:
        base.display.display(printable(f"[{self._host}] vm_backup {text}"))


def outcome(result: Mapping[str, Any]) -> str:
    """How a backup ended, in one line."""
    if result.get("failed"):
        return f"FAILED: {result.get('msg', 'no message')}"
    if not result.get("changed"):
        return f"nothing to do, {result.get('reason', '')}"
    return f"{result.get('mode')}, {human_bytes(int(result.get('bytes_written') or 0))} written, {result.get('duration')} s"


def _plain(value: Any) -> Any:
    """A result as the module has printed it, with the words of what newer releases of Ansible have types of their own for.

    Only Ansible's own module on the host reads these types, at half a second for each VM; here they end as text anyway.
    """
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    event = value.get("event")
    if _TYPE in value and isinstance(event, dict):
        return str(event.get("msg", ""))
    return {key: _plain(each) for key, each in value.items() if key != _TYPE}


def _text(warning: Any) -> str:
    """A warning in words; newer releases of Ansible hand on objects of their own."""
    return str(getattr(getattr(warning, "event", None), "msg", warning))


def summary(tasks: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result of the task. Pure."""
    backups: list[dict[str, Any]] = [
        {"failed": False, "changed": False, **result, "vm": task["vm"]} for task, result in zip(tasks, results)
    ]
    for each in backups:
        each["warnings"] = [_text(warning) for warning in each.get("warnings", [])]
        each.pop("exception", None)
        each.pop("invocation", None)
    bad = [str(each["vm"]) for each in backups if each["failed"]]
    done: dict[str, Any] = {"changed": any(each["changed"] for each in backups), "backups": backups}
    if bad:
        done.update(failed=True, msg=f"{len(bad)} of {len(backups)} VMs failed: {', '.join(bad)}")
    return done
