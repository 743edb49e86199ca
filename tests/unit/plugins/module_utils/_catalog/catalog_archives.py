# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Small archives for the tests of the catalog."""

from __future__ import annotations

import os
import random
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Consistency,
    Conversion,
    Member,
    Role,
    Skipped,
    SnapshotNode,
    TemplateDisk,
    TemplateRequirement,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import ArchiveWriter, Compression
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import BytesSource, FileSource
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress

UUID = "6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11"
OTHER_UUID = "0c0ffee0-9d43-4c43-9b1e-0f5b9a9c7d11"
TIME = 1795309200


def next_run() -> None:
    """Forgets what a run has in memory."""
    catalog._index.cache_clear()
    catalog._doubts.cache_clear()


class Told(Context):
    """A context that remembers its warnings."""

    def __init__(self, progress: Progress | None = None) -> None:
        warnings: list[str] = []
        super().__init__(progress or Progress(), lambda notice: warnings.append(notice.text))
        object.__setattr__(self, "warnings", warnings)

    warnings: list[str]


def domain_xml(name: str = "web01", uuid: str = UUID, extra: str = "") -> str:
    """A VM with a raw disk, an empty CD drive and one interface."""
    return (
        f"<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>128</memory><vcpu>2</vcpu>"
        "<os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os><devices>"
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/images/web01.raw'/>"
        "<target dev='vda' bus='virtio'/></disk>"
        "<disk type='file' device='cdrom'><source file='/iso/debian.iso'/><target dev='sda' bus='sata'/></disk>"
        "<interface type='network'><mac address='52:54:00:12:34:56'/><source network='default'/><model type='virtio'/>"
        f"</interface>{extra}</devices></domain>"
    )


def qcow2(directory: Path, *options: str, size_kib: int = 1024, seed: int = 1) -> Path:
    """A qcow2 image with some random data in it."""
    path = directory / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), f"{size_kib}k"], check=True)
    if "-b" not in options:
        raw = directory / "image.raw"
        raw.write_bytes(random.Random(seed).randbytes(size_kib * 512) + bytes(size_kib * 512))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)], check=True)
        raw.unlink()
    return path


def write(
    directory: Path,
    *,
    name: str = "web01",
    uuid: str = UUID,
    timestamp: int = TIME,
    compressed: bool = False,
    image: Path | None = None,
    extra_xml: str = "",
    incrementable: bool = False,
    requires: TemplateRequirement | None = None,
    provides: tuple[TemplateDisk, ...] = (),
    conversion: Conversion | None = None,
) -> Path:
    """An archive of one point with a disk, an ISO and a snapshot."""
    source = image or qcow2(directory)
    with ArchiveWriter(
        str(directory),
        names.archive_name(name, timestamp, uuid, compressed),
        compression=Compression() if compressed else None,
        timestamp=timestamp,
    ) as writer:
        disk = Member(
            "vda_0.qcow2", Role.DISK, 0, target="vda", virtual_size_bytes=2**20, image_format="qcow2",
            original_format="raw", former_path="/images/web01.raw", pool="default", active=True,
        )  # fmt: skip
        iso = Member("0_debian.iso", Role.ISO, 0, target="sda", former_path="/iso/debian.iso")
        file = FileSource(str(source))
        members = (writer.add(disk, file), writer.add(iso, BytesSource(b"ISO" * 1000)))
        file.close()
        done = writer.publish(
            Configuration(
                timestamp, domain_xml(name, uuid, extra_xml), name, uuid, members, consistency=Consistency.AGENT,
                snapshots=(SnapshotNode("one", "<domainsnapshot/>"), SnapshotNode("two", "<domainsnapshot/>", "one", True)),
                skipped=(Skipped("sdb", "LUN disks are passed through"),), warnings=(Notice(Code.RECORDED, "the agent was slow"),),
                incrementable=incrementable, requires=requires, provides=provides, template=bool(provides), conversion=conversion,
            )
        )  # fmt: skip
    source.unlink()
    return Path(done.path)


def write_foreign(directory: Path, *, compressed: bool = False, uuid: str = UUID, name: str = "foreign") -> Path:
    """What people make with tar and zstd: a qcow2 and a domain XML."""
    image = qcow2(directory)
    path = directory / f"{name}.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(image, "./web01.qcow2")
        data = domain_xml(uuid=uuid).encode()
        info = tarfile.TarInfo("./1700000000_web01.xml")
        info.size, info.mtime = len(data), 1700000000
        tar.addfile(info, BytesIO(data))
    image.unlink()
    if compressed:
        subprocess.run(["zstd", "-q", "--rm", str(path)], check=True)
        path = path.with_suffix(".tar.zst")
    return path


def damage(path: Path, offset: int, data: bytes = b"\xff" * 16) -> None:
    """Overwrites bytes in place, modification time kept."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
