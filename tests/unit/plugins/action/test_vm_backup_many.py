# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What vm_backup_many returns and says; how it runs is tested with real VMs (targets/weekly_backup, targets/awx)."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.action.vm_backup_many import ManyWatch, outcome
from ansible_collections.kvmops.backup.plugins.module_utils import _backup_results
from ansible_collections.kvmops.backup.plugins.plugin_utils import _progress_action as base

GOOD: dict[str, Any] = {
    "changed": True,
    "mode": "full",
    "bytes_written": 2048,
    "duration": 1.5,
    "warnings": [],
}
DONE: dict[str, Any] = {"changed": False, "mode": "none", "reason": "young enough"}
BAD: dict[str, Any] = {"failed": True, "msg": "The VM c: it is not there.", "exception": "Traceback"}
RUNNING = '{"started": true, "finished": false, "ansible_job_id": "j1.2"}'


def summary(*results: dict[str, Any]) -> dict[str, Any]:
    return _backup_results.summary([_backup_results.of_vm(vm, result) for vm, result in zip("abc", results)])


def test_summary_keeps_the_order_and_names_those_that_failed() -> None:
    found = summary(GOOD, DONE, BAD)
    assert (found["changed"], found["failed"]) == (True, True)
    assert found["msg"] == "1 of 3 VMs failed: c"
    assert [(each["vm"], each["failed"], each["changed"]) for each in found["backups"]] == [
        ("a", False, True),
        ("b", False, False),
        ("c", True, False),
    ]
    assert not any("exception" in each for each in found["backups"])


def test_summary_of_success() -> None:
    assert "failed" not in summary(DONE)
    assert summary(DONE)["changed"] is False
    assert summary() == {"changed": False, "backups": []}


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (GOOD, "full, 2.0 KiB written, 1.5 s"),
        (DONE, "nothing to do, young enough"),
        (BAD, "FAILED: The VM c: it is not there."),
    ],
)
def test_outcome(result: dict[str, Any], text: str) -> None:
    assert outcome(result) == text


