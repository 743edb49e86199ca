# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What is mounted where, and what should be: the kernel's list, /etc/fstab and systemd's mount units."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# In the order in which the first wins. What only comes with a package counts where something wants it.
_UNITS = (
    "etc/systemd/system/*mount",
    "run/systemd/*/*mount",
    "etc/systemd/system/*.[wr]*s/*mount",  # .wants, .requires
    "usr/lib/systemd/system/*.[wr]*s/*mount",
)
# The kernel or the server makes up inode numbers when a file is looked up; after a remount, or just later, they are others.
_PASSING_INODES = frozenset({"vfat", "msdos", "exfat", "cifs", "smb3", "9p"})


_USER = re.compile(r"user_id=[0-9]{1,10}")


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo. `user`: who says what is in a FUSE file system, 0 for all others."""

    mount_point: str
    fs_type: str
    source: str
    read_only: bool
    device: str  # major:minor
    user: int = 0

    def __str__(self) -> str:
        return f"{self.source} ({self.fs_type}) at {self.mount_point}"


@dataclass(frozen=True)
class Expected:
    """A mount that the host's configuration names: `source` belongs at `mount_point`, says the file `named_in`."""

    mount_point: str
    source: str
    named_in: str


def now() -> tuple[Mount, ...]:
    """All mounts of this process; look at a path first, so that it is mounted where that happens on demand."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return parse(file.read())


def parse(mountinfo: str) -> tuple[Mount, ...]:
    """All mounts in kernel order; later ones cover earlier ones. See proc(5). Pure."""
    mounts = []
    for line in mountinfo.splitlines():
        left, _dummy, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(tail) < 2:
            continue
        options = set(fields[5].split(",")) | set(tail[2].split(",") if len(tail) > 2 else ())
        user = next((int(each[8:]) for each in options if _USER.fullmatch(each)), 0) if "fuse" in tail[0] else 0
        mounts.append(Mount(_unescape(fields[4]), tail[0], _unescape(tail[1]), "ro" in options, fields[2], user))
    return tuple(mounts)


def of(path: str, mounts: Sequence[Mount]) -> Mount:
    """The mount that a real path lies on. Pure."""
    best = Mount("/", "", "", False, "")
    for mount in mounts:
        if is_within(path, mount.mount_point) and len(mount.mount_point) >= len(best.mount_point):
            best = mount
    return best


def missing(path: str, mounts: Sequence[Mount], expected: Iterable[Expected]) -> Expected | None:
    """What belongs at a real path, or above it, and is not mounted; None where nothing is missing. Of real paths. Pure."""
    here = of(path, mounts)
    if here.fs_type == "autofs":  # on demand, and that has failed
        return Expected(here.mount_point, "what is mounted on demand", here.source)
    found = [each for each in expected if is_within(path, each.mount_point)]
    nearest = max(found, key=lambda each: len(each.mount_point), default=None)
    # what is mounted further down has its own content
    return nearest if nearest and len(here.mount_point) < len(nearest.mount_point) else None


def expected(root: str = "/") -> tuple[Expected, ...]:
    """Every mount that /etc/fstab or a mount unit names, also those that are not mounted at boot."""
    found = list(_fstab(os.path.join(root, "etc/fstab")))
    seen = set()
    for pattern in _UNITS:
        for path in sorted(glob.glob(os.path.join(glob.escape(root), pattern))):
            name = os.path.basename(path)
            if name.endswith((".mount", ".automount")) and name not in seen:
                seen.add(name)
                found += _unit(path)
    return tuple(found)


def identity(directory: str) -> dict[str, Any]:
    """What tells a directory when `is_still` is asked later: facts for a journal."""
    return {"inode": os.stat(directory).st_ino, "mount": str(of(os.path.realpath(directory), now()))}


def is_still(directory: str, inode: int, mount: str = "") -> bool:
    """Whether a directory is the one that had this inode on this mount (as text, "" where an older journal has none)."""
    try:
        if os.stat(directory).st_ino == inode:
            return True
        here = of(os.path.realpath(directory), now())
    except OSError:
        return False
    return has_passing_inodes(here.fs_type) and str(here) == mount


def has_passing_inodes(fs_type: str) -> bool:
    """Whether inode numbers of that kind of file system say nothing after a while."""
    return fs_type.startswith("fuse") or fs_type in _PASSING_INODES


def _fstab(path: str) -> Iterator[Expected]:
    for line in _lines(path):
        fields = line.split()
        if len(fields) >= 3 and fields[1].startswith("/") and fields[2] not in ("swap", "autofs"):
            yield Expected(_unescape(fields[1]), _unescape(fields[0]), path)


def _unit(path: str) -> Iterator[Expected]:
    """Nothing for a masked unit, which is a link to /dev/null, and for one that is not meant for every host."""
    found = {key.strip(): value.strip() for key, _dummy, value in (line.partition("=") for line in _lines(path))}
    where = found.get("Where", "")
    if where.startswith("/") and not any(key.startswith(("Condition", "Assert")) for key in found):
        yield Expected(where, found.get("What", "what is mounted on demand"), path)


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return [line.strip() for line in file if line.strip() and not line.lstrip().startswith(("#", ";"))]
    except OSError:
        return []


def is_within(path: str, directory: str) -> bool:
    """Whether a path is that directory or below it. Pure."""
    root = directory.rstrip("/")
    return path == root or path.startswith(root + "/")


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)
