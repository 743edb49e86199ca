# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbooks of the collection, run by their names as a user runs them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive import archive_locks
from ansible_collections.kvmops.backup.tests.lab import daemons
from ansible_collections.kvmops.backup.tests.lab.modules import Ansible, run_module
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm


@dataclass(frozen=True)
class BackedUp:
    """An off VM with two archives in one directory."""

    lab: Lab
    vm: LabVm
    archives: Path
    newest: Path


@pytest.fixture(scope="module")
def backed_up(module_lab: Lab) -> Iterator[BackedUp]:
    vm = module_lab.create_vm("web 01", [Disk(size_mib=16)], start=False)
    archives = module_lab.path("archives")
    run_module("vm_backup", vm=vm.name, path=str(archives))
    newest = run_module("vm_backup", vm=vm.name, path=str(archives), compress=True)["archive"]["path"]
    yield BackedUp(module_lab, vm, archives, Path(newest))


def test_quickstart_shows_the_life_of_a_backup_and_leaves_nothing(lab: Lab, ansible: Ansible) -> None:
    directory = lab.directory / "quickstart"
    before = {domain.name() for domain in lab.connection.listAllDomains()}
    settings = Path("/etc/libvirt/qemu.conf")
    of_the_lab = settings.read_text()
    settings.write_text(of_the_lab.replace("namespaces = []\n", ""))
    of_a_host = settings.read_bytes()
    daemons.kill()

    played = ansible.playbook("kvmops.backup.quickstart", quickstart_directory=str(directory))

    said = "\n".join(played.task("What was done").data["msg"])
    assert "files of the guest are what they were at the freeze" in said
    assert "coverage full, 0 damaged" in said
    assert not directory.exists()
    assert {domain.name() for domain in lab.connection.listAllDomains()} == before
    assert settings.read_bytes() == of_a_host != of_the_lab.encode()
    settings.write_text(of_the_lab)


def test_quickstart_cleans_up_when_it_fails(lab: Lab, ansible: Ansible) -> None:
    directory = lab.directory / "quickstart"
    # A copy of that name cannot be made: it is the original's.
    played = ansible.playbook(
        "kvmops.backup.quickstart",
        fails=True,
        quickstart_directory=str(directory),
        quickstart_copy="kvmops-quickstart",
    )
    failed = [task for task in played.tasks if task.status == "failed"]
    assert [task.task for task in failed] == ["Restore it beside the original under a new name"]
    assert "kvmops-quickstart" in failed[0].data["msg"]
    assert not directory.exists()
    assert "kvmops-quickstart" not in {domain.name() for domain in lab.connection.listAllDomains()}


def test_verify_says_that_all_is_well(backed_up: BackedUp, ansible: Ansible) -> None:
    played = ansible.playbook(
        "kvmops.backup.verify", verify_path=str(backed_up.archives), verify_deep=True, verify_become=False
    )
    assert played.task("Fail if there is damage").data["msg"] == "2 archives checked, no damage"


def test_verify_fails_with_the_name_of_the_damaged_archive(backed_up: BackedUp, ansible: Ansible) -> None:
    damaged = backed_up.lab.path("damaged")
    whole = damaged / "whole.tar.zst"
    bad = damaged / "bad.tar.zst"
    content = backed_up.newest.read_bytes()
    whole.write_bytes(content)
    middle = len(content) // 3
    bad.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])

    played = ansible.playbook("kvmops.backup.verify", fails=True, verify_path=str(damaged), verify_become=False)

    said = played.task("Fail if there is damage").data["msg"]
    assert f"Archive {bad}: it is damaged: point" in said and "lost" in said
    assert str(whole) not in said


def test_verify_tells_of_an_archive_that_it_could_not_check(backed_up: BackedUp, ansible: Ansible) -> None:
    place = backed_up.lab.path("at-work")
    for name in ("free.tar.zst", "taken.tar.zst"):
        shutil.copy(backed_up.newest, place / name)
    with archive_locks.alone(str(place / "taken.tar.zst")):
        played = ansible.playbook("kvmops.backup.verify", fails=True, verify_path=str(place), verify_become=False)
    said = played.task("Fail if there is damage").data["msg"]
    assert "damaged" not in said and f"Archive {place}/taken.tar.zst: another process" in said
    handed_on = played.task("Hand the result to the job's artifacts").data["ansible_stats"]["data"]
    assert handed_on == {"verified": [f"{place}/free.tar.zst"], "damaged": []}


