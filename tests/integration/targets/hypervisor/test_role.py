# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role hypervisor: starts libvirt where nothing manages services, makes pools, and a second run changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ansible_collections.kvmops.backup.tests.lab import daemons
from ansible_collections.kvmops.backup.tests.lab.modules import Ansible, ModuleResult, PlaybookResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab

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
    settings = Path("/etc/libvirt/qemu.conf")
    of_the_lab = settings.read_text()
    settings.write_text(of_the_lab.replace("namespaces = []\n", ""))
    of_a_host = settings.read_bytes()
    daemons.kill()

    first = ansible.playbook(PLAY, hypervisor_pools=pools)

    assert daemons.answers(), first.output
    assert settings.read_bytes() == of_a_host != of_the_lab.encode()  # nothing weakens the VMs of a host
    settings.write_text(of_the_lab)
    daemons.kill()
    daemons.start()
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


def test_read_only_places_are_for_reading(lab: Lab, ansible: Ansible, run_module: Callable[..., ModuleResult]) -> None:
    pool, plain = lab.create_pool("kept"), lab.path("plain")
    lab.create_vm("guarded", [Disk(size_mib=16)], start=False)
    archive = run_module("vm_backup", vm="guarded", pool="kept")["archive"]["path"]

    squashed = lab.path("squashed") / Path(archive).name  # as NFS shows it
    shutil.copy(archive, squashed)
    for path in (squashed.parent, squashed):
        shutil.chown(path, "nobody")

    def not_ours() -> str:
        return str(run_module("backup_info", archive=str(squashed))["archives"][0]["not_ours"])

    assert not_ours().startswith("it belongs to nobody")
    lists = {
        "hypervisor_read_only": ["kept", str(plain)],
        "hypervisor_trusted_owners": [{"path": str(squashed.parent), "owner": "nobody"}],
    }
    assert changed_tasks(ansible.playbook(PLAY, **lists))
    assert changed_tasks(ansible.playbook(PLAY, **lists)) == []
    assert changed_tasks(ansible.playbook(PLAY)) == []  # not named: not lifted
    assert not_ours() == ""

    files = sorted(pool.iterdir())
    for options in ({"pool": "kept"}, {"path": str(pool)}, {"path": str(plain)}):
        message = run_module("vm_backup", vm="guarded", fails=True, **options).message
        assert "named as read-only in /etc/kvmops-backup/read-only" in message
        assert "read-only" in run_module("vm_restore", source=archive, name="copy", fails=True, **options).message
    for options in ({"state": "absent", "force": True}, {"compressed": True}, {"protected": True}):
        assert "read-only" in run_module("backup_archive", archive=archive, fails=True, **options).message
    assert sorted(pool.iterdir()) == files
    assert run_module("backup_verify", archive=archive)["archives"][0]["ok"]
    assert run_module("backup_info", pool="kept")["archives"]
    assert run_module("vm_restore", source=archive, name="copy", path=str(lab.path("restored"))).changed
    lab.adopt("copy")

    assert changed_tasks(ansible.playbook(PLAY, hypervisor_read_only=[], hypervisor_trusted_owners=[]))
    assert not_ours()
    assert run_module("backup_archive", archive=archive, protected=True).changed


def test_a_pool_without_a_path_is_refused(lab: Lab, ansible: Ansible) -> None:
    played = ansible.playbook(PLAY, fails=True, hypervisor_pools=[{"name": "nowhere"}])
    assert "path" in played.tasks[-1].data["msg"] or "path" in str(played.tasks[-1].data)
