# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Any damage to an archive is reported, and a restore of a damaged archive gives the identical bytes or refuses.

A run flips a sample of the bytes, chosen by a seed that is printed. KVMOPS_BACKUP_EXHAUSTIVE=1 flips every bit of every byte,
KVMOPS_BACKUP_EXHAUSTIVE=bytes one bit of every byte.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive import frames
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import VerifyReport, verify_file
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, DamagedError, KvmopsError
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives

pytestmark = pytest.mark.sweep

EXHAUSTIVE = os.environ.get("KVMOPS_BACKUP_EXHAUSTIVE", "")
SEED = int(os.environ.get("KVMOPS_BACKUP_SEED", "0")) or random.randrange(2**32)
SAMPLES = 300


class Victim:
    """An archive that is damaged in one way after another."""

    def __init__(self, path: Path) -> None:
        self.path, self.good = path, path.read_bytes()
        with open_archive(str(path)) as reader:
            times = [point.timestamp for point in reader.points]
        self.points = {time: archives.extract(path, timestamp=time) for time in times}
        self.contents = self.points[times[-1]]
        self.harmless: Counter[int] = Counter()
        assert verify_file(str(path), threads=1).ok

    def damage(self, data: bytes) -> VerifyReport:
        self.path.write_bytes(data)
        return verify_file(str(self.path), threads=1)

    def restores_identical_or_refuses(self) -> bool:
        """True: the newest point is identical. Anything but an error of ours, or other bytes, fails the test, at any point."""
        for time in [*self.points][:-1]:
            with contextlib.suppress(KvmopsError):
                assert archives.extract(self.path, timestamp=time, threads=1) == self.points[time], time
        try:
            found = archives.extract(self.path, threads=1)
        except KvmopsError:
            return False
        assert found == self.contents
        return True


@pytest.fixture(params=["plain", "compressed", "plain increments", "compressed increments"])
def victim(request: pytest.FixtureRequest, tmp_path: Path) -> Victim:
    path = Path(archives.write(tmp_path, archives.SMALL, compressed=request.param.startswith("compressed")).path)
    if "increments" in request.param:
        add_increments(path)
    return Victim(path)


def add_increments(path: Path) -> None:
    archives.append(
        path, {"vda_1.snapshot": archives.noise(3000, 41), f"{archives.TIMESTAMP + 1}_0.memory": b"m" * 900}
    )
    archives.append(path, {"vda_2.snapshot": archives.noise(1500, 42), "vdb_2.snapshot": b""}, cover_bytes=5000)


def compressed(victim: Victim) -> bool:
    return victim.path.name.endswith(".zst")


def without_meaning(victim: Victim, offset: int) -> bool:
    """Bits of a zstd frame that decoders ignore: the unused bit of its header, its window and its blocks' encoding."""
    with open(victim.path.with_name("good"), "wb") as file:
        file.write(victim.good)
    with open(victim.path.with_name("good"), "rb") as file:
        index = frames.read_seek_table(file.fileno(), len(victim.good))
    assert index is not None
    return compressed(victim) and offset < index.file_offsets[-1]


def skipped(victim: Victim) -> set[int]:
    """Offsets of what every reader of a compressed archive skips: the ends of it that were."""
    with open(victim.path.with_name("good"), "wb") as file:
        file.write(victim.good)
    with open(victim.path.with_name("good"), "rb") as file:
        index = frames.live_index(file.fileno(), len(victim.good))
    if index is None or not compressed(victim):
        return set()
    return {at for n in index.skips for at in range(index.file_offsets[n] + 8, index.file_offsets[n + 1])}


