# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose the directories of locks, journals and caches are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories of a user who is not root; where their state is."""
    if os.geteuid():
        pytest.skip("only root can be another user")
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return tmp_path / "kvmops-backup"


def test_they_are_made_for_the_user_alone(user: Path) -> None:
    assert _paths.state_dir() == _paths.run_dir() == _paths.cache_dir() == str(user)
    assert user.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("mode", "owner"), [(0o770, 1000), (0o777, 0), (0o1777, 0), (0o700, 1001)])
def test_what_others_may_write_to_is_refused(user: Path, mode: int, owner: int) -> None:
    user.mkdir()
    user.chmod(mode)
    os.chown(user, owner, owner)
    with pytest.raises(RefusedError, match="could forge") as refusal:
        _paths.state_dir()
    assert f"chmod 700 {user}" in refusal.value.hint


@pytest.mark.parametrize(("mode", "owner"), [(0o700, 1000), (0o755, 1000), (0o750, 0)])
def test_what_others_may_read_or_root_has_made_is_fine(user: Path, mode: int, owner: int) -> None:
    user.mkdir()
    user.chmod(mode)
    os.chown(user, owner, owner)
    assert _paths.state_dir() == str(user)
