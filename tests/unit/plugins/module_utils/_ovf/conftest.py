# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps state out of that of this host."""

from __future__ import annotations

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("state_dir", "cache_dir", "run_dir"):
        directory = str(tmp_path_factory.mktemp(name))
        monkeypatch.setattr(_paths, name, lambda directory=directory: directory)
        monkeypatch.setenv(f"KVMOPS_TESTS_{name.upper()}", directory)  # for the driver
    # no test of packages needs libvirt, which keeps the last error of a thread for whoever looks next
    monkeypatch.setattr(connection, "connect", _refuse)


def _refuse(_uri: str) -> None:
    raise KvmopsError("The connection to libvirt", "there is none in unit tests")
