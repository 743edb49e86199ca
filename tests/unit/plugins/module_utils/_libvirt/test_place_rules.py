# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of places: every kind, every use, every state of the VM; what `lvs` reports."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import lvm, storage
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import (
    NAMES,
    PlaceKind,
    Use,
    objection,
)

# What may be done in a place that can be written to, one letter for each: b backup of a VM that is off, B of one that runs,
# s and S the same for a VM with snapshots, i I t T as before for incrementable backups, r restore target, a archive target.
ALLOWED = {
    "dir": "b B s S i I t T r a",
    "network_fs": "b B s S i I t T r a",
    "zfs": "b B r a",
    "zvol": "b",
    "block": "b s",
    "lvm": "",
    "thin_lvm": "",
    "shared_lvm": "",
    "network": "",
}
LETTERS = {("backup", False): "bB", ("backup", True): "sS", ("increment", False): "iI", ("increment", True): "tT"}
NEEDS_WRITING = ["B", "S", "i", "I", "t", "T", "r", "a"]


@pytest.mark.parametrize("kind", PlaceKind)
@pytest.mark.parametrize("use", Use)
@pytest.mark.parametrize(("running", "snapshots", "read_only"), list(itertools.product((False, True), repeat=3)))
def test_every_combination(kind, use, running, snapshots, read_only):
    letter = LETTERS[use.value, snapshots][running] if (use.value, snapshots) in LETTERS else use.value[0]
    allowed = letter in ALLOWED[kind.value].split() and not (read_only and letter in NEEDS_WRITING)
    why = objection(
        kind,
        use,
        running=running,
        snapshots=snapshots,
        read_only="/mnt is mounted read-only" if read_only else "",
    )
    assert (why == "") is allowed, why
    assert NAMES[kind]


def row(path, **more):
    values = {
        "lv_path": path, "lv_dm_path": "", "vg_name": "vg0", "segtype": "linear", "vg_lock_type": "", "vg_clustered": "",
        "lv_kernel_major": "-1", "lv_kernel_minor": "-1",
    }  # fmt: skip
    return {**values, **more}


REPORT = json.dumps(
    {
        "report": [
            {
                "lv": [
                    row("/dev/vg0/a", lv_dm_path="/dev/mapper/vg0-a"),
                    row("/dev/vg0/b", segtype="thin"),
                    row("", segtype="thin-pool"),
                    row("/dev/vg0/r", segtype="raid1"),
                    row("/dev/vg1/c", vg_name="vg1", vg_lock_type="sanlock", segtype="thin"),
                    row("/dev/vg2/d", vg_name="vg2", vg_clustered="clustered"),
                    row("/dev/vg3/e", vg_name="vg3", vg_lock_type="none"),
                    row("/dev/vg3/n", vg_name="vg3", lv_kernel_major="1", lv_kernel_minor="3"),
                ]
            }
        ]
    }
)


@pytest.mark.parametrize(
    ("path", "kind", "group"),
    [
        ("/dev/vg0/a", PlaceKind.LVM, "vg0"),
        ("/dev/mapper/vg0-a", PlaceKind.LVM, "vg0"),
        ("/dev/vg0/b", PlaceKind.THIN_LVM, "vg0"),
        ("/dev/vg0/r", PlaceKind.LVM, "vg0"),
        ("/dev/vg1/c", PlaceKind.SHARED_LVM, "vg1"),
        ("/dev/vg2/d", PlaceKind.SHARED_LVM, "vg2"),
        ("/dev/vg3/e", PlaceKind.LVM, "vg3"),
        ("/dev/null", PlaceKind.LVM, "vg3"),  # by its number: 1, 3
        ("/dev/vg2", PlaceKind.SHARED_LVM, "vg2"),
        ("/dev/sdz", None, ""),
        ("/dev/vg0/none", None, ""),
        ("", None, ""),
    ],
)
def test_logical_volumes(path, kind, group):
    found = lvm.find(path, lvm.parse(REPORT))
    assert (found.kind, found.volume_group) == (kind, group) if kind else found is None


def test_a_path_is_described_by_what_lvs_says(monkeypatch):
    monkeypatch.setattr(lvm, "volumes", lambda: lvm.parse(REPORT))
    pool = storage.Pool("fast", "logical", False, "/dev/vg0", "vg0")
    monkeypatch.setattr(storage, "pools", lambda _conn: (pool,))
    place = storage.describe(object(), "/dev/vg0/b")
    assert (place.kind, place.group, place.pool, place.pool_active) == (PlaceKind.THIN_LVM, "vg0", "fast", False)
    assert place.description == "thin LVM (volume group vg0, pool fast of type logical)"
    assert storage.describe(object(), "/dev/vg0/gone").kind is PlaceKind.LVM  # lvs does not see it, the pool has it
    assert storage.describe(object(), "/dev/zvol/tank/x").kind is PlaceKind.ZVOL


def test_lvs_that_fails_is_not_taken_for_no_lvm(monkeypatch):
    monkeypatch.setattr(lvm.os, "geteuid", lambda: 0)
    failed = SimpleNamespace(returncode=5, stdout="", stderr="cannot open the devices file")
    monkeypatch.setattr(lvm.subprocess, "run", lambda *_args, **_more: failed)
    with pytest.raises(SourceError, match="cannot open the devices file"):
        lvm.volumes()


def test_volumes_of_pools_that_are_not_active():
    logical = storage.Pool("fast", "logical", False, "/dev/vg0", "vg0")
    assert storage.expected_path(logical, "web") == "/dev/vg0/web"
    zfs = storage.Pool("tank", "zfs", False, "/dev/zvol/tank", "tank")
    assert storage.expected_path(zfs, "web") == "/dev/zvol/tank/web"
    assert storage.expected_path(storage.Pool("d", "dir", False, "/d", ""), "web") == ""
