# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a verification has found is known afterwards, until the next one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import Selection, VerifyRequest
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.verify import verify
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog.catalog_archives import (
    Told,
    damage,
    write,
)


def check(path: Path, told: Told) -> None:
    verify(VerifyRequest(Selection(archive=str(path)), fail_on_damage=False), told)


def test_nothing_is_known_before(tmp_path: Path) -> None:
    view = catalog.look(str(write(tmp_path)))
    assert view.found is None
    assert not view.damaged


def test_a_good_archive(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    check(path, told)
    entry = catalog.describe(str(path))
    verified = entry["verified"]
    assert (verified["ok"], verified["coverage"], verified["current"]) == (True, "full", True)
    assert verified["points"] == [point["point"] for point in entry["points"]]
    os.utime(path, (1, 1))  # as if something had been added
    assert catalog.describe(str(path))["verified"] == {**verified, "current": False}


def test_damage_stands_until_the_next_verification(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    with open_archive(str(path)) as archive:
        offset = archive.entry("vda_0.qcow2").offset
    whole = path.read_bytes()
    damage(path, offset)
    check(path, told)
    os.utime(path, (1, 1))

    view = catalog.look(str(path))
    assert view.damaged
    assert view.found
    assert view.found.lost == tuple(point.timestamp for point in view.points)
    assert any("has found damage" in warning for warning in catalog.describe(str(path))["warnings"])

    path.write_bytes(whole)
    check(path, told)
    assert not catalog.look(str(path)).damaged


def test_another_archive_in_its_place_is_not_judged_by_it(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    with open_archive(str(path)) as archive:
        damage(path, archive.entry("vda_0.qcow2").offset)
    check(path, told)
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", timestamp=1795000000)
    shutil.copyfile(other, path)  # the same inode
    assert catalog.look(str(path)).found is None
