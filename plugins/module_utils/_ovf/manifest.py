# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The manifest of a package (``.mf``): which digest each of its files must have. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, HostileError

MAX_BYTES = 1 << 20
MAX_ENTRIES = 10_000
#: Hash algorithms by the number of hex digits of their digests.
_BY_LENGTH = {40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}
_NAMES = {
    "SHA1": "sha1",
    "SHA256": "sha256",
    "SHA2256": "sha256",
    "SHA384": "sha384",
    "SHA2384": "sha384",
    "SHA512": "sha512",
    "SHA2512": "sha512",
}
_NAMED = re.compile(r"\s*([A-Za-z0-9_-]{2,20})\s*\((.*)\)\s*=\s*([0-9A-Fa-f]+)\s*")
_BARE = re.compile(r"\s*([0-9A-Fa-f]{40,128})\s+\*?(\S.*?)\s*")
_WAY_OUT = "Ask for a manifest that can be read; without the .mf file nothing is checked."


@dataclass(frozen=True)
class Digest:
    """What a file must hash to: the algorithm's name as hashlib has it, and lower-case hex digits."""

    algorithm: str
    hex: str


def parse(data: bytes, what: str) -> dict[str, Digest]:
    """Digests by file name. Raises ArchiveError for a line that cannot be read, HostileError for names that no package has."""
    if len(data) > MAX_BYTES:
        raise HostileError(what, f"{len(data)} bytes are more than the {MAX_BYTES} allowed")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    found: dict[str, Digest] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, digest = _line(line, f"{what}, line {number}")
        if name in found:
            raise HostileError(what, f"it names {name} twice")
        found[name] = digest
        if len(found) > MAX_ENTRIES:
            raise HostileError(what, f"it names more than {MAX_ENTRIES} files")
    if not found:
        raise ArchiveError(what, "it names no file at all", _WAY_OUT)
    return found


def _line(line: str, what: str) -> tuple[str, Digest]:
    named, bare = _NAMED.fullmatch(line), _BARE.fullmatch(line)
    if named:
        word, name, digits = named.groups()
        algorithm = _NAMES.get(word.upper().replace("-", "").replace("_", ""), "")
        if not algorithm:
            raise ArchiveError(what, f"the algorithm {word} is not known", _WAY_OUT)
    elif bare:
        digits, name = bare.groups()
        algorithm = _BY_LENGTH.get(len(digits), "")
    else:
        raise ArchiveError(what, f"it cannot be read: {line[:80]!r}", _WAY_OUT)
    if _BY_LENGTH.get(len(digits)) != algorithm or not algorithm:
        raise ArchiveError(what, f"a digest of {len(digits)} hex digits does not fit its algorithm", _WAY_OUT)
    plain = name[2:] if name.startswith("./") else name
    if not plain or plain.startswith("/") or "\0" in plain or ".." in plain.split("/"):
        raise HostileError(what, f"{name[:80]!r} is no name of a file in the package")
    return plain, Digest(algorithm, digits.lower())
