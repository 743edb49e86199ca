# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a restored VM starts with the host: as the original did where that is gone, also after a kill in mid-restore."""

from __future__ import annotations

from typing import Callable

import pytest

from ansible_collections.kvmops.backup.tests.lab import kills
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm

Run = Callable[..., ModuleResult]


def archived(lab: Lab, run_module: Run, name: str) -> tuple[LabVm, str]:
    """A VM that starts with the host, and its archive."""
    vm = lab.create_vm(name, [Disk(size_mib=16, ext4=False)], start=False)
    vm.domain.setAutostart(1)
    return vm, str(run_module("vm_backup", vm=name, path=str(lab.path("backups")))["archive"]["path"])


def lose(vm: LabVm) -> None:
    """The VM and its disk are gone."""
    disk = vm.disks()["vda"]
    vm.remove()
    disk.unlink()


def here(lab: Lab) -> dict[str, int]:
    """Every VM, and whether it starts with the host."""
    return {domain.name(): domain.autostart() for domain in lab.connection.listAllDomains()}


def test_only_where_the_original_is_gone(lab: Lab, run_module: Run) -> None:
    vm, archive = archived(lab, run_module, "gateway")
    run_module("vm_restore", source=archive, name="copy", path=str(lab.path("copies")))
    lab.adopt("copy")
    assert here(lab) == {"gateway": 1, "copy": 0}
    vm.domain.setAutostart(0)
    assert run_module("vm_restore", source=archive, force=True).changed
    assert here(lab) == {"gateway": 0, "copy": 0}  # what its administrator has decided since
    lose(vm)
    run_module("vm_restore", source=archive, check_mode=True)
    assert run_module("vm_restore", source=archive).changed
    back = lab.adopt("gateway")
    assert here(lab) == {"gateway": 1, "copy": 0}
    back.domain.setAutostart(0)
    assert not run_module("vm_restore", source=archive).changed and not back.domain.autostart()


@pytest.mark.parametrize(
    ("method", "number", "when", "stands"),
    [
        ("virConnect.defineXML", 1, "after", False),
        ("virConnect.defineXML", 2, "before", False),
        ("virConnect.defineXML", 2, "after", True),
        ("virDomain.setAutostart", 1, "before", True),
    ],
)
def test_of_a_lost_vm_whose_restore_is_killed(
    lab: Lab, run_module: Run, method: str, number: int, when: str, stands: bool
) -> None:
    vm, archive = archived(lab, run_module, "lost")
    lose(vm)
    kills.kill_around_libvirt_call("vm_restore", {"source": archive}, method, when, number)
    assert here(lab) == {"lost": 0}
    settled = run_module("vm_restore", source=archive)
    lab.adopt("lost")
    assert settled.changed and (settled["bytes_written"] == 0) is stands and here(lab) == {"lost": 1}


@pytest.mark.parametrize("number", [1, 2])
def test_of_a_vm_that_was_renamed_and_is_replaced_under_its_former_name(lab: Lab, run_module: Run, number: int) -> None:
    """libvirt renames nothing by defining it: the old one goes before the new one comes, and has to come back as it was."""
    vm, archive = archived(lab, run_module, "former")
    vm.domain.rename("renamed")
    lab.adopt("renamed")
    asked = {"source": archive, "uuid": "keep", "mac": "keep"}
    kills.kill_around_libvirt_call("vm_restore", {**asked, "force": True}, "virConnect.defineXML", "after", number)
    assert here(lab) == {"former": 0}
    committed = number == 2
    settled = run_module("vm_restore", **asked, fails=not committed)
    if not committed:
        assert "that of the VM renamed" in settled.message and here(lab) == {"renamed": 1}
        assert run_module("vm_restore", **asked, force=True).changed
    assert here(lab) == {"former": 1}
