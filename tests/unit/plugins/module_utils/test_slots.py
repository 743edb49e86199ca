# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The limit of backups at work in one target: between processes, with other limits, after kills, and where locks fail."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _ofd, _paths, _slots
from ansible_collections.kvmops.backup.plugins.module_utils._errors import BusyError, CancelledError
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = str(tmp_path_factory.mktemp("state"))
    monkeypatch.setattr(_paths, "state_dir", lambda: directory)
    monkeypatch.setattr(_slots, "POLL_S", 0.01)


@pytest.fixture
def warnings() -> list[str]:
    return []


def hold(
    directory: Path,
    limit: int,
    warnings: list[str],
    timeout_s: float = 0,
    progress: Progress | None = None,
    **more: str,
) -> contextlib.AbstractContextManager[_slots.Slot]:
    context = Context(progress or Progress(), lambda notice: warnings.append(notice.text))
    return _slots.hold(str(directory), limit, what="backup of VM a", timeout_s=timeout_s, context=context)


def test_the_limit_counts_all_and_zero_never_waits(tmp_path: Path, warnings: list[str]) -> None:
    with hold(tmp_path, 0, warnings), hold(tmp_path, 0, warnings), hold(tmp_path, 3, warnings):
        with pytest.raises(
            BusyError,
            match=rf"3 backups are at work there and max_parallel is 3: backup of VM a \(process {os.getpid()}",
        ):
            hold(tmp_path, 3, warnings).__enter__()
        with hold(tmp_path, 4, warnings), hold(tmp_path, 0, warnings):
            pass
        assert os.listdir(tmp_path) == [_slots.NAME]
    assert os.listdir(tmp_path) == [] and warnings == []


def test_each_says_what_it_will_still_write(tmp_path: Path, warnings: list[str]) -> None:
    """Until it is written, and not for a file that has got another name."""
    file = tmp_path / "partial"
    with hold(tmp_path, 0, warnings) as one, hold(tmp_path, 0, warnings) as two:
        assert two.others_bytes() == 0
        one.claim(10 * 2**20)
        assert (one.others_bytes(), two.others_bytes()) == (0, 10 * 2**20)
        file.write_bytes(os.urandom(2**20))
        one.writes(str(file))
        assert two.others_bytes() == 10 * 2**20
        with open(file, "ab") as stream:
            stream.write(os.urandom(4 * 2**20))
            os.fsync(stream.fileno())
        assert abs(two.others_bytes() - 6 * 2**20) < 2**16
        with hold(tmp_path, 0, warnings) as three:
            three.claim(2**20)
            assert abs(two.others_bytes() - 7 * 2**20) < 2**16
        file.rename(tmp_path / "published")
        assert two.others_bytes() == 0
        one.claim(5)
        with open(tmp_path / _slots.NAME, "r+b") as stream:
            stream.write(b"\xff{" * 4000)  # whatever somebody else has written there
        assert two.others_bytes() == 0


@pytest.mark.parametrize(
    "told",
    ["[Infinity, 0, \"\", \"x\"]", "[" * 2048, '[5, 0, "a\\u0000b", "x"]', '[-5000000, 0, "", "x"]', "[1e5, 0, \"\", \"\"]", "5"],
)
def test_what_nobody_would_tell_claims_nothing(told: str, tmp_path: Path, warnings: list[str]) -> None:
    with hold(tmp_path, 0, warnings) as one, hold(tmp_path, 0, warnings) as two:
        with open(tmp_path / _slots.NAME, "r+b") as file:
            file.seek(2 * 2048)
            file.write(told.encode().ljust(2048, b"\0"))
        assert one.others_bytes() == two.others_bytes() == 0


def test_waiting_can_be_cancelled(tmp_path: Path, warnings: list[str]) -> None:
    progress = Progress()
    with hold(tmp_path, 1, warnings):
        progress.cancel("enough")
        with pytest.raises(CancelledError):
            hold(tmp_path, 1, warnings, 60, progress).__enter__()
    assert os.listdir(tmp_path) == []


_WORKER = """
import os, sys, time
from ansible_collections.kvmops.backup.plugins.module_utils import _slots
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
_slots.POLL_S = 0.005
directory, log, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
def tell(sign):
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.write(fd, sign.encode())
    os.close(fd)
tell("r")
while not os.path.exists(log + ".go"):
    time.sleep(0.005)
for _each in range(int(sys.argv[4])):
    with _slots.hold(directory, limit, what="test", timeout_s=60, context=Context(Progress(), print)):
        tell("+")
        time.sleep(float(sys.argv[5]))
        tell("-")
"""


def worker(directory: Path, log: Path, limit: int, rounds: int, pause_s: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(directory), str(log), str(limit), str(rounds), str(pause_s)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)])},
    )


def test_never_more_at_work_than_the_limit(tmp_path: Path) -> None:
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    log.write_text("")
    workers = [worker(place, log, 2, 15, 0.02) for _number in range(5)]
    while log.read_text() != "r" * 5:
        assert not any(each.poll() for each in workers)
        time.sleep(0.01)
    (tmp_path / "log.go").touch()
    assert [each.wait(600) for each in workers] == [0] * 5
    at_work = highest = 0
    for sign in log.read_text().lstrip("r"):
        at_work += 1 if sign == "+" else -1
        highest = max(highest, at_work)
    assert highest == 2 and at_work == 0 and len(log.read_text()) == 155
    assert os.listdir(place) == []


