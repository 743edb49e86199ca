# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose file it is: only what root, or the user who runs, alone can have written is ours."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _mounts, _paths, _trust
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog
from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._restore import host_exposure
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog import catalog_archives
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._restore import (
    restore_values,
    test_restore_allowed,
)

MALLORY, NOBODY = 1234567, 65534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir(mode=0o755)
    path = tmp_path / "place/x.tar"
    path.write_bytes(b"x")
    path.chmod(0o600)
    return path


def test_a_file_of_root_in_directories_of_root_is_ours(archive: Path) -> None:
    assert _trust.doubt(str(archive)) == ""
    archive.chmod(0o644)
    assert _trust.doubt(str(archive)) == ""
    archive.parent.chmod(0o1777)
    assert _trust.doubt(str(archive)) == ""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("file", "belongs to the user 1234567"),
        ("file mode", "every user"),
        ("file group", "the group"),
        ("directory", "belongs to the user 1234567"),
        ("directory mode", "every user"),
        ("directory group", "the group"),
        ("sticky of another", "belongs to the user 1234567"),
        ("link", "is a link of the user 1234567"),
    ],
)
def test_what_another_can_have_written_is_not(archive: Path, tmp_path: Path, what: str, words: str) -> None:
    place, path = archive.parent, archive
    if what == "file":
        os.chown(archive, MALLORY, -1)
    elif what == "file mode":
        archive.chmod(0o606)
    elif what == "file group":
        os.chown(archive, 0, 4242)
        archive.chmod(0o660)
    elif what == "directory":
        os.chown(place, MALLORY, -1)
    elif what == "directory mode":
        place.chmod(0o777)
    elif what == "directory group":
        os.chown(place, 0, 4242)
        place.chmod(0o775)
    elif what == "sticky of another":
        os.chown(place, MALLORY, -1)
        place.chmod(0o1777)
    else:
        path = tmp_path / "link.tar"
        path.symlink_to(archive)
        os.lchown(path, MALLORY, -1)
    assert words in _trust.doubt(str(path)) and "SECURITY.md" in _trust.doubt(str(path))


def test_a_group_that_is_the_users_own_counts_as_the_user(archive: Path) -> None:
    archive.chmod(0o664)
    archive.parent.chmod(0o775)
    assert _trust.doubt(str(archive)) == ""


def test_dots_and_links_are_those_of_the_kernel(archive: Path, tmp_path: Path) -> None:
    (archive.parent / "deeper").mkdir()
    (tmp_path / "first").symlink_to(archive.parent / "deeper")
    (tmp_path / "second").symlink_to("first")
    name = f"{tmp_path}/second/..//x.tar"
    assert _trust.doubt(name, os.stat(name)) == ""
    os.lchown(tmp_path / "first", MALLORY, -1)
    assert f"{tmp_path}/first is a link of" in _trust.doubt(name)


