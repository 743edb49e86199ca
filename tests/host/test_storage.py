# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Targets on NFS, and disks on real logical volumes."""

from __future__ import annotations

import pytest

from ansible_collections.kvmops.backup.tests.host.steps import Points, back_up, is_flat, partial_files
from ansible_collections.kvmops.backup.tests.lab.host.machine import Machine

VM = "web01"


@pytest.fixture(scope="module", autouse=True)
def web01(host: Machine) -> None:
    host.call("create_vm", name=VM)


@pytest.fixture(scope="module")
def exports(host: Machine) -> None:
    """Two exports of this host. The second is also mounted from a network of its own, so that NFS sees another host there: two
    mounts of one client share what the server has delegated to it, locks too."""
    host.ssh(
        "sudo mkdir -p /srv/nfs/squashed /srv/nfs/trusted /mnt/squashed /mnt/trusted /mnt/elsewhere"
        " && sudo chown nobody /srv/nfs/squashed && sudo chmod 700 /srv/nfs/squashed"
        " && sudo mkdir -p /etc/kvmops-backup && echo nobody /mnt/squashed | sudo tee /etc/kvmops-backup/trusted-owners >/dev/null"
        " && printf '%s\\n' '/srv/nfs/squashed 127.0.0.1(rw,fsid=1,root_squash,no_subtree_check)'"
        " '/srv/nfs/trusted 127.0.0.1(rw,fsid=2,no_root_squash,no_subtree_check)"
        " 192.0.2.2(rw,fsid=2,no_root_squash,no_subtree_check)'"
        " | sudo tee /etc/exports >/dev/null"
        " && sudo systemctl restart nfs-server"
        " && for name in squashed trusted; do sudo mount -t nfs4 127.0.0.1:/srv/nfs/$name /mnt/$name; done"
    )
    host.ssh(
        "sudo ip netns add other && sudo ip link add here type veth peer name there netns other"
        " && sudo ip addr add 192.0.2.1/24 dev here && sudo ip link set here up"
        " && sudo ip netns exec other sh -c 'ip addr add 192.0.2.2/24 dev there && ip link set there up"
        " && echo other >/sys/fs/nfs/net/nfs_client/identifier'"
        " && sudo nsenter --net=/run/netns/other mount -t nfs4 192.0.2.1:/srv/nfs/trusted /mnt/elsewhere"
    )


@pytest.mark.parametrize("place", ["/mnt/squashed", "/mnt/trusted"])
def test_a_target_on_nfs(host: Machine, exports: None, place: str) -> None:
    points = Points(host, VM)
    points.take(path=place)
    host.call("write_more", name=VM)
    points.take(path=place)

    points.assert_all_restore()

    host.module("vm_snapshot", vm=VM, snapshot="all", state="absent")
    assert is_flat(host, VM)


def test_slots_of_a_target_count_what_another_host_does_there(host: Machine, exports: None) -> None:
    host.call("create_vm", name="other", disks=1)
    arguments = {"vm": VM, "path": "/mnt/trusted", "bandwidth": "64k", "max_parallel": 1}
    host.call("begin", module="vm_backup", arguments=arguments)
    host.call("wait_for_phase", phases=["copy"])

    refused = host.module("vm_backup", vm="other", path="/mnt/elsewhere", max_parallel=1, wait_timeout="0", fails=True)

    assert VM in refused["msg"]
    assert not host.call("end").get("failed")
    back_up(host, "other", path="/mnt/elsewhere", max_parallel=1, wait_timeout="0")


def test_disks_on_logical_volumes_are_refused_while_the_vm_runs(host: Machine) -> None:
    host.ssh(
        "sudo pvcreate -q /dev/vdb && sudo vgcreate -q vg /dev/vdb && sudo lvcreate -q -n linear -L 16M vg"
        " && sudo lvcreate -q --type thin-pool -n pool -L 100M vg && sudo lvcreate -q -n thin -V 16M --thinpool vg/pool"
        " && for name in linear thin; do sudo mke2fs -q /dev/vg/$name; done"
    )
    for name in ("linear", "thin"):
        host.call("create_vm", name=f"on {name}", volumes=[f"/dev/vg/{name}"], disks=1)

        refused = host.module("vm_backup", vm=f"on {name}", path="/srv/backup", fails=True)

        assert f"/dev/vg/{name}" in refused["msg"]
        assert refused["hint"]
        assert not partial_files(host)
        assert host.call("is_running", name=f"on {name}")
