# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role weekly_backup: who is chosen, what a run makes, what a second one leaves alone, and who fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible_collections.kvmops.backup.tests.lab.modules import Ansible, ModuleResult, PlaybookResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm

PLAY = """
- hosts: all
  gather_facts: false
  roles:
    - role: kvmops.backup.weekly_backup
"""
SERIAL = """
- hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.add_host:
        name: other
- hosts: localhost:other
  gather_facts: false
  serial: 1
  roles:
    - role: kvmops.backup.weekly_backup
"""
SMALL = [Disk(size_mib=16, ext4=False)]


def off(lab: Lab, *names: str) -> list[LabVm]:
    return [lab.create_vm(name, SMALL, start=False) for name in names]


def rows(played: PlaybookResult) -> dict[str, tuple[str, str]]:
    """What the run says: result and reason by VM."""
    found = played.task("kvmops.backup.weekly_backup : Gather who, what and why").data["ansible_facts"]
    return {row["vm"]: (row["result"], row["why"]) for row in found["weekly_backup_result"]}


def results(played: PlaybookResult) -> dict[str, str]:
    return {vm: result for vm, (result, _why) in rows(played).items()}


def changed_tasks(played: PlaybookResult) -> list[str]:
    return [task.task for task in played.tasks if task.data.get("changed")]


def archives(target: Path) -> list[str]:
    return sorted(path.name for path in target.iterdir() if path.name.endswith(".tar"))


def test_a_second_run_of_the_day_does_nothing(lab: Lab, ansible: Ansible) -> None:
    off(lab, "web 01", "db01")
    target = lab.path("target")

    first = ansible.playbook(PLAY, weekly_backup_path=str(target))
    assert results(first) == {"web 01": "full", "db01": "full"}
    assert all("no good full backup since" in why for _result, why in rows(first).values())
    files = archives(target)
    assert len(files) == 2

    second = ansible.playbook(PLAY, weekly_backup_path=str(target))
    assert changed_tasks(second) == []
    assert results(second) == {"web 01": "done already", "db01": "done already"}
    assert archives(target) == files

    lab.create_vm("new", SMALL, start=False)
    third = ansible.playbook(PLAY, weekly_backup_path=str(target))
    assert results(third) == {"web 01": "done already", "db01": "done already", "new": "full"}


def test_increments_follow_and_full_only_gets_fulls(lab: Lab, ansible: Ansible) -> None:
    """`max_age` of a second stands for the next day."""
    migrated, plain = off(lab, "migrated", "plain")
    target = lab.path("target")
    variables: dict[str, Any] = {"weekly_backup_path": str(target), "weekly_backup_max_age": "0s"}
    variables["weekly_backup_full_only"] = ["mig*"]

    assert results(ansible.playbook(PLAY, **variables)) == {"migrated": "full", "plain": "full"}
    assert results(ansible.playbook(PLAY, **variables)) == {"migrated": "full", "plain": "incremental"}
    assert len(archives(target)) == 3
    assert migrated.domain.listAllSnapshots() == []
    assert len(plain.domain.listAllSnapshots()) == 2
    variables["weekly_backup_full_only"] = ["mig*", "plain"]
    told = ansible.playbook(PLAY, **variables).task("kvmops.backup.weekly_backup : Say who was backed up").data["msg"]
    assert [line for line in told if "keeps the snapshots" in line] == [told[-1]] and told[-1].startswith(
        "plain keeps"
    )
    variables["weekly_backup_vms"] = ["migrated"]  # the others are not this run's
    told = ansible.playbook(PLAY, **variables).task("kvmops.backup.weekly_backup : Say who was backed up").data["msg"]
    assert not [line for line in told if "keeps the snapshots" in line]


def test_a_template_gets_a_full_each_week_and_nothing_else(
    lab: Lab, ansible: Ansible, run_module: Callable[..., ModuleResult]
) -> None:
    off(lab, "golden", "plain")
    run_module("vm_template", vm="golden")
    target = lab.path("target")
    variables: dict[str, Any] = {"weekly_backup_path": str(target), "weekly_backup_max_age": "0s"}
    assert results(ansible.playbook(PLAY, **variables)) == {"golden": "full", "plain": "full"}
    assert results(ansible.playbook(PLAY, **variables)) == {"golden": "done already", "plain": "incremental"}


