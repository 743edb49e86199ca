# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What was read of archives is kept: it saves opening them, and nothing else hangs on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _retention, _trust
from ansible_collections.kvmops.backup.plugins.module_utils._archive import reader
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Conversion,
    TemplateDisk,
    TemplateRequirement,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup.archives import VmArchives
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import cache, catalog, index, retention, verified
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.info import info
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import (
    InfoRequest,
    RetentionRequest,
    Selection,
)
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog.catalog_archives import (
    OTHER_UUID,
    TIME,
    UUID,
    Told,
    next_run,
    write,
    write_foreign,
)

DAY = 86400
ROWS, ROWS2 = (("ide0", "sata", "no driver"),), (("sound", "none here"),)
DISKS = (TemplateDisk("vda", 2**20, "ab" * 32),)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the archives that were really read."""
    paths: list[str] = []

    def open_archive(path: str) -> reader.ArchiveReader:
        paths.append(path)
        return reader.open_archive(path)

    monkeypatch.setattr(catalog, "open_archive", open_archive)
    return paths


@pytest.fixture
def index_file(own_directories: Path) -> Callable[[], Path]:
    """The one file of the index."""
    return lambda: next((own_directories / "cache_dir" / "index").iterdir())


def listed(directory: Path) -> list[dict[str, object]]:
    """What backup_info says of a directory, as a new run finds it."""
    next_run()
    found = info(InfoRequest(Selection(path=str(directory))), Told())["archives"]
    assert isinstance(found, list)
    return found


def place(directory: Path) -> dict[str, Path]:
    """Archives of all kinds."""
    return {
        "old": write(directory, timestamp=TIME),
        "new": write(directory, timestamp=TIME + DAY, incrementable=True, compressed=True),
        "other": write(directory, name="db", uuid=OTHER_UUID, extra_xml="<hostdev type='usb'/>"),
        "clone": write(directory, name="clone", uuid=UUID[::-1], requires=TemplateRequirement("u", "base", DISKS)),
        "base": write(directory, name="base", uuid=OTHER_UUID[::-1], provides=DISKS),
        "converted": write(
            directory, name="appliance", uuid="a" + UUID[1:], conversion=Conversion("a.ova", "ab" * 32, "", (), ROWS, ROWS2)
        ),
        "foreign": write_foreign(directory),
        "packed": write_foreign(directory, compressed=True, name="packed"),
    }


def test_a_list_is_the_same_without_opening_anything(tmp_path: Path, opened: list[str]) -> None:
    paths = place(tmp_path)
    first = listed(tmp_path)
    assert sorted(opened) == sorted(map(str, paths.values()))
    opened.clear()
    assert listed(tmp_path) == first
    assert opened == []
    info(InfoRequest(Selection(path=str(tmp_path)), refresh=True), Told())
    assert len(opened) == len(paths)


def test_a_point_that_is_not_the_newest_is_read(tmp_path: Path, opened: list[str]) -> None:
    path = write(tmp_path)
    listed(tmp_path)
    opened.clear()
    view = catalog.glance(str(path))
    assert catalog.entry(view, TIME)["config"]["point"] == TIME and opened == []
    older = replace(view.newest, timestamp=TIME)
    several = replace(view, points=(older, replace(view.newest, timestamp=TIME + 1)))
    assert catalog.entry(several, TIME)["config"]["point"] == TIME and opened == [str(path)]


@pytest.mark.parametrize("change", ["touch", "mode", "replace", "append"])
def test_a_file_that_has_changed_is_read_again(tmp_path: Path, opened: list[str], change: str) -> None:
    path = write(tmp_path)
    listed(tmp_path)
    opened.clear()
    if change == "touch":
        os.utime(path, ns=(0, 1))
    elif change == "mode":
        path.chmod(0o640)
    elif change == "replace":
        other = write(tmp_path, name="db", uuid=OTHER_UUID)
        other.rename(path)
    else:
        with path.open("ab") as file:
            file.write(bytes(512))
    (entry,) = listed(tmp_path)
    assert opened == [str(path)]
    assert entry["vm"] == ({"name": "db", "uuid": OTHER_UUID} if change == "replace" else {"name": "web01", "uuid": UUID})


def test_a_file_that_was_moved_is_not_read_again(tmp_path: Path, opened: list[str]) -> None:
    path = write_foreign(tmp_path, compressed=True)
    first = catalog.describe(str(path))
    assert catalog.describe(str(path)) == first and opened == [str(path)]  # a foreign one takes its whole length
    catalog.describe(str(path), refresh=True)
    assert len(opened) == 2


def test_what_was_just_written_is_not_kept(tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be written to again within one tick of the clock, and would look the same."""
    monkeypatch.setattr(index, "_FRESH_NS", 60 * 10**9)
    write(tmp_path)
    listed(tmp_path)
    listed(tmp_path)
    assert len(opened) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"\n\n1\n",
        lambda data: data[: len(data) // 2],
        lambda data: data[len(data) // 2 :],
        lambda data: data[:-40] + data[40:],
        lambda data: data.replace(b"\n", b""),
        lambda data: data.replace(b'"', b""),
        lambda data: data.replace(b"[", b"{"),
        lambda data: data.replace(f"[{TIME}".encode(), b"[null"),
        lambda data: data.replace(b"1/1 ", b"0/9 "),
        lambda data: data.replace(b" 0 [", b" x ["),
        lambda data: bytes(reversed(data)),
        lambda data: os.urandom(10000),
    ],
)  # fmt: skip
def test_a_damaged_index_is_not_believed(
    tmp_path: Path, index_file: Callable[[], Path], damage: Callable[[bytes], bytes]
) -> None:
    place(tmp_path)
    first = listed(tmp_path)
    index_file().write_bytes(damage(index_file().read_bytes()))
    assert listed(tmp_path) == first
    assert listed(tmp_path) == first


