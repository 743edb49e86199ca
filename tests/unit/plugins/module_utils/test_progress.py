# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The status file, and the ways to ask an operation to stop."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _paths, _progress
from ansible_collections.kvmops.backup.plugins.module_utils._errors import CancelledError
from ansible_collections.kvmops.backup.plugins.module_utils._progress import HEARTBEAT_LIMIT_S, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def status(tmp_path: Path) -> Path:
    return tmp_path / "status.json"


def read(status: Path) -> dict[str, Any]:
    found = json.loads(status.read_text())
    assert isinstance(found, dict)
    return found


def test_status_has_all_fields_from_the_first_phase_on(status: Path, clock: Clock) -> None:
    progress = Progress(str(status), "web01", clock=clock)
    progress.phase("copy", "vda", 1000)
    found = read(status)
    assert found.pop("updated_at") > 0
    assert found == {
        "schema": 1, "phase": "copy", "vm": "web01", "disk": "vda", "bytes_done": 0, "bytes_total": 1000,
        "percent": 0.0, "rate_bps": 0, "eta_s": None, "pid": os.getpid(),
    }  # fmt: skip


def test_rate_and_eta_follow_the_last_seconds(status: Path, clock: Clock) -> None:
    progress = Progress(str(status), clock=clock)
    progress.phase("copy", "vda", 10_000)
    for _second in range(40):  # 100 bytes a second, then 10
        clock.now += 1
        progress.advance(100)
    assert (read(status)["rate_bps"], read(status)["eta_s"], read(status)["percent"]) == (100, 60, 40.0)
    for _second in range(20):
        clock.now += 1
        progress.advance(10)
    assert (read(status)["rate_bps"], read(status)["eta_s"]) == (10, 580)


def test_unknown_total_has_no_percent(status: Path, clock: Clock) -> None:
    progress = Progress(str(status), clock=clock)
    progress.phase("merge")
    clock.now += 1
    progress.advance(500)
    found = read(status)
    assert (found["percent"], found["eta_s"], found["bytes_done"]) == (None, None, 500)


def test_more_than_the_total_is_not_more_than_all(status: Path, clock: Clock) -> None:
    progress = Progress(str(status), clock=clock)
    progress.phase("copy", "vda", 100)
    clock.now += 1
    progress.advance(300)
    assert (read(status)["percent"], read(status)["eta_s"]) == (100.0, 0)


def test_at_most_one_write_in_half_a_second_except_for_phases(
    status: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (writes.append(clock.now), replace(old, new)))
    progress = Progress(str(status), clock=clock)
    progress.phase("copy", "vda", 10**6)
    for _step in range(1000):  # ten seconds
        clock.now += 0.01
        progress.advance(1)
    assert 19 <= len(writes) - 1 <= 20
    progress.phase("copy", "vdb", 1)
    progress.phase("publish")
    assert writes[-2:] == [clock.now] * 2


