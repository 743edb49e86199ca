# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Verification of archives, and of the disk images in them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import verify as catalog_verify
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import Selection, VerifyRequest
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.verify import verify
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    CancelledError,
    RefusedError,
    TargetError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
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
                "damage": [],
            }
        ]
    }


def test_damage_is_named_and_fails(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    damage(path, member_offset(path, "vda_0.qcow2") + 300_000)
    found = verify(request(path), told)
    assert found["failed"] is True
    assert str(path) in found["msg"]
    (only,) = found["archives"][0]["damage"]
    with open_archive(str(path)) as archive:
        size = archive.entry("vda_0.qcow2").size_bytes
    assert only == {
        "member": "vda_0.qcow2", "offset": 0, "length": size, "points": [TIME], "reason": "its digest does not fit",
    }  # fmt: skip
    assert found["archives"][0]["ok"] is False


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


def test_deep_in_a_foreign_archive_misses_the_backing_image(tmp_path: Path, told: Told) -> None:
    base = tmp_path / "base.qcow2"
    qcow2(tmp_path).rename(base)
    image = tmp_path / "image.qcow2"
    archive = write_foreign(tmp_path)
    qcow2(tmp_path, "-b", str(base), "-F", "qcow2")
    image.rename(tmp_path / "web01.qcow2")
    shutil.unpack_archive(archive, tmp_path / "x", "tar")
    (tmp_path / "web01.qcow2").replace(tmp_path / "x" / "web01.qcow2")
    shutil.make_archive(str(tmp_path / "foreign"), "tar", tmp_path / "x")
    (only,) = verify(request(archive, deep=True), told)["archives"][0]["damage"]
    assert only["reason"] == "its backing image base.qcow2 is not in the archive"


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


def test_deep_needs_room_for_compressed_archives(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, compressed=True)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(catalog_verify.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(TargetError, match="1000 are free"):
        verify(request(path, deep=True), told)
    assert list(tmp_path.iterdir()) == [path]


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
