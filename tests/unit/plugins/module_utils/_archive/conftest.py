# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps locks out of those of this host."""

from __future__ import annotations

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _paths


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = str(tmp_path_factory.mktemp("state"))
    monkeypatch.setattr(_paths, "state_dir", lambda: directory)
    monkeypatch.setenv("KVMOPS_TESTS_STATE", directory)  # for the driver
