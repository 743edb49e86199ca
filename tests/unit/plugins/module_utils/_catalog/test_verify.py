# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Verification of archives, and of the disk images in them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive import archive_locks, digests
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import verify as catalog_verify
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.catalog import describe, iso_time
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import Selection, VerifyRequest
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.verify import verify
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    BusyError,
    CancelledError,
    RefusedError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive.archives import append
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog.catalog_archives import (
    TIME,
    UUID,
    Told,
    damage,
    qcow2,
    write,
    write_foreign,
)


def request(path: Path, **options: bool) -> VerifyRequest:
    selection = Selection(path=str(path)) if path.is_dir() else Selection(archive=str(path))
    return VerifyRequest(selection, **options)


def member_offset(path: Path, name: str) -> int:
    with open_archive(str(path)) as archive:
        return archive.entry(name).offset


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_good(tmp_path: Path, told: Told, compressed: bool, deep: bool) -> None:
    path = write(tmp_path, compressed=compressed)
    with open_archive(str(path)) as archive:
        total = sum(entry.size_bytes for entry in archive.entries)
    found = verify(request(path, deep=deep), told)
    assert found == {
        "archives": [
            {
                "path": str(path),
                "ok": True,
                "coverage": "full",
                "checked_bytes": total,
                "unchecked_bytes": 0,
                "lost": [],
                "damage": [],
            }
        ]
    }


def test_a_place_without_archives_is_no_success_in_silence(tmp_path: Path, told: Told) -> None:
    assert verify(request(tmp_path), told) == {"archives": []}
    assert told.warnings == [f"Nothing was checked: no archive is in {tmp_path}"]


def test_a_directory_is_no_damaged_archive(tmp_path: Path, told: Told) -> None:
    with pytest.raises(ArchiveError, match="as path:"):
        verify(VerifyRequest(Selection(archive=str(tmp_path))), told)


