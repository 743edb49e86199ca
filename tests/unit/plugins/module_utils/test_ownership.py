# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A file that was made here gets its owner and mode; one that somebody has put in its place does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _ownership
from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._ownership import Ownership

QEMU = 1234567
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    """A file of root's."""
    path = tmp_path / "secret"
    path.write_text("root's")
    path.chmod(0o600)
    yield path
    assert (path.read_text(), os.stat(path).st_uid, os.stat(path).st_mode & 0o777) == ("root's", 0, 0o600)


def test_owner_group_and_mode_of_another_file(tmp_path: Path) -> None:
    model, made = tmp_path / "model", tmp_path / "made"
    model.write_bytes(b"x")
    model.chmod(0o640)
    os.chown(model, QEMU, QEMU + 1)
    _ownership.create_like(str(made), str(model))
    status = made.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777, status.st_size) == (QEMU, QEMU + 1, 0o640, 0)
    _ownership.give(str(made), Ownership(0, 0, 0o600))
    assert (made.stat().st_uid, made.stat().st_mode & 0o777) == (0, 0o600)
    _ownership.set_mode(str(made), 0o644)
    assert made.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("trick", ["link", "hard link", "FIFO"])
def test_what_has_its_name_by_now_gets_nothing(trick: str, secret: Path, tmp_path: Path) -> None:
    path = tmp_path / "overlay"
    if trick == "link":
        path.symlink_to(secret)
    elif trick == "hard link":
        os.link(secret, path)
    else:
        os.mkfifo(path)
    for use in (lambda: _ownership.give(str(path), Ownership(QEMU, QEMU)), lambda: _ownership.set_mode(str(path), 0o644)):
        with pytest.raises(TargetError, match="another file has its name by now"):
            use()


def test_a_link_planted_between_making_and_giving(secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the two calls."""
    model, path = tmp_path / "model", tmp_path / "overlay"
    model.write_bytes(b"x")
    os.chown(model, QEMU, QEMU)
    chown = os.chown

    def stopped(*arguments: Any) -> None:
        os.rename(path, tmp_path / "elsewhere")
        path.symlink_to(secret)
        chown(*arguments)

    monkeypatch.setattr(os, "chown", stopped)
    _ownership.create_like(str(path), str(model))
    assert (tmp_path / "elsewhere").stat().st_uid == QEMU


def test_a_dangling_link_is_no_place_for_a_new_file(tmp_path: Path) -> None:
    model, path = tmp_path / "model", tmp_path / "overlay"
    model.write_bytes(b"x")
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetError):
        _ownership.create_like(str(path), str(model))
    assert not (tmp_path / "nowhere").exists()
