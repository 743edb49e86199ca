# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Live progress around the long modules: the base of the action plugins.

The module runs under Ansible's async wrapper on the host. Small remote commands read its status file, which is printed
as plain lines (ansible-runner and AWX record them as job events), and touch a heartbeat file. Whatever ends this task
early leaves a cancel file or, killed, no more heartbeats: the module then stops at its next step and cleans up
(module_utils/_progress.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.kvmops.backup.plugins.module_utils import _json
from ansible_collections.kvmops.backup.plugins.module_utils._progress import CONTROL_VARIABLE, HEARTBEAT_LIMIT_S
from ansible_collections.kvmops.backup.plugins.module_utils._text import printable
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

# A poll costs the controller processor time: at most every two seconds, of a job of ten minutes and more every ten.
FIRST_POLL_S, SLOWEST_POLL_S, LONGEST_POLL_S = 0.1, 2.0, 10.0
_LONG_JOB_PART = 60
# Every five seconds at first, ever more slowly up to once a minute: hours of backup do not fill a job log.
LINE_EVERY_S, LINE_EVERY_LONGEST_S, LINES_WORTH = 5.0, 60.0, 20
LINE_EVERY_PERCENT = 10.0
# The module has stopped by itself by then.
LOST_CONNECTION_LIMIT_S = HEARTBEAT_LIMIT_S + 30.0
CANCEL_WAIT_S = 60.0
# The async wrapper kills the module after this time; a year is "never".
_MODULE_LIMIT_S = 365 * 86400

# Of a status file; a host is not believed that they are.
_NUMBERS = ("bytes_done", "bytes_total", "percent", "rate_bps", "eta_s")
_LARGEST = 2**63

display = Display()


@dataclass(frozen=True)
class Poll:
    """What one look at the host has shown: the status file, and the module's result once it has ended (None: not there)."""

    status: dict[str, Any] | None
    result: dict[str, Any] | None


@dataclass(frozen=True)
class Job:
    """A module at work on the host: its job id, the async wrapper's result file and the directory shared with the module."""

    id: str
    results_file: str
    control: str
    separator: str


def look_command(job: Job, quote: Any, *commands: str) -> str:
    """The shell command of one look: beat, print what the commands print, each in a part of its own, and the result file."""
    looks = (*commands, f"cat {quote(job.results_file)}")
    parts = "".join(f"echo; echo {job.separator}; {command} 2>/dev/null; " for command in looks)
    return f"touch {quote(job.control)}/heartbeat 2>/dev/null; {parts}echo; echo {job.separator}"


def poll_command(job: Job, quote: Any) -> str:
    """The shell command of one look at one operation: its status file, and the result file."""
    return look_command(job, quote, f"cat {quote(job.control)}/status.json")


def next_pause(pause_s: float, running_s: float) -> float:
    """How long to wait before the next look, after this pause, at a job that has been running so long."""
    return min(LONGEST_POLL_S, max(SLOWEST_POLL_S, running_s / _LONG_JOB_PART), pause_s * 1.3)


def parse_poll(output: str, separator: str) -> Poll:
    """What the output of `poll_command` says; an output that is cut off or not ours says nothing."""
    parts = parts_of(output, separator, 2)
    return Poll(status_of(parts[0]), result_of(parts[1])) if parts else Poll(None, None)


def parts_of(output: str, separator: str, count: int) -> list[str]:
    """So many parts of the output of `look_command`; none where it is cut off or not ours."""
    parts = output.split(separator)
    return parts[1:-1] if len(parts) == count + 2 else []


def status_of(text: str) -> dict[str, Any] | None:
    """A status file, as far as it can be shown."""
    status = _object(text)
    return status and {key: value for key, value in status.items() if key not in _NUMBERS or _is_number(value)}


def result_of(text: str) -> dict[str, Any] | None:
    """The result of a module that has ended; the wrapper's own interim result has "started", the module's has not."""
    result = _object(text)
    return None if result is None or "started" in result else result


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = _json.parse(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _is_number(value: Any) -> bool:
    """Whether it can be shown; nan and infinity are none of ours."""
    return isinstance(value, (int, float)) and abs(value) < _LARGEST


class Reporter:
    """Turns status after status into a few lines: one for each new phase or disk, then every few seconds or percent.

    Times are monotonic seconds.
    """

    def __init__(self, title: str, now: float) -> None:
        self._title, self._began_at = title, now
        self._step = ("", "")
        self._printed_at = self._printed_percent = 0.0

    def line(self, status: dict[str, Any], now: float) -> str | None:
        """The line to print now, None for none."""
        step = (str(status.get("phase") or ""), str(status.get("disk") or ""))
        percent = float(status.get("percent") or 0)
        pause = min(LINE_EVERY_LONGEST_S, max(LINE_EVERY_S, (now - self._began_at) / LINES_WORTH))
        due = now - self._printed_at >= pause
        if step == self._step and not due and percent - self._printed_percent < LINE_EVERY_PERCENT:
            return None
        if not step[0]:
            return None
        self._step, self._printed_at, self._printed_percent = step, now, percent
        return printable(f"{self._title} {describe(status)}")


def describe(status: dict[str, Any]) -> str:
    """A status as text, for example ``web01: copy vda 43 %, 9.1 GiB of 21.0 GiB, 212.0 MiB/s, 0:57 left``."""
    text = " ".join(str(status.get(key) or "") for key in ("phase", "disk")).strip()
    if status.get("vm"):
        text = f"{status['vm']}: {text}"
    done, total, rate = (int(status.get(key) or 0) for key in ("bytes_done", "bytes_total", "rate_bps"))
    facts = []
    if total:
        text += f" {int(status.get('percent') or 0)} %"
        facts.append(f"{human_bytes(done)} of {human_bytes(total)}")
    elif done:
        facts.append(human_bytes(done))
    if rate and done:
        facts.append(f"{human_bytes(rate)}/s")
    if status.get("eta_s") is not None and done:
        minutes, seconds = divmod(int(status["eta_s"]), 60)
        facts.append(
            f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left" if minutes >= 60 else f"{minutes}:{seconds:02} left"
        )
    return ", ".join([text, *facts])


@dataclass(frozen=True)
class Seen:
    """What one look has shown: the lines to print, and the module's result once it has ended."""

    lines: list[str]
    result: dict[str, Any] | None


class Watch:
    """How one job is looked at, and what is said of it."""

    def __init__(self, job: Job, title: str, now: float) -> None:
        self.job, self._reporter = job, Reporter(title, now)
        self.working_since = now  # the operation that has begun last

    def command(self, quote: Any) -> str:
        """The shell command of the next look."""
        return poll_command(self.job, quote)

    def seen(self, output: str, now: float) -> Seen:
        """What it has printed means."""
        poll = parse_poll(output, self.job.separator)
        line = self._reporter.line(poll.status, now) if poll.status and poll.result is None else None
        return Seen([line] if line else [], poll.result)


class _StoppedError(BaseException):
    """A signal asked this process to end. As Ansible's own timeout: nothing that catches errors shall catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class Playbook:
    """The process that runs the playbook, of which this worker is a child."""

    def __init__(self) -> None:
        self._process = os.getppid()

    def check(self) -> None:
        """Ends this worker too when the playbook has been killed: workers have sessions of their own and outlive it otherwise."""
        if os.getppid() != self._process:
            raise _StoppedError(signal.SIGTERM)


@contextlib.contextmanager
def _cancel_before_the_end() -> Iterator[None]:
    """Ansible's workers end at once when the play is interrupted; here `finally` runs first, then they do."""

    def stop(number: int, _frame: object) -> None:
        for each in previous:
            signal.signal(each, signal.SIG_IGN)
        raise _StoppedError(number)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    except _StoppedError as stopped:
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.kill(os.getpid(), stopped.number)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class ProgressActionModule(ActionBase):
    """Runs the module of the task's name with live progress; check mode and the user's own ``async`` pass through."""

    _supports_check_mode = True
    _supports_async = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The module's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        if self._task.async_val or self._task.check_mode:
            result.update(self._execute_module(task_vars=task_vars, wrap_async=bool(self._task.async_val)))
            if not self._task.async_val:
                self._remove_tmp_path(self._connection._shell.tmpdir)
        else:
            with _cancel_before_the_end():
                result.update(self._run_with_progress(task_vars or {}))
        return result

    def _run_with_progress(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        job = self._start(task_vars)
        if not isinstance(job, Job):
            return job
        result = None
        try:
            result = self._follow(job, str(task_vars.get("inventory_hostname", "")))
            result = self._readable(job, result, task_vars)
        finally:
            if result is None:
                self._cancel(job)
            else:
                self._remove(job)
        return result

    def _readable(self, job: Job, result: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        """A module's result; warnings and errors in Ansible's own types are something that only Ansible can read."""
        return self._fetch(job, task_vars) if "__ansible_type" in json.dumps(result) else result

    def _fetch(self, job: Job, task_vars: dict[str, Any]) -> dict[str, Any]:
        arguments = {"jid": job.id, "mode": "status", "_async_dir": os.path.dirname(job.results_file)}
        result: dict[str, Any] = self._execute_module(
            module_name="ansible.legacy.async_status", module_args=arguments, task_vars=task_vars
        )
        for of_the_wrapper in ("ansible_job_id", "started", "finished", "results_file"):
            result.pop(of_the_wrapper, None)
        return result

    def _start(
        self,
        task_vars: dict[str, Any],
        module_name: str | None = None,
        module_args: dict[str, Any] | None = None,
    ) -> Job | dict[str, Any]:
        """Starts the task's module, or the one named; its result where it did not come to that."""
        token = f"kvmops_backup_{secrets.token_hex(8)}"
        control = self._control(token)
        environment, limit = self._task.environment, self._task.async_val
        self._task.environment = [*(environment or []), {CONTROL_VARIABLE: control}]
        self._task.async_val = _MODULE_LIMIT_S
        try:
            started: dict[str, Any] = self._execute_module(
                module_name=module_name, module_args=module_args, task_vars=task_vars, wrap_async=True
            )
        except BaseException as error:
            # after a lost connection, a timeout or a signal the module may have come to life all the same
            if isinstance(error, AnsibleConnectionFailure) or not isinstance(error, Exception):
                self._forestall(token)
            raise
        finally:
            self._task.environment, self._task.async_val = environment, limit
        if started.get("failed") or not started.get("results_file"):
            return started
        results_file = str(started["results_file"])
        shared = os.path.join(os.path.dirname(results_file), token)
        return Job(str(started["ansible_job_id"]), results_file, shared, f"--{token}--")

    def _control(self, token: str) -> str:
        """The directory that is shared with the module, with ``~`` for the home directory on the host."""
        return f"{self.get_shell_option('async_dir', default='~/.ansible_async')}/{token}"

    def _forestall(self, token: str) -> None:
        """Leaves the cancel file for a module that is just beginning."""
        with contextlib.suppress(AnsibleConnectionFailure):
            control = self._connection._shell.quote(self._remote_expand_user(self._control(token)))
            self._low_level_execute_command(f"mkdir -p -m 700 {control} && : > {control}/cancel")

    def _watch(self, job: Job, host: str) -> Watch:
        return Watch(job, f"[{host}] {self._task.action.rpartition('.')[2]}", time.monotonic())

    def _follow(self, job: Job, host: str) -> dict[str, Any]:
        """The module's result; prints its progress until there is one. Raises when the host stays unreachable."""
        watch, pause, playbook = self._watch(job, host), FIRST_POLL_S, Playbook()
        seen_at = time.monotonic()
        while True:
            playbook.check()
            time.sleep(pause)
            pause = next_pause(pause, time.monotonic() - watch.working_since)
            try:
                answer = self._low_level_execute_command(watch.command(self._connection._shell.quote))
            except AnsibleConnectionFailure:
                if time.monotonic() - seen_at > LOST_CONNECTION_LIMIT_S:
                    raise
                display.vvv(f"{job.id}: the host did not answer, trying again", host=host)
                continue
            seen_at = time.monotonic()
            seen = watch.seen(str(answer.get("stdout", "")), seen_at)
            for line in seen.lines:
                display.display(line)
            if seen.result is not None:
                return seen.result

    def _poll(self, job: Job) -> Poll:
        answer = self._low_level_execute_command(poll_command(job, self._connection._shell.quote))
        return parse_poll(str(answer.get("stdout", "")), job.separator)

    def _cancel(self, job: Job) -> None:
        """Asks the module to stop, gives it a little time and clears up after it."""
        deadline = time.monotonic() + CANCEL_WAIT_S
        # The heartbeat ends with this task, so that the module stops also where this does not reach it.
        with contextlib.suppress(AnsibleConnectionFailure):
            self._low_level_execute_command(f": > {self._connection._shell.quote(job.control)}/cancel")
            while time.monotonic() < deadline:
                if self._poll(job).result is not None:
                    self._remove(job)
                    return
                time.sleep(0.5)

    def _remove(self, job: Job) -> None:
        quote = self._connection._shell.quote
        with contextlib.suppress(AnsibleConnectionFailure):
            self._low_level_execute_command(f"rm -rf {quote(job.control)} {quote(job.results_file)}")
