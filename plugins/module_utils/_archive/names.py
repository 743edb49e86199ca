# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Names of archives and members; nothing that came from a VM or a foreign archive is trusted here."""

from __future__ import annotations

import re
import time

from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError

PLAIN_SUFFIX, COMPRESSED_SUFFIX = ".tar", ".tar.zst"
_PACKAGE_SUFFIXES = (".ova", ".ovf")
MAX_STEM, MAX_MEMBER_NAME = 64, 255
FLAT = "Write it again from within the directory of the files (tar -C DIRECTORY -cf ARCHIVE .)."
_POINT = re.compile(r"([0-9]{1,11})(?:[^0-9].*)?\.xml")
_DIGESTS = re.compile(r"[0-9]{1,11}\.digests")


def stem(name: str) -> str:
    """A name as part of a file name: ASCII letters, digits, dot, dash, underscore; never empty, hidden or an option."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:MAX_STEM]
    return re.sub(r"^[.-]+", "_", plain) or "_"


def archive_name(vm_name: str, timestamp: int, uuid: str, compressed: bool) -> str:
    """File name of an archive whose full point was made at the unix time `timestamp`."""
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(timestamp))
    return f"{stem(vm_name)}_{when}_{uuid[:8]}{COMPRESSED_SUFFIX if compressed else PLAIN_SUFFIX}"


def is_package(path: str) -> bool:
    """Whether a file is another product's package, told by its name."""
    return path.lower().endswith(_PACKAGE_SUFFIXES)


def partial_name(name: str, token: str) -> str:
    """Hidden name under which an archive is written before it is published."""
    return f".{name}.partial-{token}"


def is_partial(name: str) -> bool:
    """Whether it is such a name."""
    return name.startswith(".") and ".partial-" in name


def configuration_member(timestamp: int, vm_name: str) -> str:
    """Member name of a point's configuration XML."""
    return f"{timestamp}_{stem(vm_name)}.xml"


def point_of(member_name: str) -> int | None:
    """Unix time in the name of a configuration XML, None if it has none."""
    match = _POINT.fullmatch(member_name)
    return int(match.group(1)) if match else None


def digests_member(timestamp: int) -> str:
    """Member name of a point's digests."""
    return f"{timestamp}.digests"


def is_digests_member(member_name: str) -> bool:
    """Whether only we give such a name."""
    return bool(_DIGESTS.fullmatch(member_name))


def digests_time(member_name: str) -> int:
    """Unix time in the name of a digests member."""
    return int(member_name.partition(".")[0])


def checked_member(name: str) -> str:
    """The plain base name of a member, a leading `./` removed; "" for the entry of the directory itself.

    Raises HostileError for paths, dot names, control characters and over-long names.
    """
    plain = name[2:] if name.startswith("./") else name
    if plain in ("", "."):
        return ""
    if (
        "/" in plain
        or plain == ".."
        or len(plain) > MAX_MEMBER_NAME
        or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in plain)
    ):
        raise HostileError(
            f"member {name[:80]!r}",
            "only plain file names have a place in an archive",
            FLAT,
        )
    return plain
