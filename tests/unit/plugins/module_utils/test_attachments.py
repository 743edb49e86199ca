# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The record of attached disks, and definitions without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._attachments import Attachment, Record
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import receivers
from ansible_collections.kvmops.backup.plugins.module_utils._ownership import Ownership

UUID = "6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11"
ATTACHED = Attachment(
    "id", "vda", "/vm/a", "/vm/a", "qcow2", 1, "", "r", "appliance", "vdb", "kvmops0123456789abcd", 5, "agent",
    template_names=("x", "y"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    return tmp_path


def test_what_was_saved_is_loaded() -> None:
    assert _attachments.load(UUID) is None and not list(_attachments.everything())
    owners = {"/vm/a": Ownership(0, 107, 0o640, b"label\0", b"\2")}
    record = Record(UUID, "web", _attachments.SNAPSHOT, 7, "agent", (ATTACHED,), owners)
    _attachments.save(record)
    assert _attachments.load(UUID) == record and list(_attachments.everything()) == [record]
    assert _attachments.held_by("r") == [(record, ATTACHED)] and not _attachments.held_by(UUID)
    assert record.receivers == ("appliance",) and record.without(ATTACHED).receivers == ()
    _attachments.drop(UUID)
    _attachments.drop(UUID)
    assert _attachments.load(UUID) is None


def test_a_record_that_cannot_be_read_is_no_empty_one(state: Path) -> None:
    _attachments.save(Record(UUID, "web"))
    (state / "attached" / f"{UUID}.json").write_text("{")
    with pytest.raises(KvmopsError, match="cannot be read"):
        _attachments.load(UUID)
    with pytest.raises(KvmopsError, match="cannot be read"):
        list(_attachments.everything(strict=True))
    assert not list(_attachments.everything())  # other VMs are not to suffer


def disk(target: str, serial: str = "", readonly: bool = True) -> str:
    flag = "<readonly/>" if readonly else ""
    return f"<disk device='disk'><source file='/f'/><target dev='{target}'/><serial>{serial or 'SN1'}</serial>{flag}</disk>"


def test_definitions_without_attached_disks() -> None:
    own = disk("vda") + disk("vdc", ATTACHED.serial, readonly=False) + disk("vdd", "kvmops0123")
    devices = f"<devices>{own}{disk('vdb', ATTACHED.serial)}</devices>"
    assert receivers.without_attached(
        f"<domain>{devices}</domain>"
    ) == f"<domain><devices>{own}</devices></domain>".replace("'", '"')
    snapshot = (
        "<domainsnapshot><disks><disk name='vda'/><disk name='vdb' snapshot='no'/></disks>"
        f"<domain>{devices}</domain><inactiveDomain>{devices}</inactiveDomain></domainsnapshot>"
    )
    left = receivers.without_attached(snapshot)
    assert "vdb" not in left and left.count("vdd") == 2
    untouched = f"<domain><devices>{own}</devices></domain>"
    assert receivers.without_attached(untouched) is untouched
