# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an image file says about itself, read without QEMU and without trusting a byte of it.

Source of the numbers: QEMU's docs/interop/qcow2.txt and the limits that block/qcow2.h enforces.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from typing import Callable

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError

#: ``(offset, length)`` → up to ``length`` bytes, shorter only at the end of the file.
ReadAt = Callable[[int, int], bytes]

QCOW2_MAGIC = b"QFI\xfb"
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_BYTES = 64 << 20
MAX_SNAPSHOT_EXTRA_BYTES = 1024
MAX_NAME_BYTES = 1023
MAX_VIRTUAL_BYTES = (1 << 63) - 512

DIRTY, CORRUPT, DATA_FILE, COMPRESSION_TYPE, EXTENDED_L2 = (1 << bit for bit in range(5))
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2
AUTOCLEAR_BITMAPS = 1

EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441

_V2_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_V3_FIELDS = struct.Struct(">QQQII")
_V2_BYTES, _V3_BYTES = 72, 104
_SNAPSHOT_ENTRY = struct.Struct(">QIHHIIQII")
_WINDOW_BYTES = 1 << 20

#: Name of a data file that the header announces without naming it.
UNNAMED = "(unnamed)"


class ImageError(KvmopsError):
    """A disk image that is inconsistent, hostile or of a kind that cannot be handled; or qemu-img failed on it."""


