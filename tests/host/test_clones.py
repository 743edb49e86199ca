# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Thin clones of a template, whose disk AppArmor closes to them for good."""

from __future__ import annotations

from ansible_collections.kvmops.backup.tests.host.steps import Points
from ansible_collections.kvmops.backup.tests.lab.host.machine import Machine


def test_a_running_clone_is_backed_up_merged_and_restored_on_its_template(host: Machine) -> None:
    host.call("create_vm", name="golden", disks=2)
    host.call("shutdown", name="golden")
    host.module("vm_template", vm="golden")
    template = host.call("content", name="golden")
    host.root("mkdir", "-p", "/srv/clones")

    host.module("vm_thin_clone", template="golden", name="clone", path="/srv/clones", start=True)
    host.call("wait_until_up", name="clone")
    points = Points(host, "clone")
    points.take()
    host.call("write_more", name="clone")
    points.take()
    host.module("vm_snapshot", vm="clone", snapshot="all", state="absent")

    assert [len(chain) for chain in host.call("chains", name="clone").values()] == [2, 2]
    host.call("write_more", name="clone")
    points.assert_all_restore()
    assert host.call("content", name="golden") == template