def test_who_is_chosen(lab: Lab, ansible: Ansible) -> None:
    off(lab, "web01", "web02", "mail")
    target = lab.path("target")

    chosen = ansible.playbook(PLAY, check_mode=True, weekly_backup_path=str(target), weekly_backup_vms=["web*"])
    assert set(results(chosen)) == {"web01", "web02"}
    expression = "ends_with(name, '2') && state == 'shut off'"
    chosen = ansible.playbook(PLAY, check_mode=True, weekly_backup_path=str(target), weekly_backup_select=expression)
    assert set(results(chosen)) == {"web02"}
    assert archives(target) == []

    missed = ansible.playbook(
        PLAY, check_mode=True, fails=True, weekly_backup_path=str(target), weekly_backup_vms=["mail", "news"]
    )
    assert results(missed) == {"mail": "full", "news": "FAILED"}
    assert "1 of 2 failed: news" in missed.tasks[-1].data["msg"]


def test_options_as_the_command_line_gives_them(lab: Lab, ansible: Ansible) -> None:
    """After ``-e NAME=VALUE`` everything is text."""
    off(lab, "web01")
    target = lab.path("target")
    numbers = {"max_parallel": "2", "keep_days": "30", "keep_last": "3", "increment_limit": "7", "bandwidth": "50M"}
    switches = {"verify": "false", "compress": "false", "free_space": "true"}
    given = {f"weekly_backup_{name}": value for name, value in {**numbers, **switches}.items()}
    played = ansible.playbook(PLAY, weekly_backup_path=str(target), weekly_backup_vms="web*", **given)
    assert results(played) == {"web01": "full"}
    assert played.task("kvmops.backup.weekly_backup : Verify what was written").status == "skipped"
    played = ansible.playbook(PLAY, weekly_backup_path=str(target), **{**given, "weekly_backup_max_age": "0"})
    assert results(played) == {"web01": "incremental"}


def test_an_age_that_is_none_is_named(lab: Lab, ansible: Ansible) -> None:
    off(lab, "web01")
    variables: dict[str, Any] = {"weekly_backup_path": str(lab.path("target")), "weekly_backup_max_age": "soon"}
    played = ansible.playbook(PLAY, fails=True, **variables)
    assert "'soon' is not a duration. Write a whole number and s, m, h, d or w" in played.tasks[-1].data["msg"]


def test_hosts_in_batches(lab: Lab, ansible: Ansible) -> None:
    """A name that fits no VM is told of when all batches have been asked, and only then."""
    off(lab, "mail")
    options: dict[str, Any] = {"weekly_backup_path": str(lab.path("target")), "weekly_backup_vms": ["mail", "news"]}
    played = ansible.playbook(SERIAL, check_mode=True, fails=True, **options)
    said = [task.data["msg"] for task in played.tasks if task.task.endswith("Say who was backed up")]
    assert [sorted(line.split()[0] for line in table) for table in said] == [["mail"], ["mail", "news"]]


def test_a_vm_that_fails_stops_no_later_batch(lab: Lab, ansible: Ansible) -> None:
    """serial: 1 — Ansible ends a play after a batch whose hosts have all failed."""
    good, bad = off(lab, "good", "bad")
    bad.disks()["vda"].unlink()
    played = ansible.playbook(SERIAL, weekly_backup_path=str(lab.path("target")), fails=True)
    last = [task for task in played.tasks if task.task.endswith("Fail if a VM was not backed up")]
    assert [task.status for task in last] == ["skipped", "failed"]
    assert last[1].data["msg"].startswith("2 of 4 failed: bad")
    assert good.domain.listAllSnapshots()


def test_a_place_must_be_named(lab: Lab, ansible: Ansible) -> None:
    played = ansible.playbook(PLAY, fails=True)
    assert "weekly_backup_pool or weekly_backup_path" in played.tasks[-1].data["msg"]


def test_what_was_written_is_verified(lab: Lab, ansible: Ansible, run_module: Callable[..., ModuleResult]) -> None:
    off(lab, "web01", "web02")
    target = lab.path("target")
    variables: dict[str, Any] = {"weekly_backup_path": str(target), "weekly_backup_verify": True}
    played = ansible.playbook(PLAY, **variables)
    verified = played.task("kvmops.backup.weekly_backup : Verify what was written").data["results"]
    assert [each["archives"][0]["ok"] for each in verified] == [True, True]

    spoilt = next(path for path in target.iterdir() if path.name.startswith("web01"))
    with open(spoilt, "r+b") as file:
        file.seek(8192)
        byte = file.read(1)
        file.seek(8192)
        file.write(bytes([byte[0] ^ 1]))
    played = ansible.playbook(PLAY, fails=True, **variables, weekly_backup_max_age="0s")
    assert results(played) == {"web01": "FAILED", "web02": "incremental"}
    assert "verification has found damage" in rows(played)["web01"][1]

    # The full of the week is lost, so there is a new one, and it is well again.
    played = ansible.playbook(PLAY, **variables, weekly_backup_max_age="0s")
    assert results(played) == {"web01": "full", "web02": "incremental"}
    assert "no good full backup since" in rows(played)["web01"][1]
