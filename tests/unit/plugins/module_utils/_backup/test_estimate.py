# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The estimate is the size of the archive that is then written."""

from __future__ import annotations

import os
import random

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import ArchiveWriter
from ansible_collections.kvmops.backup.plugins.module_utils._backup import estimate
from ansible_collections.kvmops.backup.plugins.module_utils._backup.disks import Image
from ansible_collections.kvmops.backup.plugins.module_utils._backup.members import PlannedMember
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import BytesSource, RawAsQcow2Source

UUID = "c2177883-f1bb-47f0-914d-32a22e3a8804"
XML = f"<domain type='kvm'><name>web</name><uuid>{UUID}</uuid><devices/></domain>"


@pytest.mark.parametrize("seed", range(8))
def test_as_large_as_the_archive(tmp_path, seed):
    chance = random.Random(seed)
    sizes = [chance.choice([0, 1, 511, 512, 4096, 2**22, 2**22 + 1, chance.randrange(2**23)]) for _each in range(seed)]
    planned = [
        PlannedMember(Member(f"vd{n}_0.qcow2", Role.DISK, 0, former_path=f"/i/{n}"), f"/i/{n}") for n in range(seed)
    ]
    configuration = Configuration(1_700_000_000, XML, "web", UUID, (), tool_version="1.0.0")
    predicted = estimate.point_bytes(planned, sizes, configuration)
    with ArchiveWriter(str(tmp_path), "a.tar", compression=None, timestamp=1_700_000_000) as writer:
        members = tuple(writer.add(each.member, BytesSource(bytes(size))) for each, size in zip(planned, sizes))
        written = writer.publish(Configuration(1_700_000_000, XML, "web", UUID, members, tool_version="1.0.0"))
    assert written.size_bytes == os.path.getsize(written.path)
    assert abs(predicted - written.size_bytes) <= 4096, sizes  # the digits of its sizes may need one more block


def test_what_a_member_takes(tmp_path):
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"x" * 100_000)
    os.truncate(raw, 2**30)
    source = RawAsQcow2Source(str(raw))
    images = {
        "/i/a": Image("/i/a", "qcow2", 1000, 500, 10**6),
        str(raw): Image(str(raw), "raw", 2**30, 102_400, 2**30, packed_bytes=source.size_bytes),
    }
    source.close()
    planned = PlannedMember(Member("m", Role.DISK, 0), "/i/a")
    assert estimate.member_bytes(planned, images, {}) == 1000  # byte for byte
    from_raw = PlannedMember(Member("m", Role.DISK, 0), str(raw), from_raw=True)
    assert 100_000 < estimate.member_bytes(from_raw, images, {}) < 2**20
    assert estimate.member_bytes(PlannedMember(Member("m", Role.NVRAM, 0), "/n"), images, {"/n": 7}) == 7
