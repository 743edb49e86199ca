# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Live progress through real Ansible: lines in the output, events in ansible-runner, cancelling, and what must not be there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import ArchiveWriter
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import BytesSource
from ansible_collections.kvmops.backup.plugins.module_utils._progress import HEARTBEAT_LIMIT_S
from ansible_collections.kvmops.backup.tests.lab import modules
from ansible_collections.kvmops.backup.tests.lab.syslog import system_log
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab

UUID = "6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11"
LINE = re.compile(
    r"^\[localhost\] backup_archive web01_\S+: (?P<phase>[a-z ]+?) (?P<percent>\d+) %, (?P<rest>.*)$", re.M
)
STATUS = Path("/run/kvmops-backup/status")
# Level 19 on one thread takes half a second per MiB: a long operation without much data.
SLOW = {"compressed": True, "compress_level": 19, "threads": 1}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A real archive of 24 MiB."""
    directory = tmp_path / "backups"
    directory.mkdir()
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    words = [random.Random(seed + n).randbytes(37) for n in range(4000)]
    data = b"".join(random.Random(seed).choices(words, k=24 * 2**20 // 37))
    xml = f"<domain type='qemu'><name>web01</name><uuid>{UUID}</uuid><memory>1</memory><devices/></domain>"
    name = names.archive_name("web01", 1795309200, UUID, False)
    with ArchiveWriter(str(directory), name, compression=None, timestamp=1795309200) as writer:
        member = writer.add(Member("vda_0.qcow2", Role.DISK, 0, target="vda", active=True), BytesSource(data))
        return Path(writer.publish(Configuration(1795309200, xml, "web01", UUID, (member,))).path)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ansible's async directory. Neither result files nor control directories, status files, partial archives or processes stay."""
    directory = tmp_path / "async"
    remote = tmp_path / "remote"
    monkeypatch.setenv("ANSIBLE_ASYNC_DIR", str(directory))
    monkeypatch.setenv("ANSIBLE_REMOTE_TEMP", str(remote))
    yield directory
    assert not list(directory.glob("*"))
    wait_for("end of Ansible's own temporary files", lambda: not list(remote.glob("*")))
    assert not list(STATUS.glob("*"))
    assert not list(tmp_path.rglob(".*partial*"))
    assert not module_processes()


def module_processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = path.read_bytes().replace(b"\0", b" ").decode()
            if "AnsiballZ_" in command and "async_wrapper" not in command:
                found.append(command)
    return found


