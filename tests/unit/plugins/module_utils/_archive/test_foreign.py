# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives that other tools made are read: points, members, bytes."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file
from ansible_collections.kvmops.backup.plugins.module_utils._errors import DamagedError, HostileError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives

NAMES = ["1700000000_web01.xml", "vda_0.qcow2", "vda_1.snapshot", "vdb_0.qcow2", "1700000000_0.memory", "1_cd.iso"]
DOMAIN = archives.DOMAIN.replace("vda_0.qcow2", "vda_1.snapshot").replace(
    "</devices>",
    "<disk type='file' device='cdrom'><source file='/iso/cd.iso'/><target dev='sda'/></disk></devices>",
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    where = tmp_path / "files"
    where.mkdir()
    (where / "1700000000_web01.xml").write_text(DOMAIN)
    (where / "vda_0.qcow2").write_bytes(archives.qcow2_header() + archives.noise(300_000, 1))
    (where / "vda_1.snapshot").write_bytes(archives.qcow2_header(backing=b"/images/vda_0.qcow2"))
    (where / "vdb_0.qcow2").write_bytes(archives.qcow2_header(2**28) + archives.noise(9000, 2))
    (where / "1700000000_0.memory").write_bytes(archives.noise(70_000, 3))
    (where / "1_cd.iso").write_bytes(archives.noise(40_000, 4))
    return where


def run(command: str, where: Path, archive: Path) -> None:
    tool = command.split()[0]
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed here")
    subprocess.run(["sh", "-c", command.replace("OUT", str(archive))], cwd=where, check=True)


def check(archive: Path, files: Path) -> None:
    with open_archive(str(archive)) as reader:
        assert not reader.native and not reader.broken
        (point,) = reader.points
        assert (point.timestamp, point.vm_name, point.vm_uuid) == (1_700_000_000, "web01", archives.UUID)
        assert point.format_version == 0 and point.warnings == ()
        table = {m.name: (m.target, m.parent, m.active, m.role.value) for m in point.members}
        assert table == {
            "vda_0.qcow2": ("vda", "", False, "disk"),
            "vda_1.snapshot": ("vda", "vda_0.qcow2", True, "layer"),
            "vdb_0.qcow2": ("vdb", "", True, "disk"),
            "1700000000_0.memory": ("", "", False, "memory"),
            "1_cd.iso": ("sda", "", True, "iso"),
        }
        assert next(m for m in point.members if m.target == "vdb").virtual_size_bytes == 2**28
    assert archives.extract(archive) == {name: (files / name).read_bytes() for name in table}


PLAIN = [
    "tar -cf OUT *",
    "tar --format=pax -cf OUT *",
    "tar --format=ustar -cf OUT *",
    "tar --format=gnu -cf OUT *",
    "tar --format=v7 -cf OUT *",
    "tar --format=pax --pax-option=comment=hello -cf OUT *",
    "tar -V 'web01 of monday' -cf OUT *",
    "tar -V 'web01 of monday' --format=pax -cf OUT .",
    "tar -G -cf OUT .",
    "tar --hard-dereference -h -cf OUT *",
    "tar -cf OUT .",
    "tar -cf OUT ./*",
    "bsdtar -cf OUT *",
    "bsdtar --format=pax -cf OUT .",
    "bsdtar --format=ustar -cf OUT *",
    "busybox tar -cf OUT *",
    "busybox tar -cf OUT .",
]
COMPRESSED = [
    "tar -cf - * | zstd -q -19 --long -o OUT",
    "tar -cf - . | zstd -q -T0 -o OUT",
    "tar -cf - * | zstd -q -1 --no-check -o OUT",
    "tar -cf - * | pzstd -q -p 4 -o OUT",
    "tar -cf - * | split -b 60000 --filter='zstd -q -c' > OUT",
    "bsdtar --zstd -cf OUT *",
]


@pytest.mark.parametrize("command", PLAIN)
def test_plain(command: str, files: Path, tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    run(command, files, archive)
    check(archive, files)
    report = verify_file(str(archive))
    assert report.ok and report.coverage == "structure" and report.unchecked_bytes > 0


@pytest.mark.parametrize("command", COMPRESSED)
def test_compressed(command: str, files: Path, tmp_path: Path) -> None:
    archive = tmp_path / "x.tar.zst"
    if "pzstd" in command and not shutil.which("pzstd"):
        pytest.skip("pzstd is not installed here")
    run(command, files, archive)
    check(archive, files)
    report = verify_file(str(archive))
    checked = "--no-check" not in command and "bsdtar" not in command
    assert report.ok and report.coverage == ("partial" if checked else "structure")
    data = archive.read_bytes()
    for damaged in (data[:-1], data[:-200], data + b"garbage!", data[: len(data) // 2]):
        archive.write_bytes(damaged)
        assert not verify_file(str(archive)).ok


def test_python(files: Path, tmp_path: Path) -> None:
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        for prefix in ("", "./"):
            archive = tmp_path / f"{kind}{len(prefix)}.tar"
            with tarfile.open(archive, "w", format=kind) as file:
                for name in sorted(NAMES):
                    file.add(files / name, prefix + name)
            check(archive, files)


def test_a_window_of_2_gib_is_refused_with_a_way_out(files: Path, tmp_path: Path) -> None:
    archive = tmp_path / "x.tar.zst"
    run("tar -cf - * | zstd -q --ultra --long=31 -1 -o OUT", files, archive)
    with pytest.raises(HostileError, match=r"128 MiB.*--long") as refusal:
        open_archive(str(archive))
    assert refusal.value.hint


def test_several_configurations(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "1700000000_web01.xml", files / "1700086400_web01.xml")
    run("tar -cf OUT *", files, tmp_path / "x.tar")
    with open_archive(str(tmp_path / "x.tar")) as reader:
        assert [point.timestamp for point in reader.points] == [1_700_000_000, 1_700_086_400]
        assert reader.point().timestamp == 1_700_086_400
        assert reader.point(1_700_000_000).members == reader.points[1].members


LAYERS = {"web01.qcow2": 1_700_000_000, "web01.1.snapshot": 1_700_086_401, "web01.2.snapshot": 1_700_172_802}


@pytest.fixture
def products(tmp_path: Path) -> Path:
    """A full and two increments as other products lay them out: an XML each, layers on paths of another host."""
    where = tmp_path / "products"
    where.mkdir()
    below = b""
    for name in LAYERS:
        (where / name).write_bytes(archives.qcow2_header(backing=below) if below else archives.qcow2_header())
        below = b"/vol/kvm-07/images/" + name.encode()
    for name, time in LAYERS.items():
        os.utime(where / name, (time, time))
    return where


def configurations(where: Path, sources: list[str]) -> None:
    for time, source in zip(LAYERS.values(), sources):
        text = re.sub(r"<disk.*</disk>", "", archives.DOMAIN, flags=re.DOTALL)
        disk = f"<disk type='file' device='disk'><source file='{source}'/><target dev='vda'/></disk>"
        path = where / f"{time}.xml"
        path.write_text(text.replace("</devices>", f"{disk}</devices>"))


def tops(archive: Path) -> list[str]:
    with open_archive(str(archive)) as reader:
        return ["".join(m.name for m in point.members if m.active) for point in reader.points]


def test_each_point_has_the_layer_that_its_xml_names(products: Path, tmp_path: Path) -> None:
    configurations(products, [f"/vol/kvm-07/images/{name}" for name in LAYERS])
    run("tar -cf OUT *", products, tmp_path / "x.tar")
    assert tops(tmp_path / "x.tar") == list(LAYERS)
    with open_archive(str(tmp_path / "x.tar")) as reader:
        assert all(not point.warnings for point in reader.points)
        assert [m.parent for m in reader.point().members] == ["", "web01.qcow2", "web01.1.snapshot"]


def test_an_older_point_never_gets_what_was_written_after_it(products: Path, tmp_path: Path) -> None:
    """The XMLs name the disk as the VM has it, whatever the layers are called: only their times tell."""
    layers = ["vda_0.qcow2", "vda_1.snapshot", "vda_2.snapshot"]
    for name, new in zip(LAYERS, layers):
        (products / name).rename(products / new)
    configurations(products, ["/vol/kvm-07/images/other.qcow2"] * 3)
    run("tar -cf OUT *", products, tmp_path / "x.tar")
    assert tops(tmp_path / "x.tar") == layers
    with open_archive(str(tmp_path / "x.tar")) as reader:
        assert [len(point.warnings) for point in reader.points] == [1, 1, 0]
        assert reader.points[0].warnings[0].code is Code.MATCHED_BY_GUESS
    run("tar --mtime=@1800000000 -cf OUT *", products, tmp_path / "y.tar")  # times that tell nothing
    assert tops(tmp_path / "y.tar") == ["", "", layers[-1]]
    with open_archive(str(tmp_path / "y.tar")) as reader:
        assert reader.points[0].warnings[0].code is Code.LEFT_OUT


def test_a_layer_with_the_name_of_its_base(products: Path, tmp_path: Path) -> None:
    (products / "web01.1.snapshot").rename(products / "web01.snapshot")
    (products / "web01.2.snapshot").unlink()
    configurations(products, ["/vol/kvm-07/images/web01.img"])
    run("tar -cf OUT *", products, tmp_path / "x.tar")
    assert tops(tmp_path / "x.tar") == ["web01.snapshot"]


@pytest.mark.parametrize(
    "names",
    [
        ["web01.qcow2", "web01_1.snapshot", "web01_2.snapshot"],
        ["vda_0.qcow2", "vda_1.snapshot", "vda_2.snapshot"],
        ["web01.qcow2", "web01.monday.snapshot", "web01.tuesday.snapshot"],
    ],
)
def test_layers_whose_names_are_of_another_kind_than_the_files(tmp_path: Path, names: list[str]) -> None:
    """libvirt calls the overlay of web01.qcow2 web01.STATE; the product numbers its layers, or adds a suffix."""
    files = ["/vms/web01.qcow2", "/vms/web01.monday", "/vms/web01.tuesday"]
    for name, below, time in zip(names, ["", *files], LAYERS.values()):
        (tmp_path / name).write_bytes(
            archives.qcow2_header(backing=below.encode()) if below else archives.qcow2_header()
        )
        os.utime(tmp_path / name, (time, time))
    configurations(tmp_path, files)
    run("tar -cf OUT *.xml *.qcow2 *.snapshot", tmp_path, tmp_path / "x.tar")
    assert tops(tmp_path / "x.tar") == names
    with open_archive(str(tmp_path / "x.tar")) as reader:
        assert [m.parent for m in reader.point().members] == ["", *names[:2]]


@pytest.mark.parametrize("command", ["tar -cf OUT *.xml web01*", "tar -cf - *.xml web01* | zstd -q -o OUT"])
def test_images_without_a_suffix_of_images(tmp_path: Path, command: str) -> None:
    """What `virsh snapshot-create-as --disk-only` makes, packed as it is: an overlay is not called .snapshot there."""
    names = ["web01", "web01.monday", "web01.tuesday"]
    for name, below in zip(names, ["", *names]):
        (tmp_path / name).write_bytes(archives.qcow2_header(backing=b"/vms/" + below.encode() if below else b""))
    (tmp_path / "web01.txt").write_text("a note")
    configurations(tmp_path, [f"/vms/{name}" for name in names])
    run(command, tmp_path, tmp_path / "x.tar.zst")
    assert tops(tmp_path / "x.tar.zst") == names
    with open_archive(str(tmp_path / "x.tar.zst")) as reader:
        assert [m.name for m in reader.point().members] == names and not reader.point().warnings


def test_a_disk_matched_by_the_beginning_of_its_name_is_named(products: Path, tmp_path: Path) -> None:
    """The overlay web01.monday is not in the archive, and the image below it has the same stem."""
    for name in list(LAYERS)[1:]:
        (products / name).unlink()
    configurations(products, ["/vms/web01.monday"])
    run("tar -cf OUT *", products, tmp_path / "x.tar")
    assert tops(tmp_path / "x.tar") == ["web01.qcow2"]
    with open_archive(str(tmp_path / "x.tar")) as reader:
        (warning,) = reader.point().warnings
    assert warning.code is Code.MATCHED_BY_GUESS and "vda (/vms/web01.monday)" in warning.text and "web01.qcow2" in warning.text


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("tar -czf OUT *", "gzip"),
        ("tar -cjf OUT *", "bzip2"),
        ("tar -cJf OUT *", "xz"),
        ("tar -C .. -cf OUT files", "tar -C DIRECTORY"),
        ("tar -C .. -cf OUT files/vda_0.qcow2", "tar -C DIRECTORY"),
        ("ln vda_0.qcow2 vdc.qcow2; tar -cf OUT *", "--hard-dereference"),
        ("ln -s vda_0.qcow2 vdc.qcow2; tar -cf OUT *", "--dereference"),
        (f"ln -s {'x' * 120} vdc.qcow2; tar -cf OUT *", "--dereference"),
        ("mkfifo pipe; tar -cf OUT *", "nothing but the files"),
        ("mknod null c 1 3; tar -cf OUT *", "nothing but the files"),
        ("mkdir more; tar -G -cf OUT .", "tar -C DIRECTORY"),
        ("tar -cM -L 700 -f first -f OUT * </dev/null", "Extract all volumes"),
        ("tar -cM -L 700 --format=posix -f first -f OUT * </dev/null", "Extract all volumes"),
        ("printf x > OUT", "Name a tar archive"),
        ("cp vda_0.qcow2 OUT", "Name a tar archive"),
        ("truncate -s 9M vda_0.qcow2; tar -S -cf OUT *", "without tar's -S"),
        ("truncate -s 9M vda_0.qcow2; tar -S --format=posix -cf OUT *", "without tar's -S"),
    ],
)
def test_what_cannot_be_read_is_told_with_a_way_out(files: Path, tmp_path: Path, command: str, says: str) -> None:
    run(command, files, tmp_path / "x.tar")
    with pytest.raises((HostileError, DamagedError), match=says), open_archive(str(tmp_path / "x.tar")) as reader:
        reader.point()


def test_a_layer_whose_base_cannot_be_told_is_given_none(products: Path, tmp_path: Path) -> None:
    (products / "web01.2.snapshot").write_bytes(archives.qcow2_header(backing=b"/vms/web01.lost"))
    configurations(products, ["/x"] * 2 + ["/vms/web01.2.snapshot"])
    run("tar -cf OUT *", products, tmp_path / "x.tar")
    with open_archive(str(tmp_path / "x.tar")) as reader:
        (top,) = [m for m in reader.point().members if m.active]
        assert (top.name, top.parent) == ("web01.2.snapshot", "web01.lost")
        assert Notice(Code.LEFT_OUT, "web01.2.snapshot needs web01.lost, which is not in the archive") in reader.point().warnings


def test_a_layer_above_the_one_that_the_newest_point_shows_is_named(products: Path, tmp_path: Path) -> None:
    for name in list(LAYERS)[2:]:
        (products / name).unlink()
    configurations(products, ["/vms/web01.qcow2"])
    run("tar -cf OUT *", products, tmp_path / "x.tar")
    assert tops(tmp_path / "x.tar") == ["web01.qcow2"]
    with open_archive(str(tmp_path / "x.tar")) as reader:
        assert "web01.1.snapshot stands on web01.qcow2" in reader.point().warnings[0].text


def test_a_name_without_a_time_takes_that_of_the_file(files: Path, tmp_path: Path) -> None:
    (files / "1700000000_web01.xml").rename(files / "web01.xml")
    run("tar --mtime=@1600000000 -cf OUT *", files, tmp_path / "x.tar")
    with open_archive(str(tmp_path / "x.tar")) as reader:
        assert reader.point().timestamp == 1_600_000_000


def test_other_xml_and_broken_xml_do_not_matter(files: Path, tmp_path: Path) -> None:
    (files / "pool.xml").write_text("<pool/>")
    (files / "notes.xml").write_text("not xml at all")
    run("tar -cf OUT *", files, tmp_path / "x.tar")
    with open_archive(str(tmp_path / "x.tar")) as reader:
        assert not reader.native and len(reader.points) == 1 and len(reader.broken) == 1


def test_an_image_that_is_none_is_left_out_and_named(files: Path, tmp_path: Path) -> None:
    (files / "vdb_0.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(2000))
    run("tar -cf OUT *", files, tmp_path / "x.tar")
    with open_archive(str(tmp_path / "x.tar")) as reader:
        assert "vdb_0.qcow2" in reader.point().warnings[0].text
    report = verify_file(str(tmp_path / "x.tar"))
    assert [damage.member for damage in report.damage] == ["vdb_0.qcow2"]


def test_our_archive_taken_apart_and_packed_again_is_ours(tmp_path: Path) -> None:
    path = archives.write(tmp_path, archives.SMALL).path
    with tarfile.open(path) as old, tarfile.open(tmp_path / "new.tar", "w") as new:
        for member in old:
            new.addfile(member, io.BytesIO(old.extractfile(member).read()))  # type: ignore[union-attr]
    with open_archive(str(tmp_path / "new.tar")) as reader:
        assert reader.native
    assert archives.extract(tmp_path / "new.tar") == archives.SMALL
    assert verify_file(str(tmp_path / "new.tar")).coverage == "full"
    subprocess.run(["zstd", "-q", "-T0", path], check=True)
    assert verify_file(path + ".zst").ok and archives.extract(path + ".zst") == archives.SMALL


def test_a_disk_that_was_raw_comes_back_raw_unless_there_are_layers(files: Path, tmp_path: Path) -> None:
    raw = DOMAIN.replace("<disk type='file' device='disk'>", "<disk type='file' device='disk'><driver type='raw'/>")
    (files / "1700000000_web01.xml").write_text(raw)
    archive = tmp_path / "a.tar"
    run("tar -cf OUT *", files, archive)
    with open_archive(str(archive)) as reader:
        table = {m.name: (m.image_format, m.original_format) for m in reader.points[0].members if m.target[:2] == "vd"}
    layers = {"vda_0.qcow2": ("qcow2", "qcow2"), "vda_1.snapshot": ("qcow2", "qcow2")}
    assert table == {**layers, "vdb_0.qcow2": ("qcow2", "raw")}
