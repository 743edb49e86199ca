# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Places: what is mounted where, and what is a fit target. Real directories; pools as libvirt describes them."""

from __future__ import annotations

import os
import threading

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _mounts
from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import lvm, storage


@pytest.fixture
def known(monkeypatch):
    found = []
    monkeypatch.setattr(storage, "pools", lambda _conn: tuple(found))
    return found


def test_describe_agrees_with_the_kernel(tmp_path, known):
    place = storage.describe(None, str(tmp_path / "not" / "there" / "yet"))
    facts = os.statvfs(tmp_path)
    assert place.directory == str(tmp_path) and place.kind is storage.PlaceKind.DIR
    assert place.total_bytes == facts.f_blocks * facts.f_frsize
    assert abs(place.free_bytes - facts.f_bavail * facts.f_frsize) < 2**30
    assert os.path.ismount(place.mount_point)


def test_the_nearest_pool_owns_a_path(tmp_path, known):
    (tmp_path / "inner").mkdir()
    known.append(storage.Pool("outer", "dir", True, str(tmp_path), ""))
    known.append(storage.Pool("inner", "dir", True, str(tmp_path / "inner"), ""))
    assert storage.describe(object(), str(tmp_path / "inner" / "a")).pool == "inner"
    assert storage.describe(object(), str(tmp_path / "innermost")).pool == "outer"


@pytest.fixture
def settings(tmp_path, monkeypatch):
    path = tmp_path / "settings"
    monkeypatch.setattr(
        "ansible_collections.kvmops.backup.plugins.module_utils._paths.read_only_file", lambda: str(path)
    )
    return path


@pytest.mark.parametrize("named", ["backups", "TMP/target", "TMP/other/../target", "TMP"])
def test_places_that_the_host_names_as_read_only(tmp_path, known, settings, named):
    target = tmp_path / "target"
    target.mkdir()
    known.append(storage.Pool("backups", "dir", True, str(target), ""))
    settings.write_text(f"# kept\n\n  {named.replace('TMP', str(tmp_path))}  \n")
    for way in ({"pool": "backups"}, {"path": str(target)}):
        with pytest.raises(TargetError, match=f"named as read-only in {settings}"):
            storage.resolve_target(object(), **way)
    assert "read-only" in storage.describe(object(), str(target / "a.tar")).read_only


def test_a_pool_that_is_named_as_read_only_stays_so_while_libvirt_does_not_answer(tmp_path, settings):
    settings.write_text(f"backups\n{tmp_path}/archive\n")
    for directory in ("target", "archive"):
        (tmp_path / directory).mkdir()
    with pytest.raises(TargetError, match=rf"{settings} names as read-only \(backups\) cannot be told"):
        storage.resolve_target(None, path=str(tmp_path / "target"))
    with pytest.raises(TargetError, match=f"named as read-only in {settings}"):
        storage.resolve_target(None, path=str(tmp_path / "archive"))
    settings.write_text(f"{tmp_path}/archive\n")  # directories can be told
    assert storage.resolve_target(None, path=str(tmp_path / "target")).read_only == ""


@pytest.mark.parametrize("text", ["", "# backups\n", "backup\n", "TMP/targe\n", "target\n"])
def test_other_places_stay_as_they_are(tmp_path, known, settings, text):
    (tmp_path / "target").mkdir()
    known.append(storage.Pool("backups", "dir", True, str(tmp_path / "target"), ""))
    settings.write_text(text.replace("TMP", str(tmp_path)))
    assert storage.resolve_target(object(), pool="backups").read_only == ""


def test_settings_that_cannot_be_read_protect_everything(tmp_path, known, settings):
    settings.mkdir()
    with pytest.raises(TargetError, match="cannot be read"):
        storage.resolve_target(object(), path=str(tmp_path))


def test_good_targets(tmp_path, known):
    known.append(storage.Pool("backups", "dir", True, str(tmp_path), ""))
    assert storage.resolve_target(object(), pool="backups").directory == str(tmp_path)
    assert storage.resolve_target(object(), path=str(tmp_path)).pool == "backups"


BAD_POOLS = {
    "unknown": (None, "no storage pool of that name"),
    "inactive": (("dir", False), "pool-start"),
    "lvm": (("logical", True), "of type logical"),
    "zfs": (("zfs", True), "of type zfs"),
    "unmounted": (("netfs", True), "nothing is mounted"),
    "unmounted fs": (("fs", True), "nothing is mounted"),
}


