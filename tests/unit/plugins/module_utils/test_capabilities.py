# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a file system can do, and renaming where it lacks something. Real ones: integration target vm_storage."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _capabilities, _files
from ansible_collections.kvmops.backup.plugins.module_utils._capabilities import Capabilities
from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError


def failing(code: int) -> Callable[..., Any]:
    def call(*_arguments: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def test_a_local_file_system_can_everything_and_is_asked_quickly(tmp_path: Path):
    taken = []
    for _dummy in range(5):
        begin = time.process_time()  # the rest is what a busy disk takes for two fsyncs
        found = _capabilities.probe(str(tmp_path))
        taken.append(time.process_time() - begin)
    assert found.objection("a" * 255, 2**40) == "" and found.warnings == () and found.keeps_holes
    assert "up to 255 bytes" in found.objection("a" * 256)
    assert os.listdir(tmp_path) == []
    assert min(taken) < 0.01


@pytest.mark.parametrize("call", ["pwrite", "rename", "fsync"])
def test_what_every_file_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    monkeypatch.setattr(os, call, failing(errno.EPERM))
    with pytest.raises(TargetError, match=rf"The directory {tmp_path}: files cannot be .* \(Operation not permitted\)"):
        _capabilities.probe(str(tmp_path))
    monkeypatch.setattr(os, call, failing(errno.ENOTCONN))
    with pytest.raises(TargetError, match="Look at its mount"):
        _capabilities.probe(str(tmp_path))
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))  # whether there is room is asked elsewhere
    assert _capabilities.probe(str(tmp_path)) == Capabilities()
    assert os.listdir(tmp_path) == []


def test_limits_are_named():
    fat = Capabilities(max_file_bytes=2**32 - 1, mode=0o755, locks=False)
    assert "up to 4.0 GiB, and web.tar has about 5.0 GiB" in fat.objection("web.tar", 5 * 2**30)
    assert fat.objection("web.tar", 2**31) == ""
    assert ["0755" in fat.warnings[0].text, "no locks" in fat.warnings[1].text] == [True, True]


def test_what_a_killed_probe_has_left_is_swept(tmp_path: Path):
    left, working, other = (tmp_path / f".kvmops-backup-{name}" for name in ("probe-1", "probe-2-renamed", "slots"))
    for path in (left, working, other):
        path.touch()
    fd = os.open(working, os.O_RDWR)
    try:
        assert _capabilities._lock(fd)
        _capabilities.probe(str(tmp_path))
    finally:
        os.close(fd)
    assert sorted(os.listdir(tmp_path)) == sorted([working.name, other.name])


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_renaming_without_replacing_has_ways_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, links: bool
):
    monkeypatch.setattr(_files, "_renameat2", failing(code))
    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EIO))  # as rclone says it
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("x")
    _files.rename_new(str(old), str(new))
    assert (new.read_text(), os.listdir(tmp_path)) == ("x", ["new"])
    old.write_text("y")
    with pytest.raises(FileExistsError):
        _files.rename_new(str(old), str(new))
    assert (old.read_text(), new.read_text()) == ("y", "x")


def test_an_error_of_a_rename_is_not_worked_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_files, "_renameat2", failing(errno.EACCES))
    monkeypatch.setattr(os, "rename", lambda *_paths: pytest.fail("renamed"))
    with pytest.raises(PermissionError):
        _files.rename_new(str(tmp_path / "old"), str(tmp_path / "new"))


@pytest.mark.parametrize("limit", [255, 143])  # ecryptfs
def test_names_are_shortened_and_stay_unlike(limit: int):
    long = ["/i/" + "ä" * 120 + each for each in ("a.qcow2", "b.qcow2")]
    made = [_files.suffixed(path, ".kvmops-1795309200", limit) for path in long]
    assert len(set(made)) == 2 and all(path.endswith(".kvmops-1795309200") for path in made)
    assert all(limit - 2 <= len(os.fsencode(os.path.basename(path))) <= limit for path in made)
    again = [path[: -len(".kvmops-1795309200")] for path in made]
    assert [_files.suffixed(path, ".kvmops-1795309201", limit) for path in again] == [f"{path}.kvmops-1795309201" for path in again]
    assert _files.suffixed("/i/web.qcow2", ".a", limit) == "/i/web.qcow2.a"


def test_a_free_name(tmp_path: Path):
    path = str(tmp_path / ("x" * 250))
    first = _files.free_name(path, ".before-upgrade")
    Path(first).touch()
    second = _files.free_name(path, ".before-upgrade")
    Path(second).touch()
    assert first != second and second.endswith(".before-upgrade-2")
