# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks of one VM in another where AppArmor confines both, in libvirt's own directory and outside of it."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.kvmops.backup.tests.host.steps import PATH, is_flat
from ansible_collections.kvmops.backup.tests.lab.host.machine import Machine

LIBVIRTS_OWN = "/var/lib/libvirt/images"


def allowed(host: Machine, name: str) -> str:
    """What AppArmor's profile of a VM says about files."""
    return host.root("cat", f"/etc/apparmor.d/libvirt/libvirt-{host.root('virsh', 'domuuid', name).strip()}.files")


def owners(host: Machine, paths: list[str]) -> str:
    return host.root("stat", "-c", "%n %U:%G %a", *paths)


def digest(host: Machine, vdisk: dict[str, Any]) -> str:
    """Of what the receiver reads; waits until its guest has the disk."""
    serial = vdisk["attached_as"]["serial"]
    find = f'while :; do for d in /sys/block/vd*; do [ "$(cat $d/serial)" = {serial} ] && break 2; done; usleep 100000; done'
    return host.call("shell", name="appliance", script=f"{find}; sha256sum </dev/${{d##*/}}").split()[0]


@pytest.mark.parametrize(("name", "beside"), [("inside", LIBVIRTS_OWN), ("outside", "/data")])
def test_disks_are_attached_and_given_back(host: Machine, name: str, beside: str) -> None:
    if name == "inside":
        host.call("create_vm", name="appliance", disks=1, ports=4)
    host.root("mkdir", "-p", beside)
    host.call("create_vm", name=name, beside=beside)
    paths = [chain[0] for chain in host.call("chains", name=name).values()]
    before, profile = owners(host, paths), allowed(host, "appliance")

    attached = [
        host.module("vdisk_cross_attach", vm="appliance", source_vm=name, vdisk=target)["vdisks"][0]
        for target in ("vda", "vdb")
    ]
    assert all(path in allowed(host, "appliance") for path in paths)
    digests = [digest(host, each) for each in attached]
    host.call("write_more", name=name)
    assert [digest(host, each) for each in attached] == digests

    for each in attached:
        host.module("vdisk_cross_attach", vm="appliance", vdisk=each["id"], state="detached")
    assert is_flat(host, name)
    assert owners(host, paths) == before
    assert not any(path in allowed(host, "appliance") for path in paths), profile
    host.call("write_more", name=name)


def test_a_source_that_was_restarted_meanwhile_is_merged(host: Machine) -> None:
    [vdisk] = host.module("vdisk_cross_attach", vm="appliance", source_vm="outside", vdisk="vda")["vdisks"]
    before = digest(host, vdisk)
    host.call("destroy", name="outside")
    host.call("start", name="outside")
    host.call("write_more", name="outside")
    assert digest(host, vdisk) == before
    host.call("destroy", name="appliance")
    host.call("start", name="appliance")
    assert digest(host, vdisk) == before

    host.module("vdisk_cross_attach", vm="appliance", vdisk=vdisk["id"], state="detached")

    assert is_flat(host, "outside")
    host.call("write_more", name="outside")


def test_what_was_attached_when_the_plug_was_pulled(host: Machine) -> None:
    [vdisk] = host.module("vdisk_cross_attach", vm="appliance", source_vm="inside", vdisk="vda")["vdisks"]

    host.reset()

    [held] = host.module("vdisk_cross_attach_info", another_domain="appliance")["vdisks"]
    assert held == vdisk
    host.call("start", name="appliance")
    host.call("start", name="inside")
    assert digest(host, vdisk)
    host.module("vdisk_cross_attach", vm="appliance", vdisk=vdisk["id"], state="detached")
    assert is_flat(host, "inside")
    host.module("vm_backup", vm="inside", path=PATH)
