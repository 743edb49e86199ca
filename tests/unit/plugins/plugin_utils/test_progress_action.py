# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lines of live progress, and what the host's answers mean."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.plugin_utils import _progress_action as action

JOB = action.Job(
    "j1.2", "/home/a b/.ansible_async/j1.2", "/home/a b/.ansible_async/kvmops_backup_x", "--kvmops_backup_x--"
)


def answer(status: str, result: str) -> str:
    return f"\n{JOB.separator}\n{status}\n{JOB.separator}\n{result}\n{JOB.separator}\n"


RUNNING = '{"started": true, "finished": false, "ansible_job_id": "j1.2"}'


@pytest.mark.parametrize(
    ("output", "status", "result"),
    [
        (answer("", ""), None, None),
        (answer('{"phase": "copy"}', RUNNING), {"phase": "copy"}, None),
        (answer("", '{"changed": true, "archive": {}}'), None, {"changed": True, "archive": {}}),
        (answer('{"phase": "co', '{"chang'), None, None),
        (answer("[]", "[1]"), None, None),
        ("", None, None),
        (answer('{"phase": "copy"}', '{"changed": true}')[:-30], None, None),
        ("Welcome to kvm01\n" + answer('{"phase": "copy"}', RUNNING), {"phase": "copy"}, None),
    ],
)
def test_parse_poll(output: str, status: object, result: object) -> None:
    assert action.parse_poll(output, JOB.separator) == action.Poll(status, result)  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", ['"x"', "[]", "{}", "NaN", "Infinity", "1e300", "true", "null", '"' + "9" * 5000 + '"'])
def test_a_host_that_tells_odd_numbers(odd: str) -> None:
    numbers = ", ".join(f'"{key}": {odd}' for key in ("percent", "bytes_done", "bytes_total", "rate_bps", "eta_s"))
    poll = action.parse_poll(answer(f'{{"phase": "copy", "vm": "web", {numbers}}}', "[" * 100_000), JOB.separator)
    assert poll.status is not None and poll.result is None
    line = action.Reporter("[kvm01] vm_backup", 0).line(poll.status, 1)
    assert line is not None and line.startswith("[kvm01] vm_backup web: copy")


def test_the_poll_command_beats_and_shows_both_files(tmp_path: Path) -> None:
    job = action.Job("j", str(tmp_path / "a b" / "j"), str(tmp_path / "a b" / "control"), "--x--")
    command = action.poll_command(job, shlex.quote)

    def poll() -> action.Poll:
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return action.parse_poll(done.stdout, job.separator)

    assert poll() == action.Poll(None, None)
    (tmp_path / "a b" / "control").mkdir(parents=True)
    (tmp_path / "a b" / "control" / "status.json").write_text('{"phase": "copy"}')
    (tmp_path / "a b" / "j").write_text(RUNNING)
    assert poll() == action.Poll({"phase": "copy"}, None)
    assert (tmp_path / "a b" / "control" / "heartbeat").exists()
    (tmp_path / "a b" / "j").write_text('{"changed": false}')
    assert poll() == action.Poll({"phase": "copy"}, {"changed": False})


def status(percent: float = 0, phase: str = "copy", disk: str = "vda") -> dict[str, object]:
    return {"phase": phase, "disk": disk, "percent": percent}


def test_a_line_for_each_phase_and_disk_then_by_time_or_percent() -> None:
    reporter = action.Reporter("[kvm01] vm_backup", 0.0)
    printed = [
        reporter.line(status(*args), now)
        for now, args in [
            (0.1, (0,)),
            (0.3, (1,)),
            (1.0, (9.9,)),
            (1.2, (10.5,)),
            (3.0, (11,)),
            (6.3, (12,)),
            (6.4, (0, "copy", "vdb")),
            (6.5, (0, "publish", "")),
            (6.6, (0, "publish", "")),
        ]
    ]
    assert [bool(line) for line in printed] == [True, False, False, True, False, True, True, True, False]
    assert printed[0] == "[kvm01] vm_backup copy vda"


def test_hours_of_work_are_one_line_a_minute() -> None:
    reporter = action.Reporter("x", 0.0)
    lines = [reporter.line(status(seconds / 360), float(seconds)) for seconds in range(0, 36000, 2)]
    assert 500 < len([line for line in lines if line]) < 700


def test_no_phase_no_line() -> None:
    assert action.Reporter("x", 0.0).line({}, 1.0) is None


def test_lines_are_plain_text() -> None:
    line = action.Reporter("[kvm01] vm_backup", 0.0).line(status(phase="copy\r\x1b[2J\n"), 1.0)
    assert line == "[kvm01] vm_backup copy %1B[2J  vda"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "web01: copy vda 43 %, 9.1 GiB of 21.0 GiB, 212.0 MiB/s, 0:57 left"),
        ({"eta_s": 3725}, "web01: copy vda 43 %, 9.1 GiB of 21.0 GiB, 212.0 MiB/s, 1:02:05 left"),
        ({"eta_s": None, "rate_bps": 0}, "web01: copy vda 43 %, 9.1 GiB of 21.0 GiB"),
        ({"bytes_total": 0, "percent": None, "eta_s": None}, "web01: copy vda, 9.1 GiB, 212.0 MiB/s"),
        ({"bytes_total": 0, "bytes_done": 0, "percent": None, "disk": "", "phase": "freeze"}, "web01: freeze"),
        ({"vm": ""}, "copy vda 43 %, 9.1 GiB of 21.0 GiB, 212.0 MiB/s, 0:57 left"),
    ],
)
def test_describe(changes: dict[str, object], text: str) -> None:
    whole = {
        "vm": "web01", "phase": "copy", "disk": "vda", "bytes_done": 9771050598, "bytes_total": 22548578304,
        "percent": 43.3, "rate_bps": 222298112, "eta_s": 57,
    }  # fmt: skip
    assert action.describe(json.loads(json.dumps({**whole, **changes}))) == text


ORPHANED = """
import os, sys, time
from ansible_collections.kvmops.backup.plugins.plugin_utils import _progress_action as action
playbook = action.Playbook()
playbook.check()
print(os.getpid(), flush=True)
sys.stdin.read()
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.01)
try:
    playbook.check()
except action._StoppedError:
    open(sys.argv[2], "w").close()
"""


def test_a_worker_whose_playbook_was_killed_ends_too(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    parent = subprocess.Popen(
        ["/bin/sh", "-c", f'{shlex.quote(sys.executable)} -c "$0" $$ {shlex.quote(str(proof))}; :', ORPHANED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdin
    assert parent.stdout
    assert int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdin.close()  # the worker goes on only now
    parent.stdout.read()  # until it has ended
    assert proof.exists()


def test_a_long_job_is_looked_at_less_often() -> None:
    pause, looks, running_s = action.FIRST_POLL_S, 0, 0.0
    while running_s < 3600:
        running_s, looks = running_s + pause, looks + 1
        pause = action.next_pause(pause, running_s)
        assert pause <= max(action.SLOWEST_POLL_S, running_s / 50) and pause <= action.LONGEST_POLL_S
    assert looks < 550
    assert action.next_pause(action.FIRST_POLL_S, 0) < 0.2
