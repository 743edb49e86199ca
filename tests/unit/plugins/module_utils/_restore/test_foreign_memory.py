# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""To which point the memory image of a foreign archive belongs, and when that cannot be told."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._restore import foreign_memory, tree

UUID = "c2177883-f1bb-47f0-914d-32a22e3a8804"


def domain(source: str = "/i/web.qcow2", uuid: str = UUID) -> str:
    disk = f"<disk type='file' device='disk'><source file='{source}'/><target dev='vda'/></disk>"
    cd = "<disk type='file' device='cdrom'><source file='/iso/a.iso'/><target dev='sda'/></disk>"
    return f"<domain type='kvm'><name>web</name><uuid>{uuid}</uuid><devices>{disk}{cd}</devices></domain>"


def image(xml: str) -> bytes:
    return b"LibvirtQemudSave" + struct.pack("<19I", 2, 4096, 1, *[0] * 16) + (xml.encode() + b"\0").ljust(4096, b"\0")


def point(*images: str) -> Configuration:
    members = (
        Member("web.qcow2", Role.DISK, 100, target="vda", former_path="/i/web.qcow2", active=True),
        *(Member(name, Role.MEMORY, 5000) for name in images),
    )
    return Configuration(1_700_000_000, domain(), "web", UUID, members, format_version=0)


def adopt(configuration: Configuration, **content: bytes) -> Configuration:
    read = {name.replace("_", "."): data for name, data in content.items()}
    return foreign_memory.adopt(configuration, lambda name, offset, length: read[name][offset : offset + length])


def test_it_becomes_a_snapshot() -> None:
    found = adopt(point("m.memory"), m_memory=image(domain()))
    (state,) = tree.read(found)
    assert (state.name, state.current, state.power, state.created) == ("m", True, "running", 1_700_000_000)
    assert (state.memory, state.memory_path) == ("external", "/i/m.memory")
    assert next(m for m in found.members if m.role is Role.MEMORY).former_path == "/i/m.memory"
    assert [(disk.target, disk.mode) for disk in state.disks] == [("vda", "external")]


def test_the_one_that_fits_is_taken() -> None:
    images = {"a_memory": image(domain("/i/older.qcow2")), "b_memory": image(domain())}
    assert [state.name for state in adopt(point("a.memory", "b.memory"), **images).snapshots] == ["b"]


@pytest.mark.parametrize(
    "content",
    [
        {"m_memory": image(domain(uuid=UUID.replace("c", "d")))},
        {"m_memory": image(domain("/i/other.qcow2"))},
        {"m_memory": image("<network/>")},
        {"m_memory": b"some other format" * 1000},
        {"m_memory": b""},
        {"m_memory": image(domain()), "n_memory": image(domain())},
    ],
)
def test_what_cannot_be_told_stays_in_the_archive(content: dict[str, bytes]) -> None:
    before = point(*(name.replace("_", ".") for name in content))
    assert adopt(before, **content) is before


def test_archives_of_ours_have_their_own_tree() -> None:
    before = replace(point("m.memory"), format_version=1)
    assert adopt(before, m_memory=image(domain())) is before
