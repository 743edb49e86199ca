# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A process that dies at any step leaves no half archive and harms no other; what cannot be made durable is not published."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._archive import convert, sidecars, trash
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import ArchiveWriter, Compression
from ansible_collections.kvmops.backup.plugins.module_utils._errors import CancelledError, KvmopsError, TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import BytesSource
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives, driver
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive.watching import died_at, strace

pytestmark = pytest.mark.sweep

HERE = Path(__file__).parent
SYSCALLS = ("pwrite64", "fsync", "renameat2", "ftruncate", "ioctl", "unlink")


def visible(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


@pytest.mark.parametrize("compressed", [False, True])
def test_killed_while_writing(tmp_path: Path, compressed: bool) -> None:
    old = Path(archives.write(tmp_path, archives.SMALL, name="old.tar").path)
    before = old.read_bytes()
    step = 1
    while died_at(step, lambda: archives.write(tmp_path, driver.BIG, compressed=compressed, name="new.tar", threads=1)):
        assert visible(tmp_path) in (["old.tar"], ["new.tar", "old.tar"]), step
        if "new.tar" in visible(tmp_path):
            assert archives.extract(tmp_path / "new.tar") == driver.BIG
            (tmp_path / "new.tar").unlink()
        for name in os.listdir(tmp_path):
            assert not name.startswith(".") or ".partial-" in name
        step += 1
    assert step > 8, "the sweep saw no system calls"
    print(f"{step - 1} points of death")
    assert old.read_bytes() == before
    assert archives.extract(tmp_path / "new.tar") == driver.BIG


@pytest.mark.parametrize("compressed", [False, True])
def test_killed_while_converting(tmp_path: Path, compressed: bool) -> None:
    """Old or new or both are there; both are whole, and the second run ends with the new one alone."""
    step = 1
    while True:
        directory = tmp_path / str(step)
        directory.mkdir()
        old = archives.write(directory, driver.BIG, compressed=not compressed).path
        sidecars.set_notes(old, "remember me")
        sidecars.set_protected(old, True)
        new = convert.converted_path(old, compressed)
        run = (
            (lambda old=old: convert.compress(old, threads=1))
            if compressed
            else (lambda old=old: convert.uncompress(old, threads=1))
        )
        killed = died_at(step, run)
        present = [path for path in (old, new) if os.path.exists(path)]
        assert present, step
        for path in present:
            assert verify_file(path, threads=1).ok and archives.extract(path) == driver.BIG, step
        notes = [path for path in present if sidecars.notes(path) == "remember me"]
        assert len(notes) == 1, step
        assert any(sidecars.is_protected(path) for path in present), step
        if killed and present == [old]:
            assert run() == new
        elif killed and len(present) == 2:  # as the catalogue finishes it
            with pytest.raises(TargetError, match="already"):
                run()
            sidecars.move(old, new)
            trash.delete(old)
        assert [name for name in visible(directory) if "tar" in name] == sorted(
            os.path.basename(new) + suffix for suffix in ("", ".notes", ".protected")
        )
        assert sidecars.notes(new) == "remember me" and sidecars.is_protected(new)
        shutil.rmtree(directory)
        if not killed:
            break
        step += 1
    assert step > 10


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed here")
@pytest.mark.parametrize("syscall", SYSCALLS[:4])
def test_killed_by_the_kernel(tmp_path: Path, syscall: str) -> None:
    """The real signal at the real system call, the first and the last of each kind."""
    for when in ("1", "2", "1+1") if os.environ.get("KVMOPS_BACKUP_EXHAUSTIVE") else ("1",):
        done = strace(f"inject={syscall}:signal=SIGKILL:when={when}", "write", str(tmp_path))
        if "Operation not permitted" in done.stderr:
            pytest.skip("ptrace is not permitted here")
        assert done.returncode in (0, -9, 137), done.stderr
        assert visible(tmp_path) == ([] if done.returncode else ["a.tar"])
        for name in os.listdir(tmp_path):
            os.unlink(tmp_path / name)


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed here")
@pytest.mark.parametrize("which", ["1", "2"])
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_a_failed_fsync_publishes_nothing(tmp_path: Path, which: str, error: str) -> None:
    """The first fsync is that of the file, the second that of the directory."""
    done = strace(f"inject=fsync:error={error}:when={which}", "write", str(tmp_path))
    if "Operation not permitted" in done.stderr:
        pytest.skip("ptrace is not permitted here")
    assert "TargetError" in done.stdout and str(tmp_path) in done.stdout, done
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
def test_errors_of_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool, call: str) -> None:
    if compressed and call == "ftruncate":
        pytest.skip("a compressed archive has no holes")

    def fail(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(TargetError, match=r"No space left.*Free space") as failure:
        archives.write(tmp_path, driver.BIG, compressed=compressed)
    assert str(tmp_path) in str(failure.value)
    assert os.listdir(tmp_path) == []


def test_never_over_another_file(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"mine")
    with pytest.raises(TargetError, match="never overwritten"):
        archives.write(tmp_path, archives.SMALL)
    assert os.listdir(tmp_path) == ["a.tar"] and (tmp_path / "a.tar").read_bytes() == b"mine"


def test_publish_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_old: str, new: str, _flags: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", new)

    monkeypatch.setattr(_files, "_renameat2", fail)
    path = archives.write(tmp_path, archives.SMALL).path
    assert os.listdir(tmp_path) == ["a.tar"] and archives.extract(path) == archives.SMALL
    with pytest.raises(TargetError, match="never overwritten"):
        archives.write(tmp_path, archives.SMALL)


def test_a_full_file_system(tmp_path: Path) -> None:
    """A real one, of 8 MiB."""
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("cannot mount a tmpfs here")
    try:
        contents = {"vda_0.qcow2": archives.noise(20 * 2**20)}
        for compressed in (False, True):
            with pytest.raises(TargetError, match=r"No space left"):
                archives.write(tmp_path, contents, compressed=compressed)
            assert os.listdir(tmp_path) == []
        path = archives.write(tmp_path, {"vda_0.qcow2": archives.noise(5 * 2**20)}).path
        with pytest.raises(TargetError, match=r"No space left"):
            convert.compress(path)
        assert os.listdir(tmp_path) == ["a.tar"] and verify_file(path).ok
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_readers_while_it_is_converted(tmp_path: Path) -> None:
    """Readers that opened the old file read it to the end; those that come later find the new one."""
    path = archives.write(tmp_path, driver.BIG).path
    stop, failures = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            for name in (path, path + ".zst"):
                try:
                    if archives.extract(name, threads=1) != driver.BIG:
                        failures.append(name)
                except FileNotFoundError:
                    continue
                except KvmopsError as error:
                    if "No such file" not in str(error):
                        failures.append(str(error))

    readers = [threading.Thread(target=read) for _dummy in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _round in range(5):
            convert.compress(path)
            convert.uncompress(path + ".zst")
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not failures


@pytest.mark.parametrize("compressed", [False, True])
def test_a_low_bandwidth_does_not_keep_a_run_from_stopping(tmp_path: Path, compressed: bool) -> None:
    """A chunk at 1 KiB/s takes an hour; systemd kills what does not stop within minutes."""
    progress = Progress()
    timer = threading.Timer(0.5, progress.cancel, ["signal SIGTERM"])
    writer = ArchiveWriter(
        str(tmp_path), "a.tar", compression=Compression() if compressed else None, timestamp=1, progress=progress, bandwidth=1024
    )
    begin = time.monotonic()
    with writer, pytest.raises(CancelledError, match="SIGTERM"):
        timer.start()
        writer.add(Member("vda_0.qcow2", Role.DISK, 0), BytesSource(archives.noise(2**22)))
    assert time.monotonic() - begin < 60
    assert os.listdir(tmp_path) == []
