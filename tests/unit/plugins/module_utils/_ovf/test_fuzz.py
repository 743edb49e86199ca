# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever the bytes of a descriptor, a tar or a VMDK are, what comes out is our own errors or a right result, in bounded time.

Seconds as a rule; KVMOPS_BACKUP_EXHAUSTIVE=1 makes a hundred times as many examples (minutes), 2 twice that, and so on. A failure
prints how to run it again (`@reproduce_failure`), and the seed (KVMOPS_BACKUP_SEED).
"""

from __future__ import annotations

import os
import random
import tarfile
import time
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import AsQcow2Source
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import (
    archive,
    descriptor,
    hardware,
    manifest,
    opened,
    report,
    vmdk,
)
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.package import Package, PackageFile
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._ovf import packages

EXHAUSTIVE = float(os.environ.get("KVMOPS_BACKUP_EXHAUSTIVE") or 0)
SEED = int(os.environ.get("KVMOPS_BACKUP_SEED", "0")) or random.randrange(2**32)
EXAMPLES = int(60 + EXHAUSTIVE * 6000)
LIMIT_S = 10.0
DATA = packages.content(6 << 20, grains=(0, 1, 2, 30, 64, 95))
STREAM, SPARSE = packages.stream_vmdk(DATA), packages.sparse_vmdk(DATA)
OVF = packages.descriptor(
    packages.BASE + packages.item(9, 15, Parent=3, HostResource="ovf:/file/file1") + packages.item(10, 24),
    hardware='<vmw:Config vmw:key="firmware" vmw:value="efi"/>',
)
WORDS = [
    "", "0", "-1", "${x}", "ovf:/disk/d1", "ovf:/file/file1", "../../x", "/etc/passwd", "17", "4", "3", "10", "9" * 24,
    "byte * 2^20", "byte * 2^9999", "nan", "1e309", "\u0661", "a b", "&#10;", "lsilogic,buslogic", "gzip", "http://x/y",
]  # fmt: skip

fuzz = settings(
    max_examples=EXAMPLES, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck), database=None
)
# an edit: where (in thousandths), what kind, and a value
edits = st.lists(
    st.tuples(st.integers(0, 999_999), st.integers(0, 3), st.binary(min_size=1, max_size=12)), min_size=1, max_size=6
)


def edited(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    out = bytearray(data)
    for place, kind, value in changes:
        at = place * len(out) // 1_000_000
        if kind == 0:
            out[at : at + len(value)] = value
        elif kind == 1:
            out[at:at] = value
        elif kind == 2:
            del out[at : at + len(value) * 40]
        else:
            out = out[: max(at, 1)]
    return bytes(out)


def timed(begin: float) -> None:
    assert time.monotonic() - begin < LIMIT_S, f"seed {SEED}"


def setup_module() -> None:
    print(f"seed {SEED}, {EXAMPLES} examples for each test")


@seed(SEED)
@fuzz
@given(edits)
def test_bytes_of_a_descriptor(changes: list[tuple[int, int, bytes]]) -> None:
    parse(edited(OVF, changes))


@seed(SEED)
@fuzz
@given(st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(WORDS)), min_size=1, max_size=8))
def test_values_of_a_descriptor(changes: list[tuple[int, str]]) -> None:
    """Any value instead of any other one: texts and attributes of a document that stays well-formed."""
    root = _xml.parse(OVF, "the descriptor")
    elements = [element for element in root.iter() if isinstance(element.tag, str)]
    for number, word in changes:
        element = elements[number % len(elements)]
        keys = list(element.attrib)
        if keys and number % 3:
            element.set(keys[number % len(keys)], word)
        elif not len(element):
            element.text = word
        elif number % 5 == 0 and element.getparent() is not None:
            element.getparent().append(elements[(number * 7) % len(elements)].__copy__())
    parse(_xml.text(root).encode())


def parse(data: bytes) -> None:
    begin = time.monotonic()
    try:
        described = descriptor.parse(data, "the descriptor")
        made = hardware.plan(described, data, "the descriptor", hardware.Options())
        _xml.parse(made.domain_xml, "the definition")
        list(report.lines(made.report))
    except KvmopsError as error:
        assert str(error)
    timed(begin)


@seed(SEED)
@fuzz
@given(
    st.one_of(
        st.binary(max_size=400), edits.map(lambda changes: edited(packages.manifest({"a": b"", "b c": b"x"}), changes))
    )
)
def test_bytes_of_a_manifest(data: bytes) -> None:
    try:
        assert manifest.parse(data, "the manifest")
    except KvmopsError as error:
        assert str(error)


def disk(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    begin = time.monotonic()
    try:
        source = AsQcow2Source(vmdk.SparseVmdk(PackageFile("disk1.vmdk", ((fd, 0, len(data)),))))
        for offset in range(0, min(source.size_bytes, 1 << 30), 4 << 20):
            source.read_chunk(offset, memoryview(bytearray(min(4 << 20, source.size_bytes - offset))))
    except KvmopsError as error:
        assert str(error)
    finally:
        os.close(fd)
    timed(begin)


def test_bytes_of_a_vmdk(tmp_path: Path) -> None:
    """Edits anywhere, and most of them where the headers and tables are."""

    @seed(SEED)
    @fuzz
    @given(edits, st.sampled_from(["anywhere", "head", "tail"]), st.booleans())
    def run(changes: list[tuple[int, int, bytes]], where: str, stream: bool) -> None:
        whole = STREAM if stream else SPARSE
        if where == "head":
            disk(tmp_path / "disk", edited(whole[:1024], changes)[:1024].ljust(1024, b"\0") + whole[1024:])
        elif where == "tail":
            disk(tmp_path / "disk", whole[:-6144] + edited(whole[-6144:], changes))
        else:
            disk(tmp_path / "disk", edited(whole, changes))

    run()


def test_bytes_of_a_tar(tmp_path: Path) -> None:
    """A damaged package is refused, or what is read of it is what its digests say."""
    whole = {
        kind: packages.ova(tmp_path / f"{kind}.ova", packages.honest(1 << 20), kind).read_bytes()
        for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    }
    path = tmp_path / "a.ova"

    @seed(SEED)
    @fuzz
    @given(edits, st.sampled_from(sorted(whole)), st.booleans())
    def run(changes: list[tuple[int, int, bytes]], kind: int, head: bool) -> None:
        data = whole[kind]
        path.write_bytes(edited(data[:8192], changes) + data[8192:] if head else edited(data, changes))
        begin = time.monotonic()
        try:
            with (
                Package(str(path)) as package,
                opened.opened(opened.describe(package, archive.choice()), str(tmp_path)) as made,
            ):
                assert made.drives[0].member.size_bytes > 0
        except KvmopsError as error:
            assert str(error)
        timed(begin)

    run()
