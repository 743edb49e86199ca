# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which archive is looked at, which snapshots are ours, and which of them nothing needs any more (SPEC B5, B6, B21)."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, SnapshotNode
from ansible_collections.kvmops.backup.plugins.module_utils._backup import cycles, decide
from ansible_collections.kvmops.backup.plugins.module_utils._backup.cycles import Served
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView, points_of
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import backup_snapshots

NOW = 1_800_000_000
DAY = 86400


def view(path, *timestamps, incrementable=True):
    points = tuple(
        Configuration(
            timestamp=each, domain_xml="", vm_name="web", vm_uuid="u", members=(), incrementable=incrementable,
            snapshots=(SnapshotNode(f"kvmops-{each}", "", "", True),),
        )
        for each in timestamps
    )  # fmt: skip
    return ArchiveView(path, 0, False, True, points_of(points))


def test_the_newest_made_incrementable_is_looked_at():
    old, new = view("old", NOW - 9 * DAY, NOW - 8 * DAY), view("new", NOW - 2 * DAY)
    plain = view("plain", NOW - DAY, incrementable=False)
    for order in itertools.permutations((old, new, plain)):
        assert decide.newest_of(order, set(), NOW) == "new"
    assert decide.newest_of([plain], set(), NOW) == ""
    assert decide.newest_of([], set(), NOW) == ""


def test_an_archive_from_the_future_does_not_hide_later_ones():
    """The clock was ten years ahead once: that archive is continued as long as the VM stands on it, and no longer."""
    future, present = view("future", NOW + 3650 * DAY), view("present", NOW - DAY)
    assert decide.newest_of([future, present], {f"kvmops-{NOW + 3650 * DAY}"}, NOW) == "future"
    assert decide.newest_of([future, present], {f"kvmops-{NOW - DAY}"}, NOW) == "present"
    assert decide.newest_of([future], set(), NOW) == "future"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([], NOW),
        ([NOW - DAY], NOW),
        ([NOW], NOW + 1),
        ([NOW + DAY], NOW + DAY + 1),  # the clock went back a day: points stay in order
        ([NOW + 3650 * DAY, NOW - 5], NOW),
    ],
)
def test_time_of_a_new_full(known, expected):
    assert decide.not_before([view("a", *known)] if known else [], NOW) == expected


def served(*states, stands, same_place=False, needs=()):
    return Served(tuple(states), stands, same_place, frozenset(needs))


OBSOLETE = {
    "nothing of ours": ({}, [], []),
    "older cycle here": ({"a": served("k1", "k2", stands=True, same_place=True)}, ["k1", "k2"], []),
    "broken here": ({"a": served("k1", stands=False, same_place=True)}, ["k1"], []),
    "gone here": ({"a": served("k1", stands=None, same_place=True)}, ["k1"], []),
    "stands elsewhere": ({"a": served("k1", stands=True, needs=["k1"])}, [], []),
    "not known elsewhere": ({"a": served("k1", stands=None)}, [], []),
    "broken elsewhere": ({"a": served("k1", stands=False)}, ["k1"], []),
    "stands elsewhere, on what goes": (
        {
            "a": served("k1", stands=True, same_place=True, needs=["k1"]),
            "b": served("k2", "k3", stands=True, needs=["k1", "k2", "k3"]),
        },
        ["k1", "k2", "k3"],
        ["b"],
    ),
    "through another one": (
        {
            "a": served("k1", stands=False, needs=["k1"]),
            "b": served("k2", stands=True, needs=["k1", "k2"]),
            "c": served("k3", stands=True, needs=["k2", "k3"]),
            "d": served("k4", stands=True, needs=["k4"]),
        },
        ["k1", "k2", "k3"],
        ["b", "c"],
    ),
}


@pytest.mark.parametrize("kind", OBSOLETE)
def test_obsolete(kind):
    found, names, ended = OBSOLETE[kind]
    assert cycles.obsolete(found) == (names, ended)


def test_first_point_of_an_archive():
    assert backup_snapshots.first_point(["kvmops-20", "kvmops-9", "kvmops-100"]) == 9


def chained(lengths, listed=()):
    """Facts of a VM with disks that stand on so many images; `listed`: links that only the definition knows."""
    disks, images = [], {}
    for target, length in lengths.items():
        paths = [f"/{target}.{number}" for number in range(length)]
        for path, below in zip(paths, [*paths[1:], ""]):
            images[path] = SimpleNamespace(backing_path=below)
        disks.append(SimpleNamespace(target=target, path=paths[0] if paths else "", chain=listed))
    return SimpleNamespace(view=SimpleNamespace(disks=disks), images=images)


def test_the_longest_chain_is_watched():
    assert cycles.longest_chain(chained({"vda": 2, "vdb": 5, "sda": 0})) == ("vdb", 5)
    assert cycles.longest_chain(chained({"vda": 1}, listed=("x",) * 7)) == ("vda", 8)
    assert cycles.longest_chain(chained({})) == ("", 0)
    assert cycles.about_length("vda", 19, "web") == ""
    text = cycles.about_length("vda", 20, "web")
    assert "vda stands on 20 images" in text and "vm: web, snapshot: all and state: absent" in text
