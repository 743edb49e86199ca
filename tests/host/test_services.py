# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""systemd: a backup that it runs by a timer, stops, or makes up for; libvirtd restarted in the middle."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.kvmops.backup.tests.host.steps import (
    PATH,
    Points,
    back_up,
    clock,
    is_flat,
    partial_files,
    set_clock,
    wait_for_ssh_command,
)
from ansible_collections.kvmops.backup.tests.lab.host.machine import COLLECTIONS, Machine

VM = "web01"
UNIT = "kvmops-weekly-backup"
SCHEDULE = f"""
- hosts: all
  roles:
    - role: kvmops.backup.schedule
      schedule_command: /opt/ansible/bin/ansible-playbook
      schedule_environment: {{ANSIBLE_COLLECTIONS_PATH: {COLLECTIONS}}}
      schedule_arguments: [-c, local]
      schedule_extra_vars:
        weekly_backup_hosts: all
        weekly_backup_path: {PATH}
        weekly_backup_vms: [{VM}]
        weekly_backup_max_age: 1s
        weekly_backup_bandwidth: "{{{{ bandwidth }}}}"
        ansible_python_interpreter: /usr/bin/python3
"""


@pytest.fixture(scope="module", autouse=True)
def web01(host: Machine) -> None:
    host.call("create_vm", name=VM, autostart=True)


def unit(host: Machine, what: str) -> str:
    return host.ssh(f"systemctl show -P {what} {UNIT}.service").strip()


def wait_until_it_ended(host: Machine, after: str = "0") -> None:
    """Until its service has run, and at another time than before; 0 is how systemd says never."""
    show = f"systemctl show -P ExecMainExitTimestampMonotonic {UNIT}.service"
    wait_for_ssh_command(host, f"test \"$({show})\" != 0 && test \"$({show})\" != '{after}'", 1800)


def points_there(host: Machine) -> list[int]:
    found: list[dict[str, Any]] = host.module("backup_info", path=PATH)["archives"]
    return [point["point"] for archive in found for point in archive["points"]]


def test_libvirtd_is_restarted_in_a_merge(host: Machine) -> None:
    points = Points(host, VM)
    points.take()
    host.call("write_more", name=VM)
    host.call(
        "begin", module="vm_snapshot", arguments={"vm": VM, "snapshot": "all", "state": "absent", "bandwidth": "64k"}
    )
    host.call("wait_for_phase", phases=["merge"])

    host.root("systemctl", "restart", "libvirtd")
    host.call("end")
    host.module("vm_snapshot", vm=VM, snapshot="all", state="absent")

    assert is_flat(host, VM)
    points.assert_all_restore()


def test_the_timers_service_is_stopped_in_mid_backup(host: Machine) -> None:
    host.ansible().playbook(SCHEDULE, bandwidth="32k")
    before = points_there(host)
    host.root("systemctl", "start", "--no-block", f"{UNIT}.service")
    wait_for_ssh_command(host, "sudo grep -qs copy -r /run/kvmops-backup/status", 900)

    host.root("systemctl", "stop", f"{UNIT}.service")

    assert host.call("freeze_status", name=VM) == "thawed"
    assert not partial_files(host)
    assert is_flat(host, VM)
    assert points_there(host) == before


def test_a_run_that_was_missed_is_made_up_for_after_the_boot(host: Machine) -> None:
    host.ansible().playbook(SCHEDULE, bandwidth="0")
    before = points_there(host)
    # The plug is pulled in the evening and put back two days later.
    host.root("systemctl", "stop", f"{UNIT}.timer")
    host.root("touch", "-d", f"@{clock(host) - 2 * 86400:.0f}", f"/var/lib/systemd/timers/stamp-{UNIT}.timer")
    host.root("sync")

    host.reset()
    wait_until_it_ended(host)

    assert unit(host, "Result") == "success", host.ssh(f"sudo journalctl --no-pager -u {UNIT}")
    assert len(points_there(host)) == len(before) + 1
    assert "vm_backup" in host.ssh(f"sudo journalctl --no-pager -u {UNIT}")  # its progress


def test_the_timer_runs_it_at_its_time(host: Machine) -> None:
    host.ansible().playbook(SCHEDULE, bandwidth="0")
    ended = unit(host, "ExecMainExitTimestampMonotonic")
    days = int(clock(host) // 86400)
    set_clock(host, (days + 1) * 86400 + 3600 - 5)  # at 01:00

    wait_until_it_ended(host, ended)

    assert unit(host, "Result") == "success", host.ssh(f"sudo journalctl --no-pager -u {UNIT}")
    assert back_up(host, VM, max_age="1h")["changed"] is False