class Host:
    """The control directory and the result file, as the module writes them; looks go through a real shell."""

    def __init__(self, directory: Path, vms: str) -> None:
        self.control, self.result = directory / "a b" / "control", directory / "a b" / "j1.2"
        (self.control / _backup_results.AT_WORK).mkdir(parents=True)
        (self.control / _backup_results.LOOKED).touch()
        os.utime(self.control / _backup_results.LOOKED, (0, 0))
        self.result.write_text(RUNNING)
        job = base.Job("j1.2", str(self.result), str(self.control), "--x--")
        self.watch = ManyWatch(job, "kvm01", list(vms))
        self._now = self.watch.working_since

    def status(self, number: int, **changes: Any) -> None:
        path = self.control / _backup_results.AT_WORK / str(number)
        path.write_text(json.dumps({"phase": "copy", "disk": "vda", "vm": "abc"[number], "pid": 100 + number, **changes}) + "\n")

    def end(self, number: int, result: dict[str, Any]) -> None:
        with open(self.control / _backup_results.RESULTS, "a", encoding="ascii") as file:
            file.write(json.dumps([number, 100 + number, _backup_results.of_vm("abc"[number], result)]) + "\n")

    def output(self) -> str:
        done = subprocess.run(
            ["/bin/sh", "-c", self.watch.command(shlex.quote)], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return done.stdout

    def later(self, seconds: float) -> None:
        self._now += seconds

    def look(self) -> base.Seen:
        self._now += 0.1
        return self.watch.seen(self.output(), self._now)


def test_each_vm_has_its_own_lines_and_an_end(tmp_path: Path) -> None:
    host = Host(tmp_path, "abc")
    assert host.look() == base.Seen([], None)
    host.status(0)
    host.status(1, phase="freeze", disk="")
    assert sorted(host.look().lines) == ["[kvm01] vm_backup a: copy vda", "[kvm01] vm_backup b: freeze"]
    assert host.look() == base.Seen([], None)
    host.end(1, GOOD)
    host.status(0, phase="publish", disk="")
    assert host.look().lines == ["[kvm01] vm_backup b: full, 2.0 KiB written, 1.5 s", "[kvm01] vm_backup a: publish"]
    result = summary(BAD, GOOD, DONE)
    host.end(0, BAD)
    host.result.write_text(json.dumps(result))
    seen = host.look()
    assert seen.lines == [
        "[kvm01] vm_backup a: FAILED: The VM c: it is not there.",
        "[kvm01] vm_backup c: nothing to do, young enough",
    ]
    assert seen.result == result
    assert (host.control / "heartbeat").exists()


def test_a_look_shows_only_what_has_changed(tmp_path: Path) -> None:
    """Hundreds may be at work: what a look sends does not grow with them."""
    host = Host(tmp_path, "abc")
    for number in range(3):
        host.status(number)
    host.end(0, GOOD)
    assert len(host.look().lines) == 3
    assert len(host.output()) < 200
    host.status(2, phase="publish")
    assert "publish" in host.output() and host.output().count("copy") == 0


def test_one_that_takes_long_is_told_again_until_it_ends(tmp_path: Path) -> None:
    host = Host(tmp_path, "abc")
    host.status(0, phase="publish", disk="")
    assert len(host.look().lines) == 1
    assert host.look().lines == []
    host.later(base.LINE_EVERY_S)
    assert host.look().lines == ["[kvm01] vm_backup a: publish"]
    host.end(0, GOOD)
    host.later(base.LINE_EVERY_LONGEST_S)
    assert host.look().lines == ["[kvm01] vm_backup a: full, 2.0 KiB written, 1.5 s"]
    host.later(base.LINE_EVERY_LONGEST_S)
    assert host.look().lines == []


def test_a_line_that_is_not_whole_is_seen_again(tmp_path: Path) -> None:
    host = Host(tmp_path, "abc")
    host.end(2, DONE)
    whole = (host.control / _backup_results.RESULTS).read_text()
    for part in (whole[:20], whole[:-2]):
        (host.control / _backup_results.RESULTS).write_text(part)
        assert host.look() == base.Seen([], None)
    (host.control / _backup_results.RESULTS).write_text(whole)
    assert host.look().lines == ["[kvm01] vm_backup c: nothing to do, young enough"]
    assert host.look() == base.Seen([], None)
    # with a terminal on the way
    host.end(0, GOOD)
    assert host.watch.seen(host.output().replace("\n", "\r\n"), 0.0).lines == [
        "[kvm01] vm_backup a: full, 2.0 KiB written, 1.5 s"
    ]


def test_a_module_that_was_killed_has_told_what_was_done(tmp_path: Path) -> None:
    host = Host(tmp_path, "abc")
    host.end(1, GOOD)
    assert host.look().lines
    host.end(0, BAD)
    # Ansible's async wrapper on a module that has printed nothing
    host.result.write_text(json.dumps({"failed": 1, "cmd": "AnsiballZ", "data": "", "stderr": "", "msg": "Traceback"}))
    result = host.look().result
    assert result is not None
    assert result["msg"] == "2 of 3 VMs failed: a, c"
    assert [each["changed"] for each in result["backups"]] == [False, True, False]
    assert result["backups"][2]["msg"] == (
        "The backup of VM c: the module that ran it has ended without a result. "
        "Run the task again: it puts right what this run has left."
    )


def test_what_a_module_says_that_has_not_begun_stays(tmp_path: Path) -> None:
    host = Host(tmp_path, "abc")
    refused = {"failed": True, "changed": False, "msg": "Option at_once: -1 is no number of backups"}
    host.result.write_text(json.dumps(refused))
    assert host.look().result == refused


@pytest.mark.parametrize("odd", ['"x"', "[]", "{}", "null", "[1, 2]", '["1", {}]', "[" * 100_000, '{"pid": "x"}'])
def test_a_host_that_tells_odd_things(tmp_path: Path, odd: str) -> None:
    host = Host(tmp_path, "abc")
    (host.control / _backup_results.AT_WORK / "0").write_text(odd)
    (host.control / _backup_results.RESULTS).write_text(odd)
    assert host.look() == base.Seen([], None)
    host.result.write_text(f'{{"backups": [{odd}]}}')
    host.look()
