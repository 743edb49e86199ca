# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Twenty VMs on one host: how many are at work at once, seen from outside, and one that fails among them."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.tests.lab.modules import Ansible, PlaybookResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab

PLAY = """
- hosts: all
  gather_facts: false
  roles:
    - role: kvmops.backup.weekly_backup
"""
RUNNING = ("run01", "run02")
OFF = tuple(f"off{number:02}" for number in range(18))
POISONED = "off07"
DATA_MIB = 4


@dataclass
class Watched:
    """How many archives were being written at the same time, at most."""

    most: int = 0


@contextmanager
def watching(target: Path) -> Iterator[Watched]:
    """Counts the partial files in the target all the time: whoever writes an archive has one."""
    watched, end = Watched(), threading.Event()

    def look() -> None:
        while not end.wait(0.003):
            watched.most = max(watched.most, sum(".partial-" in path.name for path in target.iterdir()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watched
    finally:
        end.set()
        thread.join()


@pytest.fixture(scope="module")
def twenty(module_lab: Lab) -> Lab:
    chance = random.Random(20)
    for name in OFF:
        vm = module_lab.create_vm(name, [Disk("raw", size_mib=8, ext4=False)], start=False)
        vm.disks()["vda"].write_bytes(chance.randbytes(DATA_MIB << 20) + bytes(4 << 20))
    for name in RUNNING:
        module_lab.create_vm(name, [Disk(size_mib=16)])
    return module_lab


def played(ansible: Ansible, target: Path, **variables: Any) -> PlaybookResult:
    options = {f"weekly_backup_{name}": value for name, value in variables.items() if name != "fails"}
    return ansible.playbook(PLAY, fails=variables.get("fails", False), weekly_backup_path=str(target), **options)


def results(done: PlaybookResult) -> dict[str, str]:
    found = done.task("kvmops.backup.weekly_backup : Gather who, what and why").data["ansible_facts"]
    return {row["vm"]: row["result"] for row in found["weekly_backup_result"]}


def changed_vms(done: PlaybookResult) -> set[str]:
    backups = done.task("kvmops.backup.weekly_backup : Back up").data["backups"]
    return {each["vm"] for each in backups if each["changed"]}


def archives(target: Path) -> list[str]:
    return sorted(path.name.split("_")[0] for path in target.iterdir() if not path.name.startswith("."))


def test_two_at_a_time_and_one_that_fails(twenty: Lab, ansible: Ansible) -> None:
    target = twenty.path("two")
    disk = twenty.vm(POISONED).disks()["vda"]
    aside = disk.rename(disk.with_suffix(".aside"))

    with watching(target) as watched:
        first = played(ansible, target, max_parallel=2, bandwidth="4M", fails=True)

    assert watched.most == 2
    assert first.exit_code == 2
    expected = {name: "FAILED" if name == POISONED else "full" for name in (*OFF, *RUNNING)}
    assert results(first) == expected
    assert f"1 of 20 failed: {POISONED}" in first.tasks[-1].data["msg"]
    assert str(disk) in first.tasks[-1].data["msg"]
    assert archives(target) == sorted(set(expected) - {POISONED})
    assert [path.name for path in target.iterdir() if path.name.startswith(".")] == []

    aside.rename(disk)
    second = played(ansible, target, max_parallel=2)
    assert changed_vms(second) == {POISONED}
    assert results(second) == {name: "full" if name == POISONED else "done already" for name in expected}

    third = played(ansible, target, max_parallel=2)
    assert [task.task for task in third.tasks if task.data.get("changed")] == []


def test_without_a_limit_all_are_at_work(twenty: Lab, ansible: Ansible) -> None:
    target = twenty.path("all")
    with watching(target) as watched:
        done = played(ansible, target, vms=list(OFF[:6]), full_only=["*"], bandwidth="1M")
    assert watched.most > 2
    assert set(results(done).values()) == {"full"}


def test_two_playbooks_share_the_limit(twenty: Lab, ansible: Ansible) -> None:
    target = twenty.path("shared")
    halves = [list(OFF[8:12]), list(OFF[12:16])]
    with watching(target) as watched, ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(played, ansible, target, vms=half, full_only=["*"], max_parallel=2, bandwidth="2M")
            for half in halves
        ]
        done = [run.result() for run in runs]
    assert watched.most == 2
    assert [set(results(each).values()) for each in done] == [{"full"}, {"full"}]
    assert archives(target) == sorted(halves[0] + halves[1])
