# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What QEMU says about disks, and when three views agree."""

from __future__ import annotations

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import blockjobs, monitor, views


def disk(qemu, live, persistent, complete=True):
    return views.DiskView("vda", qemu, live, complete, persistent, "node")


AGREE = {
    "running": (disk(("/o", "/b"), ("/o", "/b"), ("/o",)), True),
    "off": (disk((), (), ("/b",), False), True),
    "transient": (disk(("/b",), ("/b",), ()), True),
    "live chain not listed": (disk(("/o", "/b"), ("/o",), ("/o",), False), True),
    "QEMU ahead": (disk(("/o", "/b"), ("/b",), ("/b",)), False),
    "libvirt ahead": (disk(("/b",), ("/o", "/b"), ("/o",)), False),
    "persistent behind": (disk(("/o", "/b"), ("/o", "/b"), ("/b",)), False),
    "other base": (disk(("/o", "/x"), ("/o", "/b"), ("/o",)), False),
    "longer in QEMU": (disk(("/o", "/b", "/t"), ("/o", "/b"), ("/o",)), False),
    "only libvirt has it": (disk((), ("/b",), ("/b",)), False),
}


@pytest.mark.parametrize("name", AGREE)
def test_agree(name):
    found, expected = AGREE[name]
    assert found.agree is expected


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("/p/a.qcow2", "/p/a.qcow2"),
        ('json:{"driver":"qcow2","file":{"driver":"file","filename":"/p/a b"}}', "/p/a b"),
        ('json:{"driver":"raw","file":{"driver":"host_device","filename":"/dev/x"}}', "/dev/x"),
        ("nbd://host/export", ""),
        ('json:{"driver":"rbd","image":"x"}', ""),
        ('json:{"driver":"qcow2","file":{"driver":"file","filename":"/p/very lo...', ""),
        ("json:[5]", ""),
    ],
)
def test_file_names(filename, expected):
    assert monitor.file_of(filename) == expected


def test_chain_of_a_device():
    image = {"filename": "/p/o", "backing-image": {"filename": "/p/b"}}
    devices = [
        {"qdev": "/machine/peripheral/virtio-disk10/virtio-backend", "inserted": {"image": {"filename": "/x"}}},
        {"qdev": "/machine/peripheral/virtio-disk1/virtio-backend", "inserted": {"image": image, "node-name": "n"}},
        {"qdev": "sata0-0-0"},
    ]
    assert views._qemu_chain(devices, "virtio-disk1") == (("/p/o", "/p/b"), "n")
    filtered = [{"qdev": "a", "inserted": {"image": {"filename": "/p/o", "backing-image": image}}}]
    assert views._qemu_chain(filtered, "a")[0] == ("/p/o", "/p/b")
    assert views._qemu_chain(devices, "sata0-0-0") == ((), "")
    assert views._qemu_chain(devices, "") == ((), "")


@pytest.mark.parametrize(
    ("job", "target"),
    [
        ("commit-vda-libvirt-4-format", "vda"),
        ("kvmops-sdb", "sdb"),
        ("create-libvirt-4-format", ""),
        ("job0", ""),
        ("backup-vdc-x", "vdc"),
    ],
)
def test_target_of_a_job(job, target):
    assert blockjobs.target_of(job) == target