def test_damage_is_named_and_fails(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    damage(path, member_offset(path, "vda_0.qcow2") + 300_000)
    found = verify(request(path), told)
    assert found["failed"] is True
    assert found["msg"] == (
        f"Archive {path}: it is damaged: point {TIME} ({iso_time(TIME)}) is lost, and it has no other. "
        "Restore from another archive."
    )
    (only,) = found["archives"][0]["damage"]
    with open_archive(str(path)) as archive:
        size = archive.entry("vda_0.qcow2").size_bytes
    assert only == {
        "member": "vda_0.qcow2", "offset": 0, "length": size, "points": [TIME], "reason": "its digest does not fit",
    }  # fmt: skip
    assert found["archives"][0]["ok"] is False


def test_the_points_that_damage_has_cost_are_named_and_those_that_can_be_restored(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    for number in (1, 2):
        append(path, {f"vda_{number}.snapshot": b"x" * 1000}, timestamp=TIME + 60 * number)
    damage(path, member_offset(path, "vda_1.snapshot") + 10)
    found = verify(request(path), told)
    assert found["archives"][0]["lost"] == [TIME + 60, TIME + 120]
    assert found["msg"] == (
        f"Archive {path}: it is damaged: points {TIME + 60} ({iso_time(TIME + 60)}), {TIME + 120} ({iso_time(TIME + 120)}) are "
        f"lost. Point {TIME} ({iso_time(TIME)}) can still be restored from it."
    )


def test_damage_fails_only_if_asked_for(tmp_path: Path, told: Told) -> None:
    good, bad = write(tmp_path), tmp_path / "bad.tar"
    bad.write_bytes(good.read_bytes()[:200_000])
    (tmp_path / "text.tar").write_text("no archive")
    found = verify(request(tmp_path, fail_on_damage=False), told)
    assert {Path(entry["path"]).name: entry["ok"] for entry in found["archives"]} == {
        "bad.tar": False, "text.tar": False, good.name: True,
    }  # fmt: skip
    assert "failed" not in found
    assert all(entry["damage"] for entry in found["archives"] if not entry["ok"])


def test_foreign_archives_are_not_called_checked(tmp_path: Path, told: Told) -> None:
    plain = verify(request(write_foreign(tmp_path)), told)["archives"][0]
    assert (plain["ok"], plain["coverage"], plain["checked_bytes"]) == (True, "structure", 0)
    assert plain["unchecked_bytes"] > 0
    packed = verify(request(write_foreign(tmp_path, compressed=True)), told)["archives"][0]
    assert (packed["ok"], packed["coverage"]) == (True, "partial")


@pytest.mark.parametrize("compressed", [False, True])
def test_deep_finds_what_digests_cannot(tmp_path: Path, told: Told, compressed: bool) -> None:
    image = qcow2(tmp_path)
    with image.open(
        "r+b"
    ) as file:  # the archive holds exactly what the disk was: an image with a broken refcount table
        file.seek(48)
        file.seek(int.from_bytes(file.read(8), "big"))
        block = int.from_bytes(file.read(8), "big")
        file.seek(block + 6)
        file.write(bytes(4))
    path = write(tmp_path, image=image, compressed=compressed)
    assert verify(request(path), told)["archives"][0]["ok"] is True
    found = verify(request(path, deep=True), told)
    assert found["failed"] is True
    (only,) = found["archives"][0]["damage"]
    assert (only["member"], only["points"]) == ("vda_0.qcow2", [TIME])
    assert only["reason"].startswith("qemu-img check: ")


def test_deep_refuses_images_that_stand_on_files_of_the_host(tmp_path: Path, told: Told) -> None:
    base = tmp_path / "base.qcow2"
    qcow2(tmp_path).rename(base)
    path = write(tmp_path, image=qcow2(tmp_path, "-b", str(base), "-F", "qcow2"))
    (only,) = verify(request(path, deep=True), told)["archives"][0]["damage"]
    assert "it stands on another file" in only["reason"]


@pytest.mark.parametrize(
    ("backing", "found"),
    [
        ("/vms/base.qcow2", "its backing image base.qcow2 is not in the archive"),
        ("1700000000_web01.xml", "its backing image 1700000000_web01.xml is not in the archive"),
        ("web01.qcow2", "the layers below it form a circle"),
    ],
)
def test_deep_in_a_foreign_archive_misses_the_backing_image(
    tmp_path: Path, told: Told, backing: str, found: str
) -> None:
    archive = write_foreign(tmp_path)
    shutil.unpack_archive(archive, tmp_path / "x", "tar")
    xml = tmp_path / "x" / "1700000000_web01.xml"
    xml.write_text(xml.read_text().replace("/images/web01.raw", "/images/web01.qcow2"))
    qcow2(tmp_path, "-u", "-b", backing, "-F", "qcow2").replace(tmp_path / "x" / "web01.qcow2")
    shutil.make_archive(str(tmp_path / "foreign"), "tar", tmp_path / "x")
    (only,) = verify(request(archive, deep=True), told)["archives"][0]["damage"]
    assert only["reason"] == found


@pytest.mark.parametrize("compressed", [False, True])
def test_deep_takes_an_image_that_ends_within_a_sector(tmp_path: Path, told: Told, compressed: bool) -> None:
    """As those that qemu-img and libvirt have just made."""
    image = tmp_path / "fresh.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "16M"], check=True)
    assert image.stat().st_size % 512
    found = verify(request(write(tmp_path, image=image, compressed=compressed), deep=True), told)
    assert found["archives"][0]["damage"] == []


def test_deep_needs_qemu_img(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(RefusedError, match="qemu-img is not installed"):
        verify(request(write(tmp_path), deep=True), told)


def no_room(_path: str) -> Any:
    return shutil._ntuple_diskusage(1, 1, 1000)


def test_deep_needs_room_for_compressed_archives(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are checked all the same, and the rest of the place is."""
    path, plain = write(tmp_path, compressed=True), write(tmp_path, timestamp=TIME + 1)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(catalog_verify.shutil, "disk_usage", no_room)
    found = verify(request(path, deep=True), told)
    assert found["failed"] and f"{path}: " in found["msg"] and "1000 are free" in found["msg"]
    assert "TMPDIR" in found["hint"]
    assert [entry["coverage"] for entry in found["archives"]] == ["full"]
    of_place = verify(request(tmp_path, deep=True, fail_on_damage=False), told)
    assert of_place["failed"] and of_place["msg"] == found["msg"]
    assert {entry["path"] for entry in of_place["archives"]} == {str(path), str(plain)}
    assert sorted(tmp_path.iterdir()) == sorted([path, plain])


def test_damage_is_told_beside_what_could_not_be_checked(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plain = write(tmp_path, compressed=True), write(tmp_path, timestamp=TIME + 1)
    damage(plain, 300_000)
    monkeypatch.setattr(catalog_verify.shutil, "disk_usage", no_room)
    for fail_on_damage in (True, False):
        found = verify(request(tmp_path, deep=True, fail_on_damage=fail_on_damage), told)
        assert f"Archive {plain}: it is damaged" in found["msg"] and f"Archive {path}: " in found["msg"]


def gone_when_its_turn_comes(monkeypatch: pytest.MonkeyPatch, path: Path, when: str) -> None:
    """Removes an archive at a moment of its verification, as retention or a conversion does."""
    owner, name = {
        "before it is opened": (catalog_verify.archive_locks, "reading"),
        "after it was found": (catalog_verify.os.path, "isfile"),
        "before it is read": (catalog_verify.archive_verify, "verify_file"),
    }[when]
    original = getattr(owner, name)

    def removing(first: str, **options: Any) -> Any:
        found = original(first, **options) if name == "isfile" else None
        if first == str(path):
            path.unlink(missing_ok=True)
        return found if name == "isfile" else original(first, **options)

    monkeypatch.setattr(owner, name, removing)


@pytest.mark.parametrize("when", ["before it is opened", "after it was found", "before it is read"])
def test_an_archive_that_goes_meanwhile_costs_nothing_of_the_result(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    gone, stays = write(tmp_path), write(tmp_path, timestamp=TIME + 1)
    gone_when_its_turn_comes(monkeypatch, gone, when)
    found = verify(request(tmp_path), told)
    assert [entry["path"] for entry in found["archives"]] == [str(stays)] and "failed" not in found
    assert told.warnings == [f"{gone} is not checked: it is not there any more"]


@pytest.mark.parametrize("when", ["before it is opened", "after it was found", "before it is read"])
def test_the_one_archive_that_goes_meanwhile_is_an_error(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    gone = write(tmp_path)
    gone_when_its_turn_comes(monkeypatch, gone, when)
    with pytest.raises(ArchiveError, match=r"not there any more|No such file"):
        verify(request(gone), told)


def test_an_archive_that_is_busy_costs_nothing_of_the_result(tmp_path: Path, told: Told) -> None:
    taken, good = write(tmp_path), write(tmp_path, timestamp=TIME + 1)
    with archive_locks.alone(str(taken)):
        found = verify(request(tmp_path, fail_on_damage=False), told)
        with pytest.raises(BusyError, match="deleting or replacing"):
            verify(request(taken), told)
    assert [entry["path"] for entry in found["archives"]] == [str(good)]
    assert found["failed"] and str(taken) in found["msg"] and "deleting or replacing" in found["msg"]
    assert found["what"] == f"Archive {taken}" and found["why"] and found["hint"]


def test_a_file_that_cannot_be_read_is_damaged(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = write(tmp_path), write(tmp_path, timestamp=TIME + 1)
    inode, read = bad.stat().st_ino, os.pread

    def fail(fd: int, length: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, length, offset)

    monkeypatch.setattr(os, "pread", fail)
    found = verify(request(tmp_path), told)
    assert {entry["path"]: entry["ok"] for entry in found["archives"]} == {str(bad): False, str(good): True}
    assert any("Input/output error" in item["reason"] for item in found["archives"][0]["damage"])


def test_of_one_vm(tmp_path: Path, told: Told) -> None:
    mine = write(tmp_path)
    write(tmp_path, name="db01", uuid=UUID.replace("6", "7"))
    (tmp_path / "empty.tar").touch()
    found = verify(VerifyRequest(Selection(path=str(tmp_path), vm=UUID)), told)
    assert [entry["path"] for entry in found["archives"]] == [str(mine)]
    assert len(told.warnings) == 1 and "empty.tar is not checked" in told.warnings[0]


def test_what_is_not_there_is_an_error_and_no_damage(tmp_path: Path, told: Told) -> None:
    with pytest.raises(ArchiveError, match="no such file"):
        verify(VerifyRequest(Selection(archive=str(tmp_path / "missing.tar"))), told)
    with pytest.raises(ArchiveError, match="cannot be listed"):
        verify(VerifyRequest(Selection(path=str(tmp_path / "missing"))), told)


def test_it_can_be_stopped(tmp_path: Path) -> None:
    progress = Progress()
    progress.cancel("asked to")
    with pytest.raises(CancelledError):
        verify(request(write(tmp_path)), Told(progress))


def test_good_digests_in_the_hands_of_another_user_prove_nothing(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    os.chown(path, 1234567, -1)
    assert verify(request(path), told)["archives"][0]["ok"]
    assert any("is not trusted" in text and "the user 1234567" in text for text in told.warnings)


@pytest.mark.parametrize("name", ["router.ova", "router.OVF", "web.xml"])
def test_what_is_no_archive_is_not_called_damaged(tmp_path: Path, told: Told, name: str) -> None:
    path = write(tmp_path).rename(tmp_path / name)
    with pytest.raises(RefusedError, match="not an archive, but a package or a Domain XML"):
        verify(request(path), told)


def test_a_file_that_nobody_can_look_at_costs_the_others_nothing_and_is_no_success(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, good = write(tmp_path), write(tmp_path, name="db")
    real = {name: getattr(os, name) for name in ("stat", "lstat", "open")}

    def failing(name: str) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if path == str(lost):
                raise OSError(errno.ESTALE, "Stale file handle", path)
            return real[name](path, *args, **options)

        return call

    for name in real:
        monkeypatch.setattr(os, name, failing(name))
    with pytest.raises(ArchiveError, match=f"{lost}: it cannot be looked at .Stale file handle"):
        catalog.look(str(lost))
    assert not catalog.surely_of_others(str(lost), "x")
    found = verify(request(tmp_path), told)
    assert found["failed"] and str(lost) in found["msg"]
    assert [each["path"] for each in found["archives"] if each["ok"]] == [str(good)]


def anchored(directory: Path, path: Path, expected: Any, **options: Any) -> VerifyRequest:
    """As the module's parameters make it."""
    params = {"archive": str(path) if path.is_file() else None, "path": str(path) if path.is_dir() else None, "pool": None}
    params.update(vm=None, uri="", deep=False, fail_on_damage=True, threads=0, nice=0, ionice=None, expected_digest=expected)
    return VerifyRequest.of({**params, **options})


@pytest.mark.parametrize("compressed", [False, True])
def test_anchor_finds_what_was_rewritten_consistently(
    tmp_path: Path, told: Told, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "fastest", lambda: digests.SHA256)
    path = write(tmp_path, compressed=compressed)
    digest = describe(str(path))["digest"]
    as_text = f'{{"{path.name}": "{digest}"}}'  # as a command line gives it
    for expected in (digest, digest.upper(), {path.name: digest}, {str(path): digest}, as_text):
        assert verify(anchored(tmp_path, path, expected), told)["archives"][0]["ok"]
    append(path, {"vda_1.snapshot": b"new"})
    assert not told.warnings and "failed" not in verify(anchored(tmp_path, tmp_path, {path.name: digest}), told)
    assert "does not cover point" in told.warnings[-1]
    path.unlink()
    forged = write(tmp_path, compressed=compressed, image=qcow2(tmp_path, seed=2))
    assert forged == path and verify(request(path), told)["archives"][0]["ok"]
    found = verify(anchored(tmp_path, path, digest), told)
    assert found["failed"] and "somebody changed it" in found["msg"] and not found["archives"][0]["ok"]
    assert describe(str(path))["verified"]["ok"]  # what was expected wrongly is no damage


def test_anchor_of_an_archive_that_is_gone(tmp_path: Path, told: Told) -> None:
    write(tmp_path)
    found = verify(anchored(tmp_path, tmp_path, {"gone.tar": "0" * 64}), told)
    assert found["failed"] and "gone.tar: its digest is expected" in found["msg"] and len(found["archives"]) == 1


@pytest.mark.parametrize(
    ("expected", "why"),
    [("0" * 64, "one digest is of one archive"), ({"a.tar": "12"}, "64 hexadecimal"), ([], "neither"), ('{"a', "no map")],
)
def test_no_anchor(tmp_path: Path, expected: Any, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        anchored(tmp_path, tmp_path, expected)


def test_anchor_needs_a_cryptographic_hash(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    with pytest.raises(RefusedError, match="its digests are xxh3-128"):
        verify(anchored(tmp_path, path, describe(str(path))["digest"]), told)
