# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives for tests: small, deterministic ones, and what a restore of them gives."""

from __future__ import annotations

import io
import os
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from ansible_collections.kvmops.backup.plugins.module_utils._archive.append import ArchiveAppender, next_timestamp
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Consistency,
    Member,
    Role,
    Skipped,
    SnapshotNode,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import (
    ArchiveWriter,
    Compression,
    PublishedArchive,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image.sink import FileSink
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import BytesSource, FileSource, ImageSource
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice

TIMESTAMP = 1_800_000_000
UUID = "0e7bd2a1-5ad2-4d15-a8a6-2f5d6a2f3c11"
DOMAIN = (
    f"<domain type='qemu'><name>web01</name><uuid>{UUID}</uuid><devices>"
    "<disk type='file' device='disk'><source file='/var/lib/libvirt/images/vda_0.qcow2'/><target dev='vda'/></disk>"
    "<disk type='file' device='disk'><source file='/var/lib/libvirt/images/vdb_0.qcow2'/><target dev='vdb'/></disk>"
    "</devices></domain>"
)


def noise(size: int, seed: int = 1) -> bytes:
    """Incompressible bytes, the same every time."""
    return random.Random(seed).randbytes(size)


def qcow2_header(virtual_size: int = 2**20, backing: bytes = b"", data_file: bytes = b"") -> bytes:
    """The first cluster of a qcow2 image, enough for a probe."""
    extensions = b""
    if data_file:
        extensions += struct.pack(">II", 0x44415441, len(data_file)) + data_file.ljust(
            -(-len(data_file) // 8) * 8, b"\0"
        )
    extensions += struct.pack(">II", 0, 0)
    at = 104 + len(extensions)
    head = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        3,
        at if backing else 0,
        len(backing),
        16,
        virtual_size,
        0,
        1,
        0x30000,
        0x10000,
        1,
        0,
        0,
        4 if data_file else 0,
        0,
        0,
        4,
        104,
    )
    return (head + extensions + backing).ljust(4 * 65536, b"\0")


def configuration(members: Sequence[Member], timestamp: int = TIMESTAMP, **changes: object) -> Configuration:
    values: dict[str, object] = {
        "timestamp": timestamp,
        "domain_xml": DOMAIN,
        "vm_name": "web01",
        "vm_uuid": UUID,
        "members": tuple(members),
        "consistency": Consistency.MEMORY,
        "snapshots": (SnapshotNode("before-upgrade", "<domainsnapshot><name>a</name></domainsnapshot>", "", True),),
        "skipped": (Skipped("sdb", "a LUN"),),
        "warnings": (Notice(Code.RECORDED, "a warning"),),
        "created": "2027-01-15T08:00:00Z",
        "tool_version": "1.0.0",
    }
    values.update(changes)
    return Configuration(**values)  # type: ignore[arg-type]


def role_of(name: str) -> Role:
    return {".memory": Role.MEMORY, ".iso": Role.ISO, ".nvram": Role.NVRAM}.get(os.path.splitext(name)[1], Role.DISK)


def write(
    directory: Path,
    contents: Mapping[str, bytes | Path],
    *,
    compressed: bool = False,
    level: int = 2,
    threads: int = 2,
    name: str = "",
    timestamp: int = TIMESTAMP,
    **changes: object,
) -> PublishedArchive:
    """An archive with these members; a Path is a file that becomes a member."""
    file_name = name or ("a.tar.zst" if compressed else "a.tar")
    compression = Compression(level) if compressed else None
    with ArchiveWriter(
        str(directory), file_name, compression=compression, timestamp=timestamp, threads=threads
    ) as writer:
        members = []
        for member_name, content in contents.items():
            source: ImageSource = BytesSource(content) if isinstance(content, bytes) else FileSource(str(content))
            try:
                target = member_name.split("_")[0]
                members.append(
                    writer.add(Member(member_name, role_of(member_name), 0, target=target, image_format="raw"), source)
                )
            finally:
                source.close()
        return writer.publish(configuration(members, timestamp, **changes))


def append(
    path: str | Path, contents: Mapping[str, bytes | Path], *, timestamp: int = 0, threads: int = 2, **options: object
) -> PublishedArchive:
    """One more point with these new members; those of the point before are needed, too. `timestamp` 0: one second later."""
    with open_archive(str(path)) as reader:
        timestamp = timestamp or next_timestamp(reader, 0)
    sizes = [len(c) if isinstance(c, bytes) else c.stat().st_size for c in contents.values()]
    with ArchiveAppender(str(path), timestamp=timestamp, sizes=sizes, threads=threads, **options) as appender:  # type: ignore[arg-type]
        members = list(appender.newest.members)
        for name, content in contents.items():
            source: ImageSource = BytesSource(content) if isinstance(content, bytes) else FileSource(str(content))
            try:
                target = name.split("_")[0]
                parents = [member.name for member in members if member.target == target and member.role != Role.MEMORY]
                layer = name.endswith(".snapshot") and bool(parents)
                members.append(
                    appender.add(
                        Member(
                            name,
                            Role.LAYER if layer else role_of(name),
                            0,
                            target=target,
                            image_format="raw",
                            parent=parents[-1] if layer else "",
                        ),
                        source,
                    )
                )
            finally:
                source.close()
        return appender.publish(configuration(members, timestamp, incrementable=True))


SMALL: dict[str, bytes] = {
    "vda_0.qcow2": noise(700, 1) + bytes(4096) + b"disk a" * 40,
    "vdb_0.qcow2": b"text that compresses well " * 60,
    f"{TIMESTAMP}_0.memory": noise(1025, 2),
}


class MemorySink:
    """Takes a member's bytes into memory."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.finished = False

    def write(self, offset: int, data: memoryview) -> None:
        assert offset + len(data) <= len(self.data)
        self.data[offset : offset + len(data)] = data

    def clone(self, source_fd: int, source_offset: int, length: int) -> int:
        return 0

    def finish(self) -> None:
        self.finished = True

    def close(self) -> None: ...


def extract(path: str | Path, *, timestamp: int | None = None, threads: int = 2) -> dict[str, bytes]:
    """Every member of a point as a restore gets it."""
    with open_archive(str(path)) as reader:
        point = reader.point(timestamp)
        pairs = [(member, MemorySink(member.size_bytes)) for member in point.members]
        reader.extract(pairs, threads=threads)
        assert all(sink.finished for _member, sink in pairs)
        return {member.name: bytes(sink.data) for member, sink in pairs}


def extract_to_files(path: str | Path, directory: Path, threads: int = 2) -> dict[str, Path]:
    """Every member of the newest point as a file, through the sinks that a restore uses."""
    found = {}
    with open_archive(str(path)) as reader:
        pairs = []
        for member in reader.point().members:
            found[member.name] = directory / member.name
            fd = os.open(found[member.name], os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            pairs.append((member, FileSink(fd, member.size_bytes)))
        try:
            reader.extract(pairs, threads=threads)
        finally:
            for _member, sink in pairs:
                sink.close()
    return found


def tar_stream(path: str | Path) -> bytes:
    """The tar stream of an archive, decompressed by the library and not by our reader."""
    data = Path(path).read_bytes()
    if data[:4] != b"\x28\xb5\x2f\xfd":
        return data
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True).read()
