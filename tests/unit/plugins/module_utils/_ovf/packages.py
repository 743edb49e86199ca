# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Packages, descriptors and VMDKs for tests, honest ones and others, made without the collection's own code."""

from __future__ import annotations

import hashlib
import io
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SECTOR, GRAIN = 512, 128
GRAIN_BYTES = GRAIN * SECTOR
STREAM = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
_NAMESPACES = (
    'xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" '
    'xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" '
    'xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData" '
    'xmlns:vmw="http://www.vmware.com/schema/ovf" xmlns:vbox="http://www.virtualbox.org/ovf/machine"'
)


def corpus() -> Path | None:
    """The directory of real descriptors, which are not part of this project; None where it is not there."""
    named = os.environ.get("KVMOPS_OVF_CORPUS")
    places = [Path(named)] if named else [parent.parent / "shared" / "ovf-corpus" for parent in Path(__file__).parents]
    return next((place for place in places if place.is_dir()), None)


# descriptors


def item(number: int, kind: int, **fields: object) -> str:
    """One row of the hardware section; `extra` is put in as it is."""
    extra, attributes = str(fields.pop("extra", "")), str(fields.pop("attributes", ""))
    values = {"InstanceID": number, "ResourceType": kind, **fields}
    return f"<Item {attributes}>{''.join(f'<rasd:{key}>{value}</rasd:{key}>' for key, value in values.items())}{extra}</Item>"


CPU = item(1, 3, VirtualQuantity=2, ElementName="2 CPUs")
MEMORY = item(2, 4, VirtualQuantity=512, AllocationUnits="byte * 2^20", ElementName="memory")
LSI = item(3, 6, ResourceSubType="lsilogic", Address=0, ElementName="SCSI 0")
DISK = item(4, 17, Parent=3, AddressOnParent=0, HostResource="ovf:/disk/d1", ElementName="Hard disk 1")
NIC = item(5, 10, ResourceSubType="VmxNet3", Connection="VM Network", ElementName="Network adapter 1")
BASE = CPU + MEMORY + LSI + DISK + NIC


def descriptor(
    items: str = BASE,
    *,
    files: str = '<File ovf:id="file1" ovf:href="disk1.vmdk"/>',
    disks: str = f'<Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:capacity="4194304" ovf:format="{STREAM}"/>',
    name: str = "web01",
    hardware: str = "",
    system: str = "",
    head: str = "",
    os: str = '<OperatingSystemSection ovf:id="94" vmw:osType="ubuntu64Guest"><Info/></OperatingSystemSection>',
    family: str = "vmx-11",
) -> bytes:
    """A descriptor with one virtual system."""
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Envelope {_NAMESPACES}><References>{files}</References>'
        f"<DiskSection><Info/>{disks}</DiskSection><NetworkSection><Info/><Network ovf:name='VM Network'/></NetworkSection>{head}"
        f'<VirtualSystem ovf:id="vm"><Info/><Name>{name}</Name>{os}{system}<VirtualHardwareSection><Info/>'
        f"<System><vssd:VirtualSystemType>{family}</vssd:VirtualSystemType></System>{items}{hardware}"
        "</VirtualHardwareSection></VirtualSystem></Envelope>"
    ).encode()


def envelope(content: str, namespace: str = "http://schemas.dmtf.org/ovf/envelope/1") -> bytes:
    """A descriptor with this in it."""
    return f"<Envelope {_NAMESPACES.replace('http://schemas.dmtf.org/ovf/envelope/1', namespace)}>{content}</Envelope>".encode()


# disks


