# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What backup_archive never deletes unasked, and who waits for a VM (SPEC A9, B18)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _locks
from ansible_collections.kvmops.backup.tests.lab import fingerprint, modules
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


@pytest.fixture
def off(lab):
    """A VM that is off, with some data on its disk."""
    vm = lab.create_vm("web01", [Disk(size_mib=32, ext4=False)], start=False)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 20M", str(vm.disks()["vda"]))
    return vm


def test_a_disk_of_a_vm_is_no_archive(lab, off, run_module):
    disk = off.disks()["vda"]
    before = fingerprint.files(disk.parent)
    for options in ({"state": "absent"}, {"state": "absent", "force": True}, {"protected": True}):
        assert (
            "backup_archive is for archives"
            in run_module("backup_archive", archive=str(disk), fails=True, **options).message
        )
    assert fingerprint.files(disk.parent) == before
    disguised = lab.path("backups") / "web01.tar"
    disguised.write_bytes(disk.read_bytes())
    refused = run_module("backup_archive", archive=str(disguised), state="absent", fails=True)
    assert "cannot be read as an archive" in refused.message and "force" in refused["hint"]
    assert run_module("backup_archive", archive=str(disguised), state="absent", force=True).changed
    assert fingerprint.names(disguised.parent) == []


def test_the_last_good_archive_stays_beside_a_damaged_one(lab, off, run_module):
    target = lab.path("backups")
    good, bad = (run_module("vm_backup", vm="web01", path=str(target))["archive"]["path"] for _number in range(2))
    with open(bad, "r+b") as file:
        file.seek(8 << 20)
        file.write(b"damage")
    assert not run_module("backup_verify", archive=bad, fail_on_damage=False)["archives"][0]["ok"]
    for check_mode in (True, False):
        refused = run_module("backup_archive", archive=good, state="absent", fails=True, check_mode=check_mode)
        assert "last good archive of web01" in refused.message
    assert run_module("backup_archive", archive=bad, state="absent").changed
    assert fingerprint.names(target) == [good]


def test_a_backup_that_waits_for_its_vm_says_for_whom_and_can_be_stopped(lab, off):
    target, uuid = lab.path("backups"), off.domain.UUIDString()
    argv = modules.module_argv("vm_backup", {"vm": "web01", "path": str(target), "wait_timeout": "4h"})
    with (
        _locks.hold(f"vm-{uuid}", of="The VM web01", what="a merge of hours"),
        subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        ) as process,
    ):
        try:
            status = Path("/run/kvmops-backup/status") / f"web01-{process.pid}.json"
            told = wait_for("its progress", lambda: status.exists() and json.loads(status.read_text())["phase"], 60)
            assert told.startswith(f"wait for a merge of hours (process {os.getpid()} ")
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert time.monotonic() - began < 10
    result = modules.module_result("vm_backup", stdout, stderr)
    assert result.failed and result["cancelled"]
    assert fingerprint.names(target) == []


_ODD = """
- hosts: localhost
  gather_facts: false
  tasks:
    - kvmops.backup.backup_info: {path: "{{ nas }}"}
      register: listed
    - ansible.builtin.set_fact: {odd: "{{ listed.archives[0].path }}"}
    - name: Go on with it
      kvmops.backup.vm_backup: {vm: web01, path: "{{ nas }}", mode: auto}
    - name: Verify
      kvmops.backup.backup_verify: {path: "{{ nas }}", deep: true}
    - name: Protect
      kvmops.backup.backup_archive: {archive: "{{ odd }}", protected: true, notes: from the old share}
    - name: Keep
      kvmops.backup.backup_retention: {path: "{{ nas }}", keep_last: 1}
    - name: Restore
      kvmops.backup.vm_restore: {source: "{{ odd }}", name: copy, path: "{{ restored }}"}
    - name: Restore there
      kvmops.backup.vm_restore: {source: "{{ odd }}", name: other, path: "{{ nas }}"}
      ignore_errors: true
    - name: Remove
      kvmops.backup.backup_archive: {archive: "{{ odd }}", state: absent, force: true}
"""


def test_names_that_are_not_utf8_are_shown_and_can_be_handed_back(lab, off, run_module, ansible):
    share = lab.path("nas")
    nas = os.fsencode(share) + b"/caf\xe9"
    os.mkdir(nas)
    written = run_module("vm_backup", vm="web01", path=str(share), incrementable=True)["archive"]["path"]
    os.rename(written, nas + b"/M\xfcller.tar")
    shown = f"{share}/caf%E9/M%FCller.tar"
    done = ansible.playbook(_ODD, nas=f"{share}/caf%E9", restored=str(lab.path("restored")))
    lab.adopt("copy")
    grown = done.task("Go on with it").data
    assert (grown["mode"], grown["archive"]["path"]) == ("incremental", shown), grown["reason"]
    assert [(each["path"], each["ok"]) for each in done.task("Verify").data["archives"]] == [(shown, True)]
    assert done.task("Keep").data["kept"][0]["path"] == shown
    assert "not UTF-8" in done.task("Restore there").data["msg"]
    assert done.task("Remove").data["archive"]["path"] == shown and os.listdir(nas) == []
    assert any(shown in state.getXMLDesc(0) for state in off.domain.listAllSnapshots(0))
