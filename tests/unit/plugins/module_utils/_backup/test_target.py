# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a plan is told about the directory that the archive goes to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._backup import facts
from ansible_collections.kvmops.backup.plugins.module_utils._capabilities import Capabilities
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import storage


def test_free_space_is_that_of_the_directory_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a mount point: what lies above is another file system."""
    asked: list[str] = []
    real = os.statvfs

    def statvfs(path: str) -> os.statvfs_result:
        asked.append(str(path))
        return real(path)

    monkeypatch.setattr(os, "statvfs", statvfs)
    place = storage.resolve_target(None, pool="", path=str(tmp_path))
    asked.clear()
    facts.target_facts(place, Capabilities())
    assert asked == [str(tmp_path)]
