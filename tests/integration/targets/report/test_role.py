# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role report, from real VMs and archives to the files."""

from __future__ import annotations

import re
import subprocess
import urllib.request
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
    common = f'report="kvmops",place="{target}"'
    labels = f'{common},host="localhost",vm="good one",uuid="{uuid}"'
    assert f"kvmops_backup_last_good_point_timestamp_seconds{{{labels}}} {point}\n" in told
    assert f"kvmops_backup_ok{{{labels}}} 1\n" in told
    assert f"kvmops_backup_unreadable_files{{{common}}} 1\n" in told
    assert oct(page.stat().st_mode)[-3:] == "644"


REPORTS = """
- hosts: all
  gather_facts: false
  roles:
    - {role: kvmops.backup.report, report_path: "{{ nas }}"}
    - {role: kvmops.backup.report, report_path: "{{ usb }}"}
    - {role: kvmops.backup.report, report_path: "{{ usb }}", report_name: the same place again}
    - {role: kvmops.backup.report, report_path: "{{ usb }}", report_metrics_file: "{{ report_metrics_directory }}/own.prom"}
"""


def test_node_exporter_serves_every_series_of_several_reports(
    lab: Lab, ansible: Ansible, run_module: Callable[..., ModuleResult]
) -> None:
    lab.create_vm("web01", SMALL, start=False)
    nas, usb, textfiles = (lab.path(name) for name in ("nas", "usb", "textfiles"))
    for place in (nas, usb):
        run_module("vm_backup", vm="web01", path=str(place))
    ansible.playbook(REPORTS, nas=str(nas), usb=str(usb), report_metrics_directory=str(textfiles))
    files = sorted(textfiles.iterdir())
    places = [f"kvmops_backup_{str(place)[1:].replace('/', '-')}.prom" for place in (nas, usb)]
    assert [file.name for file in files] == sorted([*places, "kvmops_backup_the-same-place-again.prom", "own.prom"])
    written = sorted(series for file in files for series in all_series(file.read_text()))
    assert len({tuple(name) for name, _value in written}) == len(written) == 4 * 11
    assert [found for found in served(textfiles) if found[0][0].startswith("kvmops_")] == written


def all_series(text: str) -> list[tuple[list[str], float]]:
    """The lines of a textfile, or of what Prometheus gets: the name with its labels in the order of the alphabet, the value."""
    lines = [re.fullmatch(r"(\w+)(?:{(.*)})? (\S+)", line) for line in text.splitlines() if line[0] != "#"]
    found = [(line[1], re.findall(r'\w+="[^"]*"', line[2] or ""), line[3]) for line in lines if line]
    return sorted(([name, *sorted(labels)], float(value)) for name, labels, value in found)


def served(textfiles: Path) -> list[tuple[list[str], float]]:
    """What the exporter makes of a directory."""
    argv = ["prometheus-node-exporter", "--collector.disable-defaults", "--collector.textfile"]
    argv += [f"--collector.textfile.directory={textfiles}", "--web.listen-address=127.0.0.1:0"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as exporter:
        try:
            assert exporter.stderr
            log = iter(exporter.stderr.readline, "")
            address = next(line.split("address=")[1].split()[0] for line in log if "Listening on" in line)
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
                return all_series(answer.read().decode())
        finally:
            exporter.terminate()


def test_a_host_that_cannot_tell_is_named_and_the_play_fails(ansible: Ansible, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    played = ansible.playbook(PLAY, fails=True, report_file=str(page), report_path=str(tmp_path / "nowhere"))
    assert "nowhere" in played.tasks[-1].data["msg"]
    assert "Nothing is known of localhost" in page.read_text(encoding="utf-8")


def test_no_file_is_an_error(ansible: Ansible) -> None:
    assert "Set report_file" in ansible.playbook(PLAY, fails=True).tasks[-1].data["msg"]