def test_many_threads_lose_no_byte(status: Path, clock: Clock) -> None:
    progress = Progress(str(status), clock=clock)
    progress.phase("copy", "vda", 8001)
    threads = [threading.Thread(target=lambda: [progress.advance(1) for _step in range(1000)]) for _thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.now += 1
    progress.advance(1)
    assert read(status)["bytes_done"] == 8001


def test_a_status_file_that_cannot_be_written_stops_nothing(tmp_path: Path, clock: Clock) -> None:
    progress = Progress(str(tmp_path / "not" / "there" / "status.json"), clock=clock)
    progress.phase("copy", "vda", 10)
    clock.now += 1
    progress.advance(10)
    progress.close()


def test_close_removes_the_status_file_and_nothing_else(status: Path, clock: Clock) -> None:
    progress = Progress(str(status), clock=clock)
    progress.phase("copy")
    progress.close()
    progress.close()
    assert list(status.parent.iterdir()) == []


def test_nobody_to_report_to() -> None:
    progress = Progress()
    progress.phase("copy", "vda", 10)
    progress.advance(10)
    progress.check()
    progress.close()


def test_the_cancel_file_stops_it_within_one_interval(tmp_path: Path, clock: Clock) -> None:
    cancel = tmp_path / "cancel"
    progress = Progress("", "web01", str(cancel), clock=clock)
    progress.phase("copy", "vda", 10)
    cancel.touch()
    clock.now += 0.6
    with pytest.raises(CancelledError, match="web01: stopped: cancelled by the controller"):
        progress.advance(1)
    cancel.unlink()
    with pytest.raises(CancelledError):  # it stays stopped
        progress.check()


def test_a_heartbeat_that_goes_on_lets_it_go_on(tmp_path: Path, clock: Clock) -> None:
    heartbeat = tmp_path / "heartbeat"
    progress = Progress("", "web01", "", str(heartbeat), clock=clock)
    for beat in range(5):
        heartbeat.touch()
        os.utime(heartbeat, ns=(0, beat))  # whatever the wall clock says
        clock.now += HEARTBEAT_LIMIT_S - 1
        progress.check()


@pytest.mark.parametrize("removed", [False, True])
def test_a_heartbeat_that_ends_stops_it(tmp_path: Path, clock: Clock, removed: bool) -> None:
    heartbeat = tmp_path / "heartbeat"
    heartbeat.touch()
    progress = Progress("", "web01", "", str(heartbeat), clock=clock)
    progress.check()
    if removed:
        heartbeat.unlink()
    clock.now += HEARTBEAT_LIMIT_S
    progress.check()
    clock.now += 1
    with pytest.raises(CancelledError, match="no sign of life from the controller for 91 s"):
        progress.check()


def test_a_heartbeat_never_seen_is_not_missed(tmp_path: Path, clock: Clock) -> None:
    progress = Progress("", "", "", str(tmp_path / "heartbeat"), clock=clock)
    clock.now += 10 * HEARTBEAT_LIMIT_S
    progress.check()


def test_cancel_stops_other_threads_too() -> None:
    progress = Progress("", "web01")
    raised = []

    def work() -> None:
        try:
            while True:
                progress.advance(1)
        except CancelledError as error:
            raised.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    progress.cancel("signal SIGTERM")
    thread.join(120)
    assert raised == ["web01: stopped: signal SIGTERM. Run the task again."]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setattr(_paths, "run_dir", lambda: str(directory))
    monkeypatch.delenv(_progress.CONTROL_VARIABLE, raising=False)
    yield directory


def test_a_bare_module_writes_its_status_under_run(run_dir: Path) -> None:
    progress = _progress.for_module("../web 01/ü")
    progress.phase("copy")
    assert [path.name for path in (run_dir / "status").iterdir()] == [f"_web_01__-{os.getpid()}.json"]
    progress.close()
    assert list((run_dir / "status").iterdir()) == []


def test_status_files_of_dead_processes_go(run_dir: Path) -> None:
    (run_dir / "status").mkdir()
    dead, alive = run_dir / "status" / "a-999999999.json", run_dir / "status" / f"b-{os.getppid()}.json"
    dead.touch()
    alive.touch()
    _progress.for_module("web01").close()
    assert list((run_dir / "status").iterdir()) == [alive]


def test_under_the_action_plugin_the_status_is_seen_in_the_control_directory(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(_progress.CONTROL_VARIABLE, "~/async/token")
    progress = _progress.for_module("web01")
    progress.phase("copy", "vda", 7)
    control = tmp_path / "async" / "token"
    assert read(control / "status.json")["disk"] == "vda"
    assert (control.stat().st_mode & 0o777) == 0o700
    assert (control / "heartbeat").exists()
    (control / "cancel").touch()
    progress._next_look = 0
    with pytest.raises(CancelledError):
        progress.check()
    assert control.exists()
    progress.close()
    assert not control.exists()
