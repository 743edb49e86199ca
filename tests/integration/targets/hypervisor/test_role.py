# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role hypervisor: starts libvirt where nothing manages services, makes pools, and a second run changes nothing."""

from __future__ import annotations

from pathlib import Path

from ansible_collections.kvmops.backup.tests.lab import daemons
from ansible_collections.kvmops.backup.tests.lab.modules import Ansible, PlaybookResult
from ansible_collections.kvmops.backup.tests.lab.vm import Lab

PLAY = """
- hosts: all
  gather_facts: false
  roles:
    - role: kvmops.backup.hypervisor
"""


def changed_tasks(played: PlaybookResult) -> list[str]:
    return [task.task for task in played.tasks if task.data.get("changed")]


def test_starts_libvirt_and_creates_pools_once(lab: Lab, ansible: Ansible, tmp_path: Path) -> None:
    pools = [{"name": "new place", "path": str(lab.directory / "made by the role")}]
    daemons.kill()

    first = ansible.playbook(PLAY, hypervisor_pools=pools)

    assert daemons.answers(), first.output
    pool = lab.connection.storagePoolLookupByName("new place")
    try:
        assert pool.isActive()
        assert pool.autostart()
        assert (lab.directory / "made by the role").is_dir()
        assert changed_tasks(ansible.playbook(PLAY, hypervisor_pools=pools)) == []
        pool.destroy()
        assert changed_tasks(ansible.playbook(PLAY, hypervisor_pools=pools)) == [
            "kvmops.backup.hypervisor : Start pool new place"
        ]
    finally:
        pool.destroy()
        pool.undefine()


def test_an_existing_pool_is_left_as_it_is(lab: Lab, ansible: Ansible) -> None:
    directory = lab.create_pool("there already")
    directory.chmod(0o750)

    ansible.playbook(PLAY, hypervisor_pools=[{"name": "there already", "path": str(directory)}])

    assert directory.stat().st_mode & 0o777 == 0o750


def test_a_pool_without_a_path_is_refused(lab: Lab, ansible: Ansible) -> None:
    played = ansible.playbook(PLAY, fails=True, hypervisor_pools=[{"name": "nowhere"}])
    assert "path" in played.tasks[-1].data["msg"] or "path" in str(played.tasks[-1].data)