@pytest.mark.parametrize(("name", "ours"), [("mallory", True), ("users", False)])
def test_the_group_of_one_user(name: str, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`users` may be the first group of everybody, who are not listed as members then."""
    monkeypatch.setattr(_trust.pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="mallory", pw_gid=100))
    monkeypatch.setattr(_trust.grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=name, gr_mem=[]))
    assert _trust._is_private(100, MALLORY) is ours


@pytest.mark.parametrize("which", ["file", "directory"])
def test_an_acl_that_lets_another_user_write(which: str, archive: Path) -> None:
    """The group's bits are the mask then; the group itself is root's."""
    path = archive if which == "file" else archive.parent

    def set_acl(user: int, permissions: int) -> None:
        nobody = 2**32 - 1
        entries = ((1, 7, nobody), (2, permissions, user), (4, 4, nobody), (0x10, 7, nobody), (0x20, 0, nobody))
        acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
        os.setxattr(path, "system.posix_acl_access", acl)

    set_acl(MALLORY, 6)
    assert "can be written to by others, as its ACL says" in _trust.doubt(str(archive))
    set_acl(MALLORY, 4)
    assert _trust.doubt(str(archive)) == ""
    set_acl(0, 6)
    assert _trust.doubt(str(archive)) == ""


def test_a_file_system_that_another_user_has_mounted(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says root's of all files, in a directory that everybody may mount something on."""
    line = "62 31 0:55 / {place} rw,nosuid,nodev - fuse.sshfs mallory@far: rw,user_id={user},group_id=1000,allow_other"
    status = archive.stat()
    fuse = os.stat_result((*status[:2], os.makedev(0, 55), *status[3:10]))

    def mounted(user: int) -> None:
        mounts = _mounts.parse(line.format(place=archive.parent, user=user))
        monkeypatch.setattr(_mounts, "now", lambda: mounts)

    def doubt() -> str:
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", lambda _path: fuse)
            return _trust.doubt(str(archive))

    mounted(MALLORY)
    assert "is on a file system that the user 1234567 has mounted (mallory@far: (fuse.sshfs) at" in doubt()
    mounted(0)
    assert doubt() == ""


def test_where_every_user_may_replace_files(archive: Path, tmp_path: Path) -> None:
    place = archive.parent
    assert _trust.open_to_all(str(place)) == ""
    place.chmod(0o777)
    assert _trust.open_to_all(str(place)) == _trust.open_to_all(f"{place}/") == str(place)
    (tmp_path / "link").symlink_to(place)
    assert _trust.open_to_all(str(tmp_path / "link")) == str(place)
    (place / "below").mkdir()
    assert _trust.open_to_all(str(place / "below")) == str(place)
    place.chmod(0o1777)
    assert _trust.open_to_all(str(place / "below")) == ""


def test_another_file_under_the_name_by_now(archive: Path) -> None:
    opened = os.stat(archive)
    archive.rename(archive.with_name("old"))
    archive.write_bytes(b"y")
    assert _trust.doubt(str(archive), opened) == "another file has its name by now"
    assert "cannot be told" in _trust.doubt("/nowhere/x.tar")


def test_owners_are_trusted_in_their_place_only(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS with root_squash, where all files are nobody's."""
    settings = tmp_path / "trusted-owners"
    monkeypatch.setattr(_paths, "trusted_owners_file", lambda: str(settings))
    os.chown(archive, NOBODY, -1)
    os.chown(archive.parent, NOBODY, -1)
    assert _trust.doubt(str(archive))
    settings.write_text(f"# of the role\n{NOBODY} {archive.parent}\n", encoding="utf-8")
    assert _trust.doubt(str(archive)) == ""
    elsewhere = tmp_path / "placebo"
    elsewhere.mkdir()
    other = archive.rename(elsewhere / "x.tar")
    assert _trust.doubt(str(other))
    for line, why in (("mallory", "no user and a directory"), ("² /", "no user '²'")):
        settings.write_text(f"{line}\n", encoding="utf-8")
        with pytest.raises(TargetError, match=why):
            _trust.doubt(str(other))


def test_the_cost_of_being_careful(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each archive, in a list and in the plan of a restore, beside the same without the checks: less than 10 ms."""
    path = str(catalog_archives.write(archive.parent))
    point = restore_values.configuration(restore_values.domain_xml(restore_values.DISKS + test_restore_allowed.DEVICES))
    facts = test_restore_allowed.HERE

    def listed() -> None:
        catalog.look(path)

    def planned() -> None:
        restore_values.planned(facts, point, distrust="it belongs to mallory")

    found = {}
    for name, use in (("list", listed), ("restore", planned)):
        with_checks = _fastest_s(use)
        with monkeypatch.context() as patch:
            patch.setattr(_trust, "doubt", lambda *_arguments: "")
            patch.setattr(host_exposure, "only_allowed", lambda _root: host_exposure.Exposure())
            found[name] = (with_checks, _fastest_s(use))
    for name, (careful_s, careless_s) in found.items():
        print(f"{name}: {1000 * careful_s:.2f} ms, without the checks {1000 * careless_s:.2f} ms")
    assert all(careful_s - careless_s < 0.01 for careful_s, careless_s in found.values())


def _fastest_s(use: Callable[[], None]) -> float:
    times = []
    for _number in range(30):
        begin = time.process_time()
        use()
        times.append(time.process_time() - begin)
    return min(times)


def test_a_list_asks_once_about_a_place_and_about_each_file(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(_trust, "_doubt_of_way", lambda path, _owners: asked.append(path) or "")
    monkeypatch.setattr(_trust, "_on_mount_of_others", lambda *_arguments: asked.append("mount") or "")
    paths = [archive.with_name(f"{number}.tar") for number in range(5)]
    for path in paths:
        path.write_bytes(b"x")
    os.chown(paths[3], MALLORY, MALLORY)
    doubts = _trust.Doubts()
    found = [doubts.of(str(path)) for path in paths]
    assert asked == ["mount", str(paths[0])]
    assert [bool(why) for why in found] == [False, False, False, True, False] and "belongs to" in found[3]
    link = archive.with_name("link.tar")
    link.symlink_to(paths[0])
    doubts.of(str(link))
    assert asked[-1] == str(link)
