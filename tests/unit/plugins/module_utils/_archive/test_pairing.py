# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose image is which, in archives of tools that name images in their own way: known for sure, or left to the user."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.pairing import DefinedDisk, Pairs, pair


def image(name: str, image_format: str = "qcow2", parent: str = "") -> Member:
    return Member(name, Role.LAYER if parent else Role.DISK, 1, image_format=image_format, parent=parent)


def paired(disks: Mapping[str, str], members: list[Member], said: Mapping[str, str] | None = None) -> Pairs:
    """`disks`: path and format by target, as in ``vda: /vms/web01.qcow2``."""
    found = []
    for target, path in disks.items():
        file, _blank, image_format = path.partition(" ")
        network = "" if file.startswith("/") else file
        found.append(DefinedDisk(target, "" if network else file, "disk", image_format or "qcow2", network))
    return pair(found, {each.name: each for each in members}, said or {})


TWO = {"vda": "/vms/web01.qcow2", "vdb": "/vms/web01-data.qcow2"}
BY_TARGET = {"vda": "/vms/root.qcow2", "vdb": "/vms/data.qcow2"}


@pytest.mark.parametrize(
    ("disks", "names"),
    [
        # the names that `virsh domblklist` shows, packed as they are, or with what tools put before and behind them
        (TWO, ["web01.qcow2", "web01-data.qcow2"]),
        (TWO, ["backup-web01.qcow2", "backup-web01-data.qcow2"]),
        (TWO, ["web01.qcow2.20261101", "web01-data.qcow2.20261101"]),
        (TWO, ["web01_20261101.qcow2", "web01-data_20261101.qcow2"]),
        (TWO, ["2026-11-01_WEB01.img", "2026-11-01_WEB01-DATA.img"]),
        (TWO, ["zz-web01.qcow2", "aa-web01-data.qcow2"]),
        # by target
        (BY_TARGET, ["web01-vda.qcow2", "web01-vdb.qcow2"]),
        (BY_TARGET, ["web01.vda.20261101.qcow2", "web01.vdb.20261101.qcow2"]),
        (BY_TARGET, ["vda.full.img", "vdb.full.img"]),
        (BY_TARGET, ["vda_0.qcow2", "vdb_0.qcow2"]),
        # disks whose files bear the name of another target, since they were swapped or the bus was changed
        ({"vda": "/vms/web01-vdb.qcow2", "vdb": "/vms/web01-vda.qcow2"}, ["b-web01-vdb.qcow2", "b-web01-vda.qcow2"]),
        ({"vda": "/vms/web01-sda.qcow2", "sda": "/vms/web01-vda.qcow2"}, ["b-web01-sda.qcow2", "b-web01-vda.qcow2"]),
        ({"vda": "/vms/sda.qcow2", "vdb": "/vms/sdb.qcow2"}, ["web01-sda.img", "web01-sdb.img"]),
        ({"vda": "/vms/root.qcow2", "vdb": "/vms/vda.qcow2"}, ["b-root.qcow2", "vda.qcow2"]),
        # numbers: of the file, never of an order
        ({"vda": "/one/12/disk.0", "vdb": "/one/12/disk.1"}, ["disk-0.img", "disk-1.img"]),
        ({"vda": "/one/12/disk.1", "vdb": "/one/12/disk.0"}, ["disk-1.qcow2", "disk-0.qcow2"]),
        ({"vda": "/vms/web1.qcow2", "vdb": "/vms/web10.qcow2"}, ["b-web1.qcow2", "b-web10.qcow2"]),
        # one name, two directories
        ({"vda": "/vms/web01/disk.qcow2", "vdb": "/vms/db01/disk.qcow2"}, ["web01_disk.qcow2", "db01_disk.qcow2"]),
        ({"vda": "/vms/web01.qcow2", "vdb": "/vms/web01.img raw"}, ["b-web01.qcow2", "b-web01.img"]),
        # the names without what all have in common
        ({"vda": "/vms/web01-root.qcow2", "vdb": "/vms/web01-data.qcow2"}, ["root.img", "data.img"]),
        ({"sda": "rbd/web01-root raw", "sdb": "rbd/web01-data raw"}, ["web01-root.qcow2", "web01-data.qcow2"]),
    ],
)
def test_names_tell(disks: dict[str, str], names: list[str]) -> None:
    for order in itertools.permutations(names):
        found = paired(disks, [image(name) for name in order])
        assert found.tops == dict(zip(disks, names)) and not found.undecided and not found.warnings


