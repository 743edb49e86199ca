# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A package becomes an archive like any other; again it is no change; hostile, broken and unfinished ones become nothing at all."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, retention
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.change import change
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import (
    RULES,
    ChangeRequest,
    RetentionRequest,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    DamagedError,
    HostileError,
    KvmopsError,
    RefusedError,
    TargetError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import archive as package_archive
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.convert import convert
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.request import ConvertRequest
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._ovf import packages, test_vmdk

HERE = Path(__file__).parent
MAX_RSS_KIB = 300 * 1024
DATA = packages.content(4 << 20)


@dataclass
class Outcome:
    """What a conversion has returned and warned of."""

    values: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return Path(self.values["archive"]["path"])


def run(source: Path, target: Path, **options: Any) -> Outcome:
    told: list[str] = []
    target.mkdir(exist_ok=True)
    context = Context(Progress(), lambda notice: told.append(notice.text))
    return Outcome(convert(ConvertRequest(source=str(source), path=str(target), **options), context), told)


def disk_of(archive: Path, work: Path, member: str = "sda_0.qcow2") -> bytes:
    """What a guest sees of a member, read by other tools."""
    subprocess.run(
        ["tar", *(["--zstd"] if archive.suffix == ".zst" else []), "-xf", archive, "-C", work, member], check=True
    )
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", work / member], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", work / member, work / "raw"], check=True)
    data = (work / "raw").read_bytes()
    (work / member).unlink()
    (work / "raw").unlink()
    return data


