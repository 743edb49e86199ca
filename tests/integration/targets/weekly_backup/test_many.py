# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""vm_backup_many: one process on the host, and a child for each VM. What becomes of the others when one of them is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.tests.lab.modules import Ansible, ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab

STATUS = Path("/run/kvmops-backup/status")
JOURNALS = Path("/var/lib/kvmops-backup/journal")
VMS = ("one", "two", "three")
SIZE_MIB = 6


@pytest.fixture(scope="module")
def three(module_lab: Lab) -> Lab:
    """VMs that are off, whose backups take as long as their bandwidth says."""
    for name in VMS:
        vm = module_lab.create_vm(name, [Disk("raw", size_mib=SIZE_MIB, ext4=False)], start=False)
        vm.disks()["vda"].write_bytes(os.urandom(SIZE_MIB << 20))
    return module_lab


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = 180) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.05)
    return found


def copying() -> dict[str, int]:
    """Process ids of the backups that copy, by VM."""
    found = {}
    for path in STATUS.glob("*.json"):
        try:
            status = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        if status["phase"] == "copy":
            found[status["vm"]] = status["pid"]
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def task(target: Path, bandwidth: str, *vms: dict[str, Any], **options: Any) -> str:
    defaults = {"path": str(target), "bandwidth": bandwidth, "include_boot_files": False}
    arguments = {"vms": list(vms) or [{"vm": name} for name in VMS], "defaults": defaults, **options}
    step = {"name": "many", "kvmops.backup.vm_backup_many": arguments, "register": "many"}
    return "- " + json.dumps({"hosts": "all", "gather_facts": False, "tasks": [step]})


def names(target: Path) -> list[str]:
    return sorted(path.name.partition("_")[0] for path in target.iterdir())


def test_a_backup_that_is_killed_hurts_no_other(
    three: Lab, ansible: Ansible, run_module: Callable[..., ModuleResult]
) -> None:
    target = three.path("child")
    with ThreadPoolExecutor(1) as pool:
        play = pool.submit(ansible.playbook, task(target, "1M"), fails=True)
        pids = wait_for("three copies", lambda: len(found := copying()) == 3 and found)
        assert len({parent(pid) for pid in pids.values()}) == 1
        os.kill(pids["two"], signal.SIGKILL)
        done = play.result()
    many = done.task("many").data
    assert many["msg"] == "1 of 3 VMs failed: two"
    assert [(each["vm"], each["failed"], each["changed"]) for each in many["backups"]] == [
        ("one", False, True), ("two", True, False), ("three", False, True),
    ]  # fmt: skip
    assert many["backups"][1]["msg"] == (
        "The backup of VM two: its process was ended by signal SIGKILL. "
        "Run the task again: it puts right what this run has left."
    )
    assert "[localhost] vm_backup two: FAILED: The backup of VM two: its process was ended" in done.output
    assert re.search(r"^\[localhost\] vm_backup one: full, \d\.\d MiB written, \d", done.output, re.M)
    assert "[localhost] vm_backup one: copy vda" in done.output
    assert list(STATUS.iterdir()) == []
    again = run_module("vm_backup", vm="two", path=str(target))
    assert again.changed and names(target) == ["one", "three", "two"]
    assert list(JOURNALS.glob("*.json")) == []


def test_when_the_module_is_killed_no_backup_goes_on(
    three: Lab, ansible: Ansible, run_module: Callable[..., ModuleResult]
) -> None:
    target = three.path("parent")
    vms = [{"vm": "one", "bandwidth": "0"}, {"vm": "two"}, {"vm": "three"}]
    with ThreadPoolExecutor(1) as pool:
        play = pool.submit(ansible.playbook, task(target, "100K", *vms), fails=True)
        pids = wait_for("two copies, and a backup that is done", lambda: len(found := copying()) == 2 and found)
        wait_for("a backup that is done", lambda: names(target).count("one"))
        time.sleep(0.2)  # its result is told
        os.kill(parent(pids["two"]), signal.SIGKILL)
        begin = time.monotonic()
        wait_for("end of the children", lambda: not any(map(is_alive, pids.values())))
        assert time.monotonic() - begin < 30
        done = play.result()
    # They have cleaned up.
    assert names(target) == ["one"]
    assert list(JOURNALS.glob("*.json")) == []
    many = done.task("many").data
    assert many["msg"] == "2 of 3 VMs failed: two, three"
    assert many["backups"][0]["mode"] == "full"
    assert many["backups"][2]["msg"].startswith("The backup of VM three: the module that ran it has ended without a result.")
    assert run_module("vm_backup", vm="three", path=str(target)).changed


def test_options_are_those_of_vm_backup(three: Lab, ansible: Ansible) -> None:
    target = three.path("options")
    vms = [{"vm": "one", "modus": "full"}, {"vm": "two", "mode": "all"}, {"vm": "none"}, {"vm": "three", "pool": "p"}]
    for check_mode in (True, False):
        found = ansible.playbook(task(target, "0", *vms, {"vm": "three"}, at_once=2), check_mode=check_mode, fails=True)
        backups = found.task("many").data["backups"]
        assert [each["vm"] for each in backups] == ["one", "two", "none", "three", "three"]
        texts = [each.get("msg", "") for each in backups]
        assert texts[0].startswith("Unsupported parameters for (kvmops.backup.vm_backup) module: modus. Supported")
        assert texts[1] == "value of mode must be one of: full, incremental, auto, got: all"
        assert texts[2].startswith("The VM none: there is no VM of that name or uuid")
        assert texts[3] == "parameters are mutually exclusive: pool|path"
        assert (backups[4]["failed"], backups[4]["changed"], backups[4]["mode"]) == (False, True, "full")
        assert names(target) == ([] if check_mode else ["three"])
    nameless = ansible.module("vm_backup_many", fails=True, vms=[{"vm": "one"}, {"mode": "full"}])
    assert nameless.message.startswith("Option vms: an element has no vm")