def test_restore_takes_the_newest_archive_of_a_vm(backed_up: BackedUp, ansible: Ansible) -> None:
    target = backed_up.lab.path("restored")
    played = ansible.playbook(
        "kvmops.backup.restore",
        restore_vm=backed_up.vm.name,
        restore_from_path=str(backed_up.archives),
        restore_path=str(target),
        restore_name="web 01 copy",
        restore_become=False,
    )
    copy = backed_up.lab.adopt("web 01 copy")
    assert copy.disks()["vda"].parent == target
    assert played.task("Restore it").data["invocation"]["module_args"]["source"] == str(backed_up.newest)


def chosen(ansible: Ansible, vm: str, places: Path) -> str:
    """The archive that the playbook would restore."""
    played = ansible.playbook(
        "kvmops.backup.restore",
        check_mode=True,
        restore_vm=vm,
        restore_from_path=str(places),
        restore_path=str(places),
        restore_name="copy",
        restore_become=False,
    )
    return str(played.task("Restore it").data["invocation"]["module_args"]["source"])


def test_restore_of_a_renamed_vm_takes_its_newest_good_archive(backed_up: BackedUp, ansible: Ansible) -> None:
    """The new name comes before the old one in the alphabet; what a verification has found to be damaged is no candidate."""
    places = backed_up.lab.path("renamed")
    older = run_module("vm_backup", vm="web 01", path=str(places))["archive"]["path"]
    backed_up.vm.domain.rename("a 01")
    try:
        newest = run_module("vm_backup", vm="a 01", path=str(places))["archive"]["path"]
        assert chosen(ansible, "a 01", places) == newest
        with open(newest, "r+b") as file:
            file.seek(8192)
            byte = file.read(1)
            file.seek(8192)
            file.write(bytes([byte[0] ^ 1]))
        run_module("backup_verify", archive=newest, fails=True)
        assert chosen(ansible, "a 01", places) == older
    finally:
        backed_up.lab.connection.lookupByName("a 01").rename("web 01")


def test_restore_without_an_archive_says_so(backed_up: BackedUp, ansible: Ansible) -> None:
    empty = backed_up.lab.path("empty")
    played = ansible.playbook(
        "kvmops.backup.restore", fails=True, restore_vm="web 01", restore_from_path=str(empty), restore_become=False
    )
    assert "No good archive of web 01" in played.tasks[-1].data["msg"]


def test_restore_of_a_point_takes_an_archive_that_has_it(backed_up: BackedUp, ansible: Ansible) -> None:
    """The newest archive is not the one: it begins after the point."""
    older = next(path for path in backed_up.archives.iterdir() if path.suffix == ".tar")
    point = run_module("backup_info", archive=str(older))["archives"][0]["points"][0]["point"]
    assert point < run_module("backup_info", archive=str(backed_up.newest))["archives"][0]["points"][0]["point"]
    asked = {"restore_vm": backed_up.vm.name, "restore_from_path": str(backed_up.archives), "restore_become": False}
    played = ansible.playbook(
        "kvmops.backup.restore", check_mode=True, restore_point=point, restore_name="copy", **asked
    )
    assert played.task("Restore it").data["invocation"]["module_args"]["source"] == str(older)
    played = ansible.playbook("kvmops.backup.restore", fails=True, restore_point=point - 1, **asked)
    assert f"No good archive of web 01 with the point {point - 1} was found" in played.tasks[-1].data["msg"]


TWO_HOSTS = """
- hosts: localhost
  gather_facts: false
  tasks:
    - name: Another hypervisor
      ansible.builtin.add_host:
        name: kvm02
- ansible.builtin.import_playbook: kvmops.backup.restore
"""


def test_restore_is_for_one_host(backed_up: BackedUp, ansible: Ansible) -> None:
    """Both see the archives: each would define the VM."""
    asked = {"restore_source": str(backed_up.newest), "restore_name": "copy", "restore_become": False}
    played = ansible.playbook(TWO_HOSTS, fails=True, check_mode=True, **asked)
    failed = played.tasks[-1]
    assert (failed.task, failed.status) == ("Stop if it is not one host", "failed")
    assert all(word in failed.data["msg"] for word in ("localhost", "kvm02", "--limit"))
    played = ansible.playbook(TWO_HOSTS, check_mode=True, restore_hosts="kvm02", **asked)
    assert played.task("Restore it").status == "ok"