def left(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("form", ["ova", "directory", "ovf"])
def test_a_whole_archive(form: str, compress: bool, tmp_path: Path) -> None:
    if form == "ova":
        source = packages.ova(tmp_path / "vm.ova", packages.honest())
    else:
        source = packages.put(tmp_path / "vm", packages.honest())
        source = source / "vm.ovf" if form == "ovf" else source
    predicted = run(source, tmp_path / "to", compress=compress, check_mode=True)
    assert predicted.values["changed"] and not left(tmp_path / "to")
    made = run(source, tmp_path / "to", compress=compress)
    assert made.values["changed"] and left(tmp_path / "to") == [made.path.name]
    assert disk_of(made.path, tmp_path) == DATA
    report = verify_file(str(made.path))
    assert report.ok and report.coverage == "full"
    with open_archive(str(made.path)) as reader:
        point = reader.point()
        assert reader.native and not point.incrementable and point.vm_name == "web01"
        assert not any(member.former_path or member.pool for member in point.members)
        assert point.conversion and point.conversion.replaced and point.conversion.source == source.name
    entry = catalog.describe(str(made.path))
    assert "converted" in entry["not_ours"] and entry["conversion"]["replaced"] == made.values["replaced"]
    assert any("before its first start" in text for text in made.warnings)
    assert retention_of(tmp_path / "to") == [True]


def retention_of(directory: Path) -> list[bool]:
    """Which archives the strictest rules keep."""
    params = {
        **dict.fromkeys(["pool", "vm", "free_space", *(f"keep_{name}" for name in RULES)]),
        "path": str(directory),
    }
    request = RetentionRequest.of({**params, "keep_days": 1, "uri": "test:///none", "check_mode": True, "diff": False})
    result = retention.retain(request, Context(Progress(), lambda _text: None), lambda *_arguments: set())
    return [True] * len(result["kept"]) + [False] * len(result["removed"])


def test_again_is_no_change(tmp_path: Path) -> None:
    source = packages.ova(tmp_path / "vm.ova", packages.honest())
    first = run(source, tmp_path / "to")
    os.utime(source)
    renamed = source.rename(tmp_path / "other.ova")
    again = run(renamed, tmp_path / "to")
    assert (
        not again.values["changed"]
        and again.path == first.path
        and again.values["replaced"] == first.values["replaced"]
    )
    copy = shutil.copy(renamed, tmp_path / "copy.ova")
    assert not run(Path(copy), tmp_path / "to").values["changed"]
    assert not run(renamed, tmp_path / "to", check_mode=True).values["changed"]
    assert run(renamed, tmp_path / "to", disk_bus="virtio").values["changed"]
    assert run(renamed, tmp_path / "to", compress=True).values["changed"]
    other = packages.honest()
    other["disk1.vmdk"] = packages.stream_vmdk(packages.content(4 << 20, seed=2))
    del other["vm.mf"]
    assert run(packages.ova(tmp_path / "new.ova", other), tmp_path / "to").values["changed"]


def test_a_converted_archive_is_changed_like_any_other(tmp_path: Path) -> None:
    source = packages.ova(tmp_path / "vm.ova", packages.honest())
    made = run(source, tmp_path / "to")
    context = Context(Progress(), lambda _text: None)
    packed = change(ChangeRequest(str(made.path), compressed=True, notes="n", protected=True), context)["archive"]
    again = run(source, tmp_path / "to")
    assert not again.values["changed"] and str(again.path) == packed["path"] and packed["protected"]
    entry = catalog.describe(packed["path"])
    assert entry["compressed"] and entry["conversion"]["replaced"] == made.values["replaced"]
    plain = change(ChangeRequest(packed["path"], compressed=False, protected=False), context)["archive"]
    assert disk_of(Path(plain["path"]), tmp_path) == DATA
    with pytest.raises(RefusedError, match="last"):
        change(ChangeRequest(plain["path"], present=False), context)


def test_without_a_manifest_content_tells(tmp_path: Path) -> None:
    files = packages.honest()
    del files["vm.mf"]
    source = packages.ova(tmp_path / "vm.ova", files)
    assert run(source, tmp_path / "to").values["changed"] and not run(source, tmp_path / "to").values["changed"]


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha384", "sha512"])
def test_manifests(algorithm: str, tmp_path: Path) -> None:
    files = {"vm.ovf": packages.descriptor(), "disk1.vmdk": packages.stream_vmdk(DATA), "eula.txt": b"agree"}
    run(packages.ova(tmp_path / "a.ova", {**files, "vm.mf": packages.manifest(files, algorithm)}), tmp_path / "to")
    for name in files:
        wrong = {**files, name: files[name][:-1] + b"?"}
        source = packages.ova(tmp_path / "b.ova", {**wrong, "vm.mf": packages.manifest(files, algorithm)})
        with pytest.raises(DamagedError, match=f"{name} is not what its manifest says"):
            run(source, tmp_path / "none")
        assert not left(tmp_path / "none")
        if name != "eula.txt":
            unlisted = {key: value for key, value in files.items() if key != name}
            source = packages.ova(tmp_path / "c.ova", {**files, "vm.mf": packages.manifest(unlisted, algorithm)})
            with pytest.raises(DamagedError, match="does not name"):
                run(source, tmp_path / "none")
    missing = packages.ova(
        tmp_path / "d.ova", {**files, "vm.mf": packages.manifest({**files, "gone.nvram": b""}, algorithm)}
    )
    with pytest.raises(DamagedError, match=r"names gone\.nvram, which is not there"):
        run(missing, tmp_path / "none")


def test_sizes_that_are_not_the_descriptors(tmp_path: Path) -> None:
    """The tar's size wins over the descriptor's, and the image's own capacity, each with a warning."""
    files = {
        "vm.ovf": packages.descriptor(
            files='<File ovf:id="file1" ovf:href="disk1.vmdk" ovf:size="1"/>',
            disks='<Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:capacity="77" ovf:capacityAllocationUnits="byte * 2^20"/>',
        ),
        "disk1.vmdk": packages.stream_vmdk(DATA),
    }
    made = run(packages.ova(tmp_path / "a.ova", files), tmp_path / "to")
    assert disk_of(made.path, tmp_path) == DATA
    assert any("the file counts" in text for text in made.warnings) and any(
        "the image counts" in text for text in made.warnings
    )


def test_gzip_chunks_and_escapes(tmp_path: Path) -> None:
    disk = packages.stream_vmdk(DATA)
    cases = {
        "gzip": (
            'ovf:href="d%20x.vmdk.gz" ovf:compression="gzip"',
            {"d x.vmdk.gz": gzip.compress(disk[:50_000]) + gzip.compress(disk[50_000:])},
        ),
        "chunks": (
            'ovf:href="d.vmdk" ovf:chunkSize="40960"',
            {
                f"d.vmdk.{number:09}": disk[number * 40960 : (number + 1) * 40960]
                for number in range(-(-len(disk) // 40960))
            },
        ),
        "literal": ('ovf:href="100%25.vmdk"', {"100%25.vmdk": disk, "100%.vmdk": b"another"}),
        "decoded": ('ovf:href="a%20b%25.vmdk"', {"a b%.vmdk": disk}),
    }
    for name, (href, files) in cases.items():
        ovf = packages.descriptor(files=f'<File ovf:id="file1" {href}/>')
        all_files = {"vm.ovf": ovf, **files}
        source = packages.ova(tmp_path / f"{name}.ova", {**all_files, "vm.mf": packages.manifest(all_files)})
        made = run(source, tmp_path / name)
        assert disk_of(made.path, tmp_path) == DATA and left(tmp_path / name) == [made.path.name], name
        assert not run(source, tmp_path / name).values["changed"], name


def image(data: bytes, work: Path, form: str, *options: str) -> bytes:
    (work / "in").write_bytes(data)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, *options, work / "in", work / "out"], check=True)
    found = (work / "out").read_bytes()
    (work / "out").unlink()
    return found


@pytest.mark.parametrize(
    "form, options",
    [
        ("raw", ()),
        ("qcow2", ()),
        ("qcow2", ("-c",)),
        ("vpc", ()),
        ("vpc", ("-o", "subformat=fixed")),
        ("vhdx", ()),
        ("vmdk", ()),
    ],
)
def test_other_formats(form: str, options: tuple[str, ...], tmp_path: Path) -> None:
    """Read in place inside the OVA, each."""
    ovf = packages.descriptor(disks='<Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:capacity="4194304"/>')
    files = {"vm.ovf": ovf, "disk1.vmdk": image(DATA, tmp_path, form, *options)}
    seen = disk_of(run(packages.ova(tmp_path / "a.ova", files), tmp_path / "to").path, tmp_path)
    assert seen[: len(DATA)] == DATA and not any(seen[len(DATA) :])  # a VHD has whole cylinders


def test_flat_disks_of_a_directory(tmp_path: Path) -> None:
    sectors = len(DATA) // 512
    extents = f'RW {sectors // 2} FLAT "f1.vmdk" 0\nRW {sectors // 2} VMFS "f2.vmdk" 3\nRW 8 ZERO'
    flat = packages.text("vmfs", sectors, extents=extents)
    files = {
        "vm.ovf": packages.descriptor(),
        "disk1.vmdk": flat,
        "f1.vmdk": DATA[: len(DATA) // 2],
        "f2.vmdk": bytes(1536) + DATA[len(DATA) // 2 :],
    }
    made = run(packages.put(tmp_path / "d", files), tmp_path / "to")
    assert disk_of(made.path, tmp_path) == DATA + bytes(8 * 512)
    with pytest.raises(HostileError, match="only the description"):
        run(packages.ova(tmp_path / "a.ova", files), tmp_path / "none")
    for name in ("/etc/passwd", "../outside", "sub/x", ".."):
        (tmp_path / "d" / "disk1.vmdk").write_bytes(packages.text("vmfs", 8, extents=f'RW 8 FLAT "{name}" 0'))
        with pytest.raises(HostileError, match="not a file of the package"):
            run(tmp_path / "d", tmp_path / "none")
    (tmp_path / "d" / "f1.vmdk").unlink()
    (tmp_path / "d" / "f1.vmdk").symlink_to("/etc/passwd")
    (tmp_path / "d" / "disk1.vmdk").write_bytes(flat)
    with pytest.raises(HostileError, match="symbolic link"):
        run(tmp_path / "d", tmp_path / "none")


def test_empty_disks_and_cds(tmp_path: Path) -> None:
    items = packages.BASE + packages.item(9, 15, Parent=3, HostResource="ovf:/file/iso", ElementName="CD")
    items += packages.item(10, 17, Parent=3, AddressOnParent=1, HostResource="ovf:/disk/d2", ElementName="Hard disk 2")
    ovf = packages.descriptor(
        items,
        files='<File ovf:id="file1" ovf:href="disk1.vmdk"/><File ovf:id="iso" ovf:href="install me.iso"/>',
        disks='<Disk ovf:diskId="d1" ovf:fileRef="file1"/>'
        '<Disk ovf:diskId="d2" ovf:capacity="9" ovf:capacityAllocationUnits="byte * 2^20"/>',
    )
    iso = os.urandom(70_000)
    files = {"vm.ovf": ovf, "install me.iso": iso, "disk1.vmdk": packages.stream_vmdk(DATA)}
    made = run(packages.ova(tmp_path / "a.ova", files), tmp_path / "to")
    assert disk_of(made.path, tmp_path, "sdb_0.qcow2") == bytes(9 << 20)
    with open_archive(str(made.path)) as reader:
        names = {member.name: member.role.value for member in reader.point().members}
        assert names == {"sda_0.qcow2": "disk", "sdb_0.qcow2": "disk", "1_install_me.iso": "iso"}
        assert reader.read("1_install_me.iso", 0, 100_000) == iso
    assert any("new and empty" in text for text in made.warnings)


def partition(loader: str | None, guid: bool, tmp_path: Path) -> bytes:
    """A disk with an EFI system partition, perhaps with a loader."""
    start, size = 2048 * 512, 40 << 20
    (tmp_path / "esp").write_bytes(bytes(size))
    subprocess.run(["mkfs.vfat", "-F", "32" if guid else "16", tmp_path / "esp"], check=True, capture_output=True)
    if loader:
        (tmp_path / "loader").write_bytes(b"MZ")
        subprocess.run(["mmd", "-i", tmp_path / "esp", "::/EFI", "::/EFI/BOOT"], check=True)
        subprocess.run(["mcopy", "-i", tmp_path / "esp", tmp_path / "loader", f"::/EFI/BOOT/{loader}"], check=True)
    disk = bytearray(start + size + (1 << 20))
    disk[start : start + size] = (tmp_path / "esp").read_bytes()
    disk[510:512] = b"\x55\xaa"
    if guid:
        disk[512 : 512 + 92] = b"EFI PART".ljust(72, b"\0") + struct.pack("<QII", 2, 128, 128).ljust(20, b"\0")
        disk[1024 : 1024 + 48] = (
            bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b") + os.urandom(16) + struct.pack("<QQ", 2048, 90000)
        )
    else:
        disk[446:462] = struct.pack("<BBBBBBBBII", 0, 0, 0, 0, 0xEF, 0, 0, 0, 2048, size // 512)
    return bytes(disk)


@pytest.mark.skipif(
    not shutil.which("mcopy") or not shutil.which("mkfs.vfat"), reason="mtools and dosfstools are not installed here"
)
@pytest.mark.parametrize("guid", [True, False])
def test_efi_loaders(guid: bool, tmp_path: Path) -> None:
    for loader in ("BOOTX64.EFI", "BOOTIA32.EFI", None):
        firmware = '<vmw:Config vmw:key="firmware" vmw:value="efi"/>'
        files = {
            "vm.ovf": packages.descriptor(hardware=firmware),
            "disk1.vmdk": packages.stream_vmdk(partition(loader, guid, tmp_path)),
        }
        made = run(packages.ova(tmp_path / "a.ova", files), tmp_path / f"to{loader}", check_mode=True)
        assert any("no fallback loader" in text for text in made.warnings) == (loader != "BOOTX64.EFI"), loader


def test_what_backup_info_shows(tmp_path: Path) -> None:
    directory = packages.put(tmp_path / "d", packages.honest())
    for source in (packages.ova(tmp_path / "vm.ova", packages.honest()), directory / "vm.ovf"):
        entry = catalog.describe(str(source))
        assert entry["vm"]["name"] == "web01" and entry["config"]["disks"][0]["size"] == 4 << 20
        assert [(row["name"], row["present"]) for row in entry["files"]] == [("disk1.vmdk", True)]
        assert entry["conversion"]["replaced"]
    (directory / "disk1.vmdk").unlink()
    assert [row["present"] for row in catalog.describe(str(directory / "vm.ovf"))["files"]] == [False]
    assert package_archive.without_disks(str(directory / "vm.ovf"), package_archive.choice()).members == ()
    with pytest.raises(ArchiveError, match=r"disk1\.vmdk, which is not there"):
        run(directory / "vm.ovf", tmp_path / "none")


# what goes wrong


@pytest.mark.parametrize("source", ["/nowhere/vm.ova", "https://example.com/vm.ova"])
def test_what_is_not_on_the_host(source: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=rf"package {source}: there is no such file.*on the managed host"):
        convert(ConvertRequest(source=source), Context(Progress(), lambda _notice: None))
    with pytest.raises(ArchiveError, match=r"cannot be opened.*on the managed host"):
        convert(ConvertRequest(source=source, path=str(tmp_path)), Context(Progress(), lambda _notice: None))


def driver(source: Path, target: Path, form: str = "plain", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "driver.py"), str(target), form, str(source)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)]), **environment},
    )  # fmt: skip