def test_an_index_that_others_could_have_written_is_not_believed(
    tmp_path: Path, index_file: Callable[[], Path], opened: list[str]
) -> None:
    path = write(tmp_path)
    listed(tmp_path)
    os.chown(index_file(), 12345, 12345)
    opened.clear()
    listed(tmp_path)
    assert opened == [str(path)]
    there = index_file()
    target = there.rename(tmp_path / "index")
    there.symlink_to(target)
    opened.clear()
    listed(tmp_path)
    assert opened == [str(path)]


def _huge(path: Path) -> None:
    lines = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(2**26)
        file.write(b"\n" + lines)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [_huge, _fifo])
def test_an_index_that_no_run_can_have_written_is_begun_anew(
    tmp_path: Path, index_file: Callable[[], Path], opened: list[str], damage: Callable[[Path], None]
) -> None:
    path = write(tmp_path)
    first = listed(tmp_path)
    damage(index_file())
    opened.clear()
    assert listed(tmp_path) == first and opened == [str(path)]
    assert index_file().is_file() and index_file().stat().st_size < 2**20
    assert listed(tmp_path) == first and opened == [str(path)]


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    tmp_path: Path, own_directories: Path, index_file: Callable[[], Path]
) -> None:
    write(tmp_path)
    first = listed(tmp_path)
    index_file().unlink()
    (own_directories / "cache_dir" / "index").rmdir()
    (own_directories / "cache_dir" / "index").write_text("no directory")
    assert listed(tmp_path) == first
    shutil.rmtree(own_directories / "cache_dir")
    (own_directories / "cache_dir").write_text("no directory")
    assert listed(tmp_path) == first


def test_whose_a_file_is_and_what_is_known_of_it_is_never_taken_from_there(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write(tmp_path))
    listed(tmp_path)
    points = catalog.look(path).points
    opened.clear()
    verified.record(path, points, at=TIME, ok=False, coverage="full", lost=[TIME])
    assert not catalog.glance(path).good and catalog.glance(path).good_points == ()
    monkeypatch.setattr(_trust.Doubts, "of", lambda *_args: "it belongs to somebody")
    assert not catalog.glance(path).ours
    catalog.sidecars.set_notes(path, "before the upgrade")
    assert listed(tmp_path)[0]["notes"] == "before the upgrade"
    assert opened == []


