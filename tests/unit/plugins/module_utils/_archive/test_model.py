# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What follows from a point's values."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ansible_collections.kvmops.backup.plugins.module_utils._archive import config
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role, chain_of
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives


def test_the_chain_of_a_disk() -> None:
    below = Member("vda_0.qcow2", Role.DISK, 1, target="vda")
    top = Member("vda_1.snapshot", Role.LAYER, 1, target="vda", parent="vda_0.qcow2", active=True)
    circle = Member("vdb_0.snapshot", Role.LAYER, 1, target="vdb", parent="vdb_0.snapshot", active=True)
    point = Configuration(1, "<domain/>", "web01", "u", (below, top, circle, Member("1_0.memory", Role.MEMORY, 1)))
    assert chain_of(point, "vda") == (top, below)
    assert chain_of(point, "vdb") == (circle,)
    assert chain_of(point, "vdc") == chain_of(point, "") == ()


def test_a_point_with_thousands_of_disks_makes_its_tables_once() -> None:
    """A hostile archive of 5000 disks took 20 s to look at."""
    point = Configuration(1, "<domain/>", "web01", "u", (Member("a.qcow2", Role.DISK, 1, target="vda", active=True),))
    assert point.layers is point.layers and point.tops is point.tops


def test_snapshots_under_the_name_of_test_versions(tmp_path: Path) -> None:
    path = archives.write(tmp_path, archives.SMALL).path
    with open_archive(path) as reader:
        point = reader.point()
        xml = reader.read(point.member_name, 0, reader.entry(point.member_name).size_bytes)
    former = xml.replace(b"kvmops:snapshot", b"kvmops:saved-state").replace(point.digest.encode(), b"0" * 64)
    former = former.replace(b"0" * 64, hashlib.sha256(former).hexdigest().encode())
    found = config.decode(former, point.member_name)
    assert b"saved-state" in former and found is not None
    assert found.snapshots == point.snapshots and found.snapshots
