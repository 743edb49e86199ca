# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which files two VMs may have in common, and which not while a snapshot stays on one of them."""

from __future__ import annotations

from pathlib import Path

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