@pytest.mark.parametrize("name", BAD_POOLS)
def test_bad_pools(tmp_path, known, name):
    pool, text = BAD_POOLS[name]
    if pool:
        known.append(storage.Pool(name, pool[0], pool[1], str(tmp_path), "server:/export"))
    with pytest.raises(TargetError) as caught:
        storage.resolve_target(object(), pool=name)
    assert text in str(caught.value)


def test_the_directory_of_an_unmounted_pool_given_as_a_path(tmp_path, known):
    known.append(storage.Pool("nfs", "netfs", False, str(tmp_path), "server:/export"))
    (tmp_path / "deep").mkdir()
    for path in (tmp_path, tmp_path / "deep"):
        with pytest.raises(TargetError) as caught:
            storage.resolve_target(object(), path=str(path))
        assert "nothing is mounted" in str(caught.value)


def expects(monkeypatch, *mount_points):
    monkeypatch.setattr(
        _mounts, "expected", lambda: [_mounts.Expected(str(at), "nas:/b", "/etc/fstab") for at in mount_points]
    )


def test_a_mount_point_with_nothing_mounted(tmp_path, known, monkeypatch):
    for name in ("nas/deep", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "nas")
    expects(monkeypatch, tmp_path / "nas", "/")
    for path in ("nas", "nas/deep", "nas/not there", "link", "link/deep"):
        with pytest.raises(TargetError, match=f"nothing is mounted at {tmp_path}/nas, where /etc/fstab has nas:/b"):
            storage.resolve_target(None, path=str(tmp_path / path))
    assert storage.resolve_target(None, path=str(tmp_path / "other")).directory == str(tmp_path / "other")
    expects(monkeypatch, tmp_path / "link")
    with pytest.raises(TargetError, match=f"nothing is mounted at {tmp_path}/nas"):
        storage.resolve_target(None, path=str(tmp_path / "link"))


def test_a_place_is_touched_before_the_list_of_mounts_is_read(tmp_path, known, monkeypatch):
    """That is what mounts a file system on demand."""
    touched = []
    statvfs, now = os.statvfs, _mounts.now
    monkeypatch.setattr(os, "statvfs", lambda path: touched.append(str(path)) or statvfs(path))
    monkeypatch.setattr(_mounts, "now", lambda: touched.append("list") or now())
    storage.resolve_target(None, path=str(tmp_path))
    assert touched[0] == str(tmp_path) and "list" in touched


def test_bad_paths(tmp_path, known):
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, tmp_path / "missing"):
        with pytest.raises(TargetError):
            storage.resolve_target(None, path=str(path))
    with pytest.raises(TargetError):
        storage.resolve_target(None)
    with pytest.raises(TargetError):
        storage.resolve_target(None, pool="a", path="/b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_not_writable(tmp_path, known):
    tmp_path.chmod(0o500)
    with pytest.raises(TargetError) as caught:
        storage.resolve_target(None, path=str(tmp_path))
    assert "not writable" in str(caught.value)


def test_a_hanging_file_system_is_not_waited_for(monkeypatch, known):
    never = threading.Event()
    monkeypatch.setattr(storage, "ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(os.path, "realpath", lambda path: path if never.wait() else "")
    with pytest.raises(TargetError) as caught:
        storage.describe(None, "/mnt/nfs")
    never.set()
    assert "did not answer" in str(caught.value)


def test_pool_documents():
    netfs = "<pool type='netfs'><name>n</name><source><dir path='/e'/></source><target><path>/t</path></target></pool>"
    assert storage.parse_pool(netfs, active=False) == storage.Pool("n", "netfs", False, "/t", "/e")
    logical = "<pool type='logical'><name>l</name><source><name>vg</name></source><target><path>/dev/vg</path></target></pool>"
    assert storage.parse_pool(logical, active=True).source == "vg"


def test_a_link_to_a_logical_volume_lies_on_lvm(tmp_path, known, monkeypatch):
    volume = lvm.LogicalVolume(("/dev/vg0/web", "/dev/dm-77"), "vg0", storage.PlaceKind.THIN_LVM, (252, 77))
    monkeypatch.setattr(lvm, "volumes", lambda: (volume,))
    monkeypatch.setattr(storage, "_is_block_device", lambda path: path == "/dev/dm-77")
    link = tmp_path / "web.img"
    link.symlink_to("/dev/dm-77")
    assert storage.describe(None, str(link)).description == "thin LVM (volume group vg0)"