def reads(fd: int, path: str) -> ReadAt:
    """Reads of an open file, of which an OSError has the path: by itself it has none."""

    def read(offset: int, length: int) -> bytes:
        try:
            return os.pread(fd, length, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error

    return read


@dataclass(frozen=True)
class ImageInfo:
    """What matters of an image file before anything opens it.

    ``format`` is ``qcow2``, ``raw`` or the name of a foreign format (``vmdk``, ``vdi``, …) that callers refuse; for
    those ``virtual_size_bytes`` is the file's size. ``data_file`` is ``(unnamed)`` when announced without a name.
    """

    format: str
    virtual_size_bytes: int
    backing_file: str
    backing_format: str
    data_file: str
    encrypted: bool
    internal_snapshots: int
    dirty: bool
    corrupt: bool
    cluster_bytes: int


@dataclass(frozen=True)
class Qcow2Header:
    """The fields of a qcow2 header that were checked against each other and against the file's size."""

    version: int
    cluster_bits: int
    virtual_size_bytes: int
    crypt_method: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int
    autoclear: int
    header_bytes: int
    backing_file: str
    extensions: dict[int, bytes] = field(default_factory=dict)

    @property
    def cluster_bytes(self) -> int:
        return 1 << self.cluster_bits


def probe(read_at: ReadAt, size_bytes: int) -> ImageInfo:
    """Describe the image whose ``size_bytes`` bytes ``read_at`` reads; a few reads, never more than 1 MiB at once.

    Raises ImageError for a qcow2 whose header cannot be believed. Anything without a known magic is ``raw``: whether
    a file is *meant* to be raw is the caller's knowledge, as a guest may write any magic into its own raw disk.
    """
    head = read_at(0, 512)
    if head[:4] == QCOW2_MAGIC and head[4:8] != b"\0\0\0\1":
        header = read_header(read_at, size_bytes)
        _check_snapshot_table(read_at, size_bytes, header)
        return _describe(header)
    return ImageInfo(
        format=_foreign_format(head, read_at, size_bytes) or "raw",
        virtual_size_bytes=size_bytes,
        backing_file="",
        backing_format="",
        data_file="",
        encrypted=head[:6] == b"LUKS\xba\xbe",
        internal_snapshots=0,
        dirty=False,
        corrupt=False,
        cluster_bytes=0,
    )


def check_archive_image(info: ImageInfo, *, allowed_backing: str | None, repair: bool = False) -> None:
    """Refuse an image that must not be unpacked: foreign format, data file, corrupt, or a backing file nobody expects.

    ``allowed_backing`` is what the member table says the image stands on; the name in the header itself is replaced
    later and therefore not compared. Encrypted images are fine, and with ``repair`` corrupt ones.
    """
    if info.format not in ("qcow2", "raw"):
        raise ImageError("disk image", f"its format is {info.format}, only qcow2 and raw are expected")
    if info.data_file:
        raise ImageError("disk image", f"it keeps its data in another file ({info.data_file!r})", _HOST_FILE_HINT)
    if info.backing_file and allowed_backing is None:
        raise ImageError("disk image", f"it stands on another file ({info.backing_file!r})", _HOST_FILE_HINT)
    if info.corrupt and not repair:
        raise ImageError(
            "disk image",
            "QEMU had marked it as corrupt before it was backed up",
            "A restore with 'repair: true' repairs the restored copy.",
        )


_HOST_FILE_HINT = "An image from an archive must not open files of this host, so it is refused."


def read_header(read_at: ReadAt, size_bytes: int) -> Qcow2Header:
    """Parse and check the header and its extensions (everything in the first cluster). Raises ImageError."""
    head = read_at(0, 512)
    if len(head) < _V2_BYTES or head[:4] != QCOW2_MAGIC:
        raise _bad("no complete header")
    (_dummy, version, backing_offset, backing_bytes, cluster_bits, virtual_size, crypt_method, l1_entries, l1_offset,
     table_offset, table_clusters, snapshots, snapshots_offset) = _V2_HEADER.unpack_from(head)  # fmt: skip
    if version not in (2, 3):
        raise _bad(f"version {version} is unknown")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise _bad(f"cluster size 2^{cluster_bits} is outside 2^{MIN_CLUSTER_BITS}..2^{MAX_CLUSTER_BITS}")
    incompatible, autoclear, header_bytes = 0, 0, _V2_BYTES
    if version == 3:
        incompatible, autoclear, header_bytes = _version3_fields(head, cluster_bits)
    if crypt_method > 2:
        raise _bad(f"encryption method {crypt_method} is unknown")
    first_cluster = _first_cluster(read_at, size_bytes, cluster_bits)
    backing_file = ""
    extensions_end = len(first_cluster)
    if backing_offset:
        backing_file = _name(first_cluster, backing_offset, backing_bytes, header_bytes, 1 << cluster_bits)
        extensions_end = backing_offset
    elif backing_bytes:
        raise _bad("it gives a backing file name's length but no place")
    header = Qcow2Header(
        version=version,
        cluster_bits=cluster_bits,
        virtual_size_bytes=virtual_size,
        crypt_method=crypt_method,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        refcount_table_offset=table_offset,
        refcount_table_clusters=table_clusters,
        snapshots=snapshots,
        snapshots_offset=snapshots_offset,
        incompatible=incompatible,
        autoclear=autoclear,
        header_bytes=header_bytes,
        backing_file=backing_file,
        extensions=_extensions(first_cluster, header_bytes, extensions_end),
    )
    _check_tables(header, size_bytes)
    _check_extensions(header, size_bytes)
    return header


def _bad(why: str) -> ImageError:
    return ImageError("qcow2 header", why, "The file is damaged or made to deceive; it is refused.")


def _version3_fields(head: bytes, cluster_bits: int) -> tuple[int, int, int]:
    if len(head) <= _V3_BYTES:
        raise _bad("no complete header")
    incompatible, _dummy, autoclear, refcount_order, header_bytes = _V3_FIELDS.unpack_from(head, _V2_BYTES)
    if incompatible & ~KNOWN_INCOMPATIBLE:
        raise _bad(f"incompatible features {incompatible & ~KNOWN_INCOMPATIBLE:#x} are unknown")
    if refcount_order > 6:
        raise _bad(f"refcount width 2^{refcount_order} is beyond 64 bits")
    if header_bytes < _V3_BYTES or header_bytes % 8 or header_bytes > 1 << cluster_bits:
        raise _bad(f"header length {header_bytes} is impossible")
    compression = head[_V3_BYTES] if header_bytes > _V3_BYTES else 0
    if compression > 1 or bool(compression) != bool(incompatible & COMPRESSION_TYPE):
        raise _bad(f"compression type {compression} does not fit the feature bits")
    if incompatible & EXTENDED_L2 and cluster_bits < 14:
        raise _bad(f"subclusters need clusters of 16 KiB, these are 2^{cluster_bits}")
    return incompatible, autoclear, header_bytes


def _first_cluster(read_at: ReadAt, size_bytes: int, cluster_bits: int) -> bytes:
    want = min(1 << cluster_bits, size_bytes)
    data = read_at(0, want)
    if len(data) != want:
        raise _bad("the file ends within its first cluster")
    return data


def _name(cluster: bytes, offset: int, length: int, header_bytes: int, cluster_bytes: int) -> str:
    if not header_bytes <= offset <= cluster_bytes or length > min(MAX_NAME_BYTES, cluster_bytes - offset):
        raise _bad(f"backing file name ({length} bytes at {offset}) lies outside the first cluster")
    raw = cluster[offset : offset + length]
    if len(raw) != length or not raw or b"\0" in raw:
        raise _bad("backing file name is empty, cut off or contains NUL")
    return raw.decode("utf-8", "surrogateescape")


def _extensions(cluster: bytes, start: int, end: int) -> dict[int, bytes]:
    """Header extensions by type, from ``start`` up to ``end`` (the backing file name or the end of the cluster)."""
    found: dict[int, bytes] = {}
    offset = start
    while offset + 8 <= end:
        kind, length = struct.unpack_from(">II", cluster, offset)
        if kind == EXT_END:
            break
        offset += 8
        if length > end - offset:
            raise _bad(f"header extension {kind:#x} of {length} bytes runs out of its room")
        if kind in found:
            raise _bad(f"header extension {kind:#x} occurs twice")
        found[kind] = cluster[offset : offset + length]
        offset += -(-length // 8) * 8
    return found


def _check_tables(header: Qcow2Header, size_bytes: int) -> None:
    cluster = header.cluster_bytes
    if header.virtual_size_bytes > MAX_VIRTUAL_BYTES:
        raise _bad(f"virtual size {header.virtual_size_bytes} is absurd")
    l2_entry_bytes = 16 if header.incompatible & EXTENDED_L2 else 8
    bytes_per_l1_entry = cluster * (cluster // l2_entry_bytes)
    needed = -(-header.virtual_size_bytes // bytes_per_l1_entry)
    if header.l1_entries < needed or header.l1_entries * 8 > MAX_L1_BYTES:
        raise _bad(f"L1 table of {header.l1_entries} entries does not fit virtual size {header.virtual_size_bytes}")
    _check_place("L1 table", header.l1_offset, header.l1_entries * 8, cluster, size_bytes)
    table_bytes = header.refcount_table_clusters * cluster
    if not 0 < table_bytes <= MAX_REFCOUNT_TABLE_BYTES:
        raise _bad(f"refcount table of {header.refcount_table_clusters} clusters is impossible")
    _check_place("refcount table", header.refcount_table_offset, table_bytes, cluster, size_bytes)
    if header.snapshots > MAX_SNAPSHOTS:
        raise _bad(f"{header.snapshots} internal snapshots are more than QEMU allows")
    # An entry takes 40 bytes at the very least.
    _check_place("snapshot table", header.snapshots_offset, header.snapshots * 40, cluster, size_bytes)


def _check_place(what: str, offset: int, length: int, cluster: int, size_bytes: int) -> None:
    """A table must begin on a cluster behind the header and end within the file's last (perhaps unfinished) cluster."""
    if length == 0:
        return
    file_end = -(-size_bytes // cluster) * cluster
    if offset == 0 or offset % cluster or offset >= size_bytes or offset + length > file_end:
        raise _bad(f"{what} ({length} bytes at {offset}) lies outside the file or across clusters")


def _check_extensions(header: Qcow2Header, size_bytes: int) -> None:
    extensions, cluster = header.extensions, header.cluster_bytes
    for kind in (EXT_BACKING_FORMAT, EXT_DATA_FILE):
        if len(extensions.get(kind, b"")) > MAX_NAME_BYTES or b"\0" in extensions.get(kind, b""):
            raise _bad(f"header extension {kind:#x} is not a name")
    if header.crypt_method == 2:
        crypto = extensions.get(EXT_CRYPTO, b"")
        if len(crypto) != 16:
            raise _bad("it is LUKS encrypted but says nowhere where the LUKS header is")
        offset, length = struct.unpack(">QQ", crypto)
        _check_place("LUKS header", offset, max(length, 1), cluster, size_bytes)
    if EXT_BITMAPS in extensions and header.autoclear & AUTOCLEAR_BITMAPS:
        bitmaps = extensions[EXT_BITMAPS]
        if len(bitmaps) != 24:
            raise _bad("the bitmaps extension has the wrong size")
        count, _dummy, directory_bytes, directory_offset = struct.unpack(">IIQQ", bitmaps)
        if not 0 < count <= 65535 or not 0 < directory_bytes <= count * (24 + MAX_SNAPSHOT_EXTRA_BYTES + 1024):
            raise _bad(f"a bitmap directory of {directory_bytes} bytes for {count} bitmaps is impossible")
        _check_place("bitmap directory", directory_offset, directory_bytes, cluster, size_bytes)


def _check_snapshot_table(read_at: ReadAt, size_bytes: int, header: Qcow2Header) -> None:
    """Walk the snapshot table in windows, so that neither its entries nor their L1 tables point out of the file."""
    if header.snapshots == 0:
        return
    limit = header.snapshots_offset + MAX_SNAPSHOT_TABLE_BYTES
    offset, window_at, window = header.snapshots_offset, 0, b""
    for index in range(header.snapshots):
        if offset + _SNAPSHOT_ENTRY.size > window_at + len(window):
            window_at, window = offset, read_at(offset, _WINDOW_BYTES)
        if offset + _SNAPSHOT_ENTRY.size > window_at + len(window) or offset > limit:
            raise _bad(f"the table of internal snapshots ends before snapshot {index + 1} of {header.snapshots}")
        l1_offset, l1_entries, id_bytes, name_bytes, *_dummy, extra_bytes = _SNAPSHOT_ENTRY.unpack_from(
            window, offset - window_at
        )
        if extra_bytes > MAX_SNAPSHOT_EXTRA_BYTES or l1_entries * 8 > MAX_L1_BYTES:
            raise _bad(f"internal snapshot {index + 1} has impossible sizes")
        _check_place(
            f"L1 table of internal snapshot {index + 1}", l1_offset, l1_entries * 8, header.cluster_bytes, size_bytes
        )
        end = offset + _SNAPSHOT_ENTRY.size + extra_bytes + id_bytes + name_bytes
        if end > size_bytes:
            raise _bad(f"internal snapshot {index + 1} runs out of the file")
        offset = -(-end // 8) * 8  # QEMU does not write the fill behind the last one


def _describe(header: Qcow2Header) -> ImageInfo:
    data_file = header.extensions.get(EXT_DATA_FILE, b"").decode("utf-8", "surrogateescape")
    if header.incompatible & DATA_FILE and not data_file:
        data_file = UNNAMED
    return ImageInfo(
        format="qcow2",
        virtual_size_bytes=header.virtual_size_bytes,
        backing_file=header.backing_file,
        backing_format=header.extensions.get(EXT_BACKING_FORMAT, b"").decode("utf-8", "surrogateescape"),
        data_file=data_file,
        encrypted=header.crypt_method != 0,
        internal_snapshots=header.snapshots,
        dirty=bool(header.incompatible & DIRTY),
        corrupt=bool(header.incompatible & CORRUPT),
        cluster_bytes=header.cluster_bytes,
    )


_MAGICS = (
    (0, b"QFI\xfb\0\0\0\1", "qcow"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),
    (0, b"QED\0", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)


def _foreign_format(head: bytes, read_at: ReadAt, size_bytes: int) -> str:
    for offset, magic, name in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    if _is_vmdk_descriptor(head):
        return "vmdk"
    if size_bytes >= 512 and read_at(size_bytes - 512, 8) == b"conectix":
        return "vhd"
    if size_bytes > 32774 and read_at(32769, 5) == b"CD001":
        return "iso"
    return ""


def _is_vmdk_descriptor(head: bytes) -> bool:
    """QEMU takes text as VMDK when its first line that is neither blank nor a comment is ``version=…``."""
    if head.lstrip()[:21].lower() == b"# disk descriptorfile":
        return True
    for line in head.splitlines():
        text = line.strip()
        if text and not text.startswith(b"#"):
            return text.startswith(b"version=")
    return False
