# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which files two VMs may have in common, and which not while a snapshot stays on one of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._image import layers
from ansible_collections.kvmops.backup.plugins.module_utils._template import find
from ansible_collections.kvmops.backup.plugins.module_utils._template.find import Neighbour
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._image.image_tools import qemu


@pytest.fixture
def top(tmp_path: Path) -> str:
    """An overlay of the VM on the file "base"."""
    qemu("qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "base"), "1M")
    name = str(tmp_path / "top")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base", name)
    return name


def other(name: str, *disks: str, below: tuple[str, ...] = (), marked: bool = False) -> Neighbour:
    return Neighbour(name, name, marked, frozenset(disks), frozenset((*disks, *below)))


def test_what_may_not_be_shared(top: str) -> None:
    own, base = layers.below(top)
    assert find.shared([top], "own", [other("b", own)]) == {own: "b"}
    assert find.shared([top], "own", [other("b", "/x", below=(own, base))]) == {own: "b"}
    assert find.shared([top], "own", [other("b", base)]) == {base: "b"}
    assert find.shared([top], "own", [other("t", own, marked=True)]) == {own: "t"}


def test_what_may_be_shared(top: str) -> None:
    base = layers.below(top)[1]
    assert find.shared([top], "own", [other("b", "/x", below=(base,)), other("c", "/y")]) == {}
    assert find.shared([top], "own", [other("t", base, marked=True)]) == {}


def test_the_reason_names_everybody(top: str) -> None:
    own, base = layers.below(top)
    found = find.shared([top], "own", [other("b", own), other("c", base, own)])
    assert find.why_not_beside(found).startswith(f"the VM b has {own} too; the VM c has {base} too: a snapshot that stays")
    assert "While b, c can start with it" in find.way_out_of_sharing(found)


class Vm:
    """A VM as libvirt gives it; every question to libvirt is counted."""

    def __init__(self, host: FakeConnection, number: int, directory: Path) -> None:
        self._host, self._number, self._path = host, number, directory / f"{number}.raw"
        self._path.touch()

    def UUIDString(self) -> str:
        return f"u{self._number}"

    def name(self) -> str:
        return f"vm{self._number}"

    def XMLDesc(self, flags: int) -> str:
        self._host.asked["XMLDesc"] += 1
        other = ".persistent" if flags else ""
        return (
            f"<domain type='qemu'><name>{self.name()}</name><memory>1</memory><os><type>hvm</type></os><devices>"
            f"<disk type='file' device='disk'><source file='{self._path}{other}'/><target dev='vda'/></disk>"
            "</devices></domain>"
        )

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"one question to libvirt more for each VM: {name}")


class FakeConnection:
    """A host with so many VMs, the first of which runs."""

    def __init__(self, count: int, directory: Path) -> None:
        self.asked: Counter[str] = Counter()
        self._vms = [Vm(self, number, directory) for number in range(count)]

    def listAllDomains(self, flags: int) -> list[Vm]:
        self.asked["listAllDomains"] += 1
        snapshots = find.libvirt.VIR_CONNECT_LIST_DOMAINS_HAS_SNAPSHOT
        return [] if flags == snapshots else self._vms[: 1 if flags else None]


@pytest.mark.parametrize("count", [3, 30])
def test_each_definition_is_asked_for_once(tmp_path: Path, count: int) -> None:
    conn = FakeConnection(count, tmp_path)
    host = find.Host(conn)
    found = host.neighbours
    assert host.owners([str(tmp_path / "none.raw")], "u1") == {}
    assert host.neighbours is found
    assert conn.asked == {"XMLDesc": count + 1, "listAllDomains": 3}
    assert [len(each.disks) for each in found] == [2] + [1] * (count - 1)
    parsed = find._definition.cache_info().misses
    find.neighbours(conn)
    assert find._definition.cache_info().misses == parsed
