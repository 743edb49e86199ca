# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two weeks of docs/WEEKLY.md, with a power cycle and a host reset in each."""

from __future__ import annotations

from ansible_collections.kvmops.backup.tests.host.steps import (
    PATH,
    RESTORED,
    Points,
    back_up,
    clock,
    is_flat,
    partial_files,
    set_clock,
)
from ansible_collections.kvmops.backup.tests.lab.host.machine import Machine

DAY_S = 86400
POLICY = {"full_weekday": "sunday", "increment_limit": 7, "keep_days": 30, "max_age": "20h"}
PLAY = f"""
- hosts: all
  roles:
    - role: kvmops.backup.weekly_backup
      weekly_backup_path: {PATH}
"""


def next_sunday(now: float) -> float:
    """One o'clock UTC of the first Sunday after tomorrow."""
    days = int(now // DAY_S) + 2
    return float((days + (3 - days) % 7) * DAY_S + 3600)  # day 0 was a Thursday


def test_two_weeks(host: Machine) -> None:
    """Sundays by the role from outside, the other days by the module with the role's options."""
    host.call("create_vm", name="web01", autostart=True)
    points = Points(host, "web01")
    sunday = next_sunday(clock(host))
    saturdays: list[tuple[str, int, str]] = []

    for day in range(14):
        weekday = day % 7
        set_clock(host, sunday + day * DAY_S)
        host.call("write_more", name="web01")
        if weekday == 3:
            host.call("destroy", name="web01")
            host.call("start", name="web01")
        if weekday == 5:
            arguments = {"vm": "web01", "path": PATH, "mode": "auto", "bandwidth": "32k", **POLICY}
            host.call("begin", module="vm_backup", arguments=arguments)
            host.call("wait_for_phase", phases=["copy"])  # a small layer is one step
            host.reset()
            host.call("wait_until_up", name="web01")
            set_clock(host, sunday + day * DAY_S + 3600)

        if weekday == 0:
            played = host.ansible().playbook(PLAY)
            (outcome,) = played.task("kvmops.backup.weekly_backup : Gather who, what and why").data["ansible_facts"][
                "weekly_backup_result"
            ]
            assert outcome["result"] != "FAILED", played.output
            archives = host.module("backup_info", path=PATH, vm="web01")["archives"]
            newest = max(archives, key=lambda archive: archive["points"][0]["point"])
            points.remember({"archive": newest, "point": newest["points"][0]["point"]})
            assert len(newest["points"]) == 1
        elif weekday == 6:
            done = back_up(host, "web01", **POLICY)
            assert done["mode"] == "incremental"
            assert is_flat(host, "web01")
            saturdays.append((done["archive"]["path"], done["point"], host.call("frozen_digests", name="web01")))
        else:
            assert points.take(**POLICY)["mode"] == "incremental"

    archives = host.module("backup_info", path=PATH, vm="web01")["archives"]
    assert sorted(len(archive["points"]) for archive in archives) == [7, 7]
    assert not partial_files(host)
    points.assert_all_restore()
    for archive, point, frozen in saturdays:  # no layer was left to compare with: the guest tells
        host.module("vm_restore", source=archive, point=point, name="restored", path=RESTORED, start=True)
        host.call("wait_until_up", name="restored")
        assert host.call("booted_digests", name="restored") == frozen
        host.call("destroy", name="restored")
        host.call("remove_vm", name="restored")