def test_every_flipped_byte(victim: Victim) -> None:
    flips = [(offset, 1 << bit) for offset in range(len(victim.good)) for bit in range(8)]
    if EXHAUSTIVE == "bytes":
        flips = [(offset, 1 << offset % 8) for offset in range(len(victim.good))]
    elif not EXHAUSTIVE:
        print(f"KVMOPS_BACKUP_SEED={SEED}")
        flips = random.Random(SEED).sample(flips, SAMPLES)
    without = skipped(victim)
    flips = [(offset, mask) for offset, mask in flips if offset not in without or offset % 7 == 0]
    unreported = []
    for offset, mask in flips:
        data = bytearray(victim.good)
        data[offset] ^= mask
        report = victim.damage(data)
        identical = victim.restores_identical_or_refuses()
        if report.ok:
            assert identical, (offset, mask)
            if offset not in without:
                unreported.append((offset, mask))
    print(f"{len(unreported)} of {len(flips)} flips are without meaning: {unreported[:60]}")
    if not compressed(victim):
        assert unreported == []
    else:
        assert all(without_meaning(victim, offset) for offset, _mask in unreported)
        assert len(unreported) <= len(flips) // 20


@pytest.mark.parametrize("bit", [20, 22, 23, 25])
def test_flips_of_large_numbers_in_the_seek_table(victim: Victim, bit: int) -> None:
    """Also those that make a frame look larger than ours, which one thread reads then."""
    if not compressed(victim):
        pytest.skip("a plain archive has no seek table")
    count = int.from_bytes(victim.good[-9:-5], "little")
    begin = len(victim.good) - 9 - 8 * count
    for number in range(2 * count):
        data = bytearray(victim.good)
        data[begin + 4 * number + bit // 8] ^= 1 << bit % 8
        assert not victim.damage(data).ok, number
        victim.restores_identical_or_refuses()


def test_every_truncation(victim: Victim) -> None:
    for length in range(len(victim.good)):
        if EXHAUSTIVE or not length % (len(victim.good) // 150) or length > len(victim.good) - 60:
            try:
                report = victim.damage(victim.good[:length])
            except ArchiveError as error:
                assert not length or "archive" in str(error)
                continue
            assert not report.ok, length
            victim.restores_identical_or_refuses()


@pytest.mark.parametrize(
    "garbage", [b"x", b"\0", bytes(512), bytes(10240), archives.noise(600), b"\x50\x2a\x4d\x18\0\0\0\0"]
)
def test_trailing_garbage(victim: Victim, garbage: bytes) -> None:
    report = victim.damage(victim.good + garbage)
    zeros_behind_a_tar = not compressed(victim) and not any(garbage)
    assert report.ok == zeros_behind_a_tar
    assert victim.restores_identical_or_refuses() or not report.ok


def test_an_archive_behind_an_archive(victim: Victim) -> None:
    assert not victim.damage(victim.good + victim.good).ok
    victim.restores_identical_or_refuses()


@pytest.mark.parametrize("block", [512, 4096])
def test_zeroed_blocks(victim: Victim, block: int) -> None:
    without, uncommitted = skipped(victim), []
    for offset in range(0, len(victim.good), block):
        data = bytearray(victim.good)
        data[offset : offset + block] = bytes(len(data[offset : offset + block]))
        if data == victim.good or set(range(offset, offset + block)) <= without:
            continue
        report = victim.damage(data)
        if report.ok:  # the block that commits the last point: without it the point is not there, and it is said
            assert block == 512 and "append was interrupted" in report.notices[0].text
            uncommitted.append(offset)
        else:
            victim.restores_identical_or_refuses()
    assert len(uncommitted) == (block == 512 and len(victim.points) > 1 and not compressed(victim))


def test_random_damage(victim: Victim) -> None:
    print(f"KVMOPS_BACKUP_SEED={SEED}")
    chance = random.Random(SEED)
    for _round in range(3000 if EXHAUSTIVE else 200):
        data = bytearray(victim.good)
        for _byte in range(chance.randint(2, 40)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.3:
            begin = chance.randrange(len(data))
            del data[begin : begin + chance.randint(1, 600)]
        try:
            report = victim.damage(data)
        except ArchiveError:
            continue
        assert victim.restores_identical_or_refuses() or not report.ok, SEED


def member_extent(path: Path, name: str) -> tuple[int, int]:
    """Where a member's data are in a plain archive."""
    with open_archive(str(path)) as reader:
        entry = reader.entry(name)
        return entry.offset, entry.size_bytes


@pytest.fixture
def plain(tmp_path: Path) -> Victim:
    contents = {**archives.SMALL, "vdc_0.qcow2": archives.noise(9 * 2**20, 5)}
    return Victim(Path(archives.write(tmp_path, contents).path))


def test_damage_is_located(plain: Victim) -> None:
    begin, _size = member_extent(plain.path, "vdc_0.qcow2")
    data = bytearray(plain.good)
    data[begin + 5 * 2**20] ^= 1
    (found,) = plain.damage(data).damage
    assert (found.member, found.offset, found.length) == ("vdc_0.qcow2", 4 * 2**20, 4 * 2**20)
    assert found.points == (archives.TIMESTAMP,)


def test_damage_behind_a_broken_header_is_located(plain: Victim) -> None:
    """Two wounds: the header of the second disk, and one chunk of the third."""
    begin, _size = member_extent(plain.path, "vdc_0.qcow2")
    header, _size = member_extent(plain.path, "vdb_0.qcow2")
    data = bytearray(plain.good)
    data[begin] ^= 1
    data[header - 512 + 130] ^= 1
    report = plain.damage(data)
    assert [(d.member, d.offset) for d in report.damage] == [("", header - 4096 + 512), ("vdc_0.qcow2", 0)] or [
        (d.member, d.length) for d in report.damage
    ] == [("", header - report.damage[0].offset), ("vdc_0.qcow2", 4 * 2**20)]
    assert all(d.points == (archives.TIMESTAMP,) for d in report.damage)
    assert "vdb_0.qcow2" in report.damage[0].reason
    assert report.coverage == "full"


@pytest.mark.parametrize("name", [*archives.SMALL, f"{archives.TIMESTAMP}.digests", f"{archives.TIMESTAMP}_web01.xml"])
def test_a_lost_header_is_named(victim: Victim, name: str) -> None:
    """The whole header of a member is overwritten with zeros; everything else is checked all the same."""
    with open_archive(str(victim.path)) as reader:
        entry, source = reader.entry(name), reader.bytes
        begin, end = entry.header_offset, entry.offset
        if compressed(victim):
            begin, length = source.index.extent(begin, end - begin)  # type: ignore[union-attr]
            end = begin + length
    data = bytearray(victim.good)
    data[begin:end] = bytes(end - begin)
    report = victim.damage(data)
    (found,) = report.damage
    assert (found.member, found.offset, found.length) == ("", begin, end - begin)
    assert name in found.reason and found.points == tuple(victim.points)
    assert report.checked_bytes == sum(e.size_bytes for e in reader.entries)
    assert not victim.restores_identical_or_refuses()


def test_damaged_digests_are_named_and_members_checked_all_the_same(plain: Victim) -> None:
    begin, _size = member_extent(plain.path, f"{archives.TIMESTAMP}.digests")
    disk, _size = member_extent(plain.path, "vdb_0.qcow2")
    data = bytearray(plain.good)
    data[begin + 520] ^= 1
    report = plain.damage(data)
    (found,) = report.damage
    assert found.member == f"{archives.TIMESTAMP}.digests" and found.points == (archives.TIMESTAMP,)
    assert report.coverage == "full"
    data[disk + 3] ^= 1
    assert {d.member for d in plain.damage(data).damage} == {f"{archives.TIMESTAMP}.digests", "vdb_0.qcow2"}


def test_a_damaged_namespace_does_not_make_it_foreign(plain: Victim) -> None:
    data = plain.good.replace(b"urn:kvmops:backup:1", b"urn:kvmopz:backup:1")
    report = plain.damage(data)
    assert not report.ok
    assert not plain.restores_identical_or_refuses()
    data = plain.good.replace(b"urn:kvmops:backup:1", b"urn:kvmopz:backup:1").replace(
        b"<kvmops:backup", b"<kvmopz:backup"
    )
    assert not plain.damage(data).ok
    assert not plain.restores_identical_or_refuses()


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    assert not verify_file(str(tmp_path / "a.tar")).ok


@pytest.fixture(params=["plain", "compressed"])
def increments(request: pytest.FixtureRequest, tmp_path: Path) -> Victim:
    path = Path(archives.write(tmp_path, archives.SMALL, compressed=request.param == "compressed").path)
    add_increments(path)
    return Victim(path)


TIMES = [archives.TIMESTAMP + n for n in range(3)]
NEEDED_FROM = {
    "vdb_0.qcow2": 0,
    f"{TIMES[0]}.digests": 0,
    "vda_1.snapshot": 1,
    f"{TIMES[1]}.digests": 1,
    f"{TIMES[1]}_web01.xml": 1,
    "vda_2.snapshot": 2,
    f"{TIMES[2]}.digests": 2,
    f"{TIMES[2]}_web01.xml": 2,
}


@pytest.mark.parametrize("where", ["data", "header"])
@pytest.mark.parametrize("name", NEEDED_FROM)
def test_the_points_before_the_damage_stay(increments: Victim, name: str, where: str) -> None:
    """Damage names the points that are lost; all others restore, and the newest is never an older one in disguise."""
    with open_archive(str(increments.path)) as reader:
        entry, source = reader.entry(name), reader.bytes
        begin = entry.offset + entry.size_bytes // 2 if where == "data" else entry.header_offset
        length = 8
        if compressed(increments):
            begin, length = source.index.extent(begin, 1)  # type: ignore[union-attr]
            begin += length - 4  # the frame's checksum
            length = 4
    data = bytearray(increments.good)
    for at in range(begin, begin + length):
        data[at] ^= 0x55
    report = increments.damage(data)
    lost = TIMES[NEEDED_FROM[name] :]
    assert {point for item in report.damage for point in item.points} == set(lost), report
    # Which digests belong to which member is told by the configuration.
    assert report.coverage == ("partial" if where == "data" and name.endswith(".xml") else "full")
    for time in TIMES:
        if time in lost:
            with pytest.raises(KvmopsError):
                archives.extract(increments.path, timestamp=time)
        else:
            assert archives.extract(increments.path, timestamp=time) == increments.points[time]
    with pytest.raises(DamagedError):
        archives.extract(increments.path)
    if where == "header" or not name.endswith((".snapshot", ".qcow2", ".digests")):  # what opening the archive shows
        with pytest.raises(DamagedError):
            archives.append(increments.path, {"vda_3.snapshot": b"x"}, timestamp=TIMES[-1] + 1)
        assert increments.path.read_bytes() == data


def test_truncated_increments(increments: Victim) -> None:
    """What was whole before the cut is there still."""
    with open_archive(str(increments.path)) as reader:
        ends = [reader.entry(point.member_name).end for point in reader.points]
        if compressed(increments):
            index = reader.bytes.index  # type: ignore[union-attr]
            ends = [index.file_offsets[index.find(end - 1) + 1] for end in ends]
    for number, end in enumerate(ends):
        increments.path.write_bytes(increments.good[: end + 700])
        if number < 2 or not compressed(increments):
            with open_archive(str(increments.path)) as reader:
                assert [point.timestamp for point in reader.points] == TIMES[: number + 1]
        for time in TIMES[: number + 1]:
            assert archives.extract(increments.path, timestamp=time) == increments.points[time]


def test_a_lost_commit_in_the_middle(tmp_path: Path) -> None:
    """Zeros where the second point begins: the third one shows that this is damage, and nothing is cut off."""
    path = Path(archives.write(tmp_path, archives.SMALL).path)
    with open_archive(str(path)) as reader:
        end = reader.end
    add_increments(path)
    data = bytearray(path.read_bytes())
    data[end : end + 512] = bytes(512)
    path.write_bytes(data)
    report = verify_file(str(path))
    assert not report.ok and report.damage[0].points == tuple(TIMES[1:])
    assert archives.extract(path, timestamp=TIMES[0]) == archives.SMALL
    with pytest.raises(DamagedError, match=str(TIMES[0])):
        archives.extract(path)
    with pytest.raises(DamagedError, match=f"{TIMES[1]}, {TIMES[2]}"):
        archives.append(path, {"vda_3.snapshot": b"x"}, timestamp=TIMES[-1] + 1)
    assert path.read_bytes() == data