def test_killed_in_the_middle(tmp_path: Path) -> None:
    source = packages.ova(tmp_path / "vm.ova", packages.honest())
    target = tmp_path / "to"
    target.mkdir()
    killed = driver(source, target, KILL="1")
    assert killed.returncode == -9, killed.stderr
    assert [name for name in left(target) if not name.startswith(".")] == [] and len(left(target)) == 1
    made = run(source, target)
    assert made.values["changed"] and left(target) == [made.path.name]
    assert any("put right" in text for text in made.warnings)


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    source = packages.ova(tmp_path / "vm.ova", packages.honest(64 << 20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(TargetError):
            run(source, tmp_path / "to")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(tmp_path / "to") == []
    with monkeypatch.context() as patch:
        patch.setattr(_files, "free_bytes", lambda _directory: 100_000)
        with pytest.raises(TargetError, match="and 100000 are free"):
            run(source, tmp_path / "to")
    assert run(source, tmp_path / "to").values["changed"]


def test_a_source_that_is_copied_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ansible_collections.kvmops.backup.plugins.module_utils._ovf import hashing

    source = packages.ova(tmp_path / "vm.ova", packages.honest())
    real = hashing.of_files
    monkeypatch.setattr(
        hashing, "of_files", lambda *arguments: (os.truncate(source, source.stat().st_size + 512), real(*arguments))[1]
    )
    with pytest.raises(KvmopsError, match="has changed while it was read"):
        run(source, tmp_path / "to")
    assert left(tmp_path / "to") == []


# what is hostile


def qcow2(data: bytes, work: Path, *options: str) -> bytes:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, work / "q", "4M"], check=True)
    found = (work / "q").read_bytes()
    (work / "q").unlink()
    return found


