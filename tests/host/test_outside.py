# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible from outside, over ssh, as users of several kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.host.steps import PATH, Points
from ansible_collections.kvmops.backup.tests.lab.host.machine import COLLECTIONS, Machine

VM = "web01"
ROLE = """
- hosts: all
  roles:
    - role: kvmops.backup.hypervisor
      hypervisor_pools: [{name: backups, path: /srv/backup}]
"""
REPORT = f"""
- hosts: all
  roles:
    - role: kvmops.backup.report
      report_host: kvm01
      report_path: {PATH}
      report_file: /srv/backups.html
      report_metrics_file: /srv/kvmops.prom
"""


def test_the_quickstart_finds_that_kvm_works_where_it_does(host: Machine) -> None:
    host.root("python3", "-I", f"{COLLECTIONS}/ansible_collections/kvmops/backup/tests/lab/kvm.py")


def test_the_role_hypervisor_prepares_a_host_once(host: Machine) -> None:
    host.ssh(
        "sudo mkdir -p /var/lib/apt/periodic && sudo touch /var/lib/apt/periodic/update-success-stamp"
    )  # the packages are there

    predicted = host.ansible().playbook(ROLE, check_mode=True)
    first = host.ansible().playbook(ROLE)
    second = host.ansible().playbook(ROLE)

    changed = [
        {task.task for task in played.tasks if task.data.get("changed")} for played in (predicted, first, second)
    ]
    assert changed[1] and changed[0] <= changed[1]
    assert not changed[2]
    assert "backups" in host.root("virsh", "pool-list", "--autostart", "--name")


@pytest.fixture(scope="module")
def points(host: Machine) -> Points:
    host.call("create_vm", name=VM)
    return Points(host, VM)


def test_a_backup_over_ssh_shows_its_progress_while_it_runs(host: Machine, points: Points) -> None:
    done = host.ansible().module("vm_backup", vm=VM, path=PATH, mode="auto")

    points.remember(done.data)
    assert f"[kvm01] vm_backup {VM}: copy" in done.output


def test_the_restore_of_the_readme_works_on_a_fresh_host(host: Machine, points: Points) -> None:
    archive, _point, _content = points.taken[0]
    play = readme_task("Restore under a new name").replace(
        "/srv/backup/web01_20261122T010000Z_6f1a2b3c.tar.zst", archive
    )

    host.ansible().playbook(f"- hosts: all\n  tasks:\n{play}")

    host.call("wait_until_up", name="web01-test")
    host.call("destroy", name="web01-test")
    host.call("remove_vm", name="web01-test")


def readme_task(name: str) -> str:
    """A task of README's, as it stands there."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    return readme[readme.index(f"    - name: {name}") :].split("```")[0]


def test_a_user_whom_sudo_asks_for_a_password(host: Machine, points: Points) -> None:
    ansible = host.ansible("asked", ansible_become_password="lab")

    info = ansible.module("backup_info", path=PATH, vm=VM)

    assert [archive["path"] for archive in info["archives"]] == [points.taken[0][0]]


def test_a_user_in_the_group_libvirt_without_sudo(host: Machine, points: Points) -> None:
    ansible = host.ansible("member", become=False)

    assert [vm["name"] for vm in ansible.module("vm_info", uri="qemu:///system")["vms"]] == [VM]
    refused = ansible.module("vm_backup", vm=VM, path="/home/member", fails=True)

    assert "root" in refused.message, refused.message
    assert not [name for name in host.call("files", directory="/home/member") if ".tar" in name]


def test_a_restore_in_place(host: Machine, points: Points) -> None:
    archive, point, content = points.taken[0]
    host.call("destroy", name=VM)

    host.ansible().module("vm_restore", source=archive, point=point, force=True)

    assert host.call("content", name=VM) == content


def test_retention_and_report(host: Machine, points: Points) -> None:
    host.module("vm_backup", vm=VM, path=PATH)

    gone = host.ansible().module("backup_retention", path=PATH, keep_last=1)
    host.ansible().playbook(REPORT)

    assert [archive["path"] for archive in gone["removed"]] == [points.taken[0][0]]
    assert VM in host.root("cat", "/srv/backups.html")
    assert f'vm="{VM}"' in host.root("cat", "/srv/kvmops.prom")