def controller_processes() -> list[int]:
    """ansible-playbook and its workers, which are sessions of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"/ansible-playbook\0" in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def task(archive: Path, options: dict[str, Any], **keywords: Any) -> str:
    step = {"name": "slow", "kvmops.backup.backup_archive": {"archive": str(archive), **options}, **keywords}
    return json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": [{**step, "register": "slow"}]}])


def start(play: str, tmp_path: Path, connection: str = "local", **environment: str) -> subprocess.Popen[str]:
    """ansible-playbook, in a process group of its own."""
    path = tmp_path / "play.json"
    path.write_text(play)
    argv = [
        str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", "-c", connection,
        "-e", "ansible_python_interpreter=/usr/bin/python3", str(path),
    ]  # fmt: skip
    return subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "ANSIBLE_NOCOLOR": "1", **environment},
    )  # fmt: skip


def wait_for(what: str, condition: Any, timeout_s: float = 180) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.05)
    return found


def status() -> dict[str, Any] | None:
    """The status of the running operation, once it has begun to compress."""
    for path in STATUS.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            found = json.loads(path.read_text())
            if found["phase"] == "compress" and found["bytes_done"]:
                return dict(found)
    return None


def check_lines(output: str) -> None:
    """Plain lines with phase, percent, rate and time left, in order."""
    found = [match.groupdict() for match in LINE.finditer(output)]
    compressing = [int(line["percent"]) for line in found if line["phase"] == "compress"]
    assert len(compressing) >= 3, output
    assert compressing == sorted(compressing)
    assert any(re.search(r"MiB of 2[34]\.\d MiB, [\d.]+ [KM]iB/s, \d+:\d\d left", line["rest"]) for line in found), (
        output
    )
    assert "\r" not in output


def test_lines_in_the_output_of_the_play(archive: Path, ansible: modules.Ansible) -> None:
    """And next to none in the host's log: Ansible's async wrapper writes one there every five seconds."""
    before = digest(archive)
    begin = time.monotonic()
    with system_log() as log:
        done = ansible.playbook("- " + task(archive, SLOW)[1:-1])
    assert time.monotonic() - begin > 6  # the wrapper had a reason to write
    assert any("Invoked with" in line for line in log) and any("Module complete" in line for line in log), log
    assert not [line for line in log if "still running" in line] and len(log) < 15
    check_lines(done.output)
    result = done.task("slow").data
    assert result["changed"] is True
    assert result["archive"]["path"] == f"{archive}.zst"
    assert not {"ansible_job_id", "started", "finished", "results_file"} & set(result)
    back = ansible.module("backup_archive", archive=f"{archive}.zst", compressed=False)
    assert digest(Path(back["archive"]["path"])) == before


def test_a_failure_is_the_modules_own(archive: Path, ansible: modules.Ansible) -> None:
    found = ansible.module("backup_archive", fails=True, archive=str(archive), state="absent")
    assert found.message.startswith(f"Archive {archive}: it is the last good archive of web01 in ")
    assert found["hint"] == "To delete it all the same, use force: true."


def test_job_events_in_ansible_runner(archive: Path, tmp_path: Path) -> None:
    data = tmp_path / "runner"
    (data / "project").mkdir(parents=True)
    (data / "project" / "play.yml").write_text(task(archive, SLOW))
    argv = [
        str(Path(sys.executable).parent / "ansible-runner"), "run", str(data), "-p", "play.yml", "--ident", "job", "-q",
        "--cmdline=-i localhost, -c local -e ansible_python_interpreter=/usr/bin/python3",
    ]  # fmt: skip
    # The runner looks for ansible-playbook in PATH.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, timeout=600, env={**os.environ, "PATH": path})
    events = [json.loads(path.read_text()) for path in (data / "artifacts" / "job" / "job_events").glob("*.json")]
    events.sort(key=lambda event: event["counter"])
    check_lines("\n".join(event["stdout"] for event in events if event["event"] == "verbose"))
    assert any(event["event"] == "runner_on_ok" for event in events)


class SlowBackup:
    """A backup of a VM that is off, held back by its bandwidth limit: slow without load."""

    def __init__(self, lab: Lab, tmp_path: Path) -> None:
        self._tmp_path = tmp_path
        self._vm = lab.create_vm("web01", [Disk("raw", ext4=False)], start=False)
        self._image = self._vm.disks()["vda"]
        self._image.write_bytes(random.randbytes(64 * 2**20))
        self._before = self._state()
        self.target = lab.path("backups")

    def _state(self) -> tuple[str, str]:
        return digest(self._image), self._vm.xml()

    def start(self, bandwidth: str, **keywords: Any) -> subprocess.Popen[str]:
        options = {"vm": "web01", "path": str(self.target), "bandwidth": bandwidth, "include_boot_files": False}
        tasks = [{"kvmops.backup.vm_backup": options, **keywords}]
        return start(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]), self._tmp_path)

    def wait_until_it_copies(self, results: Path) -> None:
        wait_for("partial archive", lambda: list(self.target.glob(".*partial*")))
        (heartbeat,) = wait_for("heartbeat", lambda: list(results.glob("*/heartbeat")))
        # The first beat is the module's own; with the next the controller knows the module and looks after it.
        first = heartbeat.stat().st_mtime_ns
        wait_for("the controller's heartbeat", lambda: heartbeat.stat().st_mtime_ns != first)

    def check_that_nothing_is_left(self) -> None:
        assert list(self.target.iterdir()) == []
        assert self._state() == self._before


@pytest.fixture
def slow_backup(lab: Lab, tmp_path: Path) -> SlowBackup:
    return SlowBackup(lab, tmp_path)


def test_a_task_that_runs_out_of_time_leaves_nothing(slow_backup: SlowBackup) -> None:
    play = slow_backup.start("512K", timeout=45)
    output, _stderr = play.communicate(timeout=600)
    assert play.returncode == 2, output
    assert re.search(r"^\[localhost\] vm_backup web01: copy vda \d+ %, ", output, re.M), output
    slow_backup.check_that_nothing_is_left()


def test_an_interrupted_play_leaves_nothing(slow_backup: SlowBackup, results: Path) -> None:
    play = slow_backup.start("1M")
    slow_backup.wait_until_it_copies(results)
    os.killpg(play.pid, signal.SIGINT)
    play.communicate(timeout=600)
    slow_backup.check_that_nothing_is_left()


def test_a_backup_whose_controller_was_killed_stops(slow_backup: SlowBackup, results: Path) -> None:
    play = slow_backup.start("256K")
    slow_backup.wait_until_it_copies(results)
    for pid in controller_processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    play.communicate()
    assert module_processes()
    wait_for("end of the module", lambda: not module_processes(), HEARTBEAT_LIMIT_S + 180)
    slow_backup.check_that_nothing_is_left()
    (job,) = results.glob("j*[0-9]")  # Ansible's own, which only the controller would have removed
    # Ansible's wrapper writes down the result when the module has ended.
    wait_for("result", lambda: "started" not in json.loads(job.read_text()), 60)
    assert json.loads(job.read_text())["cancelled"] is True
    job.unlink()


def test_lost_polls_are_tolerated(archive: Path, tmp_path: Path) -> None:
    plugins = str(Path(__file__).with_name("connection"))
    play = start(task(archive, SLOW), tmp_path, connection="flaky", ANSIBLE_CONNECTION_PLUGINS=plugins)
    output, _stderr = play.communicate(timeout=600)
    assert play.returncode == 0, output
    check_lines(output)


def test_the_users_own_async_passes_through(archive: Path, tmp_path: Path, results: Path) -> None:
    play = start(task(archive, SLOW, **{"async": 300, "poll": 0}), tmp_path)
    output, _stderr = play.communicate(timeout=300)
    assert play.returncode == 0, output
    assert not LINE.search(output)
    found = wait_for("progress", status)
    assert set(found) == {
        "schema", "phase", "vm", "disk", "bytes_done", "bytes_total", "percent", "rate_bps", "eta_s", "updated_at", "pid",
    }  # fmt: skip
    (job,) = results.glob("j*[0-9]")
    wait_for("result", lambda: "archive" in json.loads(job.read_text()), 300)
    assert json.loads(job.read_text())["archive"]["compressed"] is True
    job.unlink()
    wait_for("end of the wrapper", lambda: not module_processes())


def test_check_mode_passes_through(archive: Path, ansible: modules.Ansible) -> None:
    found = ansible.module("backup_archive", check_mode=True, archive=str(archive), **SLOW)
    assert found.changed
    assert "localhost]" not in found.output
    assert list(archive.parent.iterdir()) == [archive]


def test_short_operations_stay_short(archive: Path, tmp_path: Path, ansible: modules.Ansible) -> None:
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _round in range(4):
        for check_mode in (True, False):  # check mode runs the bare module
            begin = time.monotonic()
            ansible.module("backup_archive", check_mode=check_mode, archive=str(archive), protected=False)
            seconds[check_mode].append(time.monotonic() - begin)
    # at their best: whatever else the machine does makes them longer, never shorter
    extra = min(seconds[False]) - min(seconds[True])
    print(f"live progress costs {extra:.2f} s, the bare module takes {min(seconds[True]):.2f} s")
    assert extra < min(seconds[True])  # measured: 0.5 s against 1.4 s with nothing else to do