def hostile(work: Path) -> dict[str, dict[str, bytes]]:
    """Packages made to deceive, as files of an OVA; VMDK tables and tar members have tests of their own."""
    ovf, disk = packages.descriptor(), packages.stream_vmdk(DATA)
    honest = {"vm.ovf": ovf, "disk1.vmdk": disk}
    (work / "base").write_bytes(bytes(4 << 20))

    def with_disk(data: bytes) -> dict[str, bytes]:
        return {"vm.ovf": packages.descriptor(disks='<Disk ovf:diskId="d1" ovf:fileRef="file1"/>'), "disk1.vmdk": data}

    def with_href(href: str, **more: bytes) -> dict[str, bytes]:
        return {
            "vm.ovf": packages.descriptor(files=f'<File ovf:id="file1" ovf:href="{href}"/>'),
            "disk1.vmdk": disk,
            **more,
        }

    def with_capacity(text: str) -> dict[str, bytes]:
        return {
            **honest,
            "vm.ovf": packages.descriptor(disks=f'<Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:capacity="{text}"/>'),
        }

    backed = qcow2(DATA, work, "-u", "-b", "/etc/passwd", "-F", "raw")
    nbd = bytearray(backed)
    at = nbd.index(b"/etc/passwd")
    nbd[at : at + 11] = b"nbd:a.b:123"
    data_file = qcow2(DATA, work, "-o", f"data_file={work / 'external'},data_file_raw=on")
    bomb = gzip.compress(bytes(200 << 20))
    return {
        "1 text extent": with_disk(packages.text("monolithicFlat", 1, extents='RW 1 FLAT "/etc/passwd" 0').ljust(2048, b"\n")),
        "5 qcow2 with a backing file": with_disk(backed),
        "6 qcow2 with a data file": with_disk(data_file),
        "7 qcow2 on a network": with_disk(bytes(nbd)),
        "10 1 PiB": with_disk(packages.stream_vmdk(DATA, first={"capacity": 2**41}, last={"capacity": 2**41})),
        "13 gzip bomb": {
            "vm.ovf": packages.descriptor(files='<File ovf:id="file1" ovf:href="disk1.vmdk" ovf:compression="gzip"/>'),
            "disk1.vmdk": bomb,
        },
        "13 gzip of garbage": {
            "vm.ovf": packages.descriptor(files='<File ovf:id="file1" ovf:href="disk1.vmdk" ovf:compression="gzip"/>'),
            "disk1.vmdk": disk,
        },
        "13 unknown compression": {
            "vm.ovf": packages.descriptor(files='<File ovf:id="file1" ovf:href="disk1.vmdk" ovf:compression="bzip2"/>'),
            "disk1.vmdk": disk,
        },
        "21 href outside": with_href("../disk1.vmdk"),
        "21 sibling": with_href("../t2/disk1.vmdk"),
        "21 absolute": with_href("/etc/passwd"),
        "21 escaped": with_href("%2e%2e/disk1.vmdk"),
        "22 http": with_href("http://127.0.0.1/disk1.vmdk"),
        "22 file": with_href("file:///etc/passwd"),
        "22 UNC": with_href("\\\\server\\share\\disk1.vmdk"),
        "23 external entity": {**honest, "vm.ovf": b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><Envelope>&e;</Envelope>'},
        "24 billion laughs": {
            **honest,
            "vm.ovf": b'<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><Envelope>&b;</Envelope>',
        },
        "25 huge XML": {**honest, "vm.ovf": b"<Envelope>" + b"<a/>" * 4_000_000 + b"</Envelope>"},
        "25 deep XML": {**honest, "vm.ovf": b"<Envelope>" + b"<a>" * 50_000 + b"</a>" * 50_000 + b"</Envelope>"},
        "25 attributes": {**honest, "vm.ovf": b"<Envelope " + b" ".join(b"a%d=''" % n for n in range(60_000)) + b"/>"},
        "28 wrong digest": {**honest, "vm.mf": packages.manifest({**honest, "disk1.vmdk": b"x"})},
        "28 missing": {**honest, "vm.mf": packages.manifest({**honest, "none.vmdk": b""})},
        "28 duplicate": {**honest, "vm.mf": packages.manifest(honest) * 2},
        "28 unlisted": {**honest, "vm.mf": packages.manifest({"vm.ovf": ovf})},
        "28 path": {**honest, "vm.mf": packages.manifest({**honest, "../x": b""})},
        "28 unreadable": {**honest, "vm.mf": b"what is this\n"},
        "29 negative capacity": with_capacity("-1"),
        "29 power": with_capacity("2^9999"),
        "29 property": with_capacity("${a}"),
        "30 name": {**honest, "vm.ovf": packages.descriptor(name="../../x")},
        "31 CPUs": {**honest, "vm.ovf": packages.descriptor(packages.item(1, 3, VirtualQuantity=10**9))},
        "31 RAM": {**honest, "vm.ovf": packages.descriptor(packages.item(2, 4, VirtualQuantity=10**15, AllocationUnits="MB"))},
        "31 empty disk of exbibytes": {
            **honest,
            "vm.ovf": packages.descriptor(
                disks='<Disk ovf:diskId="d1" ovf:capacity="4" ovf:capacityAllocationUnits="byte * 2^60"/>'
            ),
        },
        "32 two descriptors": {**honest, "other.ovf": ovf},
        "33 missing chunk": {"vm.ovf": ovf, "disk1.vmdk.000000000": disk[:1000], "disk1.vmdk.000000002": disk[1000:]},
        "33 extra chunk": {
            "vm.ovf": packages.descriptor(files='<File ovf:id="file1" ovf:href="disk1.vmdk" ovf:chunkSize="40960"/>'),
            **{f"disk1.vmdk.{number:09}": disk[number * 40960 : (number + 1) * 40960] for number in range(-(-len(disk) // 40960))},
            f"disk1.vmdk.{-(-len(disk) // 40960) + 1:09}": b"more",
        },
        "truncated": with_disk(disk[:-1024]),
        "no image at all": {**honest, "disk1.vmdk": b"just text " * 1000},
        "empty image": {**honest, "disk1.vmdk": b""},
    }  # fmt: skip


def hostile_tars() -> dict[str, bytes]:
    """Tars with a member that no OVA has, beside honest ones, and descriptors that contradict themselves."""
    honest = {"vm.ovf": packages.descriptor(), "disk1.vmdk": packages.stream_vmdk(DATA)}

    def tar(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", pax: str = "") -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT) as archive:
            for file, data in honest.items():
                info = tarfile.TarInfo(file)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.pax_headers = kind, link, {"path": pax} if pax else {}
            archive.addfile(info)
        return out.getvalue()

    def lying(size: int) -> bytes:
        """The disk's header names another size; its checksum is right."""
        data = bytearray(tar("other"))
        at = data.index(b"disk1.vmdk\0")
        data[at + 124 : at + 136] = b"%011o\0" % size
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        return bytes(data)

    return {
        "14 parent directory": tar("../outside"), "14 pax path": tar("innocent", pax="../outside"),
        "15 absolute": tar("/etc/passwd"),
        "16 symbolic link": tar("link", tarfile.SYMTYPE, "/etc/passwd"),
        "17 hard link": tar("link", tarfile.LNKTYPE, "/etc/passwd"),
        "18 device": tar("device", tarfile.CHRTYPE), "18 FIFO": tar("fifo", tarfile.FIFOTYPE), "19 duplicate": tar("vm.ovf"),
        "20 larger than the tar": lying((1 << 33) - 1), "20 smaller than it is": lying(1000),
    }  # fmt: skip


def contradictions() -> dict[str, dict[str, bytes]]:
    """Descriptors in which two rows have one id, or a controller stands on itself."""
    disk = packages.stream_vmdk(DATA)
    row = '<Disk ovf:diskId="d1" ovf:fileRef="file1"/>'
    file = '<File ovf:id="file1" ovf:href="disk1.vmdk"/>'
    cycle = packages.item(7, 6, Parent=8) + packages.item(8, 6, Parent=7)
    descriptors = {
        "26 files": packages.descriptor(files=file * 2),
        "26 disks": packages.descriptor(disks=row * 2),
        "26 items": packages.descriptor(packages.BASE + packages.item(4, 10)),
        "27 cycle": packages.descriptor(packages.BASE + cycle),
    }
    return {name: {"vm.ovf": data, "disk1.vmdk": disk} for name, data in descriptors.items()}


#: What the refusal says, by the beginning of the input's name: each by its own rule, not by one behind it.
REASONS = {
    "1 text extent": "only the description of a disk", "5 ": "passwd", "6 ": "external", "7 ": "nbd:",
    "10 1 PiB": "larger than any VMDK", "13 gzip bomb": "unpacks to more than",
    "13 unknown": "is not known", "16 ": "link", "17 ": "link", "19 ": "vm.ovf", "20 larger": "still being copied",
    "21 ": "lies outside of the package", "22 ": "somewhere else", "23 ": "document type declaration",
    "24 ": "document type declaration", "28 wrong": "is not what its manifest",
    "28 missing": "names none.vmdk, which is not there", "28 duplicate": "twice", "28 unlisted": "does not name disk1.vmdk",
    "28 path": "is no name of a file", "28 unreadable": "cannot be read", "29 property": "has no value", "29 ": "is no number",
    "30 ": "is not a name for a VM", "31 CPUs": "CPUs make no sense", "32 ": "more than one descriptor",
    "33 missing": "disk1.vmdk.000000001", "33 extra": "but not disk1.vmdk.", "26 files": "two of its files",
    "26 disks": "two of its disks", "26 items": "two of its items", "27 ": "is its own parent",
}  # fmt: skip


def test_hostile_packages(tmp_path: Path) -> None:
    """All 33 kinds, as OVAs: refused, each with a reason, in bounded memory and time. Nothing is left, and strace sees nothing
    opened outside of the package."""
    target, trace = tmp_path / "to", tmp_path / "trace"
    target.mkdir()
    without_size = packages.descriptor(disks='<Disk ovf:diskId="d1" ovf:fileRef="file1"/>')
    disks = {
        f"{name} (VMDK)": {"vm.ovf": without_size, "disk1.vmdk": data}
        for name, data in test_vmdk.HOSTILE.items()
    }
    inputs = {**hostile(tmp_path), **disks, **contradictions(), **hostile_tars()}
    assert {int(name.split()[0]) for name in inputs if name[0].isdigit()} == set(range(1, 34))
    sources = [tmp_path / f"{number}.ova" for number in range(len(inputs))]
    for source, files in zip(sources, inputs.values()):
        if isinstance(files, bytes):
            source.write_bytes(files)
        else:
            packages.ova(source, files)
    strace = ["strace", "-f", "-qq", "-e", "trace=openat,open,connect", "-o", trace]
    done = subprocess.run(
        [*strace, sys.executable, HERE / "driver.py", target, "plain", *sources],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *told, peak = done.stdout.strip().splitlines()
    assert len(told) == len(inputs) and int(peak) < MAX_RSS_KIB and left(target) == []
    for name, line in zip(inputs, told):
        seconds, _space, text = line.partition(" ")
        assert text.startswith("refused: ") and len(text) > 50 and float(seconds) < 20, (name, line)
        assert next((reason for begin, reason in REASONS.items() if name.startswith(begin)), "") in text, (name, line)
    for secret in ("/etc/passwd", "external", "t2/disk1.vmdk", "base", "nbd", "127.0.0.1", "8080"):
        found = [line for line in trace.read_text(errors="replace").splitlines() if f'{secret}"' in line]
        assert not found, (secret, found)


def test_small_files_that_inflate_to_gigabytes(tmp_path: Path) -> None:
    """A grain of zeros is bounded by its own size: gigabytes of zeros from 512 KiB are honest, and take no memory."""
    size = 4 << 30
    grains = size // packages.GRAIN_BYTES
    import zlib

    made = bytearray(packages.stream_vmdk(b"\1" * packages.GRAIN_BYTES))
    del made[-4096:]
    packed = zlib.compress(b"\1" * packages.GRAIN_BYTES, 9)
    out = bytearray(packages.GRAIN_BYTES)
    tables = []
    for number in range(grains // 16):  # one grain in 16
        tables.append((number * 16, len(out) // 512))
        out += struct.pack("<QI", number * 16 * 128, len(packed)) + packed
        out += bytes(-len(out) % 512)
    entries = [0] * grains
    for number, at in tables:
        entries[number] = at
    places = []
    for begin in range(0, grains, 512):
        places.append(len(out) // 512)
        out += struct.pack("<512I", *entries[begin : begin + 512])
    directory = len(out) // 512
    out += struct.pack(f"<{len(places)}I", *places).ljust(-(-len(places) * 4 // 512) * 512, b"\0")
    out[512 : 512 * 21] = packages.text("streamOptimized", size // 512).ljust(20 * 512, b"\0")
    out[:512] = packages.header(size // 512, directory_at=directory)
    files = {
        "vm.ovf": packages.descriptor(disks='<Disk ovf:diskId="d1" ovf:fileRef="file1"/>'),
        "disk1.vmdk": bytes(out),
    }
    source = packages.ova(tmp_path / "vm.ova", files)
    (tmp_path / "to").mkdir()
    done = driver(source, tmp_path / "to", "compressed")
    told, peak = done.stdout.strip().splitlines()
    path = told.partition(" ")[2]
    assert not path.startswith("refused") and int(peak) < MAX_RSS_KIB, done.stdout
    assert Path(path).stat().st_size < 20 << 20