def test_a_killed_backup_gives_its_slot_back(tmp_path: Path, warnings: list[str]) -> None:
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    log.write_text("")
    (tmp_path / "log.go").touch()
    for _number in range(3):
        victim = worker(place, log, 1, 1, 60)
        while not log.read_text().endswith("+"):
            assert victim.poll() is None
            time.sleep(0.01)
        with pytest.raises(BusyError):
            hold(place, 1, warnings).__enter__()
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        with hold(place, 1, warnings):
            log.write_text("")
    assert os.listdir(place) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_it_holds_on_this_host(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = _ofd.fcntl.fcntl

    def without(fd: int, command: int, request: bytes) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path / _slots.NAME)):
            raise OSError(code, os.strerror(code))
        return bytes(real(fd, command, request))

    monkeypatch.setattr(_ofd.fcntl, "fcntl", without)
    with hold(tmp_path, 1, warnings), pytest.raises(BusyError):
        hold(tmp_path, 1, warnings).__enter__()
    assert "this host only" in warnings[0]


def _symbolic_link(path: Path, elsewhere: Path) -> None:
    os.symlink(elsewhere, path)


def _hard_link(path: Path, elsewhere: Path) -> None:
    elsewhere.write_bytes(b"precious" * 1000)
    os.link(elsewhere, path)


def _fifo(path: Path, _elsewhere: Path) -> None:
    os.mkfifo(path)


def _endless(path: Path, _elsewhere: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(8 << 40)


def _somebody_elses(path: Path, _elsewhere: Path) -> None:
    path.touch()
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize("make", [_symbolic_link, _hard_link, _fifo, _endless, _somebody_elses])
def test_a_file_in_the_way_is_not_touched(
    tmp_path: Path, warnings: list[str], make: Callable[[Path, Path], None]
) -> None:
    """Nor does it stop or delay a backup: the host's own count stands in, and says so."""
    if make is _somebody_elses and os.geteuid():
        pytest.skip("only root may give a file away")
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    place.mkdir()
    make(place / _slots.NAME, elsewhere)
    before = os.lstat(place / _slots.NAME), elsewhere.exists() and elsewhere.read_bytes()
    begin = time.monotonic()
    with hold(place, 1, warnings) as slot, pytest.raises(BusyError):
        assert slot.others_bytes() == 0
        hold(place, 1, warnings).__enter__()
    assert time.monotonic() - begin < 5
    assert (os.lstat(place / _slots.NAME), elsewhere.exists() and elsewhere.read_bytes()) == before
    assert os.listdir(place) == [_slots.NAME]
    assert "this host only" in warnings[-1]
    if make is not _symbolic_link:
        assert "Remove it." in warnings[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_where_files_of_ours_are_not_ours(tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS with root_squash."""
    real = os.open

    def squashed(path: str, flags: int, *more: Any, **named: Any) -> int:
        fd = real(path, flags, *more, **named)
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            os.fchown(fd, 65534, 65534)
        return fd

    monkeypatch.setattr(os, "open", squashed)
    with hold(tmp_path, 1, warnings), pytest.raises(BusyError):
        hold(tmp_path, 1, warnings).__enter__()
    assert warnings == [] and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("fs_type", "options", "shared"),
    [
        ("ext4", "rw", True),
        ("nfs4", "rw vers=4.2 local_lock=none", True),
        ("nfs", "rw vers=3 nolock local_lock=all", False),
        ("nfs", "rw local_lock=posix", False),
        ("nfs", "rw local_lock=flock", True),
        ("cifs", "rw", True),
        ("cifs", "rw nobrl", False),
        ("fuse.sshfs", "rw", False),
        ("9p", "rw", False),
        ("fuse.glusterfs", "rw", True),
    ],
)
def test_which_mounts_share_their_locks(fs_type: str, options: str, shared: bool) -> None:
    assert (_slots.why_not_shared(fs_type, frozenset(options.split())) == "") == shared


def test_random_order_of_leaving_keeps_the_count(tmp_path: Path, warnings: list[str]) -> None:
    seed = int(os.environ.get("KVMOPS_BACKUP_SEED", "0")) or random.randrange(2**32)
    print(f"KVMOPS_BACKUP_SEED={seed}")
    pick = random.Random(seed)
    held: list[contextlib.AbstractContextManager[_slots.Slot]] = []
    for _number in range(300):
        if held and pick.random() < 0.5:
            held.pop(pick.randrange(len(held))).__exit__(None, None, None)
            continue
        one = hold(tmp_path, 5, warnings)
        if len(held) == 5:
            with pytest.raises(BusyError):
                one.__enter__()
        else:
            one.__enter__()
            held.append(one)
    for each in held:
        each.__exit__(None, None, None)
    assert os.listdir(tmp_path) == []
