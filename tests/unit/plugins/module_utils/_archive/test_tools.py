# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The tools of every system read what we wrote; blocks are shared and holes kept where the file system can."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._archive import convert, frames, tar
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives

ODD_NAMES = ["web 01", "Ärger", "../../etc/passwd", "a" * 300, "-rf", "%s'\"$(x)\\", ".hidden", "日本"]
PLAIN_EXTRACT = {
    "GNU tar": ["tar", "-xf"],
    "bsdtar": ["bsdtar", "-xf"],
    "busybox": ["busybox", "tar", "-xf"],
}
COMPRESSED_EXTRACT = {
    "GNU tar": ["tar", "--zstd", "-xf"],
    "bsdtar": ["bsdtar", "-xf"],
}


def run(*command: str | Path, **options: object) -> bytes:
    done = subprocess.run([str(part) for part in command], capture_output=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, (command, done.stderr)
    return bytes(done.stdout)


def need(tool: str) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed here")


def extracted(command: list[str], archive: Path, where: Path) -> dict[str, bytes]:
    need(command[0])
    where.mkdir()
    run(*command, archive, cwd=where)
    return {file.name: file.read_bytes() for file in where.iterdir()}


def members(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if not name.endswith((".xml", ".digests"))}


@pytest.mark.parametrize("tool", PLAIN_EXTRACT)
def test_plain_is_read_by(tool: str, tmp_path: Path) -> None:
    path = Path(archives.write(tmp_path, archives.SMALL).path)
    found = extracted(PLAIN_EXTRACT[tool], path, tmp_path / "x")
    assert members(found) == archives.SMALL
    assert len(found) == len(archives.SMALL) + 2


@pytest.mark.parametrize("tool", COMPRESSED_EXTRACT)
def test_compressed_is_read_by(tool: str, tmp_path: Path) -> None:
    path = Path(archives.write(tmp_path, archives.SMALL, compressed=True).path)
    assert members(extracted(COMPRESSED_EXTRACT[tool], path, tmp_path / "x")) == archives.SMALL


def test_python_reads_it(tmp_path: Path) -> None:
    path = Path(archives.write(tmp_path, archives.SMALL).path)
    with tarfile.open(path, errorlevel=2) as file:
        found = {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]
        assert all(member.isreg() and member.mode == 0o600 for member in file)
    assert members(found) == archives.SMALL


def test_zstd_gives_the_same_tar_stream(tmp_path: Path) -> None:
    need("zstd")
    plain = Path(archives.write(tmp_path, archives.SMALL).path)
    packed = Path(archives.write(tmp_path, archives.SMALL, compressed=True).path)
    run("zstd", "-q", "-t", packed)
    assert run("zstd", "-d", "-c", packed) == plain.read_bytes()
    assert archives.tar_stream(packed) == plain.read_bytes()


def test_seek_table_is_what_zstd_lists(tmp_path: Path) -> None:
    need("zstd")
    contents = {"vda_0.qcow2": archives.noise(5 * 2**20) + bytes(9 * 2**20)}
    path = Path(archives.write(tmp_path, contents, compressed=True).path)
    listed = run("zstd", "-lv", path).decode()
    with open(path, "rb") as file:
        by_table = frames.read_seek_table(file.fileno(), path.stat().st_size)
        by_walk = frames.walk(file.fileno(), path.stat().st_size)
    assert by_table is not None and by_walk is not None and not by_walk.problem
    count = len(by_table.file_offsets) - 1
    assert list(by_walk.file_offsets)[: count + 1] == list(by_table.file_offsets)
    assert list(by_walk.stream_offsets)[: count + 1] == list(by_table.stream_offsets)
    figures = {line.split(":")[0].strip(): line.split(":", 1)[1] for line in listed.splitlines() if ":" in line}
    assert int(next(value for key, value in figures.items() if "Skippable Frames" in key)) == 1
    zstd_frames = next(value for key, value in figures.items() if key.endswith("Zstandard Frames"))
    assert int(zstd_frames) == count
    assert f"({by_table.stream_size} B)" in figures["Decompressed Size"]
    assert by_table.largest <= 4 * 2**20


def test_every_member_begins_at_4096(tmp_path: Path) -> None:
    path = Path(archives.write(tmp_path, archives.SMALL).path)
    with open_archive(str(path)) as reader:
        assert len(reader.entries) == 5
        assert all(entry.offset % 4096 == 0 for entry in reader.entries)
        assert reader.end % 4096 == 0 and reader.end + 4096 == path.stat().st_size


@pytest.mark.parametrize("compressed", [False, True])
def test_writing_back_does_not_wait_for_the_fsync(
    compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(_files, "start_writing_back", lambda _fd, _offset, length: begun.append(length))
    content = {"vda_0.qcow2": archives.noise(9 * 2**20)}
    written = archives.write(tmp_path, content, compressed=compressed).bytes_written
    assert sum(begun) >= 0.99 * written


@pytest.mark.parametrize("vm_name", ODD_NAMES)
def test_odd_vm_names(vm_name: str, tmp_path: Path) -> None:
    name = convert.names.archive_name(vm_name, archives.TIMESTAMP, archives.UUID, False)
    path = Path(archives.write(tmp_path, archives.SMALL, name=name, vm_name=vm_name).path)
    assert path.parent == tmp_path and path.name == name and name.isascii() and name[0] not in ".-"
    assert len(name) < 110
    assert verify_file(str(path)).ok
    assert members(extracted(["tar", "-xf"], path, tmp_path / "x")) == archives.SMALL


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive with a sparse member of 9 GiB: beyond what the octal size field holds."""
    directory = tmp_path_factory.mktemp("huge")
    disk = directory / "disk"
    with open(disk, "wb") as file:
        file.truncate(9 * 2**30 + 700)
        for offset in (0, 8 * 2**30 - 10, 9 * 2**30):
            file.seek(offset)
            file.write(archives.noise(100, offset + 1))
    return Path(archives.write(directory, {"vda_0.qcow2": disk, "vdb_0.qcow2": b"behind"}).path)


@pytest.mark.parametrize("tool", ["tar", "bsdtar", "busybox", "python", "ours"])
def test_a_member_of_9_gib(huge: Path, tool: str) -> None:
    need(tool if tool not in ("python", "ours") else "sh")
    if tool == "python":
        with tarfile.open(huge) as file:
            listed = [(member.name, member.size) for member in file]
    elif tool == "ours":
        with open_archive(str(huge)) as reader:
            listed = [(entry.name, entry.size_bytes) for entry in reader.entries]
    else:
        prefix = ["busybox", "tar"] if tool == "busybox" else [tool]
        lines = run(*prefix, "-tvf", huge, env={"LC_ALL": "C", "PATH": os.environ["PATH"]}).decode().splitlines()
        column = 4 if tool == "bsdtar" else 2
        listed = [(line.split()[-1], int(line.split()[column])) for line in lines]
    assert listed[:2] == [("vda_0.qcow2", 9 * 2**30 + 700), ("vdb_0.qcow2", 6)]
    assert len(listed) == 4


def test_holes_are_kept_everywhere(huge: Path, tmp_path: Path) -> None:
    def allocated(path: Path) -> int:
        return path.stat().st_blocks * 512

    assert huge.stat().st_size > 9 * 2**30 and allocated(huge) < 2**20
    begin = time.monotonic()
    found = archives.extract_to_files(huge, tmp_path)
    assert found["vda_0.qcow2"].stat().st_size == 9 * 2**30 + 700
    assert allocated(found["vda_0.qcow2"]) < 2**20
    with open(found["vda_0.qcow2"], "rb") as file:
        for offset in (0, 8 * 2**30 - 10, 9 * 2**30):
            file.seek(offset)
            assert file.read(100) == archives.noise(100, offset + 1)
    assert verify_file(str(huge)).ok
    os.link(huge, tmp_path / "b.tar")
    packed = convert.compress(str(tmp_path / "b.tar"))
    assert os.stat(packed).st_size < 2**20 and verify_file(packed).ok
    plain = convert.uncompress(packed)
    assert allocated(Path(plain)) < 2**20 and verify_file(plain).ok
    assert time.monotonic() - begin < 60


@pytest.fixture(params=["xfs", "btrfs"])
def reflinks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system with reflinks on a loop device."""
    kind: str = request.param
    need(f"mkfs.{kind}")
    if os.geteuid():
        pytest.skip("only root can mount a loop device")
    image, mount = tmp_path / "fs.img", tmp_path / "mnt"
    with open(image, "wb") as file:
        file.truncate(400 * 2**20)
    mount.mkdir()
    run(f"mkfs.{kind}", "-q", *(["-m", "reflink=1"] if kind == "xfs" else []), image)
    done = subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"NO LOOP DEVICES HERE, reflinks are not tested: {done.stderr.decode()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def used(mount: Path) -> int:
    descriptor = os.open(mount, os.O_RDONLY)
    try:
        os.sync()
        status = os.fstatvfs(descriptor)
        return (status.f_blocks - status.f_bfree) * status.f_frsize
    finally:
        os.close(descriptor)


def test_blocks_are_shared(reflinks: Path, tmp_path: Path) -> None:
    disk = reflinks / "disk"
    disk.write_bytes(archives.noise(60 * 2**20 + 777, 9))
    before = used(reflinks)
    written = archives.write(reflinks, {"vda_0.qcow2": disk, "vdb_0.qcow2": b"small"})
    shared = used(reflinks)
    assert shared - before < 4 * 2**20
    assert written.bytes_written < 2**20
    assert verify_file(written.path).ok
    directory = reflinks / "out"
    directory.mkdir()
    found = archives.extract_to_files(written.path, directory)
    assert used(reflinks) - shared < 4 * 2**20
    assert found["vda_0.qcow2"].read_bytes() == disk.read_bytes()
    run("tar", "-xf", written.path, "-C", tmp_path)
    assert (tmp_path / "vda_0.qcow2").read_bytes() == disk.read_bytes()


def test_header_round_trip_with_python(tmp_path: Path) -> None:
    for size in (0, 1, 8 * 2**30 - 1, 8 * 2**30, 2**45):
        for position in (0, 512, 1024, 3584, 4096, 40960):
            header = tar.header("vda_0.qcow2", size, archives.TIMESTAMP, position)
            assert (position + len(header)) % 4096 == 0 and 1536 <= len(header) <= 1536 + 4095
            info = tarfile.TarFile(fileobj=io.BytesIO(header + bytes(1024))).next()
            assert info is not None and (info.name, info.size, info.mtime) == ("vda_0.qcow2", size, archives.TIMESTAMP)