def content(size_bytes: int, seed: int = 1, grains: Sequence[int] = (0, 3, 4)) -> bytes:
    """A disk with data in these grains (as far as it has them), half of it text, and zeros elsewhere."""
    data = bytearray(size_bytes)
    random_ = random.Random(seed)
    for number in grains:
        begin = number * GRAIN_BYTES
        part = random_.randbytes(GRAIN_BYTES // 4) + b"a line of text\n" * 4000
        end = min(begin + GRAIN_BYTES, size_bytes)
        if begin < size_bytes:
            data[begin:end] = part[:GRAIN_BYTES].ljust(GRAIN_BYTES, b".")[: end - begin]
    return bytes(data)


def text(kind: str, sectors: int, extra: str = "", extents: str = "") -> bytes:
    """A disk's own descriptor."""
    lines = extents or f'RDONLY {sectors} SPARSE "disk1.vmdk"'
    return (
        f'# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="{kind}"\n{extra}\n'
        f'# Extent description\n{lines}\n\n#DDB\nddb.virtualHWVersion = "4"\n'
    ).encode()


def header(
    capacity: int,
    *,
    flags: int = 0x30001,
    grain: int = GRAIN,
    text_at: int = 1,
    text_sectors: int = 20,
    per_table: int = 512,
    directory_at: int = 0,
    compression: int = 1,
    version: int = 3,
    magic: bytes = b"KDMV",
) -> bytes:
    """A sparse header of one sector."""
    return struct.pack(
        "<4sIIQQQQIQQQBccccH", magic, version, flags, capacity, grain, text_at, text_sectors, per_table, 0, directory_at, 128, 0,
        b"\n", b" ", b"\r", b"\n", compression,
    ).ljust(SECTOR, b"\0")  # fmt: skip


def stream_vmdk(
    data: bytes,
    *,
    own_text: bytes | None = None,
    first: Mapping[str, int] | None = None,
    last: Mapping[str, int] | None = None,
    marker: Callable[[int], int] = lambda lba: lba,
    directory: Callable[[list[int]], list[int]] = lambda entries: entries,
    tables: Callable[[list[list[int]]], list[list[int]]] = lambda tables: tables,
    deflate: Callable[[bytes], bytes] = lambda grain: zlib.compress(grain, 6),
) -> bytes:
    """A streamOptimized disk, as VMware writes it; the arguments make others of it."""
    sectors = -(-len(data) // SECTOR)
    out = bytearray(GRAIN_BYTES)
    out[SECTOR : SECTOR + 20 * SECTOR] = (own_text or text("streamOptimized", sectors)).ljust(20 * SECTOR, b"\0")
    grains = -(-len(data) // GRAIN_BYTES)
    all_tables = [[0] * 512 for _number in range(-(-grains // 512))]

    def metadata(kind: int, payload: bytes) -> int:
        out.extend(struct.pack("<QII", -(-len(payload) // SECTOR), 0, kind).ljust(SECTOR, b"\0"))
        at = len(out) // SECTOR
        out.extend(payload.ljust(-(-len(payload) // SECTOR) * SECTOR, b"\0"))
        return at

    for number in range(grains):
        grain = data[number * GRAIN_BYTES : (number + 1) * GRAIN_BYTES]
        if any(grain):
            all_tables[number // 512][number % 512] = len(out) // SECTOR
            packed = deflate(grain.ljust(GRAIN_BYTES, b"\0"))
            out.extend(struct.pack("<QI", marker(number * GRAIN), len(packed)) + packed)
            out.extend(bytes(-len(out) % SECTOR))
    places = [metadata(1, struct.pack("<512I", *table)) if any(table) else 0 for table in tables(all_tables)]
    places = directory(places)
    directory_at = metadata(2, struct.pack(f"<{len(places)}I", *places))
    footer = header(**{"capacity": sectors, "directory_at": directory_at, **(last or {})})  # type: ignore[arg-type]
    metadata(3, footer)
    out.extend(bytes(SECTOR))
    out[:SECTOR] = header(**{"capacity": sectors, "directory_at": 2**64 - 1, **(first or {})})  # type: ignore[arg-type]
    return bytes(out)


def sparse_vmdk(data: bytes, *, own_text: bytes | None = None, shuffled: bool = False) -> bytes:
    """A monolithicSparse disk."""
    sectors = -(-len(data) // SECTOR)
    out = bytearray(GRAIN_BYTES * 2)
    out[SECTOR : SECTOR + 20 * SECTOR] = (own_text or text("monolithicSparse", sectors)).ljust(20 * SECTOR, b"\0")
    grains = -(-len(data) // GRAIN_BYTES)
    tables = [[0] * 512 for _number in range(-(-grains // 512))]
    order = list(range(grains))
    if shuffled:
        random.Random(1).shuffle(order)
    for number in order:
        grain = data[number * GRAIN_BYTES : (number + 1) * GRAIN_BYTES]
        if any(grain):
            tables[number // 512][number % 512] = len(out) // SECTOR
            out.extend(grain.ljust(GRAIN_BYTES, b"\0"))
    places = []
    for table in tables:
        places.append(len(out) // SECTOR)
        out.extend(struct.pack("<512I", *table))
    directory_at = len(out) // SECTOR
    out.extend(struct.pack(f"<{len(places)}I", *places).ljust(SECTOR, b"\0"))
    out[:SECTOR] = header(sectors, flags=3, directory_at=directory_at, compression=0, version=1)
    return bytes(out)


# packages


def manifest(files: Mapping[str, bytes], algorithm: str = "sha256", form: str = "{name}({file})= {digest}") -> bytes:
    """A manifest of these files."""
    rows = (
        form.format(name=algorithm.upper(), file=file, digest=hashlib.new(algorithm, data).hexdigest())
        for file, data in files.items()
    )
    return ("\n".join(rows) + "\n").encode()


def ova(path: Path, files: Mapping[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """An OVA of these files, in this order."""
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            archive.addfile(info, io.BytesIO(data))
    return path


def honest(size_bytes: int = 4 << 20) -> dict[str, bytes]:
    """Files of a package that nothing is wrong with."""
    files = {"vm.ovf": descriptor(), "disk1.vmdk": stream_vmdk(content(size_bytes))}
    return {"vm.ovf": files["vm.ovf"], "vm.mf": manifest(files), "disk1.vmdk": files["disk1.vmdk"]}


def put(directory: Path, files: Mapping[str, bytes]) -> Path:
    """The files in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory
