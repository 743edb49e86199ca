# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Those who only look tell of what dead runs left, and change nothing."""

from __future__ import annotations

import os

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import overlays, pending

URI = "qemu:///system"


@pytest.fixture
def journals(monkeypatch, tmp_path):
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    for uuid, name in (("u1", "web"), ("u2", "db")):
        dead = Journal.open(overlays.journal_key(uuid), "backup", {"vm_uuid": uuid, "vm_name": name})
        dead.close()
    return tmp_path / "journal"


def test_each_vm_has_its_own(journals):
    before = sorted(os.listdir(journals))
    assert len(before) == 2
    told = pending.of_host(URI, ["u1"])
    assert len(told) == 1 and "will put right: a run of backup of web (process" in told[0]
    assert len(pending.of_host(URI, ["u1", "u2", "u3"])) == 2
    assert pending.of_host(URI, []) == []
    assert len(pending.of_vm(URI, "db", "u2")) == 1
    assert sorted(os.listdir(journals)) == before


def test_a_run_at_work_is_not_told_of(journals):
    with_life = Journal.open(overlays.journal_key("u3"), "backup", {"vm_name": "app"})
    assert pending.of_host(URI, ["u3"]) == []
    with_life.close()
    assert "app" in pending.of_host(URI, ["u3"])[0]
