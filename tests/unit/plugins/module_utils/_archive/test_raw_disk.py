# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A raw disk in an archive: its qcow2 tables are members' last chunks, known only when all the data before were read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import ArchiveWriter, Compression
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import RawAsQcow2Source
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives

CLUSTER = 65536
PER_L2_TABLE = 512 * 2**20


def scattered(path: Path, pieces: int) -> None:
    """A sparse disk with one cluster of data under each of so many L2 tables, as a large disk has."""
    with open(path, "wb") as file:
        file.truncate(pieces * PER_L2_TABLE)
        for index in range(pieces):
            file.seek(index * PER_L2_TABLE + index * CLUSTER)
            file.write(archives.noise(CLUSTER, index))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "pieces", [20, 60, 63, 200]
)  # tables in one chunk with the data; in that and the next; in several
def test_tables_wait_for_the_data(tmp_path: Path, pieces: int, compressed: bool) -> None:
    raw = tmp_path / "raw"
    scattered(raw, pieces)
    compression = Compression() if compressed else None
    with ArchiveWriter(
        str(tmp_path), "a.tar", compression=compression, timestamp=archives.TIMESTAMP, threads=8
    ) as writer:
        source = RawAsQcow2Source(str(raw))
        member = writer.add(Member("vda_0.qcow2", Role.DISK, 0, target="vda", original_format="raw"), source)
        source.close()
        writer.publish(archives.configuration([member]))
    (tmp_path / "q").write_bytes(archives.extract(tmp_path / "a.tar")[member.name])
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", tmp_path / "q"], check=True)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, tmp_path / "q"], check=True)
    with open_archive(str(tmp_path / "a.tar")) as reader:
        for changed in (False, True):
            if changed:
                with open(raw, "r+b") as file:
                    file.seek((pieces - 1) * (PER_L2_TABLE + CLUSTER))
                    file.write(b"\0")
            source = RawAsQcow2Source(str(raw))
            assert reader.matches(reader.point().members[0], source, threads=8) is not changed
            source.close()
