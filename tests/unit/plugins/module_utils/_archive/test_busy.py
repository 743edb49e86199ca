# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may do what to an archive that others work with, and how an archive goes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _mounts, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._archive import archive_locks, sidecars, trash
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, BusyError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    directory = tmp_path / "place"
    directory.mkdir()
    path = directory / "web01.tar"
    path.write_bytes(b"archive")
    return path


def names(archive: Path) -> list[str]:
    return sorted(os.listdir(archive.parent))


def test_readers_share_and_keep_the_archive(archive: Path) -> None:
    with archive_locks.reading(str(archive)), archive_locks.reading(str(archive)):
        assert archive_locks.users(str(archive)) == "it is being restored or verified"
        assert archive_locks.writer(str(archive)) == ""
        with pytest.raises(BusyError, match="being restored or verified"):
            trash.delete(str(archive))
        with archive_locks.writing(str(archive), "adding a point"):
            assert "adding a point" in archive_locks.users(str(archive))
    assert archive_locks.users(str(archive)) == "" and names(archive) == ["web01.tar"]
    trash.delete(str(archive))
    assert names(archive) == []


def test_nobody_begins_to_read_what_is_going(archive: Path) -> None:
    with archive_locks.alone(str(archive)), pytest.raises(BusyError, match="just deleting"), archive_locks.reading(str(archive)):
        pass
    with pytest.raises(ArchiveError, match="cannot be opened"), archive_locks.reading(str(archive) + ".gone"):
        pass
    assert archive_locks.users(str(archive) + ".gone") == ""


def test_what_stands_beside_an_archive_goes_with_it(archive: Path) -> None:
    sidecars.set_notes(str(archive), "before the upgrade")
    sidecars.set_protected(str(archive), True)
    (archive.parent / ".kvmops-trash-00").write_bytes(b"of somebody else")
    trash.delete(str(archive))
    assert names(archive) == [".kvmops-trash-00"]
    assert trash.settle(str(archive.parent)) == [] and names(archive) == [".kvmops-trash-00"]


@pytest.mark.parametrize("step", ["open", "rename"])
def test_goes_without_free_space(archive: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((Journal, "open") if step == "open" else (os, "rename")), full)
    trash.delete(str(archive))
    assert names(archive) == []
    assert not os.listdir(os.path.join(_paths.state_dir(), "journal")) if step == "rename" else True


def test_what_cannot_go_stays_whole(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_arguments: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    sidecars.set_notes(str(archive), "notes")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        with pytest.raises(ArchiveError, match="cannot be deleted"):
            trash.delete(str(archive))
    assert names(archive) == ["web01.tar", "web01.tar.notes"] and trash.pending(str(archive.parent)) == []


def test_an_unfinished_archive_is_removed_when_its_file_system_is_back(archive: Path) -> None:
    """The directory was unmounted meanwhile; the next run there takes the file, the next run elsewhere does not look."""
    target, away = archive.parent, archive.parent.with_name("away")
    partial = target / ".web02.tar.partial-0123456789ab"
    partial.write_bytes(b"half")
    place = _mounts.identity(str(target))
    target.rename(away)
    target.mkdir()
    assert not trash.remove_partial(str(partial), place)
    assert trash.settle(str(target)) == [] and trash.pending(str(target)) == []
    target.rmdir()
    away.rename(target)
    assert trash.settle("/elsewhere") == [] and trash.pending(str(target)) == [str(partial)]
    assert trash.settle(str(target)) == [str(partial)] and names(archive) == ["web01.tar"]
    assert trash.settle(str(target)) == [] and Journal.left_behind(lambda _facts: True) == []


def test_an_unfinished_archive_that_a_person_has_removed_is_forgotten(archive: Path) -> None:
    partial = archive.parent / ".web02.tar.partial-0123456789ab"
    assert not trash.remove_partial(str(partial), _mounts.identity(str(archive.parent)))
    assert not trash.remove_partial(str(partial))
    assert Journal.left_behind(lambda _facts: True) == []


def test_only_unfinished_archives_are_removed(archive: Path) -> None:
    good = archive.parent / ".web_1.tar.partial-0123456789ab"
    kept = [archive.parent / name for name in ("web.tar", ".web.tar", "web.tar.partial-1")]
    for path in [good, *kept]:
        path.write_text("x")
    link = archive.parent / ".link.partial-1"
    link.symlink_to(kept[0])
    directory = archive.parent / ".directory.partial-1"
    directory.mkdir()
    for path in [*kept, link, directory, archive.parent / ".missing.partial-1"]:
        assert trash.remove_partial(str(path)) is False
    assert trash.remove_partial(str(good)) is True
    assert names(archive) == sorted(path.name for path in [archive, *kept, link, directory])


_DELETE = """
import os, signal, sys
from ansible_collections.kvmops.backup.plugins.module_utils import _files, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._archive import trash
_paths.state_dir = lambda: os.environ["KVMOPS_TESTS_STATE"]
left = int(sys.argv[2])
def counted(call):
    def one(*arguments, **options):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return one
for module, name in ((os, "rename"), (os, "unlink"), (os, "fsync"), (os, "fdatasync"), (os, "open")):
    setattr(module, name, counted(getattr(module, name)))
trash.delete(sys.argv[1])
"""


def test_killed_anywhere_it_is_there_or_gone(archive: Path) -> None:
    seen = set()
    for step in range(1, 100):
        archive.write_bytes(b"archive")
        sidecars.set_notes(str(archive), "notes")
        run = subprocess.run(
            [sys.executable, "-c", _DELETE, str(archive), str(step)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)])},
            check=False,
        )
        assert run.returncode in (0, -signal.SIGKILL)
        there = archive.exists()
        waiting = trash.pending(str(archive.parent))
        assert trash.settle(str(archive.parent)) == waiting
        assert archive.exists() == there  # what was not hidden yet is not touched
        assert names(archive) == (["web01.tar", "web01.tar.notes"] if there else []), step
        seen.add((there, bool(waiting)))
        if run.returncode == 0:
            break
    assert seen == {(True, False), (False, True), (False, False)}
