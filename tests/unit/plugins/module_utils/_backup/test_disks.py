# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of disks, against docs/DISKS.md: every row of the document is a case here, and every case a row there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._backup.disks import DiskVerdict, Image, judge
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import Disk
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import PlaceKind

DOCUMENT = Path(__file__).parents[5] / "docs" / "DISKS.md"

FILE = Disk(
    target="vda", device="disk", type="file", path="/images/web.qcow2", format="qcow2", bus="virtio", readonly=False,
    shareable=False, transient=False, pool="", volume="", chain=(), chain_complete=True, encrypted=False,
    has_data_file=False, has_slices=False, network="", mirror="", mirror_ready=False, alias="", serial="", index="",
)  # fmt: skip
QCOW2 = Image("/images/web.qcow2", "qcow2", 100, 100, 1000)
RAW = replace(QCOW2, format="raw")
DEVICE = replace(RAW, is_device=True, kind=PlaceKind.BLOCK)
CDROM = replace(FILE, device="cdrom", readonly=True)

# row of docs/DISKS.md: (disk, image, snapshots, include_iso)
CASES = {
    "file, qcow2": [(FILE, QCOW2, False, True), (FILE, QCOW2, True, True)],
    "file, raw": [(FILE, RAW, False, True)],
    "volume of a directory pool": [(replace(FILE, type="volume", pool="p", volume="v"), QCOW2, False, True)],
    "block device, partition or multipath device, raw": [(replace(FILE, type="block"), DEVICE, False, True)],
    "block device with qcow2 on it": [(replace(FILE, type="block"), replace(DEVICE, format="qcow2"), False, True)],
    "on LVM, thin LVM or shared LVM": [
        (FILE, replace(DEVICE, kind=kind), False, True)
        for kind in (PlaceKind.LVM, PlaceKind.THIN_LVM, PlaceKind.SHARED_LVM)
    ],
    "on ZFS, VM without snapshots": [(FILE, replace(QCOW2, kind=PlaceKind.ZFS), False, True)],
    "on ZFS, VM with snapshots": [(FILE, replace(QCOW2, kind=PlaceKind.ZFS), True, True)],
    "network disk (iSCSI, RBD, NBD, …), NVMe, vhost-user, vDPA": [
        (replace(FILE, type=kind, path="", network="rbd/pool/image"), None, False, True)
        for kind in ("network", "nvme", "vhostuser", "vhostvdpa", "dir")
    ],
    "other image formats (vmdk, vdi, vpc, …)": [
        (FILE, replace(QCOW2, format=fmt), False, True) for fmt in ("vmdk", "vdi", "vpc", "qed", "luks")
    ],
    "qcow2 with an external data file": [
        (FILE, replace(QCOW2, has_data_file=True), False, True),
        (replace(FILE, has_data_file=True), QCOW2, False, True),
    ],
    "slice of a larger file": [(replace(FILE, has_slices=True), RAW, False, True)],
    "encrypted (LUKS)": [(replace(FILE, encrypted=True), QCOW2, False, True)],
    "LUN (`device='lun'`)": [(replace(FILE, device="lun", type="block"), DEVICE, False, True)],
    "transient": [(replace(FILE, transient=True), QCOW2, False, True)],
    "shareable and writable": [(replace(FILE, shareable=True), RAW, False, True)],
    "read-only": [(replace(FILE, readonly=True), QCOW2, False, True)],
    "source that does not exist": [(FILE, None, False, True), (replace(FILE, path=""), None, False, True)],
    "with somebody else's block job": [(replace(FILE, mirror="copy"), QCOW2, False, True)],
    "CD image (`include_iso: true`)": [(CDROM, RAW, False, True)],
    "CD image (`include_iso: false`)": [(CDROM, RAW, False, False)],
    "floppy": [(replace(FILE, device="floppy"), RAW, False, True)],
    "empty CD or floppy drive": [
        (replace(CDROM, path=""), None, False, True),
        (replace(CDROM, path=""), None, False, False),
    ],
}

WORDS = {
    "stored": {DiskVerdict.FREEZE, DiskVerdict.COPY, DiskVerdict.ISO},
    "refused": {DiskVerdict.REFUSE},
    "skipped": {DiskVerdict.SKIP},
    "nothing": {DiskVerdict.NOTHING},
    "as": {DiskVerdict.FREEZE, DiskVerdict.COPY},
}


def rows():
    """(kind, running, off) of the document's table."""
    found = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return [row for row in found if row[0] != "kind of disk"]


def test_same_rows():
    assert [row[0] for row in rows()] == list(CASES)


@pytest.mark.parametrize(("kind", "running", "off"), rows())
def test_row(kind, running, off):
    for is_running, told in ((True, running), (False, off)):
        for disk, image, snapshots, include_iso in CASES[kind]:
            judgement = judge(disk, image, running=is_running, snapshots=snapshots, include_iso=include_iso)
            assert judgement.verdict in WORDS[told.split()[0].rstrip(",")], (kind, is_running, judgement)
            assert bool(judgement.reason) == (judgement.verdict in (DiskVerdict.SKIP, DiskVerdict.REFUSE))
            assert ("warning" in told) == bool(judgement.warning)


def test_only_a_running_writable_disk_is_frozen():
    assert judge(FILE, QCOW2, running=True, snapshots=False, include_iso=True).verdict is DiskVerdict.FREEZE
    assert judge(FILE, QCOW2, running=False, snapshots=False, include_iso=True).verdict is DiskVerdict.COPY
    read_only = replace(FILE, readonly=True)
    assert judge(read_only, QCOW2, running=True, snapshots=False, include_iso=True).verdict is DiskVerdict.COPY


@pytest.mark.parametrize("kind", ["lvm", "thin_lvm", "shared_lvm"])
def test_a_layer_below_on_lvm_is_refused_too(kind):
    below = [
        replace(QCOW2, path="/images/base.qcow2"),
        replace(DEVICE, path="/dev/vg0/base", kind=PlaceKind(kind), group="vg0"),
    ]
    judgement = judge(FILE, QCOW2, running=False, snapshots=False, include_iso=True, below=below)
    assert judgement.verdict is DiskVerdict.REFUSE and "/dev/vg0/base" in judgement.reason and "vg0" in judgement.reason


def test_a_disk_in_a_read_only_place_is_copied_but_not_frozen():
    image = replace(QCOW2, read_only="/images is named as read-only")
    for running, incrementable, verdict in (
        (False, False, DiskVerdict.COPY), (True, False, DiskVerdict.REFUSE), (False, True, DiskVerdict.REFUSE),
    ):  # fmt: skip
        arguments = {"running": running, "snapshots": False, "include_iso": True, "incrementable": incrementable}
        assert judge(FILE, image, **arguments).verdict is verdict
        assert judge(replace(FILE, readonly=True), image, **arguments).verdict is DiskVerdict.COPY
