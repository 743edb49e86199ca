# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Retention in a directory of real archives: what is looked at, what is removed, what is never touched."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._archive import archive_locks, convert, sidecars
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import TemplateDisk, TemplateRequirement
from ansible_collections.kvmops.backup.plugins.module_utils._backup.archives import VmArchives
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, retention
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import (
    RetentionRequest,
    Selection,
    VerifyRequest,
)
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.retention import retain
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.verify import verify
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, KvmopsError, TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection, storage
from ansible_collections.kvmops.backup.plugins.module_utils._retention import Rules
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog.catalog_archives import (
    OTHER_UUID,
    TIME,
    UUID,
    Told,
    damage,
    write,
    write_foreign,
)

DAY_S = 86400


@pytest.fixture(autouse=True)
def without_libvirt(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_uri: str) -> None:
        raise KvmopsError("The connection", "not in a unit test")

    monkeypatch.setattr(connection, "connect", connect)
    monkeypatch.setattr(retention.time, "time", lambda: float(TIME + DAY_S))


def nothing(_views: Sequence[ArchiveView]) -> str:
    return ""


def run(directory: Path, told: Told, *, continued: retention.Continued = nothing, **options: Any) -> dict[str, Any]:
    rules = Rules(**{name[5:]: options.pop(name) for name in list(options) if name.startswith("keep_")})
    return retain(RetentionRequest(rules, path=str(directory), **options), told, continued)


def paths(entries: Sequence[dict[str, str]]) -> set[str]:
    return {os.path.basename(each["path"]) for each in entries}


def history(directory: Path, days: Sequence[int], **options: Any) -> list[Path]:
    return [write(directory, timestamp=TIME - each * DAY_S, **options) for each in days]


def test_check_mode_leaves_nothing_at_all(tmp_path: Path, own_directories: Path, told: Told) -> None:
    history(tmp_path, [1, 0])
    assert run(tmp_path, told, keep_last=1, check_mode=True)["changed"]
    assert not list((own_directories / "state_dir").iterdir())


def test_a_file_that_nobody_can_look_at_stays_and_stops_nothing(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, lost, new = history(tmp_path, [2, 1, 0])
    real = os.stat

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if path == str(lost):
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert [view.path for view in VmArchives(UUID).views(str(tmp_path))] == [str(old), str(new)]
    result = run(tmp_path, told, keep_last=1)
    assert paths(result["removed"]) == {old.name}
    assert "cannot be looked at (Stale" in next(each["reason"] for each in result["kept"] if each["path"] == str(lost))


def test_keeps_the_newest_and_says_why(tmp_path: Path, told: Told) -> None:
    made = history(tmp_path, [3, 2, 1, 0])
    sidecars.set_notes(str(made[0]), "old")
    predicted = run(tmp_path, told, keep_last=2, check_mode=True)
    assert all(path.exists() for path in made)
    result = run(tmp_path, told, keep_last=2, diff=True)
    assert {**predicted} == {key: value for key, value in result.items() if key != "diff"}
    assert result["changed"] and paths(result["removed"]) == {path.name for path in made[:2]}
    assert {each["reason"] for each in result["removed"]} == {"newer ones fill all rules"}
    assert result["freed_bytes"] > 0 and str(made[0]) in result["diff"]["before"]
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in made[2:])
    again = run(tmp_path, told, keep_last=2)
    assert not again["changed"] and again["removed"] == [] and len(again["kept"]) == 2
    assert told.warnings == []


def test_a_vm_without_archives_is_told_of(tmp_path: Path, told: Told) -> None:
    history(tmp_path, [3, 2])
    result = run(tmp_path, told, keep_last=1, vm="web1")
    assert not result["changed"] and result["kept"] == []
    assert any("belongs to a VM web1" in text for text in told.warnings)


