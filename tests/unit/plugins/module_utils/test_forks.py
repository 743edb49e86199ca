# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Children side by side: what they hand over, and what becomes of those that do not."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _forks

PROGRAM = """
import json, os, signal, sys, time
from ansible_collections.kvmops.backup.plugins.module_utils import _forks, _progress
from ansible_collections.kvmops.backup.plugins.module_utils._errors import CancelledError
directory, parent = sys.argv[1], os.getpid()

def work(number):
    progress = _progress.Progress("", str(number), parent=parent)
    signal.signal(signal.SIGTERM, lambda *_: progress.cancel("signal SIGTERM"))
    with open(f"{directory}/{number}", "w") as file:
        file.write(str(os.getpid()))
    try:
        while not os.path.exists(f"{directory}/go"):
            progress.check()
            time.sleep(0.02)
    except CancelledError as error:
        with open(f"{directory}/{number}.stopped", "w") as file:
            file.write(error.why)
        raise
    return {"number": number}

for end in _forks.side_by_side(int(sys.argv[2]), work, at_once=int(sys.argv[3]), stopped=lambda: ""):
    print(json.dumps([end.number, end.value, end.why, end.cancelled]), flush=True)
"""


def ends(count: int, work: Callable[[int], Any], at_once: int = 2, stopped: str = "") -> dict[int, _forks.End]:
    found = {end.number: end for end in _forks.side_by_side(count, work, at_once=at_once, stopped=lambda: stopped)}
    assert list(_forks._ended()) == []
    return found


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    mask, files = signal.pthread_sigmask(signal.SIG_BLOCK, []), len(os.listdir("/proc/self/fd"))
    yield
    (tmp_path / "go").touch()  # ends children that a failed test has left
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert len(os.listdir("/proc/self/fd")) == files
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_values_come_from_other_processes() -> None:
    found = ends(5, lambda number: {"number": number, "pid": os.getpid(), "text": "\udce4" * 100_000})
    values = [found[number].value or {} for number in range(5)]
    assert [value["number"] for value in values] == list(range(5))
    assert len({os.getpid(), *(value["pid"] for value in values)}) == 6
    assert values[0]["text"] == "\udce4" * 100_000
    assert ends(0, lambda number: {}) == {}


@pytest.mark.parametrize(("cores", "free_mib", "expected"), [(2, 20000, 8), (16, 20000, 64), (16, 1300, 10), (2, 64, 2)])
def test_what_a_host_bears(cores: int, free_mib: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    text = f"MemTotal: 1 kB\nMemAvailable: {free_mib << 10} kB\n"
    monkeypatch.setattr(_forks, "open", lambda *_arguments, **_options: io.StringIO(text), raising=False)
    assert _forks.bearable() == expected


def test_no_more_than_so_many_at_once(tmp_path: Path) -> None:
    def work(number: int) -> dict[str, Any]:
        (tmp_path / str(number)).touch()
        most = 0
        for _look in range(10):
            most = max(most, len(list(tmp_path.iterdir())))
            time.sleep(0.01)
        (tmp_path / str(number)).unlink()
        return {"most": most}

    assert max((end.value or {})["most"] for end in ends(9, work, 3).values()) in (2, 3)


def test_those_that_die_are_told_with_the_reason_and_hurt_no_other() -> None:
    def work(number: int) -> dict[str, Any]:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 2:
            os.write(2, b"free(): invalid pointer\n")
            os.kill(os.getpid(), signal.SIGUSR1)
        if number == 3:
            os._exit(7)
        if number == 4:
            raise KeyboardInterrupt
        if number == 5:
            sys.exit("no way")
        return {"number": number}

    found = ends(7, work)
    assert [found[number].value for number in range(7)] == [{"number": 0}, *[None] * 5, {"number": 6}]
    assert found[1].why == "its process was ended by signal SIGKILL"
    assert found[2].why == "its process was ended by signal SIGUSR1, after it had said: free(): invalid pointer"
    assert found[3].why == "its process ended with code 7"
    assert "KeyboardInterrupt" in found[4].why and "no way" in found[5].why


def test_what_libraries_print_is_no_part_of_the_result(capfd: pytest.CaptureFixture[str]) -> None:
    def work(number: int) -> dict[str, Any]:
        os.write(1, b"noise")
        os.write(2, b"noise")
        return {"read": os.read(0, 10).decode()}

    assert ends(1, work)[0].value == {"read": ""}
    assert capfd.readouterr() == ("", "")


def test_signals_are_as_usual_in_a_child() -> None:
    def work(number: int) -> dict[str, Any]:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return {"blocked": sorted(blocked), "term": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL}

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert ends(1, work)[0].value == {"blocked": [], "term": True}
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_host_that_starts_no_more_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, failing = os.fork, [False, True, False, True, True]

    def scarce() -> int:
        if failing and failing.pop(0):
            raise OSError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", scarce)
    found = ends(3, lambda number: {"number": number}, 3)
    assert [found[number].value for number in range(2)] == [{"number": 0}, {"number": 1}]
    assert found[2].value is not None or "Resource temporarily unavailable" in found[2].why


def test_nothing_is_begun_once_it_shall_stop() -> None:
    assert all(end.cancelled for end in ends(4, lambda number: {}, stopped="cancelled by the controller").values())
    answers = iter(["", "cancelled by the controller"])
    ended = list(_forks.side_by_side(4, lambda number: {}, at_once=2, stopped=lambda: next(answers)))
    cancelled = [end for end in ended if end.cancelled]
    assert len(cancelled) == 2
    assert {end.why for end in cancelled} == {"stopped before it began: cancelled by the controller"}


def test_whoever_asks_no_more_leaves_no_child() -> None:
    running = _forks.side_by_side(2, lambda number: time.sleep(60 * number) or {}, at_once=2, stopped=lambda: "")
    assert next(running).number == 0
    running.close()


class Program:
    """A parent with children that go on until they are stopped, or a file says so."""

    def __init__(self, directory: Path, count: int, at_once: int) -> None:
        self._directory = directory
        argv = [sys.executable, "-c", PROGRAM, str(directory), str(count), str(at_once)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self.pids = [self._pid(number) for number in range(at_once)]

    def _pid(self, number: int) -> int:
        path = self._directory / str(number)
        wait_for(lambda: path.exists() and path.read_text())
        return int(path.read_text())

    def ends(self) -> list[Any]:
        output, _stderr = self.process.communicate(timeout=60)
        return sorted(json.loads(line) for line in output.splitlines())


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_signal_to_the_parent_stops_all(tmp_path: Path) -> None:
    program = Program(tmp_path, 3, 2)
    program.process.terminate()
    found = program.ends()
    assert [end[1] for end in found] == [None] * 3
    assert found[2][2:] == ["stopped before it began: signal SIGTERM", True]
    assert [(tmp_path / f"{number}.stopped").read_text() for number in range(2)] == ["stopped: signal SIGTERM"] * 2


def test_a_child_that_is_killed_hurts_no_other(tmp_path: Path) -> None:
    program = Program(tmp_path, 3, 2)
    os.kill(program.pids[0], signal.SIGKILL)
    program._pid(2)
    (tmp_path / "go").touch()
    assert [end[1] for end in program.ends()] == [None, {"number": 1}, {"number": 2}]


def test_children_end_with_the_parent(tmp_path: Path) -> None:
    program = Program(tmp_path, 2, 2)
    program.process.kill()
    program.process.communicate()
    wait_for(lambda: not any(map(is_alive, program.pids)))
    assert [(tmp_path / f"{number}.stopped").read_text() for number in range(2)] == [
        "stopped: the process that started it has ended"
    ] * 2
