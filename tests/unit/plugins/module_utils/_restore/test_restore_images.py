# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Foreign archives whose images are damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._errors import DamagedError
from ansible_collections.kvmops.backup.plugins.module_utils._restore.run import check_images
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog.catalog_archives import write_foreign


def with_an_image(directory: Path, name: str, data: bytes) -> Path:
    archive = write_foreign(directory)
    shutil.unpack_archive(archive, directory / "x", "tar")
    (directory / "x" / name).write_bytes(data)
    return Path(shutil.make_archive(str(directory / "changed"), "tar", directory / "x"))


def test_a_vm_is_not_restored_without_the_disk_whose_image_is_damaged(tmp_path: Path) -> None:
    header = bytearray(b"QFI\xfb\0\0\0\3" + bytes(2000))
    with open_archive(str(with_an_image(tmp_path, "web01.qcow2", bytes(header)))) as archive:
        with pytest.raises(DamagedError, match=r"no image for vda, and web01\.qcow2") as refusal:
            check_images(archive, archive.point())
        assert refusal.value.member == "web01.qcow2"


def test_a_damaged_image_beside_those_of_the_vm_does_not_matter(tmp_path: Path) -> None:
    with open_archive(str(with_an_image(tmp_path, "other.qcow2", b"QFI\xfb\0\0\0\3" + bytes(2000)))) as archive:
        assert list(archive.images.bad) == ["other.qcow2"]
        check_images(archive, archive.point())