def test_foreign_files_are_never_touched(tmp_path: Path, told: Told) -> None:
    made = history(tmp_path, [400, 300, 0])
    write_foreign(tmp_path, name="web01_20200101T000000Z_6f1a2b3c")
    write_foreign(tmp_path, compressed=True, name="packed")
    elsewhere = tmp_path / "below"
    elsewhere.mkdir()
    shutil.copy(made[0], elsewhere / "x.tar")
    os.symlink(made[0], tmp_path / "web01_20200102T000000Z_6f1a2b3c.tar")
    for name in (
        "empty.tar",
        "text.tar.zst",
        ".web01.tar.partial-0011",
        ".kvmops-trash-0123456789ab",
        "web01.tar.notes",
    ):
        (tmp_path / name).write_bytes(b"" if name == "empty.tar" else b"text")
    (tmp_path / "directory.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "cut.tar").write_bytes(made[1].read_bytes()[:5000])
    before = set(os.listdir(tmp_path))
    result = run(tmp_path, told, keep_last=1, keep_days=30)
    assert paths(result["removed"]) == {made[0].name, made[1].name}
    assert before - set(os.listdir(tmp_path)) == {made[0].name, made[1].name} and (elsewhere / "x.tar").exists()
    reasons = {os.path.basename(each["path"]): each["reason"] for each in result["kept"]}
    assert reasons["packed.tar.zst"] == "it was not made by this collection" and "cannot be read" in reasons["cut.tar"]


def test_protected_used_and_continued_archives_stay(tmp_path: Path, told: Told) -> None:
    made = history(tmp_path, [5, 4, 3, 2, 1])
    sidecars.set_protected(str(made[0]), True)

    def continued(views: Sequence[ArchiveView]) -> str:
        assert len(views) == 5
        return str(made[1])

    with archive_locks.reading(str(made[2])):
        result = run(tmp_path, told, keep_last=1, continued=continued)
    assert paths(result["removed"]) == {made[3].name}
    assert [each["reason"] for each in result["kept"]][:3] == [
        "it is protected",
        "a backup with mode auto would continue it",
        "it is in use: it is being restored or verified",
    ]


def test_what_comes_into_use_meanwhile_stays(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    made = history(tmp_path, [3, 2, 1])
    monkeypatch.setattr(retention.archive_locks, "users", lambda _path: "")
    with archive_locks.reading(str(made[0])):
        result = run(tmp_path, told, keep_last=1)
    assert paths(result["removed"]) == {made[1].name} and made[0].exists()
    assert "was not removed although it should be" in told.warnings[0]


def test_what_has_changed_since_it_was_looked_at_stays(tmp_path: Path, told: Told) -> None:
    made = history(tmp_path, [3, 2, 1])

    def grows(_views: Sequence[ArchiveView]) -> str:
        with made[0].open("ab") as file:
            file.write(b"a point")
        return ""

    result = run(tmp_path, told, keep_last=1, continued=grows)
    assert made[0].exists() and paths(result["removed"]) == {made[1].name}
    assert "changed since" in told.warnings[0]


def test_archives_belong_to_vms_by_uuid(tmp_path: Path, told: Told) -> None:
    mine = history(tmp_path, [3, 1])
    renamed = history(tmp_path, [2], name="web02")
    other = history(tmp_path, [9, 8], uuid=OTHER_UUID)
    result = run(tmp_path, told, keep_last=1, vm=UUID)
    assert paths(result["removed"]) == {mine[0].name, renamed[0].name}
    assert paths(result["kept"]) == {mine[1].name} and all(path.exists() for path in other)
    assert not run(tmp_path, told, keep_last=1, vm="nobody")["changed"]


def test_a_damaged_archive_is_never_the_last_good_one(tmp_path: Path, told: Told) -> None:
    made = history(tmp_path, [2, 1])
    entries = catalog.open_archive(str(made[1])).entries
    damage(made[1], next(each.offset for each in entries if each.name.endswith(".xml")) + 40)
    result = run(tmp_path, told, keep_last=1, keep_days=1)
    assert result["removed"] == [] and "last good" in result["kept"][0]["reason"]


def test_an_archive_and_its_other_form_go_together(tmp_path: Path, told: Told) -> None:
    made = history(tmp_path, [2, 1])
    (tmp_path / "work").mkdir()
    shutil.copy(made[0], tmp_path / "work")
    packed = Path(convert.compress(str(tmp_path / "work" / made[0].name), 2))
    shutil.move(packed, tmp_path)
    result = run(tmp_path, told, keep_last=2)
    assert not result["changed"] and paths(result["kept"]) == {path.name for path in made}
    result = run(tmp_path, told, keep_last=1)
    assert paths(result["removed"]) == {made[0].name}
    assert set(os.listdir(tmp_path)) == {"work", made[1].name}


def test_a_listing_that_fails_removes_nothing(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    made = history(tmp_path, [2, 1])

    def fails(_directories: Sequence[str]) -> list[str]:
        raise ArchiveError("Directory", "it cannot be listed")

    monkeypatch.setattr(catalog, "find", fails)
    with pytest.raises(ArchiveError):
        run(tmp_path, told, keep_last=1)
    assert all(path.exists() for path in made)


def test_space_is_freed_from_the_oldest_and_no_further(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = history(tmp_path, [4, 3, 2]) + history(tmp_path, [9, 1], uuid=OTHER_UUID)
    size = _files.freed_bytes(str(made[0]))
    begin = {path: _files.freed_bytes(str(path)) for path in made}
    monkeypatch.setattr(
        retention._files, "free_bytes", lambda _directory: sum(b for path, b in begin.items() if not path.exists())
    )
    with pytest.raises(TargetError, match=r"cannot be had.*Nothing was removed"):
        run(tmp_path, told, free_space_bytes=10 * size)
    assert all(path.exists() for path in made)
    result = run(tmp_path, told, free_space_bytes=size + 1, check_mode=True)
    assert paths(result["removed"]) == {made[3].name, made[0].name}
    result = run(tmp_path, told, free_space_bytes=size + 1)
    assert paths(result["removed"]) == {made[3].name, made[0].name}
    assert not run(tmp_path, told, free_space_bytes=size + 1)["changed"]


def test_space_that_one_cannot_give_comes_from_the_next(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest has come into use, and the next gives back half of what it seemed to: the third goes too."""
    made = history(tmp_path, [4, 3, 2, 1])
    size = _files.freed_bytes(str(made[0]))
    gives = dict(zip(made, (size, size // 2, size, size)))
    monkeypatch.setattr(_files, "_GIVEN_BACK_S", 0.01)
    monkeypatch.setattr(retention.archive_locks, "users", lambda _path: "")
    monkeypatch.setattr(
        retention._files, "free_bytes", lambda _directory: sum(b for path, b in gives.items() if not path.exists())
    )
    with archive_locks.reading(str(made[0])):
        result = run(tmp_path, told, free_space_bytes=size)
        assert paths(result["removed"]) == {made[1].name, made[2].name}
        assert "was not removed although it should be" in told.warnings[0]
        with pytest.raises(TargetError, match=r"are wanted and .* are free, although 0 archives were removed"):
            run(tmp_path, told, free_space_bytes=2 * size)
    assert made[0].exists() and made[3].exists()


def test_too_little_space_is_an_error_that_tells_of_what_went(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with snapshots of the file system, which keep the blocks."""
    made = history(tmp_path, [2, 1])
    monkeypatch.setattr(_files, "_GIVEN_BACK_S", 0.01)
    monkeypatch.setattr(retention._files, "free_bytes", lambda _directory: 0)
    with pytest.raises(TargetError, match="although 1 archives were removed"):
        run(tmp_path, told, free_space_bytes=1000)
    assert [each.exists() for each in made] == [False, True]
    assert any(f"{made[0]} was removed" in text for text in told.warnings)


def test_a_file_with_two_names_frees_nothing(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert _files.freed_bytes(str(path)) == path.stat().st_blocks * 512
    os.link(path, tmp_path / "second")
    assert _files.freed_bytes(str(path)) == 0


TEMPLATE_UUID = "7e3f1a7e-9d43-4c43-9b1e-0f5b9a9c7d11"


def of_template(directory: Path, days: int, content: str) -> Path:
    """The archive of a template with that content."""
    disk = TemplateDisk("vda", 2**20, content * 64)
    return write(directory, name="golden", uuid=TEMPLATE_UUID, timestamp=TIME - days * DAY_S, provides=(disk,))


def of_clone(directory: Path, days: int, content: str) -> Path:
    """The archive of a thin clone that stands on that content."""
    disk = TemplateDisk("vdb", 2**20, content * 64)
    needed = TemplateRequirement(TEMPLATE_UUID, "golden", (disk,))
    return write(directory, timestamp=TIME - days * DAY_S, requires=needed)


def pools(monkeypatch: pytest.MonkeyPatch, *directories: Path) -> None:
    monkeypatch.setattr(connection, "connect", lambda _uri: None)
    known = tuple(storage.Pool(each.name, "dir", True, str(each), "") for each in directories)
    monkeypatch.setattr(storage, "pools", lambda _conn: known)


def test_the_template_of_a_kept_clone_stays(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    pools(monkeypatch, here, there)
    oldest, older, newest = of_template(here, 9, "a"), of_template(here, 8, "b"), of_template(here, 7, "c")
    first, second = of_clone(here, 3, "a"), of_clone(here, 2, "c")
    elsewhere = of_clone(there, 1, "b")
    result = run(here, told, keep_last=1)
    assert paths(result["removed"]) == {first.name, oldest.name}
    assert [os.path.basename(each["path"]) for each in result["removed"]] == [first.name, oldest.name]
    reasons = {os.path.basename(each["path"]): each["reason"] for each in result["kept"]}
    assert reasons[older.name] == "it holds the template that a kept archive of a thin clone needs"
    assert set(os.listdir(here)) == {older.name, newest.name, second.name}
    elsewhere.unlink()
    assert paths(run(here, told, keep_last=1)["removed"]) == {older.name}


def test_where_clones_elsewhere_cannot_be_seen_no_template_is_removed(tmp_path: Path, told: Told) -> None:
    """As with a pool whose directory is gone. The archives of other VMs go as ever."""
    templates = [of_template(tmp_path, 9, "a"), of_template(tmp_path, 8, "b")]
    older, newest = history(tmp_path, [7, 6])
    result = run(tmp_path, told, keep_last=1)
    assert paths(result["removed"]) == {older.name} and newest.exists()
    reasons = {each["path"]: each["reason"] for each in result["kept"]}
    assert "thin clone in another place" in reasons[str(templates[0])]
    assert any("Archives of templates stay: The connection" in text for text in told.warnings)


def test_what_a_verification_has_found_counts(tmp_path: Path, told: Told) -> None:
    """Damage that only reading shows: the archive is no longer the good one that may stand alone."""
    older, newer = history(tmp_path, [2, 1])
    damage(
        newer, next(each.offset for each in catalog.open_archive(str(newer)).entries if each.name.endswith(".qcow2"))
    )
    assert paths(run(tmp_path, told, keep_last=1, check_mode=True)["removed"]) == {older.name}
    verify(VerifyRequest(Selection(path=str(tmp_path)), fail_on_damage=False), told)
    result = run(tmp_path, told, keep_last=1)
    assert result["removed"] == [] and older.exists()


def test_only_vms_of_which_an_archive_would_go_are_looked_at(tmp_path: Path, told: Told) -> None:
    """A look at a VM costs a second on a host with many: a place with the archives of 500 VMs took minutes in each run."""
    history(tmp_path, [2, 1, 0])
    other = history(tmp_path, [1, 0], uuid=OTHER_UUID, name="other")
    asked = []

    def continued(views: Sequence[ArchiveView]) -> str:
        asked.append(views[0].newest.vm_uuid)
        return str(other[0])

    run(tmp_path, told, continued=continued, keep_last=3)
    assert not asked
    run(tmp_path, told, continued=continued, keep_last=2, check_mode=True)
    assert asked == [UUID]
    result = run(tmp_path, told, continued=continued, keep_last=1)
    assert sorted(asked[1:]) == sorted([UUID, OTHER_UUID])
    assert other[0].exists() and str(other[0]) not in {each["path"] for each in result["removed"]}


MALLORY = 1234567


def test_nothing_of_ours_goes_because_of_an_archive_of_others(tmp_path: Path, told: Told) -> None:
    """It has the VM's uuid, good digests and a later time."""
    genuine, forged = history(tmp_path, [2, 0])
    os.chown(forged, MALLORY, -1)
    assert catalog.look(str(forged)).points and not catalog.look(str(forged)).good
    result = run(tmp_path, told, keep_last=1)
    assert not result["changed"] and genuine.exists() and forged.exists()
    reasons = {os.path.basename(each["path"]): each["reason"] for each in result["kept"]}
    assert reasons[forged.name].startswith("not trusted: it belongs to the user 1234567")
    assert reasons[genuine.name] == "it is number 1 of 1 (keep_last)"
    described = catalog.describe(str(forged))
    assert described["not_ours"].startswith("it belongs to the user 1234567")
    assert described["warnings"][0].startswith("not trusted: ")
    os.chown(forged, 0, -1)
    assert paths(run(tmp_path, told, keep_last=1)["removed"]) == {genuine.name}


def test_where_others_may_write_nothing_is_removed(tmp_path: Path, told: Told) -> None:
    place = tmp_path / "place"
    place.mkdir()
    history(place, [2, 1, 0])
    place.chmod(0o777)
    result = run(place, told, keep_last=1)
    assert result["removed"] == [] and len(result["kept"]) == 3
    assert all(f"its directory {place} can be written to by every user" in each["reason"] for each in result["kept"])