@pytest.mark.parametrize(
    ("disks", "names"),
    [
        (BY_TARGET, ["disk-0.qcow2", "disk-1.qcow2"]),
        (BY_TARGET, ["sda.qcow2", "sdb.qcow2"]),
        (BY_TARGET, ["web01.img", "web01-1.img"]),
        (BY_TARGET, ["root.img", "root-old.img", "root-older.img"]),
        (TWO, ["web01-a.qcow2", "web01-b.qcow2"]),
        ({"vda": "/a/disk.qcow2", "vdb": "/b/disk.qcow2"}, ["disk.qcow2", "disk_1.qcow2"]),
        ({"vda": "/vms/web01-vda.qcow2", "vdb": "/vms/web01-vdb.qcow2"}, ["web01.img", "other.img"]),
        ({"vda": "/vms/root.qcow2"}, ["a.qcow2", "b.qcow2"]),
        ({"vda": "/vms/web01.qcow2"}, ["web01_20261101.qcow2", "web01_20261102.qcow2"]),
    ],
)
def test_what_nothing_tells_is_left_to_the_user(disks: dict[str, str], names: list[str]) -> None:
    for order in itertools.permutations(names):
        found = paired(disks, [image(name) for name in order])
        assert {disk.target for disk in found.undecided} == set(disks) - set(found.tops)
        assert found.undecided and set(found.choices) == set(names) - set(found.tops.values())


def test_an_image_that_speaks_for_another_disk_is_not_given_to_the_one_that_is_left() -> None:
    found = paired(TWO, [image("web01.qcow2"), image("web01-old.qcow2")])
    assert found.tops == {"vda": "web01.qcow2"}
    assert [disk.target for disk in found.undecided] == ["vdb"] and found.choices == ["web01-old.qcow2"]


@pytest.mark.parametrize(
    ("disks", "members", "tops"),
    [
        ({"vda": "/vms/root.qcow2"}, [image("web01.img")], {"vda": "web01.img"}),
        ({"vda": "/vms/a.qcow2", "vdb": "/vms/b raw"}, [image("x", "raw"), image("y")], {"vda": "y", "vdb": "x"}),
        ({"vda": "/vms/a.qcow2", "vdb": "/vms/b.qcow2"}, [image("a.qcow2"), image("y")], {"vda": "a.qcow2", "vdb": "y"}),
    ],
)
def test_the_only_way_that_is_left(disks: dict[str, str], members: list[Member], tops: dict[str, str]) -> None:
    found = paired(disks, members)
    guessed = {name for name in tops.values() if name != "a.qcow2"}
    assert found.tops == tops and not found.undecided and len(found.warnings) == len(guessed)


def test_a_raw_image_is_not_given_to_a_qcow2_disk_that_no_name_tells() -> None:
    found = paired({"vda": "/vms/root.qcow2"}, [image("web01.img", "raw")])
    assert found.tops == {} and found.choices == ["web01.img"]
    both = paired({"vda": "/a.qcow2", "vdb": "/b.qcow2"}, [image("x", "raw"), image("y")])
    assert both.tops == {} and both.choices == ["x", "y"]


def test_layers_go_with_their_disk() -> None:
    members = [image("b-web01.qcow2"), image("b-web01.snap1", parent="b-web01.qcow2"), image("b-web01-data.qcow2")]
    snapshot = {"vda": "/vms/web01.snap1", "vdb": "/vms/web01-data.qcow2"}
    found = paired(snapshot, members)
    assert found.tops == {"vda": "b-web01.snap1", "vdb": "b-web01-data.qcow2"} and found.named == {"vda", "vdb"}
    assert paired(TWO, members).tops["vda"] == "b-web01.qcow2", "the layer above came later"


def test_two_disks_on_one_base() -> None:
    members = [image("base.qcow2"), image("b-root.qcow2", parent="base.qcow2"), image("b-data.qcow2", parent="base.qcow2")]
    assert paired(BY_TARGET, members).tops == {"vda": "b-root.qcow2", "vdb": "b-data.qcow2"}


def test_what_the_user_says_counts() -> None:
    members = [image("disk-0.qcow2"), image("disk-1.qcow2")]
    assert paired(BY_TARGET, members, {"vda": "disk-1.qcow2"}).tops == {"vda": "disk-1.qcow2", "vdb": "disk-0.qcow2"}
    left_out = paired(BY_TARGET, members, {"vda": "disk-1.qcow2", "vdb": ""})
    assert left_out.tops == {"vda": "disk-1.qcow2"} and not left_out.undecided


def test_no_archive_takes_long() -> None:
    """Layers on one another, in a circle, and as many disks as images."""
    tower = [image("0")] + [image(str(number), parent=str(number - 1)) for number in range(1, 5000)]
    circle = [image(f"c{number}", parent=f"c{(number + 1) % 1000}") for number in range(1000)]
    many = [image(f"web-{number}.qcow2") for number in range(140)]
    disks = {f"vd{number}": f"/vms/web-{number}.qcow2.x" for number in range(140)}
    began = time.process_time()
    paired({"vda": "/vms/x", "vdb": "/vms/y", "vdc": "/vms/c1"}, tower + circle)
    assert len(paired(disks, many).tops) == 140
    assert time.process_time() - began < 20
