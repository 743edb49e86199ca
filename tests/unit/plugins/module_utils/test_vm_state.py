# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The memory of a VM: kept, durable, and no harm when it is lost or damaged."""

from __future__ import annotations

import os

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _paths, _vm_state
from ansible_collections.kvmops.backup.plugins.module_utils._vm_state import Evidence, VmState

UUID = "6f1a2b3c-0000-4000-8000-000000000001"
FULL = VmState({"/i/a b": Evidence("d", (1, 2, 3, 4, 5))}, "the VM was restored in place", (7, 9), ("kvmops-7",))


@pytest.fixture(autouse=True)
def state_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    return tmp_path


def test_round_trip(state_dir):
    assert _vm_state.load(UUID) == VmState()
    _vm_state.save(UUID, FULL)
    assert _vm_state.load(UUID) == FULL
    assert os.listdir(state_dir / "vms") == [f"{UUID}.json"]


@pytest.mark.parametrize("length", [0, 1, 20, 60])
def test_a_damaged_file_is_as_none(state_dir, length):
    _vm_state.save(UUID, FULL)
    path = state_dir / "vms" / f"{UUID}.json"
    path.write_text(path.read_text(encoding="utf-8")[:length], encoding="utf-8")
    assert _vm_state.load(UUID) == VmState()


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"frozen": {}, "ended": "", "begun": [Infinity], "to_merge": []}', "5"],
    ids=["deep", "infinity", "a number"],
)
def test_a_forged_file_is_as_none(state_dir, text):
    _vm_state.save(UUID, FULL)
    (state_dir / "vms" / f"{UUID}.json").write_text(text, encoding="utf-8")
    assert _vm_state.load(UUID) == VmState()


def test_what_cannot_be_ours_is_not_read(state_dir):
    """Neither a run that hangs nor one that takes gigabytes."""
    _vm_state.save(UUID, FULL)
    path = state_dir / "vms" / f"{UUID}.json"
    data = path.read_bytes()
    path.write_bytes(data + b" " * 2**25)
    assert _vm_state.load(UUID) == VmState()
    path.write_bytes(data)
    assert _vm_state.load(UUID) == FULL
    path.unlink()
    os.mkfifo(path)
    assert _vm_state.load(UUID) == VmState()


def test_end_of_a_cycle():
    _vm_state.save(UUID, VmState(frozen=FULL.frozen, begun=(3,), to_merge=("x",)))
    _vm_state.end_cycle(UUID, "snapshot k was deleted")
    state = _vm_state.load(UUID)
    assert state.why_ended(3) == "snapshot k was deleted"
    assert (state.frozen, state.to_merge) == (FULL.frozen, ("x",))


def test_evidence_sees_what_touch_hides(tmp_path):
    """The same size and the time set back: device, inode, size and mtime are equal, ctime is not."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    before, times = _vm_state.evidence(str(path)), os.stat(path)
    with open(path, "r+b") as stream:
        stream.write(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = _vm_state.evidence(str(path))
    assert after[:-1] == before[:-1]
    assert after != before


def test_only_names_that_are_uuids_of_a_file():
    for name in ("", "../x", ".hidden", "a/b"):
        with pytest.raises(ValueError, match="not a uuid"):
            _vm_state.save(name, VmState())
