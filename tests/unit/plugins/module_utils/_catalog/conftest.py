# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the catalog's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import index
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog.catalog_archives import (
    Told,
    next_run,
)


@pytest.fixture(autouse=True)
def own_directories(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State, run and cache directories of the test alone."""
    directory = tmp_path_factory.mktemp("host")
    for name in ("state_dir", "run_dir", "cache_dir"):
        path = directory / name
        path.mkdir()
        monkeypatch.setattr(_paths, name, lambda path=path: str(path))
    monkeypatch.setattr(index, "_FRESH_NS", 0)  # archives of tests are young
    next_run()
    return directory


@pytest.fixture
def told() -> Told:
    """Where the operation under test reports to."""
    return Told()
