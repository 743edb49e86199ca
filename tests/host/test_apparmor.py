# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots of ours are merged on hosts whose libvirt denies a VM to write to its backing files."""

from __future__ import annotations

from ansible_collections.kvmops.backup.tests.host.steps import PATH, Points, is_flat, partial_files, snapshots
from ansible_collections.kvmops.backup.tests.lab.host.machine import Machine


def test_the_host_confines_its_vms(host: Machine) -> None:
    host.call("create_vm", name="two disks")
    confined = host.root("aa-status")
    assert "libvirtd" in confined
    assert f"libvirt-{host.root('virsh', 'domuuid', 'two disks').strip()}" in confined


def test_both_disks_of_a_running_vm_are_merged(host: Machine) -> None:
    points = Points(host, "two disks")
    points.take()
    host.call("write_more", name="two disks")

    host.module("vm_snapshot", vm="two disks", snapshot="all", state="absent")

    assert is_flat(host, "two disks")
    host.call("write_more", name="two disks")
    points.assert_all_restore()


def test_a_vm_that_was_power_cycled_with_our_snapshots_is_merged_while_it_runs(host: Machine) -> None:
    host.call("create_vm", name="cycled", disks=1)
    points = Points(host, "cycled")
    points.take()
    host.call("destroy", name="cycled")
    host.call("start", name="cycled")
    assert points.take()["mode"] == "incremental"

    host.module("vm_snapshot", vm="cycled", snapshot="all", state="absent")

    assert is_flat(host, "cycled")
    points.assert_all_restore()


def test_a_vm_in_a_directory_that_libvirt_does_not_know_starts_after_a_revert(host: Machine) -> None:
    """libvirt's helper reads files there by their extension only, and allows QEMU no chain that it could not read."""
    host.root("mkdir", "-p", "/data")
    host.call("create_vm", name="elsewhere", disks=1, start=False, beside="/data")
    points = Points(host, "elsewhere")
    points.take()
    host.call("start", name="elsewhere")
    host.call("write_more", name="elsewhere")
    host.call("destroy", name="elsewhere")

    (made,) = snapshots(host, "elsewhere")
    assert host.module("vm_snapshot", vm="elsewhere", snapshot=made, state="reverted")["changed"]

    host.call("start", name="elsewhere")
    points.assert_all_restore()


def test_a_host_that_was_reset_in_mid_backup_goes_on_with_the_next_one(host: Machine) -> None:
    host.call("create_vm", name="autostarted", disks=1, autostart=True)
    arguments = {"vm": "autostarted", "path": PATH, "bandwidth": "64k"}
    host.call("begin", module="vm_backup", arguments=arguments)
    host.call("wait_for_phase", phases=["copy"], percent=5)

    host.reset()
    host.call("wait_until_up", name="autostarted")
    points = Points(host, "autostarted")
    points.take()

    assert not partial_files(host)
    points.assert_all_restore()
    host.module("vm_snapshot", vm="autostarted", snapshot="all", state="absent")
    assert is_flat(host, "autostarted")
