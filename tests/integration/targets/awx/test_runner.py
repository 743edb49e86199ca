# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The weekly backup as AWX runs it, through ansible-runner: events, artifacts, check mode, and a job that is cancelled."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ansible_runner
import pytest

from ansible_collections.kvmops.backup.tests.lab._run import wait_for
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab

SMALL = [Disk(size_mib=16, ext4=False)]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner looks for ansible-playbook in PATH."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


class Job:
    """One run; `events` are the whole events as AWX stores them."""

    def __init__(self, directory: Path, **variables: Any) -> None:
        directory.mkdir(parents=True)
        self.events: list[dict[str, Any]] = []
        self.cancelled = threading.Event()
        self._settings: dict[str, Any] = {
            "private_data_dir": str(directory),
            "playbook": "kvmops.backup.weekly_backup",
            "inventory": "localhost ansible_connection=local ansible_python_interpreter=/usr/bin/python3",
            "extravars": {"weekly_backup_become": False, **variables},
            "envvars": {name: os.environ[name] for name in ("ANSIBLE_COLLECTIONS_PATH", "PYTHONPATH", "PATH")},
            "quiet": True,
            "event_handler": self._keep,
            "cancel_callback": self.cancelled.is_set,
        }

    def _keep(self, event: dict[str, Any]) -> bool:
        self.events.append(event)
        return True

    def run(self, cmdline: str = "") -> Any:
        return ansible_runner.run(**self._settings, **({"cmdline": cmdline} if cmdline else {}))

    def artifacts(self) -> dict[str, Any]:
        """What AWX shows as the job's artifacts."""
        told = [each["event_data"].get("artifact_data") for each in self.events if each["event"] == "playbook_on_stats"]
        return dict(told[-1] or {})

    def output(self) -> str:
        return "\n".join(each["stdout"] for each in self.events)


def files(target: Path) -> list[str]:
    return sorted(path.name for path in target.iterdir())


def test_events_and_artifacts(lab: Lab, tmp_path: Path) -> None:
    for name in ("good", "poisoned"):
        lab.create_vm(name, SMALL, start=False)
    lab.vm("poisoned").disks()["vda"].unlink()
    target = lab.path("target")

    job = Job(tmp_path / "check", weekly_backup_path=str(target), weekly_backup_vms=["good"])
    checked = job.run("--check")
    assert (checked.status, checked.rc) == ("successful", 0)
    assert [row["result"] for row in job.artifacts()["weekly_backup_result"]] == ["full"]
    assert files(target) == []

    job = Job(tmp_path / "run", weekly_backup_path=str(target))
    done = job.run()
    assert (done.status, done.rc) == ("failed", 2)
    rows = {row["vm"]: row for row in job.artifacts()["weekly_backup_result"]}
    assert {name: row["result"] for name, row in rows.items()} == {"good": "full", "poisoned": "FAILED"}
    assert rows["good"]["archive"] == str(target / files(target)[0])
    lines = [each["stdout"] for each in job.events if each["event"] == "verbose"]
    assert any("vm_backup good: full," in line for line in lines), job.output()
    assert any("vm_backup poisoned: FAILED" in line for line in lines)
    json.dumps(job.events)


def test_a_cancelled_job_leaves_nothing(lab: Lab, tmp_path: Path, run_module: Callable[..., ModuleResult]) -> None:
    """Cancelled while two VMs are copied, one of them running."""
    data = Disk("raw", size_mib=40, ext4=False)
    running, off = (lab.create_vm(name, [Disk(), data], start=False) for name in ("running", "off"))
    for vm in (running, off):
        vm.disks()["vdb"].write_bytes(os.urandom(40 << 20))
    running.start()
    paths = {vm.name: vm.disks() for vm in (running, off)}
    target = lab.path("target")
    job = Job(tmp_path / "run", weekly_backup_path=str(target), weekly_backup_bandwidth="200K")
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(job.run()))
    thread.start()
    try:
        wait_for("two archives being written", lambda: sum(".partial-" in name for name in files(target)) == 2, 180)
        job.cancelled.set()
    finally:
        job.cancelled.set()
        thread.join()
    assert result[0].status == "canceled"

    # The playbook is killed at once. Its worker, which outlives it, or else the heartbeat that is missing, stops the modules.
    wait_for("all files to go", lambda: files(target) == [], 300)
    wait_for("the status files to go", lambda: list(Path("/run/kvmops-backup/status").iterdir()) == [], 180)
    assert list(Path("/var/lib/kvmops-backup/journal").glob("*.json")) == []
    for vm in (running, off):
        assert vm.domain.listAllSnapshots() == []
        assert vm.disks() == paths[vm.name]
    assert running.agent.freeze_status() == "thawed"
    running.wait_for_marker(running.last_marker().number + 2)
    # Nobody holds a lock: a backup that does not wait gets through.
    for vm in (running, off):
        assert run_module("vm_backup", vm=vm.name, path=str(target), max_parallel=1, wait_timeout="0").changed