def test_a_run_opens_the_archives_of_its_own_vm_only(tmp_path: Path, opened: list[str]) -> None:
    """Whatever else is in the place: counted at two sizes."""
    own = [write(tmp_path, timestamp=TIME + day) for day in range(2)]
    counts = []
    for size in (3, 12):
        for number in range(size):
            uuid = f"{number:08x}{OTHER_UUID[8:]}"
            write(tmp_path, name=f"vm{number}-{size}", uuid=uuid, timestamp=TIME + size)
        listed(tmp_path)
        opened.clear()
        next_run()
        assert [view.path for view in VmArchives(UUID).views(str(tmp_path))] == [str(path) for path in own]
        retention.look(str(tmp_path), "test:///default", Told(), lambda _views: "", UUID)
        counts.append(len(opened))
        assert set(opened) == set(map(str, own))
    assert counts[0] == counts[1] == 2 * len(own)


def forge(file: Path, *changes: tuple[str, str]) -> None:
    """Makes the index say something else."""
    data = file.read_bytes()
    for old, new in changes:
        assert old.encode() in data
        data = data.replace(old.encode(), new.encode())
    file.write_bytes(data)


@pytest.mark.parametrize(
    "changes",
    [
        [(f'"{OTHER_UUID}"', f'"{UUID}"')],  # the newest of another VM counts as one of this VM
        [(UUID, OTHER_UUID)],
        [(f"{TIME + DAY},", f"{TIME - DAY},")],
        [("true,true,false,", "true,true,true,")],  # damaged
    ],
)
def test_a_wrong_index_removes_nothing_that_is_needed(
    tmp_path: Path, index_file: Callable[[], Path], changes: list[tuple[str, str]]
) -> None:
    paths = place(tmp_path)
    right = retain(tmp_path, check_mode=True)
    assert right == [str(paths["old"])]
    listed(tmp_path)
    forge(index_file(), *changes)
    assert set(retain(tmp_path)) <= set(right)
    assert paths["new"].exists() and paths["other"].exists() and paths["base"].exists()


def test_a_wrong_index_does_not_cost_a_clone_its_template(
    tmp_path: Path, index_file: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template's archive is the older of two, and the index denies that a clone needs it."""
    monkeypatch.setattr(retention, "_clones_elsewhere", lambda *_args: [])
    base = write(tmp_path, name="base", uuid=OTHER_UUID, provides=DISKS)
    write(tmp_path, name="base", uuid=OTHER_UUID, timestamp=TIME + DAY)
    clone = write(tmp_path, name="clone", requires=TemplateRequirement("u", "base", DISKS))
    listed(tmp_path)
    forge(index_file(), ('["u","base",[["vda",1048576,"' + "ab" * 32 + '"]]]', "null"))
    next_run()
    assert catalog.glance(str(clone)).newest.requires is None
    assert retain(tmp_path) == []
    assert base.exists()


def retain(directory: Path, *, check_mode: bool = False) -> list[str]:
    """What backup_retention removes with keep_last 1, as a new run."""
    next_run()
    request = RetentionRequest(_retention.Rules(last=1), path=str(directory), uri="test:///default", check_mode=check_mode)
    return [each["path"] for each in retention.retain(request, Told(), lambda _views: "")["removed"]]


def test_lines_of_what_is_gone_do_not_stay_for_ever(
    tmp_path: Path, index_file: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_SLACK_LINES", 4)
    path = write(tmp_path)
    for number in range(20):
        os.utime(path, ns=(0, number))
        listed(tmp_path)
    assert len(index_file().read_bytes().splitlines()) <= 8


def test_indexes_of_places_that_are_gone_do_not_stay_for_ever(
    tmp_path: Path, own_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_MAX_FILES", 3)
    path = write(tmp_path)
    for number in range(6):
        directory = tmp_path / str(number)
        directory.mkdir()
        shutil.copy(path, directory)
        listed(directory)
    assert len(list((own_directories / "cache_dir" / "index").iterdir())) == 3


def test_two_runs_that_tidy_the_cache_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).touch()
    unlink = os.unlink

    def both(path: str) -> None:
        unlink(path)
        unlink(path)  # the other one was faster

    monkeypatch.setattr(cache.os, "unlink", both)
    cache.remove_oldest(str(tmp_path), 1)
    assert len(list(tmp_path.iterdir())) == 1
