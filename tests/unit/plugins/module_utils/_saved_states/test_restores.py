# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the journal of a restore says, and when it is better not to act on it. Killed restores: integration target vm_restore."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._saved_states import restores
from ansible_collections.kvmops.backup.plugins.module_utils._saved_states.restores import (
    FileStep,
    OldVm,
    Operation,
    StateRecord,
)


def operation(directory: Path) -> Operation:
    return Operation(
        uri="qemu:///system",
        uuid="u",
        name="web",
        token="t",
        source="/backup/web.tar",
        files=(
            FileStep(f"{directory}/.a.partial", f"{directory}/a", f"{directory}/.a.old", f"{directory}/.a.scratch"),
        ),
        directories={str(directory): directory.stat().st_ino},
        old=OldVm(
            "v",
            "web",
            "<domain/>",
            True,
            (StateRecord("s", "<domainsnapshot/>", True),),
            (("c", "<domaincheckpoint/>"),),
        ),
        pools=("vms",),
        states=(StateRecord("n", "<domainsnapshot/>", False),),
        inodes={f"{directory}/a": 5},
    )


def test_the_journal_gives_back_what_was_written(tmp_path: Path) -> None:
    for wanted in (operation(tmp_path), replace(operation(tmp_path), old=None, inodes=None)):
        assert Operation.from_facts(json.loads(json.dumps(wanted.facts()))) == wanted


@pytest.mark.parametrize("gone", [False, True], ids=["another directory", "no directory"])
def test_a_missing_mount_is_not_taken_for_missing_files(tmp_path: Path, gone: bool) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    wanted = operation(place)
    place.rename(tmp_path / "elsewhere")
    if not gone:
        place.mkdir()
    with pytest.raises(KvmopsError, match="Mount what belongs there"):
        restores.conclude(None, wanted)


def test_the_directory_of_a_tpm_is_taken_back_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one was in place already, the old one waits aside; a second run finds nothing more to do."""
    monkeypatch.setattr(restores, "_lookup", lambda _conn, _uuid: None)
    monkeypatch.setattr(restores, "refresh", lambda _conn, _pools: None)
    for name in ("u", ".old", ".partial"):
        (tmp_path / name / "tpm2").mkdir(parents=True)
        (tmp_path / name / "tpm2" / "state").write_text(name)
    (tmp_path / ".scratch").write_text("tar")
    step = FileStep(*(str(tmp_path / name) for name in (".partial", "u", ".old", ".scratch")))
    inodes = {step.path: (tmp_path / "u").stat().st_ino}
    wanted = replace(operation(tmp_path), files=(step,), old=None, inodes=inodes)
    for _run in range(2):
        restores.roll_back(None, wanted)
        assert [path.name for path in tmp_path.iterdir()] == ["u"]
        assert (tmp_path / "u" / "tpm2" / "state").read_text() == ".old"


def test_a_vm_is_concerned_by_name_and_uuid_be_it_the_old_or_the_new_one(tmp_path: Path) -> None:
    found = replace(operation(tmp_path), name="web-2")
    assert all(found.concerns(each) for each in ("web-2", "u", "web", "v"))
    assert not any(found.concerns(each) for each in ("", "w", "web-3"))
    assert not replace(found, old=None).concerns("web")
    assert found.pending_token != found.token
