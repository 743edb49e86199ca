# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs on files: the archive layer beside tar, zstd, cp, sha256sum and qemu-img."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.kvmops.backup.benchmarks import data
from ansible_collections.kvmops.backup.benchmarks.limits import compressing_alone
from ansible_collections.kvmops.backup.benchmarks.measure import Contender, Goal, Job, Jobs, same
from ansible_collections.kvmops.backup.tests.lab.loopfs import LoopFileSystem
from ansible_collections.kvmops.backup.tests.lab.modules import module_argv

_GIB = 1 << 30


@dataclass(frozen=True)
class Source:
    """A directory with `disk.qcow2` and `domain.xml`, and the same disk as a sparse raw file."""

    directory: Path
    raw: Path
    allocated_bytes: int

    @property
    def qcow2(self) -> Path:
        """The disk."""
        return self.directory / "disk.qcow2"

    @property
    def xml(self) -> Path:
        """The VM's definition."""
        return self.directory / "domain.xml"

    @property
    def size_mib(self) -> int:
        """MiB of data."""
        return self.allocated_bytes >> 20


def make_source(directory: Path, allocated_bytes: int) -> Source:
    """Writes the data."""
    source = Source(directory / "source", directory / "disk.raw", allocated_bytes)
    source.directory.mkdir(parents=True)
    data.make_raw(source.raw, allocated_bytes)
    data.make_qcow2(source.raw, source.qcow2)
    source.xml.write_text(data.DOMAIN_XML)
    return source


def _ours(output: Path, verb: str, *arguments: object, directory: bool = False, name: str = "") -> Contender:
    command = (*data.driver(), verb, *map(str, arguments))
    return Contender(name or "kvmops.backup", (command,), output, output_is_directory=directory, durable=True)


def _tar_argv(source: Source, output: str) -> tuple[str, ...]:
    return ("tar", "-cf", output, "-C", str(source.directory), source.qcow2.name, source.xml.name)


def _run(*argv: object) -> None:
    subprocess.run([str(argument) for argument in argv], check=True)


def _pack(source: Source, archive: Path, *level: int) -> Path:
    _run(*data.driver(), "pack", source.qcow2, source.xml, archive, *level)
    return archive


def plain_on(source: Source, work: Path, name: str, goals: tuple[float, float], space: LoopFileSystem | None) -> Jobs:
    """Full and restore, plain, on the file system that holds both `source` and `work`; goals against GNU tar."""
    full, tar, copy = work / "full.tar", work / "gnu.tar", work / "copy.qcow2"

    def extra_blocks() -> str:
        if space is None:
            return ""
        before = space.used_bytes()
        _pack(source, full)
        with_archive = space.used_bytes()
        _run(*data.driver(), "restore", full, work)
        with_disk = space.used_bytes()
        (work / "vda_0.qcow2").unlink()
        full.unlink()
        return (
            f"blocks taken on {name} (statvfs): archive {(with_archive - before) >> 10} KiB, "
            f"disk restored from it {(with_disk - with_archive) >> 10} KiB"
        )

    yield Job(
        f"full plain, {name}",
        (
            _ours(full, "pack", source.qcow2, source.xml, full),
            Contender("tar -cf", (_tar_argv(source, str(tar)),), tar),
            Contender("cp --reflink=never", (("cp", "--reflink=never", str(source.qcow2), str(copy)),), copy),
        ),
        (Goal(1, goals[0]),),
        (source.qcow2,),
        check=lambda: same(source.qcow2, copy),
        note=extra_blocks,
    )

    _pack(source, full)
    _run(*_tar_argv(source, str(tar)))
    restored, extracted = work / "restored", work / "extracted"

    def equal() -> None:
        same(source.qcow2, restored / "vda_0.qcow2")
        same(source.qcow2, extracted / source.qcow2.name)

    yield Job(
        f"restore plain, {name}",
        (
            _ours(restored, "restore", full, restored, directory=True),
            Contender(
                "tar -xf", (("tar", "-xf", str(tar), "-C", str(extracted)),), extracted, output_is_directory=True
            ),
        ),
        (Goal(1, goals[1]),),
        (full, tar),
        check=equal,
    )
    full.unlink()
    tar.unlink()


def on_reflinks(source: Source, work: Path, kind: str) -> Jobs:
    """`plain_on` a file system with reflinks on a loop device, with a copy of the source on it."""
    with LoopFileSystem(kind, 4 * source.size_mib + 1024, work) as file_system:
        local = Source(file_system.path / "source", source.raw, source.allocated_bytes)
        shutil.copytree(source.directory, local.directory)
        yield from plain_on(local, file_system.path, kind, (8.0, 12.0), file_system)
    file_system.image.unlink()
    file_system.path.rmdir()


