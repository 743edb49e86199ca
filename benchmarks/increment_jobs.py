# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs on increments: a layer into an archive that is there, beside tar -r, and compressed beside what one does without us."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.kvmops.backup.benchmarks import data
from ansible_collections.kvmops.backup.benchmarks.file_jobs import Source
from ansible_collections.kvmops.backup.benchmarks.measure import BenchmarkError, Contender, Goal, Job, Jobs

_GIB = 1 << 30
_LAYER_BYTES = 100 << 20
_TAIL_BYTES = 1 << 20
_TAR = 'tar -rf "$0" -C "$1" layer.qcow2 domain.xml && sync "$0"'
_TAR_ZSTD = (
    'zstd -dqf "$0" -o "$0.plain" && tar -rf "$0.plain" -C "$1" layer.qcow2 domain.xml && '
    'zstd -qf -3 -T0 "$0.plain" -o "$0.new" && sync "$0.new" && mv "$0.new" "$0" && rm "$0.plain"'
)


@dataclass(frozen=True)
class _Restorable:
    """An archive that every run gets as it was: an append changes its last bytes only."""

    path: Path
    size_bytes: int
    tail: bytes

    @classmethod
    def of(cls, path: Path) -> _Restorable:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            return cls(path, size, file.read())

    def restore(self) -> None:
        """As it was."""
        with open(self.path, "r+b") as file:
            file.truncate(self.size_bytes)
            file.seek(self.size_bytes - len(self.tail))
            file.write(self.tail)
            file.flush()
            os.fsync(file.fileno())


def increments(source: Source, work: Path) -> Jobs:
    """100 MiB into the archive of `source`, and into archives of 1, 4 and 16 GiB."""
    layer = _layer(source.directory)
    for kind, suffix, level, script, goal in (
        ("plain", "tar", (), _TAR, 1.5),
        ("compressed", "tar.zst", ("2",), _TAR_ZSTD, 20.0),
    ):
        ours, peer, pristine = (work / f"{name}.{suffix}" for name in ("ours", "peer", "pristine"))
        pack = (*data.driver(), "pack", str(source.qcow2), str(source.xml))
        subprocess.run([*pack, str(ours), *level], check=True)
        subprocess.run(["cp", str(ours), str(peer)], check=True)
        os.link(peer, pristine)  # the peer's way back to the beginning where it replaces the file
        peer_tail = _Restorable.of(peer)

        def peer_again(peer: Path = peer, pristine: Path = pristine, tail: _Restorable = peer_tail) -> None:
            peer.unlink()
            os.link(pristine, peer)
            tail.restore()

        title = "decompress, tar -rf, zstd -3 -T0" if level else "tar -rf, fsync"
        yield Job(
            f"increment of 100 MiB into {source.size_mib} MiB, {kind}",
            (
                _append("kvmops.backup", _Restorable.of(ours), layer, source.xml),
                Contender(
                    title, (("sh", "-c", script, str(peer), str(source.directory)),), durable=True, before=peer_again
                ),
            ),
            (Goal(1, goal),),
            (ours, peer, layer),
            check=lambda ours=ours: _check(ours, layer),  # type: ignore[misc]
        )
        for path in (ours, peer, pristine):
            path.unlink()
        yield from _flat(work, suffix, kind, layer, source.xml)


def _layer(directory: Path) -> Path:
    raw, layer = directory / "layer.raw", directory / "layer.qcow2"
    data.make_raw(raw, _LAYER_BYTES)
    data.make_qcow2(raw, layer)
    raw.unlink()
    return layer


def _append(name: str, archive: _Restorable, layer: Path, xml: Path) -> Contender:
    command = (*data.driver(), "append", str(archive.path), str(layer), str(xml))
    return Contender(name, (command,), durable=True, before=archive.restore)


def _flat(work: Path, suffix: str, kind: str, layer: Path, xml: Path) -> Jobs:
    """The cost does not grow with the archive."""
    sizes: Sequence[int] = (16, 4, 1)
    archives = [
        data.make_sparse_archive(work, f"{size}.{suffix}", size * _GIB, 2 if suffix == "tar.zst" else 0)
        for size in sizes
    ]
    yield Job(
        f"increment of 100 MiB into 16, 4 and 1 GiB, {kind}",
        tuple(
            _append(f"kvmops.backup, {size} GiB", _Restorable.of(archive), layer, xml)
            for size, archive in zip(sizes, archives)
        ),
        (Goal(1, 0.8), Goal(2, 0.8)),
        (layer,),
    )
    for archive in archives:
        archive.unlink()


def _check(archive: Path, layer: Path) -> None:
    """The tools get the layer out of the archive."""
    with subprocess.Popen(["tar", "-xOf", str(archive), "vda_1.snapshot"], stdout=subprocess.PIPE) as tar:
        if subprocess.run(["cmp", "-", str(layer)], stdin=tar.stdout, check=False).returncode:
            raise BenchmarkError(f"the layer in {archive} is not {layer}")
    subprocess.run([*data.driver(), "verify", str(archive)], check=True)
