# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The tar layer: headers we write and a strict reader of those that others wrote.

A member is a pax extended header padded by a comment record, so that its data begins on a 4096-byte boundary, then a ustar header,
then the data, then zeros up to a multiple of 512. See docs/FORMAT.md, "Plain layout". Source: POSIX.1-2017, pax interchange format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable, Optional

from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._errors import DamagedError, HostileError

BLOCK = 512
ALIGN = 4096
END = bytes(ALIGN)
OCTAL_LIMIT = 8 * 2**30  # the ustar size field ends here; busybox needs base-256 beyond it
MAX_NAME_BYTES = 100  # of the ustar name field; longer names would need a second form
MAX_MEMBERS = 20_000
MAX_EXTENDED_HEADERS = 16  # before one member
MAX_PAX_BYTES = 64 * 2**10
MAX_MEMBER_BYTES = 2**60
MAX_TIME = 10**11

Fetch = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Entry:
    """A regular-file member: header and data offsets and size in bytes of the tar stream, modification time in unix seconds."""

    name: str
    header_offset: int
    offset: int
    size_bytes: int
    mtime: int

    @property
    def end(self) -> int:
        """Offset behind the data and its zero fill."""
        return round_up(self.offset + self.size_bytes, BLOCK)


def round_up(number: int, to: int) -> int:
    """The smallest multiple of `to` that is not below `number`."""
    return -(-number // to) * to


def _number(value: int, width: int) -> bytes:
    if value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return b"\x80" + value.to_bytes(width - 1, "big")


def _ustar(name: str, size: int, mtime: int, kind: bytes) -> bytes:
    fields = (
        name.encode("ascii")[:MAX_NAME_BYTES].ljust(MAX_NAME_BYTES, b"\0")
        + _number(0o600, 8)
        + _number(0, 8)
        + _number(0, 8)
        + _number(size, 12)
        + _number(mtime, 12)
        + b" " * 8
        + kind
        + bytes(100)
        + b"ustar\x0000"
        + b"root".ljust(32, b"\0") * 2
        + _number(0, 8)
        + _number(0, 8)
    ).ljust(BLOCK, b"\0")
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def data_offset(header_offset: int) -> int:
    """Where the data of a member begins whose header begins at `header_offset`."""
    return round_up(header_offset + 3 * BLOCK, ALIGN)


def is_own_name(name: str) -> bool:
    """Whether we give a member such a name."""
    try:
        return 0 < len(name) <= MAX_NAME_BYTES and name.isascii() and names.checked_member(name) == name
    except HostileError:
        return False


def header(name: str, size: int, mtime: int, header_offset: int) -> bytes:
    """Everything between `header_offset` and the member's aligned data. Raises ValueError for names that we never give."""
    if not is_own_name(name):
        raise ValueError(f"{name!r} is no name for a member")
    room = data_offset(header_offset) - header_offset - 2 * BLOCK
    records = b""
    if size >= OCTAL_LIMIT:
        body = f" size={size}\n"
        length = len(body) + 2
        records = f"{length}{body}".encode()
    left = room - len(records)
    head, tail = f"{left} comment=", "\n"
    records += (head + " " * (left - len(head) - len(tail)) + tail).encode()
    return _ustar(f"PaxHeaders/{name}", room, mtime, b"x") + records + _ustar(name, size, mtime, b"0")


def bare_header(name: str, size: int, mtime: int) -> bytes:
    """A ustar header without a pax header, as an increment's first member has it."""
    return _ustar(name, size, mtime, b"0")


def begins_as_ours(data: bytes) -> bool:
    """Whether the first ALIGN bytes of a stream are, byte for byte, what stands before the first member that we write."""
    found = framing(data[data_offset(0) - BLOCK : data_offset(0)])
    try:
        return found is not None and header(*found, 0) == data
    except ValueError:  # no name for a member
        return False


def is_header(block: bytes) -> bool:
    """Whether a block is a header as we write them, also one of a pax header."""
    if len(block) != BLOCK or block[257:265] != b"ustar\x0000":
        return False
    try:
        _check_sum(block, 0)
    except DamagedError:
        return False
    return True


def framing(header_bytes: bytes) -> Optional[tuple[str, int, int]]:
    """(name, size, mtime) if the block is the ustar header of a member as we write it, else None."""
    if len(header_bytes) != BLOCK:
        return None
    try:
        _check_sum(header_bytes, 0)
        name = header_bytes[:MAX_NAME_BYTES].rstrip(b"\0").decode("ascii")
        size, mtime = _parse_number(header_bytes[124:136], "size", 0), _time(header_bytes)
        return (name, size, mtime) if header_bytes == _ustar(name, size, mtime, b"0") and name else None
    except (DamagedError, ValueError):
        return None


def _time(block: bytes) -> int:
    """Modification time of a header; 0 where it is not between 1970 and the year 5138: it only serves for show."""
    try:
        found = _parse_number(block[136:148], "time", 0)
    except DamagedError:
        return 0
    return found if found <= MAX_TIME else 0


def _parse_number(field: bytes, what: str, at: int) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if field[0] & 0x80 or any(c not in b"01234567" for c in digits):
        raise DamagedError("archive", f"the tar header at offset {at} has no valid {what}", offset=at, length=BLOCK)
    return int(digits, 8)


def _check_sum(block: bytes, at: int) -> None:
    stored = _parse_number(block[148:156], "checksum", at)
    plain = block[:148] + b" " * 8 + block[156:]
    # Some tars of old sum signed bytes; told only where needed, for it is slow.
    if stored != sum(plain) and stored != sum(c - 256 if c > 127 else c for c in plain):
        raise DamagedError("archive", f"the tar header at offset {at} has a wrong checksum", offset=at, length=BLOCK)


def _pax_records(data: bytes, at: int) -> dict[str, str]:
    records: dict[str, str] = {}
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        try:
            digits = data[position:space] if space > 0 else b""
            length = int(digits) if digits.isdigit() else 0
            record = data[position : position + length]
            if length <= space - position or len(record) != length or not record.endswith(b"\n"):
                raise ValueError
            key, _dummy, value = record[space - position + 1 : -1].partition(b"=")
            name = key.decode()
            if name in records:
                raise HostileError("archive", f"the pax header at offset {at} names {name!r} twice")
            records[name] = value.decode("utf-8", "backslashreplace")
        except ValueError as error:
            raise DamagedError(
                "archive", f"the pax header at offset {at} is broken", offset=at, length=len(data)
            ) from error
        position += length
    return records


def _size(field: int, records: dict[str, str], at: int) -> int:
    if "size" not in records:
        return field
    digits = records["size"]
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise DamagedError("archive", f"the pax header before {at} carries the size {digits[:20]!r}", offset=at)
    size = int(digits)
    # Other tools put 0 or the largest octal number into the field where the size does not fit it.
    if field != size and (size < OCTAL_LIMIT or field not in (0, OCTAL_LIMIT - 1)):
        raise DamagedError("archive", f"the headers before {at} name two sizes, {field} and {size}", offset=at)
    return size


_NOT_SPARSE = "Write it again without tar's -S (with bsdtar's --no-read-sparse)."
_JOIN = "Extract all volumes (tar -xMf FIRST, the others when tar asks for them) and write one archive of the files."
_NO_SPECIAL = "Write it again with nothing but the files of the VM."
# By the type in the header: what it is called, and how to get an archive without it.
_REFUSED = {
    b"1": ("hard link", "Write it again with tar's --hard-dereference, or with one name for each file."),
    b"2": ("symbolic link", "Write it again with tar's --dereference (-h), which follows links."),
    b"3": ("character device", _NO_SPECIAL),
    b"4": ("block device", _NO_SPECIAL),
    b"5": ("directory", names.FLAT),
    b"6": ("FIFO", _NO_SPECIAL),
    b"D": ("directory of an incremental dump", names.FLAT),
    b"M": ("part of a file whose beginning is in another volume", _JOIN),
    b"N": ("list of long names of GNU tar before 1.11", "Extract it with tar, and write it again."),
    b"S": ("GNU sparse file", _NOT_SPARSE),
}
_FILES = (b"0", b"\0", b"7")  # "contiguous" is a file to whoever does not know better (POSIX)
_OTHER_COMPRESSION = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
_AT_THE_BEGINNING = "Name a tar archive, plain or compressed by zstd. If it is one, its beginning is damaged."


class Walk:
    """One pass over the headers of a tar stream: `entries()` yields them, then `end` is the offset of the end marker.

    `fetch(offset, length)` returns at most `length` bytes, fewer only at the end of the stream; offsets only grow.
    Raises DamagedError (with the offset) for broken or missing headers, HostileError for what no honest archive holds.
    """

    def __init__(self, fetch: Fetch, size_bytes: Optional[int]) -> None:
        self._fetch, self._size = fetch, size_bytes
        self.end = 0

    def entries(self) -> Iterator[Entry]:
        """Every regular file in the order of the stream."""
        seen: set[str] = set()
        count = position = 0
        while True:
            begin, records, long_name, headers = position, dict[str, str](), "", 0
            while True:
                block = self._block(position)
                if block is None:
                    if position != begin:
                        raise DamagedError(
                            "archive",
                            f"it ends inside the header at offset {begin}",
                            offset=begin,
                            length=position - begin,
                        )
                    self.end = begin
                    return
                kind = block[156:157]
                size = _parse_number(block[124:136], "size", position)
                if kind not in (b"x", b"g", b"L", b"K"):
                    break
                headers += 1
                if headers > MAX_EXTENDED_HEADERS:
                    raise HostileError("archive", f"there are more than {MAX_EXTENDED_HEADERS} headers at {begin}")
                if size > MAX_PAX_BYTES:
                    raise HostileError("archive", f"the extended header at offset {position} has {size} bytes")
                payload = self._fetch(position + BLOCK, size)
                if len(payload) < size:
                    raise DamagedError(
                        "archive", f"it ends inside the header at offset {position}", offset=position, length=BLOCK
                    )
                if kind == b"L":
                    long_name = payload.rstrip(b"\0").decode("utf-8", "backslashreplace")
                elif kind != b"K":  # the long target of a link, which is refused itself
                    found = _pax_records(payload, position)
                    if "GNU.volume.offset" in found:
                        raise HostileError("archive", "it is not the first volume of several", _JOIN)
                    if kind == b"g" and ("size" in found or "path" in found):
                        raise HostileError(
                            "archive", f"the global header at offset {position} renames or resizes members"
                        )
                    if any(key.startswith("GNU.sparse") for key in found):
                        raise HostileError("archive", "it holds sparse members", _NOT_SPARSE)
                    records = found if kind == b"x" else records
                position += BLOCK + round_up(size, BLOCK)
            entry = self._entry(
                block, begin, position, _size(size, records, position), records.get("path") or long_name
            )
            position = entry.end
            count += 1
            if count > MAX_MEMBERS:
                raise HostileError("archive", f"it has more than {MAX_MEMBERS} members")
            if not entry.name:
                continue
            if entry.name in seen:
                raise HostileError(f"member {entry.name!r}", "it is in the archive twice")
            seen.add(entry.name)
            yield entry

    def _block(self, position: int) -> Optional[bytes]:
        """The header at `position`, None for the end marker."""
        try:
            return self._checked(position)
        except DamagedError as error:
            if position or error.hint:
                raise
            raise DamagedError(
                error.what, error.why, _AT_THE_BEGINNING, offset=error.offset, length=error.length
            ) from error

    def _checked(self, position: int) -> Optional[bytes]:
        block = self._fetch(position, BLOCK)
        if len(block) < BLOCK:
            raise DamagedError(
                "archive",
                f"it ends at offset {position + len(block)} without an end marker",
                offset=position,
                length=len(block),
            )
        if block == bytes(BLOCK):
            follows = self._fetch(position + BLOCK, BLOCK)
            if follows and follows != bytes(len(follows)):
                raise DamagedError(
                    "archive",
                    f"a block of zeros stands where a header should be at offset {position}",
                    offset=position,
                    length=BLOCK,
                )
            return None
        tool = next((tool for magic, tool in _OTHER_COMPRESSION.items() if block.startswith(magic)), "")
        if position == 0 and tool:
            hint = f"Uncompress it with {tool} -d first; only zstd is read."
            raise DamagedError("archive", f"it is compressed with {tool}", hint, length=BLOCK)
        _check_sum(block, position)
        return block

    def _entry(self, block: bytes, begin: int, position: int, size: int, long_name: str) -> Entry:
        kind = block[156:157]
        raw = block[:100].split(b"\0")[0]
        prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
        name = long_name or (prefix + b"/" + raw if prefix else raw).decode("utf-8", "backslashreplace")
        # The directory itself, also with the list of names that an incremental dump has of it, and the label of tar -V.
        if (kind == b"5" and name in (".", "./") and size == 0) or (kind == b"D" and name in (".", "./")) or kind == b"V":
            return Entry("", begin, position + BLOCK, size, 0)
        if kind not in _FILES:
            what, hint = _REFUSED.get(kind, (f"member of type {kind.decode('ascii', 'backslashreplace')!r}", _NO_SPECIAL))
            raise HostileError(f"member {name[:80]!r}", f"a {what} has no place in an archive", hint)
        if size > MAX_MEMBER_BYTES:
            raise HostileError(f"member {name[:80]!r}", f"a size of {size} bytes cannot be")
        checked = names.checked_member(name)
        if not checked:
            raise HostileError(f"member {name[:80]!r}", "a file without a name")
        offset = position + BLOCK
        if self._size is not None and offset + size > self._size:
            raise DamagedError(
                f"member {checked!r}",
                f"the archive ends {offset + size - self._size} bytes before the member does",
                member=checked,
                offset=max(0, self._size - offset),
                length=min(size, offset + size - self._size),
            )
        return Entry(checked, begin, offset, size, _time(block))
