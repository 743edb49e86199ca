# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Packages in every form that was seen are read in place; what no honest one holds is refused."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, HostileError, SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.package import Package
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._ovf import packages

FILES = {"vm.ovf": packages.descriptor(), "disk1.vmdk": b"d" * 70_000, "vm.mf": packages.manifest({"disk1.vmdk": b"x"})}


def v7(data: bytes) -> bytes:
    """Every header of a ustar stream as tar wrote it in 1979."""
    out, position = bytearray(data), 0
    while out[position : position + 512].strip(b"\0"):
        size = int(out[position + 124 : position + 135], 8)
        out[position + 257 : position + 512] = bytes(255)
        out[position + 156] = 0
        out[position + 148 : position + 156] = b" " * 8
        out[position + 148 : position + 156] = b"%06o\0 " % sum(out[position : position + 512])
        position += 512 + -(-size // 512) * 512
    return bytes(out)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("order", [("vm.ovf", "vm.mf", "disk1.vmdk"), ("disk1.vmdk", "vm.mf", "vm.ovf")])
def test_ova(kind: int, order: tuple[str, ...], tmp_path: Path) -> None:
    files = {name: FILES[name] for name in order}
    path = packages.ova(tmp_path / "a.ova", files, kind)
    (tmp_path / "old.ova").write_bytes(v7(packages.ova(tmp_path / "u.ova", files).read_bytes()))
    for each in (path, tmp_path / "old.ova"):
        with Package(str(each)) as package:
            assert package.descriptor == FILES["vm.ovf"] and set(package.files) == set(FILES)
            disk = package.file("disk1.vmdk")
            assert disk and disk.read_at(60_000, 20_000) == b"d" * 10_000 and package.manifest


def test_long_names_and_large_members(tmp_path: Path) -> None:
    """A member over 8 GiB in base-256 (GNU) and in a pax record, and names of more than 100 bytes."""
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        size, long = 9 << 30, "d" * 150 + ".vmdk"
        path = tmp_path / f"large{kind}.ova"
        with open(path, "wb") as file:
            for name, length in ((long, size), ("vm.ovf", len(FILES["vm.ovf"]))):
                info = tarfile.TarInfo(name)
                info.size = length
                file.write(info.tobuf(kind))
                data_at = file.tell()
                if name == "vm.ovf":
                    file.write(FILES["vm.ovf"])
                file.truncate(data_at + -(-length // 512) * 512)
                file.seek(0, os.SEEK_END)
            file.write(bytes(1024))
        with Package(str(path)) as package:
            large = package.file(long)
            assert large and large.size_bytes == size and package.descriptor == FILES["vm.ovf"]
            assert sum(end - begin for begin, end in large.data_ranges()) < 1 << 20


def test_directory_and_lone_descriptor(tmp_path: Path) -> None:
    packages.put(tmp_path / "d", {**FILES, "other.txt": b"x"})
    for source in (tmp_path / "d", tmp_path / "d" / "vm.ovf"):
        with Package(str(source)) as package:
            assert package.descriptor == FILES["vm.ovf"] and package.file("disk1.vmdk") and package.manifest
            assert package.file("../d/disk1.vmdk") is None and package.file("missing") is None
    (tmp_path / "d" / "second.ovf").write_bytes(b"")
    with pytest.raises(ArchiveError, match="2 descriptors"):
        Package(str(tmp_path / "d"))
    with Package(str(tmp_path / "d" / "vm.ovf")) as package:
        assert package.manifest_name == "vm.mf"


def test_links_in_a_directory_are_not_followed(tmp_path: Path) -> None:
    packages.put(tmp_path / "d", {"vm.ovf": FILES["vm.ovf"]})
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "d" / "disk1.vmdk").symlink_to(tmp_path / "outside")
    os.mkfifo(tmp_path / "d" / "fifo.vmdk")
    (tmp_path / "d" / "sub").symlink_to(tmp_path)
    with Package(str(tmp_path / "d")) as package:
        for name in ("disk1.vmdk", "fifo.vmdk"):
            with pytest.raises(HostileError):
                package.file(name)
        assert package.file("sub/outside") is None


def test_chunks(tmp_path: Path) -> None:
    data = bytes(range(256)) * 400
    pieces = {f"disk1.vmdk.{number:09}": data[number * 40_960 : (number + 1) * 40_960] for number in range(3)}
    with Package(str(packages.ova(tmp_path / "a.ova", {"vm.ovf": FILES["vm.ovf"], **pieces}))) as package:
        joined = package.chunked("disk1.vmdk", 40_960)
        assert joined and joined.read_at(0, 1 << 20) == data and joined.read_at(40_000, 2_000) == data[40_000:42_000]
        assert package.chunked("other.vmdk", 40_960) is None
        with pytest.raises(ArchiveError, match="a chunk has"):
            package.chunked("disk1.vmdk", 50_000)
    missing = {name: value for name, value in pieces.items() if not name.endswith("1")}
    path = packages.ova(tmp_path / "b.ova", {"vm.ovf": FILES["vm.ovf"], **missing})
    with Package(str(path)) as package, pytest.raises(ArchiveError, match=r"but not disk1\.vmdk\.000000001"):
        package.chunked("disk1.vmdk", 40_960)


@pytest.mark.parametrize("cut", [20_000, 1024, 512 * 3])
def test_unfinished_copy(cut: int, tmp_path: Path) -> None:
    path = packages.ova(tmp_path / "a.ova", FILES)
    whole = path.read_bytes().rstrip(b"\0")
    path.write_bytes(whole[: -cut if cut != 1024 else len(whole)])
    with pytest.raises(ArchiveError, match="still being copied: "):
        Package(str(path))
    os.utime(path, (time.time() - 3600,) * 2)
    with pytest.raises(ArchiveError, match="still being copied, or was cut off"):
        Package(str(path))


def test_changed_while_it_is_read(tmp_path: Path) -> None:
    path = packages.ova(tmp_path / "a.ova", FILES)
    with Package(str(path)) as package:
        package.check_unchanged()
        with open(path, "ab") as file:
            file.write(b"more")
        with pytest.raises(SourceError, match="has changed"):
            package.check_unchanged()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "info",
    [
        tarfile.TarInfo("../outside"), tarfile.TarInfo("/etc/passwd"), tarfile.TarInfo("a/../../b"), tarfile.TarInfo("vm.ovf"),
        special("link", tarfile.SYMTYPE, "/etc/passwd"), special("hard", tarfile.LNKTYPE, "/etc/passwd"),
        special("fifo", tarfile.FIFOTYPE), special("device", tarfile.CHRTYPE), special("block", tarfile.BLKTYPE),
        tarfile.TarInfo("second.ovf"),
    ],
    ids=lambda info: info.name,
)  # fmt: skip
@pytest.mark.parametrize("pax", [False, True])
def test_hostile_members(info: tarfile.TarInfo, pax: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.ova"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT) as archive:
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        if pax:
            info = tarfile.TarInfo("innocent")
            info.pax_headers = {"path": "../outside"}
        archive.addfile(info)
    with pytest.raises(HostileError):
        Package(str(path))


def test_what_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "text.ova").write_bytes(b"no tar at all, but longer than one block " * 100)
    (tmp_path / "gzip.ova").write_bytes(b"\x1f\x8b" + bytes(2000))
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo.ova")
    for name in ("subdirectory.ova", "sparse.ova"):
        with tarfile.open(tmp_path / name, "w") as archive:
            archive.addfile(special("vm", tarfile.DIRTYPE) if name.startswith("sub") else special("disk", tarfile.GNUTYPE_SPARSE))
        with pytest.raises(HostileError, match="Pack it again: tar"):
            Package(str(tmp_path / name))
    for name, head in (("vm.vmx", b'.encoding = "UTF-8"'), ("vm.vbox", b"<?xml"), ("vm.vmdk", b"KDMV"), ("zip.ova", b"PK\3\4")):
        (tmp_path / name).write_bytes(head)
    packages.ova(tmp_path / "vmware.ova", {"vm.vmx": b"", "vm.vmdk": b""})
    (tmp_path / "hyperv" / "Virtual Hard Disks").mkdir(parents=True)
    for name, why in (
        ("vm.vmx", "the configuration of a VMware VM.*ovftool"),
        ("vm.vbox", "the configuration of a VirtualBox VM.*VBoxManage export"),
        ("vm.vmdk", "a disk without its VM"),
        ("zip.ova", "a ZIP archive"),
        ("vmware.ova", "no descriptor.*vm.vmx: the configuration of a VMware VM.*ovftool"),
        ("hyperv", "no descriptor.*Hyper-V"),
        ("text.ova", "no OVA"),
        ("gzip.ova", "gzip"),
        ("empty", "no descriptor"),
        ("fifo.ova", "neither"),
        ("x.ova", "opened"),
    ):
        with pytest.raises(ArchiveError, match=why):
            Package(str(tmp_path / name))
