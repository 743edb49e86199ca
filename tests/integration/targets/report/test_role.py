# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role report, from real VMs and archives to the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ansible_collections.kvmops.backup.tests.lab.modules import Ansible, ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab

PLAY = """
- hosts: all
  gather_facts: false
  roles:
    - role: kvmops.backup.report
"""
SMALL = [Disk(size_mib=16, ext4=False)]


def test_the_page_and_the_metrics_show_what_is_there(
    lab: Lab, ansible: Ansible, run_module: Callable[..., ModuleResult], tmp_path: Path
) -> None:
    target = lab.path("target")
    for name in ("good one", "never", "spoilt"):
        lab.create_vm(name, SMALL, start=False)
    run_module("vm_backup", vm="good one", path=str(target), mode="auto")
    point = run_module("vm_backup", vm="good one", path=str(target), mode="auto")["point"]
    run_module("backup_verify", path=str(target))
    spoilt = Path(run_module("vm_backup", vm="spoilt", path=str(target))["archive"]["path"])
    with open(spoilt, "r+b") as file:
        file.seek(8192)
        file.write(b"\xff")
    run_module("backup_verify", archive=str(spoilt), fail_on_damage=False)
    (target / "foreign.tar").write_bytes(b"no archive")

    page, metrics = tmp_path / "page.html", tmp_path / "kvmops.prom"
    files = {"report_file": str(page), "report_metrics_file": str(metrics)}
    ansible.playbook(PLAY, report_path=str(target), report_title="Lab & more", **files)

    text = page.read_text(encoding="utf-8")
    assert "<h1>Lab &amp; more</h1>" in text
    rows = [row for row in text.split("<tr>") if '<div class="name">' in row]
    assert ["spoilt" in rows[0], "never" in rows[1], "good one" in rows[2]] == [True] * 3
    assert "1 damaged" in rows[0]
    assert "no backup" in rows[1]
    assert "all archives good" in rows[2]
    assert "2 points in the last 35 days" in rows[2]
    assert "foreign.tar" in text
    told = metrics.read_text(encoding="utf-8")
    uuid = str(lab.vm("good one").domain.UUIDString())
    labels = f'host="localhost",vm="good one",uuid="{uuid}"'
    assert f"kvmops_backup_last_good_point_timestamp_seconds{{{labels}}} {point}\n" in told
    assert f"kvmops_backup_ok{{{labels}}} 1\n" in told
    assert "kvmops_backup_unreadable_files 1\n" in told
    assert oct(page.stat().st_mode)[-3:] == "644"


def test_a_host_that_cannot_tell_is_named_and_the_play_fails(ansible: Ansible, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    played = ansible.playbook(PLAY, fails=True, report_file=str(page), report_path=str(tmp_path / "nowhere"))
    assert "nowhere" in played.tasks[-1].data["msg"]
    assert "Nothing is known of localhost" in page.read_text(encoding="utf-8")


def test_no_file_is_an_error(ansible: Ansible) -> None:
    assert "Set report_file" in ansible.playbook(PLAY, fails=True).tasks[-1].data["msg"]
