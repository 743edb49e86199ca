# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An archive that this collection made, in the hands of another user of the host."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._restore import run, transaction
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import RestoreRequest
from ansible_collections.kvmops.backup.plugins.module_utils._restore.transaction import Transaction
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

    fresh = run_module("vm_backup", vm="prey", path=str(place), keep_last=2)
    assert fresh.changed and genuine.exists() and forged.exists() and fresh["removed_archives"] == []
    assert any(f"{forged} is not trusted" in warning for warning in fresh.warnings)
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


def test_a_place_where_others_may_put_files(
    lab: Lab, run_module: Callable[..., ModuleResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused; and taken all the same, it does not become a way to other files of the host."""
    lab.create_vm("prey", [Disk(size_mib=16), Disk("raw", size_mib=16)], start=False)
    archive = run_module("vm_backup", vm="prey", path=str(lab.path("backups")))["archive"]["path"]
    place, secret = lab.path("open"), lab.path("roots") / "secret"
    place.chmod(0o777)
    secret.write_text("root's")
    secret.chmod(0o600)
    before = secret.stat()
    wishes = {"source": archive, "name": "copy", "path": str(place)}
    assert f"chmod o-w {place}" in run_module("vm_restore", fails=True, **wishes).message

    def link_in_place_of(pattern: str) -> None:
        for path in place.glob(pattern):
            path.rename(path.with_name(f"taken-{path.name}"))
            path.symlink_to(secret)

    def swapped_before(function: Any, pattern: str) -> Any:
        return lambda *arguments: (link_in_place_of(pattern), function(*arguments))[1]

    def swapped_after(function: Any, pattern: str) -> Any:
        return lambda *arguments: (function(*arguments), link_in_place_of(pattern))[0]

    finish, rename = Transaction._finish_files, transaction._rename
    stops = (
        (Transaction, "_finish_files", swapped_before(finish, ".*partial*")),
        (Transaction, "_swap", swapped_before(Transaction._swap, ".*partial*")),
        (transaction, "_rename", swapped_after(rename, "[!.t]*")),
    )
    for where, name, stopped in stops:  # the process is stopped there, and another one has its way
        with monkeypatch.context() as patch:
            patch.setattr(where, name, stopped)
            with pytest.raises(TargetError, match="another file has its name by now"):
                run.restore(RestoreRequest(trust=True, **wishes), Context(Progress(), lambda _text: None))
        now = secret.stat()
        assert (secret.read_text(), now.st_uid, now.st_mode) == ("root's", before.st_uid, before.st_mode), name
        assert "copy" not in {domain.name() for domain in lab.connection.listAllDomains()}
        for path in place.iterdir():
            assert path.is_symlink() or path.name.startswith("taken-")
            path.unlink()
    assert run_module("vm_restore", trust=True, **wishes).changed
    assert set(lab.adopt("copy").disks()) == {"vda", "vdb"}
