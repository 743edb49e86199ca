# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The newest ansible-core, on a newer Python than the hypervisor's, beside the one that all other tests run with."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.lab.modules import Ansible, ModuleResult
from ansible_collections.kvmops.backup.tests.lab.syslog import system_log
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab

TOOLS = Path(os.environ.get("KVMOPS_LAB_CACHE", "/var/cache/kvmops-lab")) / "newest-core/bin"
PLAY = """
- hosts: all
  gather_facts: false
  roles:
    - role: kvmops.backup.weekly_backup
    - role: kvmops.backup.report
"""


@pytest.fixture
def newest() -> Ansible:
    """Its command-line tools."""
    shown = subprocess.run([TOOLS / "ansible", "--version"], capture_output=True, text=True, check=True).stdout
    assert re.search(r"\[core 2\.21\.", shown) and re.search(r"python version = 3\.1[2-9]", shown), shown
    return Ansible(tools=TOOLS)


def test_roles_live_progress_and_errors(
    lab: Lab,
    newest: Ansible,
    run_module: Callable[..., ModuleResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote = tmp_path / "remote"
    monkeypatch.setenv("ANSIBLE_REMOTE_TEMP", str(remote))
    lab.create_vm("web 01", [Disk(size_mib=16, ext4=False)], start=False)
    target, page = lab.path("target"), tmp_path / "page.html"
    places = {"weekly_backup_path": str(target), "report_path": str(target), "report_file": str(page)}
    played = newest.playbook(PLAY, **places)
    rows = played.task("kvmops.backup.weekly_backup : Gather who, what and why").data["ansible_facts"]
    assert [(row["vm"], row["result"]) for row in rows["weekly_backup_result"]] == [("web 01", "full")]
    assert "web 01" in page.read_text(encoding="utf-8") and "no backup" not in page.read_text(encoding="utf-8")

    with system_log() as log:
        slowly = {"bandwidth": "32K", "include_boot_files": False}
        made = newest.module("vm_backup", vm="web 01", path=str(target), **slowly)
    assert made["duration"] > 6 and not [line for line in log if "still running" in line], log
    assert not list(remote.glob("*"))  # Ansible's own temporary files
    assert re.search(r"^\[localhost\] vm_backup web 01: \w+", made.output, re.M), made.output
    assert made.changed and made["mode"] == "full" and Path(made["archive"]["path"]).parent == target

    failed = newest.module("vm_backup", vm="no such VM", path=str(target), fails=True)
    assert failed["what"] == "The VM no such VM" and "virsh list --all" in failed["hint"]
    assert "Traceback" not in failed.output
    assert run_module("backup_verify", path=str(target))["archives"]
