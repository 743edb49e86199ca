# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Changing one archive: idempotence, what is refused, and what a killed run leaves."""

from __future__ import annotations

import contextlib
import errno
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _journal, _locks, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._archive import convert, partials, sidecars
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import TemplateDisk, TemplateRequirement
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, retention
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import change as change_module
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.change import change
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import (
    ChangeRequest,
    Selection,
    VerifyRequest,
)
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.verify import verify
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    BusyError,
    CancelledError,
    DamagedError,
    KvmopsError,
    RefusedError,
    TargetError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog.catalog_archives import (
    OTHER_UUID,
    TIME,
    UUID,
    Told,
    damage,
    write,
    write_foreign,
)


@pytest.fixture(autouse=True)
def without_libvirt(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_uri: str) -> None:
        raise KvmopsError("The connection", "not in a unit test")

    monkeypatch.setattr(connection, "connect", connect)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def everything(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run(path: Path, told: Told, **options: Any) -> dict[str, Any]:
    return change(ChangeRequest(str(path), **options), told)


def test_compress_and_back(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    plain, view = path.read_bytes(), catalog.look(str(path))
    sidecars.set_notes(str(path), "note")
    sidecars.set_protected(str(path), True)
    packed = path.with_suffix(".tar.zst")
    found = run(path, told, compressed=True)
    assert found == {
        "changed": True,
        "archive": {
            "path": str(packed), "size": packed.stat().st_size, "compressed": True, "protected": True, "notes": "note",
        },
    }  # fmt: skip
    assert names(tmp_path) == [packed.name, packed.name + ".notes", packed.name + ".protected"]
    assert catalog.look(str(packed)).identity == view.identity
    for again in (path, packed):  # under the old and the new name
        assert run(again, told, compressed=True) == {**found, "changed": False}
    assert run(packed, told, compressed=False)["archive"]["path"] == str(path)
    assert path.read_bytes() == plain
    assert names(tmp_path) == [path.name, path.name + ".notes", path.name + ".protected"]


def test_foreign_archives_are_converted_too(tmp_path: Path, told: Told) -> None:
    path = write_foreign(tmp_path)
    config = catalog.describe(str(path))["config"]
    found = run(path, told, compressed=True)
    assert catalog.describe(found["archive"]["path"])["config"] == config


def test_marks_are_idempotent(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    wanted = {"protected": True, "notes": "keep"}
    assert run(path, told, **wanted)["changed"] is True
    assert run(path, told, **wanted)["changed"] is False
    assert run(path, told)["changed"] is False
    assert run(path, told)["archive"] == {
        "path": str(path), "size": path.stat().st_size, "compressed": False, **wanted,
    }  # fmt: skip
    assert run(path, told, protected=False, notes="")["changed"] is True
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "options", [{"compressed": True}, {"protected": True}, {"notes": "x"}, {"present": False, "force": True}]
)
def test_check_mode_touches_nothing(tmp_path: Path, own_directories: Path, told: Told, options: dict[str, Any]) -> None:
    path = write(tmp_path)
    before = everything(tmp_path)
    predicted = run(path, told, check_mode=True, diff=True, **options)
    assert everything(tmp_path) == before
    assert predicted["changed"] is True
    assert not list((own_directories / "state_dir").rglob("*.lock"))
    done = run(path, told, diff=True, **options)
    for key in ("path", "compressed", "protected", "notes"):
        assert done["archive"][key] == predicted["archive"][key]
    assert done["diff"]["before"] == predicted["diff"]["before"]


def test_delete(tmp_path: Path, told: Told) -> None:
    path, other = write(tmp_path), write(tmp_path, timestamp=TIME + 1)
    sidecars.set_notes(str(path), "note")
    assert run(path, told, present=False)["changed"] is True
    assert names(tmp_path) == [other.name]
    assert run(path, told, present=False) == {"changed": False}


def test_the_last_good_archive_of_a_vm_needs_force(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    write(tmp_path, uuid=OTHER_UUID)  # another VM of that name
    (tmp_path / "damaged.tar").write_bytes(path.read_bytes()[:-5000])
    before = everything(tmp_path)
    with pytest.raises(RefusedError, match="last good archive of web01"):
        run(path, told, present=False)
    with pytest.raises(RefusedError, match="last good archive of web01"):
        run(path, told, present=False, check_mode=True)
    assert everything(tmp_path) == before
    assert run(path, told, present=False, force=True)["changed"] is True
    assert not path.exists()


def found_damaged(path: Path, told: Told) -> None:
    """Damage that only a verification finds; the archive's structure is as it was."""
    damage(path, 300_000)
    assert not verify(VerifyRequest(Selection(archive=str(path)), fail_on_damage=False), told)["archives"][0]["ok"]


def test_a_damaged_or_foreign_archive_is_not_the_good_one_that_stays(tmp_path: Path, told: Told) -> None:
    path, damaged = write(tmp_path), write(tmp_path, timestamp=TIME + 1)
    found_damaged(damaged, told)
    foreign = write_foreign(tmp_path)
    with pytest.raises(RefusedError, match="last good archive of web01"):
        run(path, told, present=False)
    assert run(foreign, told, present=False)["changed"] is True
    assert run(damaged, told, present=False)["changed"] is True
    with pytest.raises(RefusedError, match="last good archive of web01"):
        run(path, told, present=False)


def test_a_damaged_archive_goes_without_force_also_when_it_is_the_only_one(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    found_damaged(path, told)
    assert run(path, told, present=False)["changed"] is True


def test_the_only_foreign_archive_of_a_vm_needs_force(tmp_path: Path, told: Told) -> None:
    path, other = write_foreign(tmp_path), write_foreign(tmp_path, name="other")
    assert run(other, told, present=False)["changed"] is True
    found_damaged(write(tmp_path), told)
    with pytest.raises(RefusedError, match="last archive of web01"):
        run(path, told, present=False)
    write(tmp_path, timestamp=TIME + 1)
    assert run(path, told, present=False)["changed"] is True


def test_a_damaged_archive_is_no_template_for_a_clone(tmp_path: Path, told: Told) -> None:
    disks = (TemplateDisk("vda", 2**20, "ab" * 32),)
    provider, spare = (write(tmp_path, name="golden", timestamp=TIME + each, provides=disks) for each in (0, 1))
    write(tmp_path, name="clone", uuid=OTHER_UUID, requires=TemplateRequirement(UUID, "golden", disks))
    third = write(tmp_path, name="golden", timestamp=TIME + 2)  # good, but of other content
    found_damaged(spare, told)
    with pytest.raises(RefusedError, match="these archives of thin clones need"):
        run(provider, told, present=False)
    assert run(third, told, present=False)["changed"] is True


@contextlib.contextmanager
def just_before(monkeypatch: pytest.MonkeyPatch, path: Path) -> Iterator[None]:
    """Whoever had the locks before us has deleted another archive."""
    hold = _locks.hold

    def held(name: str, **options: Any) -> contextlib.AbstractContextManager[None]:
        if name == f"vm-{UUID}":
            path.unlink(missing_ok=True)
        return hold(name, **options)

    with monkeypatch.context() as patched:
        patched.setattr(_locks, "hold", held)
        yield


def test_two_that_delete_at_once_leave_the_last_one(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = write(tmp_path), write(tmp_path, timestamp=TIME + 1)
    with just_before(monkeypatch, other), pytest.raises(RefusedError, match="last good archive"):
        run(path, told, present=False)
    assert names(tmp_path) == [path.name]
    with just_before(monkeypatch, path):
        assert run(path, told, present=False) == {"changed": False}


def test_nothing_is_deleted_while_retention_judges_by_what_it_saw(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _other = write(tmp_path), write(tmp_path, timestamp=TIME + 1)
    monkeypatch.setattr(retention, "_OTHERS_TIMEOUT_S", 0)
    with retention.alone(str(tmp_path), told), pytest.raises(BusyError, match="retention in"):
        run(path, told, present=False)
    assert path.exists()


def test_its_own_compressed_form_is_no_other_archive(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    copy = path.read_bytes()
    packed = Path(convert.compress(str(path)))
    path.write_bytes(copy)
    for either in (path, packed):
        with pytest.raises(RefusedError, match="last good archive"):
            run(either, told, present=False)


def test_a_protected_archive_needs_force(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    write(tmp_path, timestamp=TIME + 1)
    sidecars.set_protected(str(path), True)
    with pytest.raises(RefusedError, match="it is protected"):
        run(path, told, present=False)
    assert run(path, told, present=False, force=True)["changed"] is True
    assert names(tmp_path) == [f"web01_20261122T010001Z_{UUID[:8]}.tar"]


def test_a_damaged_archive_can_be_deleted_and_protected_but_not_converted(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    damage(path, 300_000)
    before = everything(tmp_path)
    with pytest.raises(DamagedError, match="it is damaged"):
        run(path, told, compressed=True)
    assert everything(tmp_path) == before
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(ArchiveError):
        run(path, told, compressed=True)
    assert run(path, told, protected=True)["archive"]["compressed"] is None
    assert run(path, told, protected=False)["changed"] is True
    assert run(path, told, present=False)["changed"] is True
    assert names(tmp_path) == []


ANYTHING = ({"present": False}, {"protected": True}, {"notes": "x"})


@pytest.mark.parametrize("name", ["web01.qcow2", "web01", "web01.xml", "web01.tar.gz", "web01.tar.notes", "tar"])
def test_what_is_not_named_like_an_archive_is_never_touched(tmp_path: Path, told: Told, name: str) -> None:
    path = write(tmp_path).rename(tmp_path / name)
    before = everything(tmp_path)
    for options in (*ANYTHING, {"compressed": True}, {}):
        for more in ({}, {"force": True}, {"check_mode": True}):
            with pytest.raises(RefusedError, match=r"backup_archive is for archives.*\.tar"):
                run(path, told, **options, **more)
    assert everything(tmp_path) == before


def test_a_link_is_not_taken_for_its_archive(tmp_path: Path, told: Told) -> None:
    """What is protected or compressed through it would be the link: the archive would go with the next retention."""
    path = write(tmp_path)
    link = tmp_path / "latest.tar"
    link.symlink_to(path)
    before = everything(tmp_path)
    for options in (*ANYTHING, {"present": False, "force": True}, {}):
        for check_mode in (True, False):
            with pytest.raises(RefusedError, match=f"symbolic link to {path}"):
                run(link, told, check_mode=check_mode, **options)
    assert everything(tmp_path) == before


def something_else(path: Path, kind: str) -> None:
    if kind == "tar of something else":
        with tarfile.open(path, "w") as tar:
            tar.add(__file__, "test.py")
    else:
        path.write_bytes({"zeros": bytes(300_000), "noise": bytes(range(256)) * 1000, "empty": b""}[kind])


@pytest.mark.parametrize("kind", ["tar of something else", "zeros", "noise", "empty"])
def test_what_is_no_archive_is_deleted_with_force_only(tmp_path: Path, told: Told, kind: str) -> None:
    path = tmp_path / "web01.tar"
    something_else(path, kind)
    before = everything(tmp_path)
    for options in ANYTHING:
        for check_mode in (True, False):
            with pytest.raises(RefusedError, match="it cannot be read as an archive: "):
                run(path, told, check_mode=check_mode, **options)
    assert everything(tmp_path) == before
    assert run(path, told, protected=False, notes="")["changed"] is False
    assert run(path, told, present=False, force=True)["changed"] is True
    assert names(tmp_path) == []


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_on_a_failing_disk_is_deleted_with_force_only(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    path = write(tmp_path, compressed=compressed)
    before = everything(tmp_path)
    read = os.pread

    def fail(fd: int, length: int, offset: int) -> bytes:
        if offset + length > path.stat().st_size // 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, length, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", fail)
        with pytest.raises(RefusedError, match=r"Input/output error.*force"):
            run(path, told, present=False)
    assert everything(tmp_path) == before
    with pytest.raises(RefusedError, match="last good archive"):
        run(path, told, present=False)


def test_an_archive_of_a_newer_release_is_deleted_with_force_only(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    data = path.read_bytes()
    at = data.index(b' version="1"', data.index(b"<kvmops:backup"))
    damage(path, at, b' version="9"')
    with pytest.raises(RefusedError, match="format version 9"):
        run(path, told, present=False)
    assert path.exists()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.1])
def test_what_began_as_an_archive_of_ours_needs_no_force(
    tmp_path: Path, told: Told, kept: float, compressed: bool
) -> None:
    path = write(tmp_path, compressed=compressed)
    os.truncate(path, int(path.stat().st_size * kept))
    assert run(path, told, notes="half")["changed"] is True
    assert run(path, told, present=False)["changed"] is True
    assert names(tmp_path) == []


def test_no_such_archive(tmp_path: Path, told: Told) -> None:
    with pytest.raises(ArchiveError, match="no such file"):
        run(tmp_path / "missing.tar", told, protected=True)
    with pytest.raises(TargetError):
        run(tmp_path / "missing" / "x.tar", told, present=False)


def test_a_read_only_place_is_refused_first(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)

    def refuse(_conn: object, *, path: str) -> None:
        raise TargetError(path, "read-only")

    monkeypatch.setattr(change_module.storage, "resolve_target", refuse)
    for options in ({"compressed": False}, {"present": False, "force": True}, {"notes": "", "check_mode": True}):
        with pytest.raises(TargetError, match="read-only"):
            run(path, told, **options)


def test_a_read_only_pool_stays_so_while_libvirt_does_not_answer(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch, own_directories: Path
) -> None:
    path, settings = write(tmp_path), own_directories / "read-only"
    settings.write_text("backups\n")
    monkeypatch.setattr(_paths, "read_only_file", lambda: str(settings))
    with pytest.raises(TargetError, match="cannot be told, as libvirt does not answer"):
        run(path, told, present=False, force=True)
    assert path.exists()


def test_busy_while_somebody_is_at_work_on_the_vm(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    with _locks.hold(f"vm-{UUID}", of="The VM web01", what="backing up web01"):
        for options in ({"compressed": True}, {"protected": True}, {"present": False, "force": True}):
            with pytest.raises(BusyError, match="backing up web01"):
                run(path, told, **options)
        assert run(path, told, protected=False)["changed"] is False
    assert names(tmp_path) == [path.name]


def test_a_strange_uuid_is_no_lock_name(tmp_path: Path, told: Told) -> None:
    path = write_foreign(tmp_path, uuid="../../x")
    assert run(path, told, protected=True)["changed"] is True


def test_another_archive_in_the_way_is_not_touched(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    other = write(tmp_path, timestamp=TIME + 1, compressed=True).rename(path.with_suffix(".tar.zst"))
    before = everything(tmp_path)
    for check_mode in (True, False):
        with pytest.raises(TargetError, match="not the same archive"):
            run(path, told, compressed=True, check_mode=check_mode)
    other.write_bytes(b"")
    with pytest.raises(TargetError, match="not the same archive"):
        run(path, told, compressed=True)
    assert (tmp_path / path.name).read_bytes() == before[path.name]


class KilledError(BaseException):
    """Stands for SIGKILL: what it leaves is what the disk holds."""


def test_a_conversion_killed_before_its_last_step_is_finished(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    sidecars.set_notes(str(path), "note")
    plain = path.read_bytes()
    convert.compress(str(path))
    packed = path.with_suffix(".tar.zst")
    path.write_bytes(plain)  # killed between the new file's birth and the old one's end
    os.replace(str(packed) + ".notes", str(path) + ".notes")
    assert run(path, told, compressed=True, check_mode=True)["changed"] is True
    found = run(path, told, compressed=True)
    assert (found["changed"], found["archive"]["notes"]) == (True, "note")
    assert names(tmp_path) == [packed.name, packed.name + ".notes"]
    assert run(path, told, compressed=True)["changed"] is False


def test_a_damaged_half_of_a_killed_conversion_costs_nothing(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    plain = path.read_bytes()
    packed = Path(convert.compress(str(path)))
    path.write_bytes(plain)
    damage(packed, packed.stat().st_size // 2)
    with pytest.raises(DamagedError, match="was not removed"):
        run(path, told, compressed=True)
    assert path.read_bytes() == plain


def test_a_partial_file_of_a_dead_run_goes_with_the_next(tmp_path: Path, own_directories: Path, told: Told) -> None:
    path = write(tmp_path)
    partial = tmp_path / f".{path.name}.zst.partial-abc"
    partial.write_bytes(b"half")
    journal = _journal.Journal.open(str(tmp_path), change_module.OPERATION, partials.PartialFacts(str(path)))
    journal.record(partial=str(partial))
    assert run(path, told, protected=False)["changed"] is False  # the run is alive: its file is left alone
    assert partial.exists()
    journal.close()
    run(path, told, protected=False, check_mode=True)
    assert partial.exists()
    assert len(told.warnings) == 1 and str(partial) in told.warnings[0]
    run(path, told, protected=False)
    assert not partial.exists()
    assert list((own_directories / "state_dir" / "journal").iterdir()) == []


def test_a_cancelled_conversion_leaves_nothing(tmp_path: Path, own_directories: Path) -> None:
    path = write(tmp_path)
    before = everything(tmp_path)
    stopped = Progress()
    phase = stopped.phase

    def stop_at(name: str, disk: str = "", bytes_total: int = 0) -> None:
        if name == "read back":
            stopped.cancel("asked to")
        phase(name, disk, bytes_total)

    stopped.phase = stop_at  # type: ignore[method-assign]
    with pytest.raises(CancelledError):
        change(replace(ChangeRequest(str(path)), compressed=True), Told(stopped))
    assert everything(tmp_path) == before
    assert list((own_directories / "state_dir" / "journal").iterdir()) == []


def test_an_archive_of_others_is_not_made_ours_by_converting_it(tmp_path: Path, told: Told) -> None:
    path = write(tmp_path)
    os.chown(path, 1234567, -1)
    for check_mode in (True, False):
        with pytest.raises(RefusedError, match="not trusted") as caught:
            run(path, told, compressed=True, check_mode=check_mode)
        assert "trust: true" in caught.value.hint
    with pytest.raises(RefusedError, match="not trusted"):
        convert.compress(str(path))
    assert names(tmp_path) == [path.name]
    done = run(path, told, compressed=True, trust=True)
    assert done["changed"] and os.stat(done["archive"]["path"]).st_uid == 0


def test_the_last_archive_of_ours_needs_force_beside_one_of_others(tmp_path: Path, told: Told) -> None:
    ours, forged = write(tmp_path), write(tmp_path, timestamp=TIME + 1)
    os.chown(forged, 1234567, -1)
    with pytest.raises(RefusedError, match="last good"):
        run(ours, told, present=False)
    assert run(forged, told, present=False)["changed"] and ours.exists()