def compressed(source: Source, work: Path) -> Jobs:
    """Full, restore, verify and view of compressed archives; verify of plain ones."""
    archive, peer = work / "full.tar.zst", work / "gnu.tar.zst"
    zstd = ("zstd", "-q", "-3", "-T0", "-o")
    for level, goal in ((3, 1.3), (2, 1.6)):
        yield Job(
            f"full compressed, level {level}",
            (
                _ours(archive, "pack", source.qcow2, source.xml, archive, level, name=f"kvmops.backup level {level}"),
                Contender("tar, zstd -3 -T0", (_tar_argv(source, "-"), (*zstd, str(peer))), peer),
            ),
            (Goal(1, goal),),
            (source.qcow2,),
            note=functools.partial(compressing_alone, source.qcow2, level),
        )

    _pack(source, archive, 2)
    _run("sh", "-c", '"$@" | zstd -q -3 -T0 -o "$0"', peer, *_tar_argv(source, "-"))
    yield _restore_compressed(source, work, archive, peer)
    yield Job(
        "verify compressed",
        (
            Contender("kvmops.backup", ((*data.driver(), "verify", str(archive)),)),
            Contender("zstd -t, of the same archive", (("zstd", "-tq", str(archive)),)),
            Contender("zstd -t, of tar and zstd -3 -T0", (("zstd", "-tq", str(peer)),)),
        ),
        (Goal(1, 1.8), Goal(2, 1.8)),
        (archive, peer),
    )
    yield from _look(archive, peer)
    archive.unlink()
    peer.unlink()

    plain = _pack(source, work / "full.tar")
    yield Job(
        "verify plain",
        (
            Contender("kvmops.backup", ((*data.driver(), "verify", str(plain)),)),
            Contender("sha256sum", (("sha256sum", str(plain)),)),
        ),
        (Goal(1, 18.0),),
        (plain,),
    )
    plain.unlink()


def _restore_compressed(source: Source, work: Path, archive: Path, peer: Path) -> Job:
    restored, extracted, foreign = work / "restored", work / "extracted", work / "extracted-foreign"

    def tar(of: Path, to: Path) -> tuple[tuple[str, ...]]:
        return (("tar", "--zstd", "-xf", str(of), "-C", str(to)),)

    def equal() -> None:
        same(source.qcow2, restored / "vda_0.qcow2")
        same(source.qcow2, extracted / "vda_0.qcow2")
        same(source.qcow2, foreign / source.qcow2.name)

    return Job(
        "restore compressed",
        (
            _ours(restored, "restore", archive, restored, directory=True),
            Contender(
                "tar --zstd -xf, of the same archive", tar(archive, extracted), extracted, output_is_directory=True
            ),
            Contender("tar --zstd -xf, of tar and zstd -3 -T0", tar(peer, foreign), foreign, output_is_directory=True),
        ),
        (Goal(1, 2.0), Goal(2, 2.0)),
        (archive, peer),
        check=equal,
    )


def _look(archive: Path, peer: Path) -> Jobs:
    def contenders(verb: str, module: bool, *options: str) -> tuple[Contender, ...]:
        ours = [Contender("kvmops.backup", ((*data.driver(), verb, str(archive)),))]
        if module:
            argv = tuple(module_argv("backup_info", {"archive": str(archive)}))
            ours.append(Contender("module backup_info", (argv,)))
        peers = [(archive, "the same archive"), (peer, "tar and zstd -3 -T0")]
        return (
            *ours,
            *(
                Contender(
                    f"tar --zstd {options[0]}, of {what}", (("tar", "--zstd", options[0], str(path), *options[1:]),)
                )
                for path, what in peers
            ),
        )

    view = contenders("view", True, "-xOf", "--wildcards", "*.xml")
    yield Job("view", view, (Goal(2, at_most_s=0.1), Goal(3, at_most_s=0.1)), (archive, peer))
    yield Job("list", contenders("list", False, "-tf"), (Goal(1, at_most_s=0.1), Goal(2, at_most_s=0.1)), (archive, peer))


def flat_view(work: Path, large_bytes: int) -> Jobs:
    """View of archives of disks of 1 GiB and of `large_bytes`, empty, but with as many chunks and frames as full ones."""
    for kind, suffix, level in (("plain", "tar", 0), ("compressed", "tar.zst", 2)):
        small = data.make_sparse_archive(work, f"small.{suffix}", _GIB, level)
        large = data.make_sparse_archive(work, f"large.{suffix}", large_bytes, level)
        yield Job(
            f"view {kind}, {large_bytes // _GIB} GiB and 1 GiB",
            (
                Contender(f"kvmops.backup, {large_bytes // _GIB} GiB", ((*data.driver(), "view", str(large)),)),
                Contender("kvmops.backup, 1 GiB", ((*data.driver(), "view", str(small)),)),
            ),
            (Goal(1, 0.8),),
        )
        small.unlink()
        large.unlink()


def raw_disk(source: Source, work: Path) -> Jobs:
    """A raw disk as a qcow2 member of a plain archive, in one pass."""
    archive, converted = work / "raw.tar", work / "converted.qcow2"
    convert = ("qemu-img", "convert", "-W", "-m", "16", "-f", "raw", "-O", "qcow2", str(source.raw), str(converted))
    pack = (*data.driver(), "pack-raw", source.raw, source.xml)

    def equal() -> None:
        _run("tar", "-xf", archive, "-C", work, "vda_0.qcow2")
        image = work / "vda_0.qcow2"
        for options in (("check", "-q", image), ("compare", "-q", image, source.raw)):
            _run("qemu-img", *options)
        image.unlink()

    def nothing_temporary() -> str:
        with LoopFileSystem("ext4", source.size_mib * 105 // 100 + 32, work) as file_system:
            status = os.statvfs(file_system.path)
            free = status.f_bavail * status.f_frsize
            there = file_system.path / "raw.tar"
            environment = {**os.environ, "TMPDIR": str(file_system.path)}
            subprocess.run([*map(str, pack), str(there)], check=True, env=environment)
            size = there.stat().st_size
        file_system.image.unlink()
        file_system.path.rmdir()
        return f"raw disk: the archive of {size >> 20} MiB was written with {free >> 20} MiB free: nothing temporary beside it"

    yield Job(
        "raw disk to qcow2",
        (
            _ours(archive, *map(str, pack[3:]), archive),
            Contender("qemu-img convert -W -m 16", (convert,), converted),
        ),
        (Goal(1, 1.4),),
        (source.raw,),
        check=equal,
        note=nothing_temporary,
    )
