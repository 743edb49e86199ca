# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An archive that this collection made, in the hands of another user of the host."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Callable

from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab

MALLORY = 1234567
OPTIONS = (
    "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><qemu:arg value='-S'/></qemu:commandline>"
)


def test_it_brings_nothing_and_counts_for_nothing(lab: Lab, run_module: Callable[..., ModuleResult]) -> None:
    vm = lab.create_vm("prey", [Disk(size_mib=16)], start=False)
    lab.connection.defineXML(vm.xml(inactive=True).replace("</domain>", f"{OPTIONS}</domain>"))
    vm.domain.setAutostart(1)
    place = lab.path("backups")
    place.chmod(0o1777)  # others may put files there, and take away their own
    genuine = Path(run_module("vm_backup", vm="prey", path=str(place))["archive"]["path"])
    later = Path(run_module("vm_backup", vm="prey", path=str(place))["archive"]["path"])
    forged = place / "forged.tar"
    shutil.move(later, forged)
    os.chown(forged, MALLORY, -1)

    fresh = run_module("vm_backup", vm="prey", path=str(place), keep_last=2, max_age="1s")
    assert fresh.changed and genuine.exists() and forged.exists() and fresh["removed_archives"] == []
    assert any(f"{forged} is not ours" in warning for warning in fresh.warnings)
    assert not run_module("backup_retention", path=str(place), keep_last=2).changed
    os.unlink(fresh["archive"]["path"])
    os.unlink(genuine)
    assert run_module("vm_backup", vm="prey", path=str(place), max_age="1h", check_mode=True).changed

    vm.domain.undefine()
    wishes = {"source": str(forged), "path": str(lab.path("restored"))}
    refused = run_module("vm_restore", start=True, fails=True, **wishes).message
    assert "commandline -S" in refused and not os.listdir(wishes["path"])
    done = run_module("vm_restore", **wishes)
    assert "belongs to the user 1234567" in done.warnings[0]
    assert "-S" not in vm.xml(inactive=True) and not vm.domain.autostart() and not vm.is_running()
    assert not run_module("vm_restore", **wishes).changed
    vm.domain.undefine()
    shutil.rmtree(wishes["path"])
    os.mkdir(wishes["path"], 0o711)
    run_module("vm_restore", trust=True, **wishes)
    assert "-S" in vm.xml(inactive=True) and vm.domain.autostart()
