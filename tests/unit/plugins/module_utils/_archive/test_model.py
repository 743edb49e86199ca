# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What follows from a point's values."""

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role, chain_of


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
