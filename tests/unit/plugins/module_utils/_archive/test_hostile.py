# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives made to deceive are refused or do no harm, in bounded memory and time, and nothing outside of them is read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from ansible_collections.kvmops.backup.plugins.module_utils._archive import (
    config,
    digests,
    frames,
    names,
    sidecars,
    tar,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, HostileError, KvmopsError
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives

HERE = Path(__file__).parent
XML = archives.DOMAIN.encode()
MAX_RSS_KIB = 300 * 1024
MANY = 20 if os.environ.get("KVMOPS_BACKUP_EXHAUSTIVE") else 1


def member(name: str, data: bytes = b"x", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    body = data if info.isreg() else b""
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + body.ljust(-(-len(body) // 512) * 512, b"\0")


def archive(*parts: bytes) -> bytes:
    return b"".join(parts) + bytes(10240)


def patched(header: bytes, offset: int, data: bytes, at: int = 0) -> bytes:
    """A tar header with other bytes in it and the right checksum."""
    block = bytearray(header[at : at + 512])
    block[offset : offset + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return header[:at] + bytes(block) + header[at + 512 :]


def pax(**records: str) -> bytes:
    body = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode()
        length = len(line) + len(str(len(line)))
        length = len(line) + len(str(length))
        body += str(length).encode() + line
    header = bytearray(member("pax", body))
    header[156:157] = b"x"
    return patched(bytes(header), 156, b"x")


def global_pax(**records: str) -> bytes:
    return patched(pax(**records), 156, b"g")


REFUSED: dict[str, bytes] = {
    "a path": archive(member("../../etc/passwd")),
    "a directory": archive(member("a/b.qcow2")),
    "absolute": archive(member("/etc/passwd")),
    "dot dot": archive(member("..")),
    "a hard link": archive(member("vda_0.qcow2", type=tarfile.LNKTYPE, linkname="/etc/shadow")),
    "a symbolic link": archive(member("vda_0.qcow2", type=tarfile.SYMTYPE, linkname="/etc/shadow")),
    "a character device": archive(member("vda_0.qcow2", type=tarfile.CHRTYPE)),
    "a block device": archive(member("vda_0.qcow2", type=tarfile.BLKTYPE)),
    "a FIFO": archive(member("vda_0.qcow2", type=tarfile.FIFOTYPE)),
    "a directory with a name": archive(member("dir", type=tarfile.DIRTYPE)),
    "an unknown type": archive(patched(member("vda_0.qcow2"), 156, b"Z")),
    "a GNU sparse member": archive(patched(member("vda_0.qcow2"), 156, b"S")),
    "pax sparse": archive(pax(**{"GNU.sparse.major": "1"}), member("vda_0.qcow2")),
    "two of one name": archive(member("vda_0.qcow2"), member("vda_0.qcow2", b"y")),
    "two of one name, one with ./": archive(member("vda_0.qcow2"), member("./vda_0.qcow2", b"y")),
    "pax path": archive(pax(path="../x"), member("vda_0.qcow2")),
    "pax path, absolute": archive(pax(path="/etc/x"), member("vda_0.qcow2")),
    "pax size": archive(pax(size="700"), member("vda_0.qcow2", bytes(512))),
    "pax size, not ASCII": archive(pax(size="²"), member("vda_0.qcow2")),
    "pax size of 5000 digits": archive(pax(size="9" * 5000), member("vda_0.qcow2")),
    "pax size, negative": archive(pax(size="-1"), member("vda_0.qcow2")),
    "pax without a length": archive(patched(member("p", b"nonsense\n"), 156, b"x"), member("vda_0.qcow2")),
    "pax twice the same key": archive(patched(member("p", b"6 a=b\n6 a=c\n"), 156, b"x"), member("vda_0.qcow2")),
    "a huge pax header": archive(patched(member("p", b" " * 70_000), 156, b"x")),
    "global size": archive(global_pax(size="1"), member("vda_0.qcow2")),
    "global path": archive(global_pax(path="x"), member("vda_0.qcow2")),
    "headers without end": archive(pax(comment="x") * 40, member("vda_0.qcow2")),
    "a size of 8 EiB": archive(patched(member("vda_0.qcow2"), 124, b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7)),
    "a size beyond the end": archive(patched(member("vda_0.qcow2"), 124, b"00077777777\0")),
    "a negative size": archive(patched(member("vda_0.qcow2"), 124, b"\xff" * 12)),
    "a size that is no number": archive(patched(member("vda_0.qcow2"), 124, b"12x45678901\0")),
    "a name with a newline": archive(member("vda\n_0.qcow2")),
    "a name with an escape": archive(member("vda\x1b[31m.qcow2")),
    "a name of 300 characters": archive(member("v" * 300)),
    "thousands of members": archive(*(member(f"{number}.iso", b"") for number in range(20_001))),
    "thousands of ./": archive(member("./", b"", type=tarfile.DIRTYPE) * 20_002),
    "thousands of configurations": archive(*(member(f"{number}.xml", XML) for number in range(300))),
    "no tar at all": archives.noise(10_000),
    "a lone block of zeros": bytes(512) + member("vda_0.qcow2"),
}
HARMLESS: dict[str, bytes] = {
    "a name that is not UTF-8": archive(member("vda_\udce4.qcow2"), member("1.xml", XML)),
    "a time before 1970": archive(member("vda_0.qcow2", mtime=-5), member("1.xml", XML)),
    "two archives": archive(member("1.xml", XML)) + archive(member("2.xml", XML)),
    "nothing": bytes(10240),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(zstandard.compress(REFUSED[what]) if packed else REFUSED[what])
    begin = time.process_time()
    with pytest.raises(ArchiveError) as refusal:
        open_archive(str(path))
    assert str(path) in str(refusal.value) and str(refusal.value).isprintable()
    with contextlib.suppress(HostileError):
        assert not verify_file(str(path)).ok
    assert time.process_time() - begin < 10
    assert os.listdir(tmp_path) == ["x.tar"]


@pytest.mark.parametrize("what", HARMLESS)
def test_harmless(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(HARMLESS[what])
    with open_archive(str(path)) as reader:
        for entry in reader.entries:
            entry.name.encode()
        assert len(reader.points) == (0 if what == "nothing" else 1)


BAD_XML: dict[str, bytes] = {
    "billion laughs": b'<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9))
    + b"]><domain><name>&j;</name></domain>",
    "laughs in an attribute": b'<!DOCTYPE a [<!ENTITY a "aa">]><domain x="&a;"/>',
    "an external entity": b'<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]><domain><name>&a;</name></domain>',
    "an external DTD": b'<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x.dtd"><domain/>',
    "deep": b"<domain>" + b"<a>" * 100_000,
    "20 MB": b"<domain>" + b" " * (20 * 2**20) + b"</domain>",
    "millions of elements": b"<domain>" + b"<a/>" * 3_500_000 + b"</domain>",
    "thousands of attributes": b"<domain " + b" ".join(b'a%d=""' % n for n in range(30_000)) + b"/>",
    "many tags of many attributes": b"<domain>"
    + (b"<a " + b" ".join(b'a%d=""' % n for n in range(600)) + b"/>") * 1000
    + b"</domain>",
    "a tag without end": b"<domain " + b"a" * 15_000_000,
    "another encoding": b'<?xml version="1.0" encoding="UTF-7"?><domain/>',
}


@pytest.mark.parametrize("what", BAD_XML)
def test_bad_xml(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(archive(member("1700000000.xml", BAD_XML[what])))
    begin = time.process_time()
    with open_archive(str(path)) as reader:
        assert reader.points == () and len(reader.broken) == 1
        with pytest.raises(ArchiveError, match="no point in it is whole"):
            reader.point()
    assert not verify_file(str(path)).ok
    assert time.process_time() - begin < 10


def native(table: list[tuple[Member, bytes]], *, sizes: dict[str, int] | None = None, **changes: object) -> bytes:
    """An archive in our form, its digests and its configuration right, whatever its table says."""
    members, chunks, parts = [], [], b""
    for item, data in table:
        chunk_digests = [hashlib.sha256(data[at : at + 2**22]).digest() for at in range(0, len(data), 2**22)]
        size = (sizes or {}).get(item.name, len(data))
        members.append(
            Member(**{**item.__dict__, "size_bytes": size, "digest": digests.SHA256.of_member(b"".join(chunk_digests))})
        )
        chunks += chunk_digests
        parts += tar.header(item.name, len(data), 1, len(parts)) + data.ljust(tar.round_up(len(data), 512), b"\0")
    blob = digests.pack(chunks)
    parts += tar.header("1.digests", len(blob), 1, len(parts)) + blob.ljust(tar.round_up(len(blob), 512), b"\0")
    xml, _digest = config.encode(
        archives.configuration(
            members, 1, digests_member="1.digests", digests_digest=hashlib.sha256(blob).hexdigest(), **changes
        )
    )
    return parts + tar.header("1_web01.xml", len(xml), 1, len(parts)) + xml + tar.END


def disk(name: str, parent: str = "") -> Member:
    return Member(name, Role.LAYER if parent else Role.DISK, 0, parent=parent, image_format="qcow2")


@pytest.mark.parametrize(
    "data",
    [
        native([(disk("a", "b"), b"1"), (disk("b", "a"), b"2")]),
        native([(disk("a", "a"), b"1")]),
        native([(disk("a", "/etc/passwd"), b"1")]),
        native([(disk("a"), b"1")], sizes={"a": 2}),
        native([(disk("a"), b"1")], sizes={"a": 10**19}),
        native([(disk("a"), b"1")], parent_point=7, parent_digest="0" * 64),
    ],
    ids=[
        "a circle",
        "its own parent",
        "a host file as parent",
        "another size",
        "an absurd size",
        "another parent point",
    ],
)
def test_a_table_that_lies(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with open_archive(str(path)) as reader:
        assert reader.native and reader.points == () and len(reader.broken) == 1
    assert not verify_file(str(path)).ok


@pytest.mark.parametrize("name", ["", "\xa0.digest", "../digest"])
def test_a_table_that_names_what_we_never_write(name: str, tmp_path: Path) -> None:
    """And whose first header is broken, so that the verification goes by the table."""
    data = native([(disk("a"), b"1")])
    named = f'digests="{name}"'.encode().ljust(len(b'digests="1.digests"'))
    (digest,) = set(re.findall(rb' digest="([0-9a-f]{64})"><', data))
    xml = data[data.index(b"<domain") : -len(tar.END)].replace(b'digests="1.digests"', named)
    right = hashlib.sha256(xml.replace(digest, b"0" * 64)).hexdigest().encode()
    path = tmp_path / "x.tar"
    whole = data[: data.index(b"<domain")] + xml.replace(digest, right) + tar.END
    assert len(whole) == len(data) and named in whole
    for broken in (whole, b"Q" + whole[1:]):
        path.write_bytes(broken)
        assert not verify_file(str(path)).ok


def test_names_in_a_table_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    good = native([(disk("a"), b"1")])
    assert b'name="a"' in good
    path.write_bytes(good)
    with open_archive(str(path)) as reader:
        assert len(reader.points) == 1
    with pytest.raises(HostileError):
        names.checked_member("../a")


def zstd_header(content: int) -> bytes:
    return frames.ZSTD_MAGIC + bytes([0xC0 | 0x20]) + struct.pack("<Q", content)


def rle(content: int) -> bytes:
    """A frame of zeros: 4 bytes for every 128 KiB."""
    blocks = content // 2**17
    return (
        zstd_header(content)
        + struct.pack("<I", 2**17 << 3 | 2)[:3] * 0
        + b"".join(struct.pack("<I", 2**17 << 3 | 2 | (number == blocks - 1))[:3] + b"\0" for number in range(blocks))
    )


BOMBS: dict[str, Callable[[], bytes]] = {
    "a frame of 20 GiB of zeros": lambda: zstandard.compress(member("vda_0.raw", b"")) + rle(20 * 2**30),
    "frames of 60 MiB": lambda: rle(60 * 2**20) * 8,
    "thousands of empty frames": lambda: (
        zstandard.compress(b"") * (50_000 * MANY) + zstandard.compress(REFUSED["a path"])
    ),
    "millions of skippable frames": lambda: b"\x50\x2a\x4d\x18\0\0\0\0" * (300_000 * MANY),
    "a frame of empty blocks": lambda: zstd_header(2**20) + b"\0\0\0" * (500_000 * MANY),
    "a frame that lies about its size": lambda: zstd_header(2**40) + rle(2**20)[13:],
    "a frame that lies small": lambda: zstd_header(512) + rle(2**26)[13:],
    "a window of 2 GiB": lambda: (
        zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters.from_level(
                1, window_log=31, write_content_size=False
            )
        )
        .compressobj()
        .compress(bytes(10))
        + b"\0" * 10
    ),
    "a zstd of a zstd": lambda: zstandard.compress(zstandard.compress(bytes(2**28))),
    "a seek table of 2^32 frames": lambda: (
        zstandard.compress(bytes(10240)) + struct.pack("<IIIBI", frames.SKIPPABLE, 9, 2**32 - 1, 0, frames.SEEKABLE)
    ),
    "a seek table that overlaps": lambda: zstandard.compress(bytes(10240)) + frames.seek_table([5, 2**20, 2**31, 1]),
    "a seek table that lies": lambda: zstandard.compress(bytes(10240)) + frames.seek_table([1, 60 * 2**20] * 300),
    "a seek table that fits but lies": lambda: (
        (data := zstandard.compress(archives.noise(10240))) + frames.seek_table([len(data), 2**25])
    ),
    "a million skipped frames of nothing": lambda: (
        (data := zstandard.compress(bytes(10240))) + frames.seek_table([len(data), 10240] + [0, 0] * 2**20)
    ),
    "a live frame said to be skipped": lambda: (
        (data := zstandard.compress(bytes(10240))) + data + frames.seek_table([len(data), 10240, len(data), 0])
    ),
    "a live frame that leads back to the same table": lambda: (
        (data := zstandard.compress(bytes(10240)))
        + data
        + frames.seek_table([len(data), 10240, 8 + len(data) + 8 + 16 + 9, 0])
    ),
    "an append that never was": lambda: (
        (data := zstandard.compress(bytes(10240))) + frames.skippable(32) + frames.trailer(len(data), 1)
    ),
    "an append that leads into itself": lambda: (
        (data := zstandard.compress(bytes(10240))) + frames.skippable(32) + frames.trailer(len(data) + 39, 1)
    ),
    "a hidden frame behind a frame": lambda: (
        (data := zstandard.compress(bytes(10240)))
        + zstandard.compress(REFUSED["a path"])
        + frames.seek_table([len(data) + len(zstandard.compress(REFUSED["a path"])), 10240])
    ),
    "a terabyte of hole": lambda: b"",
    "XML that one emoji makes four times as wide": lambda: archive(
        *(
            member(
                f"{number}.xml",
                XML.replace(
                    b"<devices>",
                    "<description>😀</description>".encode() + b"<a>" + b"x" * 4_000_000 + b"</a><devices>",
                ),
            )
            for number in range(1, 9)
        )
    ),
    "thousands of tiny images": lambda: archive(
        *(member(f"{n}.qcow2", b"QFI\xfb\0\0\0\3") for n in range(3_000)), member("1.xml", XML)
    ),
    "a terabyte of digests": lambda: b"",
}


def limited(operation: str, path: Path, *extra: str) -> tuple[str, int, float]:
    """Output, peak memory in KiB and seconds of an operation in a process that cannot take more than 2 GiB."""
    begin = time.monotonic()
    done = subprocess.run(
        [
            "sh",
            "-c",
            'ulimit -v 2500000; exec "$@"',
            "sh",
            sys.executable,
            str(HERE / "driver.py"),
            operation,
            str(path),
            *extra,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, int(done.stdout.split()[-1]), time.monotonic() - begin


@pytest.mark.parametrize("what", BOMBS)
def test_bombs(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar.zst"
    path.write_bytes(BOMBS[what]())
    if what == "a terabyte of hole":
        path.write_bytes(native([(disk("a"), b"1")]))
        os.truncate(path, 2**40)
    if what == "a terabyte of digests":
        path.write_bytes(tar.header("vda_0.qcow2", 2**40, 1, 0))
        os.truncate(path, 4096 + 2**40)
        blob_at = 4096 + 2**40
        with open(path, "r+b") as file:
            file.seek(blob_at)
            size = 512 + 2**18 * 32
            file.write(tar.header("1.digests", size, 1, blob_at))
            xml_at = tar.round_up(blob_at + 4096 + size, 512)
            xml, _digest = config.encode(
                archives.configuration(
                    [Member("vda_0.qcow2", Role.DISK, 2**40, digest="0" * 64)],
                    1,
                    digests_member="1.digests",
                    digests_digest="0" * 64,
                )
            )
            file.seek(xml_at)
            file.write(tar.header("1_web01.xml", len(xml), 1, xml_at) + xml + tar.END)
    output, peak, seconds = limited("read", path)
    print(f"{what}: {peak // 1024} MiB, {seconds:.1f} s, {path.stat().st_size} bytes: {output[:200]!r}")
    assert (
        "Error" in output
        or "verify False" in output
        or what in ("a terabyte of hole", "thousands of tiny images")
        or "emoji" in what
    )
    assert peak < MAX_RSS_KIB
    assert seconds < 100


@pytest.mark.parametrize(
    "image",
    [
        archives.qcow2_header(backing=b"/etc/shadow"),
        archives.qcow2_header(backing=b'json:{"file.filename":"/etc/shadow"}'),
        archives.qcow2_header(backing=b"nbd://127.0.0.1:9/x"),
        archives.qcow2_header(data_file=b"/etc/shadow"),
    ],
)
def test_nothing_outside_the_archive_is_opened(image: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(archive(member("vda_0.qcow2", image), member("1700000000.xml", XML)))
    with open_archive(str(path)) as reader:
        (found,) = [m for m in reader.point().members if m.name == "vda_0.qcow2"]
        assert found.parent not in [entry.name for entry in reader.entries]
    if not shutil.which("strace"):
        pytest.skip("strace is not installed here")
    log = tmp_path / "log"
    subprocess.run(
        [
            "strace",
            "-f",
            "-qq",
            "-e",
            "trace=open,openat,openat2,connect",
            "-o",
            log,
            sys.executable,
            HERE / "driver.py",
            "read",
            path,
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)])},
    )
    calls = log.read_text()
    assert str(path) in calls
    assert "/etc/shadow" not in calls and "connect(" not in calls


def test_what_stands_beside_an_archive_is_not_followed(tmp_path: Path) -> None:
    path = str(tmp_path / "a.tar")
    os.symlink("/etc/passwd", path + ".notes")
    assert sidecars.notes(path) == ""
    os.unlink(path + ".notes")
    os.mkfifo(path + ".notes")
    assert sidecars.notes(path) == ""
    os.unlink(path + ".notes")
    os.mkdir(path + ".notes")
    assert sidecars.notes(path) == ""
    with pytest.raises(KvmopsError, match="65536"):
        sidecars.set_notes(path, "x" * 70_000)


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.tar")
    for path in (tmp_path / "fifo.tar", tmp_path, tmp_path / "absent.tar", Path("/dev/zero")):
        with pytest.raises(ArchiveError):
            open_archive(str(path))
