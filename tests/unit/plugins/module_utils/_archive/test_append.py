# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A point is added in place: every reader sees the old archive until the commit and the new one after it, whatever happens."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import zstandard

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._archive import (
    append,
    archive_locks,
    convert,
    frames,
    trash,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive import reader as reading
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive, why_full
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    BusyError,
    DamagedError,
    RefusedError,
    SourceError,
    TargetError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import BytesSource
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive.watching import (
    after_every_change,
    died_at,
    strace,
    tool_views,
)

pytestmark = pytest.mark.sweep

SEED = int(os.environ.get("KVMOPS_BACKUP_SEED", "0")) or random.randrange(2**32)
EXHAUSTIVE = os.environ.get("KVMOPS_BACKUP_EXHAUSTIVE", "")
LAYERS = {
    "vda_1.snapshot": archives.noise(150_000, 11),
    "vdb_1.snapshot": b"text that compresses well " * 60,
    f"{archives.TIMESTAMP + 1}_0.memory": archives.noise(180_001, 12),
}
NEXT = {"vda_2.snapshot": archives.noise(5000, 21), "vdb_2.snapshot": b""}
COVER = 200_000  # so that LAYERS need more than one


@pytest.fixture(params=["plain", "compressed"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(archives.write(tmp_path, archives.SMALL, compressed=request.param == "compressed").path)


def add(path: Path, contents: dict[str, bytes] | None = None, **options: object) -> archives.PublishedArchive:
    options.setdefault("cover_bytes", COVER)
    return archives.append(path, LAYERS if contents is None else contents, threads=1, **options)


def points(path: Path) -> list[int]:
    with open_archive(str(path)) as reader:
        assert not reader.broken and reader.structure is None
        return [point.timestamp for point in reader.points]


def is_old_or_new(path: Path) -> bool:
    """Whether the new point is there; anything but the old or the new archive, byte for byte, fails the test."""
    found = points(path)
    assert found in ([archives.TIMESTAMP], [archives.TIMESTAMP, archives.TIMESTAMP + 1])
    assert archives.extract(path, timestamp=archives.TIMESTAMP, threads=1) == archives.SMALL
    if len(found) == 2:
        assert archives.extract(path, threads=1) == {**archives.SMALL, **LAYERS}
    return len(found) == 2


def is_whole(path: Path) -> bool:
    """Whether every byte of a file is in frames; a plain archive is whole always."""
    if path.suffix == ".tar":
        return True
    with open(path, "rb") as file:
        try:
            return bool(list(frames.scan(file.fileno(), path.stat().st_size)))
        except frames.FrameError:
            return False


def test_every_reader_at_every_stage(archive: Path) -> None:
    """The tools see exactly the old archive until the last write, and the new one after it."""
    views, windows = [tool_views(archive)], 0
    assert len({tuple(view) for view in views[0].values()}) == 1, views[0]

    def look(*_call: object) -> None:
        nonlocal windows
        if is_whole(archive):
            views.append(tool_views(archive))
        else:
            windows += 1
        committed = is_old_or_new(archive)
        report = verify_file(str(archive), threads=1)
        assert report.ok and report.coverage == "full"
        if not committed and is_whole(archive) and archive.stat().st_size != old_size:
            assert report.notices

    old_size = archive.stat().st_size
    with after_every_change(archive, look):
        add(archive)
    old, new = views[0], views[-1]
    assert new != old and len({tuple(view) for view in new.values()}) == 1, new
    changes = [number for number, (a, b) in enumerate(zip(views, views[1:])) if a != b]
    assert changes == [len(views) - 2], "it changed before the last write"
    assert len(new["GNU tar"]) == len(old["GNU tar"]) + len(LAYERS) + 2
    print(f"{len(views)} stages, {windows} windows")
    # FORMAT.md: between growing the file and covering what is new, for each of the two covers, and before the rest is cut off
    assert windows == (0 if archive.suffix == ".tar" else 3)


def test_the_old_part_stays(archive: Path) -> None:
    old = archive.read_bytes()
    with open_archive(str(archive)) as reader:
        index = getattr(reader.bytes, "index", None)
        begin, length = (index.file_offsets[-2], 8) if index else (reader.end, 512)
    written = add(archive)
    new = archive.read_bytes()
    assert new[:begin] == old[:begin] and new[begin : begin + length] != old[begin : begin + length]
    if index:
        assert new[begin + length : len(old)] == old[begin + length :]
    else:
        assert not any(new[begin + 512 : begin + 1024])
    assert written.size_bytes == len(new)
    assert written.bytes_written <= sum(map(len, LAYERS.values())) + 64 * 2**10


def test_points_have_what_they_need(archive: Path) -> None:
    add(archive)
    add(archive, NEXT)
    times = [archives.TIMESTAMP + n for n in range(3)]
    assert points(archive) == times
    expected = [archives.SMALL, {**archives.SMALL, **LAYERS}, {**archives.SMALL, **LAYERS, **NEXT}]
    with open_archive(str(archive)) as reader:
        assert [point.mode for point in reader.points] == ["full", "incremental", "incremental"]
        assert [point.parent_point for point in reader.points] == [0, *times[:2]]
        assert [point.parent_digest for point in reader.points] == ["", *(p.digest for p in reader.points[:2])]
        assert reader.point().timestamp == times[-1] and not reader.pending
    for time, contents in zip(times, expected):
        assert archives.extract(archive, timestamp=time) == contents
    for _round in range(2):
        convert_ = convert.uncompress if archive.suffix == ".zst" else convert.compress
        archive = Path(convert_(str(archive)))
        assert points(archive) == times
        for time, contents in zip(times, expected):
            assert archives.extract(archive, timestamp=time) == contents
        assert len({tuple(view) for view in tool_views(archive).values()}) == 1
    add(archive, {"vda_3.snapshot": b"after it was converted"})
    assert verify_file(str(archive)).ok and len(points(archive)) == 4


def test_killed_at_every_system_call(archive: Path) -> None:
    """Old or new, and the next append works."""
    old = archive.read_bytes()
    step, states = 1, []
    while died_at(step, lambda: add(archive)):
        new = is_old_or_new(archive)
        states.append(new)
        assert verify_file(str(archive), threads=1).ok
        if not new:
            left = append.settle(str(archive))
            assert archive.read_bytes() == old
            assert bool(left) == (bool(left) and "append" in left)
            died_at(step, lambda: add(archive))
        add(archive, NEXT, timestamp=archives.TIMESTAMP + 7)
        assert archives.extract(archive) == {**archives.SMALL, **(LAYERS if new else {}), **NEXT}
        assert verify_file(str(archive), threads=1).ok
        archive.write_bytes(old)
        step += 1
    print(f"{step - 1} points of death, {sum(states)} with the new point")
    assert step > 10 and states == sorted(states)
    assert is_old_or_new(archive)


def test_a_point_without_new_members(archive: Path) -> None:
    """Killed at every system call, too: the mark stands where the configuration's header comes, as there are no digests."""
    old, step = archive.read_bytes(), 1
    while died_at(step, lambda: add(archive, {})):
        assert len(points(archive)) in (1, 2) and verify_file(str(archive), threads=1).ok, step
        if len(points(archive)) == 1:
            append.settle(str(archive))
            assert archive.read_bytes() == old
        archive.write_bytes(old)
        step += 1
    assert points(archive) == [archives.TIMESTAMP, archives.TIMESTAMP + 1]
    assert archives.extract(archive) == archives.SMALL
    assert len({tuple(view) for view in tool_views(archive).values()}) == 1


def test_converted_with_the_remains_of_an_append(archive: Path) -> None:
    assert died_at(12, lambda: add(archive))
    with open_archive(str(archive)) as reader:
        assert reader.pending
    other = convert.compress(str(archive)) if archive.suffix == ".tar" else convert.uncompress(str(archive))
    with open_archive(other) as reader:
        assert not reader.pending
    assert not archive.exists() and archives.extract(other) == archives.SMALL


def test_killed_while_cutting_off(archive: Path) -> None:
    """At every system call, after a death early in an append and one before the commit."""
    old = archive.read_bytes()
    calls = 1
    while died_at(calls, lambda: add(archive)):
        archive.write_bytes(old)
        calls += 1
    archive.write_bytes(old)
    uncommitted = calls - 1
    while True:
        assert died_at(uncommitted, lambda: add(archive))
        if not is_old_or_new(archive):
            break
        archive.write_bytes(old)
        uncommitted -= 1
    for death in (10, uncommitted):
        archive.write_bytes(old)
        assert died_at(death, lambda: add(archive))
        dead = archive.read_bytes()
        step = 1
        while died_at(step, lambda: append.settle(str(archive))):
            assert not is_old_or_new(archive)
            assert verify_file(str(archive), threads=1).ok, (death, step)
            append.settle(str(archive))
            assert archive.read_bytes() == old
            archive.write_bytes(dead)
            step += 1
        assert step > 2 and archive.read_bytes() == old


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed here")
@pytest.mark.parametrize(
    "rule", ["pwrite64:signal=SIGKILL:when=5", "fsync:signal=SIGKILL:when=2", "ftruncate:signal=SIGKILL"]
)
def test_killed_by_the_kernel(archive: Path, rule: str) -> None:
    done = strace(f"inject={rule}", "append", str(archive))
    if "Operation not permitted" in done.stderr:
        pytest.skip("ptrace is not permitted here")
    assert done.returncode in (-9, 137), done
    assert archives.extract(archive) == archives.SMALL
    add(archive)
    assert is_old_or_new(archive)


class _Failing:
    """Lets the `at`th call of a function on a file fail, or all from there on."""

    def __init__(self, patch: pytest.MonkeyPatch, path: Path, name: str, at: int, code: int, lasting: bool) -> None:
        self.path, self.count, self.original = path, 0, getattr(os, name)
        self.at, self.code, self.lasting = at, code, lasting
        patch.setattr(os, name, self)

    def __call__(self, fd: int, *arguments: object) -> object:
        self.count += os.readlink(f"/proc/self/fd/{fd}") == str(self.path)
        if self.count == self.at or (self.lasting and self.count > self.at):
            raise OSError(self.code, os.strerror(self.code))
        return self.original(fd, *arguments)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_no_space_and_failing_fsync(archive: Path, call: str, lasting: bool) -> None:
    """At every call: an error that names the place, and the old archive; byte for byte unless the place takes no write at all."""
    old = archive.read_bytes()
    for at in range(1, 1000):
        with pytest.MonkeyPatch.context() as patch:
            failing = _Failing(patch, archive, call, at, errno.ENOSPC, lasting)
            try:
                add(archive)
            except TargetError as error:
                assert str(archive) in str(error) and "No space left" in str(error)
            if failing.count < failing.at:
                break
        assert not is_old_or_new(archive), at
        if not lasting:
            assert archive.read_bytes() == old
        assert verify_file(str(archive), threads=1).ok
        add(archive, NEXT)
        assert archives.extract(archive) == {**archives.SMALL, **NEXT}
        archive.write_bytes(old)
    assert at > 3


def test_a_full_file_system(archive: Path, tmp_path: Path) -> None:
    place = tmp_path / "mnt"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        path = Path(shutil.copy(archive, place))
        old = path.read_bytes()
        for size in (3, 5, 40):
            with pytest.raises(TargetError, match="No space left"):
                add(path, {"vda_1.snapshot": archives.noise(size * 2**20)}, cover_bytes=2**20)
            assert path.read_bytes() == old
        add(path)
        assert is_old_or_new(path)
    finally:
        subprocess.run(["umount", place], check=True)


def test_leaving_without_publishing(archive: Path) -> None:
    old = archive.read_bytes()
    with append.ArchiveAppender(str(archive), timestamp=archives.TIMESTAMP + 1, sizes=[5000, 3]) as appender:
        appender.add(Member("vda_1.snapshot", Role.LAYER, 0, parent="vda_0.qcow2"), BytesSource(archives.noise(5000)))
        with open_archive(str(archive)) as reader:
            assert "append" in reader.pending and len(reader.points) == 1
        with pytest.raises(SourceError, match="had 3 when"):
            appender.add(Member("vdb_1.snapshot", Role.LAYER, 0), BytesSource(b"grown"))
        with pytest.raises(ValueError, match="already"):
            appender.add(Member("vda_0.qcow2", Role.DISK, 0), BytesSource(b"abc"))
        with pytest.raises(ValueError, match="not all members"):
            appender.publish(archives.configuration([], archives.TIMESTAMP + 1))
    assert archive.read_bytes() == old
    assert not append.settle(str(archive))


def test_the_configuration_must_fit(archive: Path) -> None:
    for change in ("old", "order", "missing"):
        with append.ArchiveAppender(str(archive), timestamp=archives.TIMESTAMP + 1, sizes=[3]) as appender:
            new = appender.add(Member("vda_1.snapshot", Role.LAYER, 0, parent="vda_0.qcow2"), BytesSource(b"abc"))
            rows = [*appender.newest.members, new]
            if change == "old":
                rows[0] = Member("vda_0.qcow2", Role.DISK, 1, digest="0" * 64)
            rows = rows[::-1] if change == "order" else rows[:-1] if change == "missing" else rows
            with pytest.raises(ValueError, match="does not list"):
                appender.publish(archives.configuration(rows, archives.TIMESTAMP + 1))
    assert points(archive) == [archives.TIMESTAMP]


def test_an_archive_is_full_when_readers_take_no_more(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_archive(str(archive)) as reader:
        held, newest = reader.heads_bytes, reader.entry(reader.points[-1].member_name).size_bytes
        monkeypatch.setattr(reading, "MAX_CONFIGURATION_BYTES", held + 2 * newest)
        assert why_full(reader) == ""
        monkeypatch.setattr(reading, "MAX_CONFIGURATION_BYTES", held + 2 * newest - 1)
        assert "no room" in why_full(reader)
        monkeypatch.undo()
    monkeypatch.setattr(append, "MAX_CONFIGURATION_BYTES", held)
    before = archive.read_bytes()
    with pytest.raises(ArchiveError, match="more than"):
        archives.append(archive, NEXT)
    assert archive.read_bytes() == before


def test_timestamps_only_grow(archive: Path) -> None:
    """Also where the clock has stepped back, by a day or by ten years."""
    for timestamp in (archives.TIMESTAMP, archives.TIMESTAMP - 86400, 1):
        with pytest.raises(RefusedError, match=f"{archives.TIMESTAMP + 1} is free"):
            add(archive, timestamp=timestamp)
    for number, now in enumerate((archives.TIMESTAMP, 1, archives.TIMESTAMP + 500, archives.TIMESTAMP + 499)):
        with open_archive(str(archive)) as reader:
            timestamp = append.next_timestamp(reader, now)
        add(archive, {f"vda_{number + 1}.snapshot": b"x"}, timestamp=timestamp)
    assert points(archive) == [archives.TIMESTAMP + n for n in (0, 1, 2, 500, 501)]


def test_one_writer(archive: Path) -> None:
    with append.ArchiveAppender(str(archive), timestamp=archives.TIMESTAMP + 1, sizes=[]):
        assert "adding a point" in archive_locks.writer(str(archive))
        for other in (
            lambda: add(archive),
            lambda: append.settle(str(archive)),
            lambda: convert.compress(str(archive)) if archive.suffix == ".tar" else convert.uncompress(str(archive)),
            lambda: trash.delete(str(archive)),
        ):
            with pytest.raises(BusyError, match=f"adding a point to {archive} .process {os.getpid()}"):
                other()
        assert archives.extract(archive) == archives.SMALL
    assert not archive_locks.writer(str(archive))
    add(archive)


def test_a_writer_on_another_host(archive: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its lock's file is not here, but its lock on the archive is."""
    with archive_locks.writing(str(archive), "test"):
        (tmp_path / "other").mkdir()
        monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path / "other"))
        assert archive_locks.writer(str(archive)) == "a process of another host"
        with pytest.raises(BusyError, match="another host"):
            add(archive)
    assert not archive_locks.writer(str(archive))
    add(archive)


def test_the_end_frame_is_where_a_commit_fits(tmp_path: Path) -> None:
    """Whatever the size of what is before it, its first bytes are in one sector."""
    skipped = 0
    for size in range(1000):
        path = archives.write(
            tmp_path, {"vda_0.qcow2": archives.noise(size)}, compressed=True, name=f"{size}.tar.zst"
        ).path
        with open_archive(path) as reader:
            index = reader.bytes.index  # type: ignore[union-attr]
            assert index.file_offsets[-2] % 512 <= 504
        if index.skips:
            skipped += 1
            assert verify_file(path).ok
            add(Path(path))
            assert verify_file(path).ok and is_whole(Path(path))
            if skipped > 2:
                break
        os.unlink(path)
    assert skipped > 2, "the sizes never led to a skipped frame"


def test_an_end_frame_across_two_sectors(tmp_path: Path) -> None:
    """An archive whose commit would not be one write to one sector is written anew first."""
    for size in range(1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(frames, "HEADER_BYTES", 0)
            name = f"{size}.tar.zst"
            path = archives.write(tmp_path, {"vda_0.qcow2": archives.noise(size)}, compressed=True, name=name).path
        with open_archive(path) as reader:
            if reader.bytes.index.file_offsets[-2] % 512 > 504:  # type: ignore[union-attr]
                break
        os.unlink(path)
    told: list[dict[str, object]] = []
    add(Path(path), on_growth=told.append)
    assert [sorted(facts) for facts in told] == [["partial"], ["archive", "old_size_bytes", "point"]]
    assert archives.extract(path) == {"vda_0.qcow2": archives.noise(size), **LAYERS} and verify_file(path).ok


def test_facts_for_the_journal(archive: Path) -> None:
    told: list[dict[str, object]] = []

    def on_growth(facts: dict[str, object]) -> None:
        assert archive.read_bytes() == old
        told.append(facts)

    old = archive.read_bytes()
    add(archive, on_growth=on_growth)
    expected = {"archive": str(archive), "old_size_bytes": len(old), "point": archives.TIMESTAMP + 1}
    assert told == [expected]


@pytest.mark.parametrize("how", [["-q"], ["-q", "-19", "--long=27"], ["-q", "--no-check", "--no-content-size"]])
def test_recompressed_by_other_tools(tmp_path: Path, how: list[str]) -> None:
    """The first append cuts it into our frames, once."""
    if not shutil.which("zstd"):
        pytest.skip("zstd is not installed here")
    plain = Path(archives.write(tmp_path, archives.SMALL).path)
    add(plain)
    path = tmp_path / "a.tar.zst"
    subprocess.run(["zstd", *how, plain, "-o", path], check=True)
    told: list[dict[str, object]] = []
    add(path, NEXT, on_growth=told.append)
    assert [sorted(facts) for facts in told] == [["partial"], ["archive", "old_size_bytes", "point"]]
    assert not os.path.exists(str(told[0]["partial"]))
    add(path, {"vda_3.snapshot": b"x"}, on_growth=told.append)
    assert len(told) == 3
    assert archives.extract(path) == {**archives.SMALL, **LAYERS, **NEXT, "vda_3.snapshot": b"x"}
    assert verify_file(str(path)).ok and is_whole(path)


def test_killed_while_it_is_written_anew(tmp_path: Path) -> None:
    """Old or new, and what is left beside it is the file that the journal knows."""
    plain = Path(archives.write(tmp_path, archives.SMALL).path)
    path = tmp_path / "b.tar.zst"
    path.write_bytes(zstandard.compress(plain.read_bytes()))
    plain.unlink()
    old, step = path.read_bytes(), 1
    while died_at(step, lambda: add(path)):
        is_old_or_new(path)
        assert verify_file(str(path), threads=1).ok or not is_whole(path)
        for name in set(os.listdir(tmp_path)) - {path.name}:
            assert name.startswith(f".{path.name}.partial-")
            (tmp_path / name).unlink()
        path.write_bytes(old)
        step += 3
    assert is_old_or_new(path) and os.listdir(tmp_path) == [path.name]


def test_after_a_foreign_append(tmp_path: Path) -> None:
    path = Path(archives.write(tmp_path, archives.SMALL).path)
    (tmp_path / "remark.txt").write_bytes(b"r" * 700)
    subprocess.run(["tar", "-rf", path, "-C", tmp_path, "remark.txt"], check=True)
    before = path.read_bytes()
    with open_archive(str(path)) as reader:
        end = reader.end
        assert end % 4096 and end % 512 == 0
    step = 1
    while died_at(step, lambda: add(path)):
        assert len(points(path)) == 1 or step > 8
        assert verify_file(str(path), threads=1).ok
        path.write_bytes(before)
        step += 1
    assert path.read_bytes()[:end] == before[:end]
    assert archives.extract(path) == {**archives.SMALL, **LAYERS}
    assert len({tuple(view) for view in tool_views(path).values()}) == 1
    subprocess.run(["tar", "-rf", path, "-C", tmp_path, "--transform=s/remark/more/", "remark.txt"], check=True)
    add(path, NEXT)
    assert archives.extract(path) == {**archives.SMALL, **LAYERS, **NEXT}
    report = verify_file(str(path))
    assert report.ok and report.coverage == "partial" and report.unchecked_bytes == 1400
    packed = convert.compress(str(path))
    add(Path(packed), {"vda_3.snapshot": b"x"})
    assert archives.extract(packed) == {**archives.SMALL, **LAYERS, **NEXT, "vda_3.snapshot": b"x"}


def test_what_is_not_ours_is_not_cut_off(archive: Path) -> None:
    old = archive.read_bytes()
    for garbage in (b"x", archives.noise(5000), archives.noise(40_000)):
        archive.write_bytes(old + garbage)
        assert not append.settle(str(archive))
        with pytest.raises(DamagedError):
            add(archive)
        assert archive.read_bytes() == old + garbage
        assert not verify_file(str(archive)).ok


def test_nothing_is_added_to_an_archive_of_another_user(archive: Path) -> None:
    before = archive.read_bytes()
    os.chown(archive, 1234567, -1)
    with open_archive(str(archive)) as reader:
        assert why_full(reader).startswith("it is not trusted: it belongs to the user 1234567")
    with pytest.raises(RefusedError, match="it is not trusted"):
        add(archive)
    assert archive.read_bytes() == before


def test_only_our_archives(tmp_path: Path) -> None:
    (tmp_path / "1_x.xml").write_text(archives.DOMAIN)
    subprocess.run(["tar", "-cf", tmp_path / "f.tar", "-C", tmp_path, "1_x.xml"], check=True)
    before = (tmp_path / "f.tar").read_bytes()
    with pytest.raises(RefusedError, match="not made by this collection"):
        add(tmp_path / "f.tar")
    assert (tmp_path / "f.tar").read_bytes() == before


def test_layers_of_two_archives_do_not_mix(tmp_path: Path) -> None:
    """The increment of another archive, put in the place of one, is refused."""
    one, other = (
        Path(archives.write(tmp_path, {"vda_0.qcow2": archives.noise(5000, seed)}, name=f"{seed}.tar").path)
        for seed in (1, 2)
    )
    with open_archive(str(one)) as reader:
        end = reader.end
    for path in (one, other):
        add(path, {"vda_1.snapshot": b"layer"})
    mixed = one.read_bytes()[:end] + other.read_bytes()[end:]
    one.write_bytes(mixed)
    with open_archive(str(one)) as reader:
        assert [point.timestamp for point in reader.points] == [archives.TIMESTAMP]
        (broken,) = reader.broken
        assert broken.timestamp == archives.TIMESTAMP + 1 and "another point" in str(broken.error)
        with pytest.raises(DamagedError, match="newest point"):
            reader.point()
    report = verify_file(str(one))
    assert not report.ok and report.damage[0].points == (archives.TIMESTAMP + 1,)
    with pytest.raises(DamagedError):
        add(one, {"vda_2.snapshot": b"layer"})


def test_matches(archive: Path, tmp_path: Path) -> None:
    content = archives.noise(9 * 2**20 + 77)
    sparse = bytes(CHUNK_BYTES) + b"x" * 10 + bytes(2 * CHUNK_BYTES)
    archives.append(archive, {"vda_1.snapshot": content, "vdb_1.snapshot": sparse})
    reads: list[int] = []

    class Source(BytesSource):
        def read_chunk(self, offset: int, buffer: memoryview) -> bool:
            reads.append(offset)
            return super().read_chunk(offset, buffer)

    with open_archive(str(archive)) as reader:
        table = {member.name: member for member in reader.point().members}
        member = table["vda_1.snapshot"]
        assert reader.matches(member, Source(content), threads=2)
        assert reader.matches(table["vdb_1.snapshot"], Source(sparse))
        assert reader.matches(table["vda_0.qcow2"], Source(archives.SMALL["vda_0.qcow2"]))
        assert not reader.matches(member, Source(content[:-1])) and not reader.matches(member, Source(content + b"x"))
        for position in (0, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[position] ^= 1
            assert not reader.matches(member, Source(bytes(changed)))
        large = archives.noise(1) + bytes(60 * 2**20)
        fake = Member("vda_1.snapshot", Role.LAYER, len(content))
        del reads[:]
        assert not reader.matches(fake, Source(large[: len(content)]), threads=1)
        assert len(reads) <= 3


def test_readers_while_points_are_added(archive: Path) -> None:
    """Every look finds whole points, the same or more than before; a verification never takes a commit for damage."""
    stop, failures = threading.Event(), []

    def look() -> None:
        seen = 1
        while not stop.is_set():
            try:
                found = len(points(archive))
                assert found >= seen
                seen = found
                assert archives.extract(archive, timestamp=archives.TIMESTAMP, threads=1) == archives.SMALL
                report = verify_file(str(archive), threads=1)
                assert report.ok, report
            except BaseException as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=look) for _number in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(1, 16):
            add(archive, {f"vda_{number}.snapshot": archives.noise(3000, number)}, cover_bytes=2**20)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not failures, failures
    assert len(points(archive)) == 16


SIZES = [
    0,
    1,
    511,
    512,
    513,
    4095,
    4096,
    4097,
    70_000,
    CHUNK_BYTES - 1,
    CHUNK_BYTES,
    CHUNK_BYTES + 1,
    2 * CHUNK_BYTES + 5,
]


@pytest.mark.parametrize("compressed", [False, True])
def test_random_histories(tmp_path: Path, compressed: bool) -> None:
    """Increments of all sizes, converted in between, killed, mixed with foreign appends: every point byte for byte."""
    print(f"KVMOPS_BACKUP_SEED={SEED}")
    chance = random.Random(SEED + compressed)
    (tmp_path / "remark").write_bytes(b"r" * 700)
    for history in range(20 if EXHAUSTIVE else 2):
        directory = tmp_path / str(history)
        directory.mkdir()
        contents: dict[str, bytes] = {"vda_0.qcow2": archives.noise(chance.choice(SIZES), 1), "vdb_0.qcow2": b"b"}
        path = Path(archives.write(directory, contents, compressed=compressed).path)
        expected = {archives.TIMESTAMP: dict(contents)}
        for number in range(1, chance.randint(4, 10)):
            new = {}
            for target in ("vda", "vdb"):
                size = chance.choice(SIZES)
                data = bytearray(bytes(size) if chance.random() < 0.3 else archives.noise(size, number))
                if size > 100_000 and chance.random() < 0.5:
                    data[50_000:-50_000] = bytes(size - 100_000)
                new[f"{target}_{number}.snapshot"] = bytes(data)
            event = chance.random()
            if event < 0.2:
                died_at(chance.randint(1, 40), lambda new=new, path=path: archives.append(path, new, threads=1))
            elif event < 0.4:
                path = Path((convert.uncompress if path.suffix == ".zst" else convert.compress)(str(path), threads=2))
            elif event < 0.5 and path.suffix == ".tar":
                name = f"--transform=s/remark/r{number}/"
                subprocess.run(["tar", "-rf", path, "-C", tmp_path, name, "remark"], check=True)
            found = points(path)
            if len(found) == len(expected):
                archives.append(path, new, cover_bytes=chance.choice([COVER, 9 * 2**20, append.MAX_COVER_BYTES]))
                found = points(path)
            contents.update(new)
            expected[found[-1]] = dict(contents)
            assert found == list(expected), SEED
        assert verify_file(str(path)).ok, SEED
        for timestamp, members in expected.items():
            assert archives.extract(path, timestamp=timestamp) == members, (SEED, timestamp)
        assert len({tuple(view) for view in tool_views(path).values()}) == 1, SEED
        assert is_whole(path)
        shutil.rmtree(directory)
