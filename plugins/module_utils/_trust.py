# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Whether a file is ours to trust: only root, or the user who runs, can have written it (docs/SECURITY.md)."""

from __future__ import annotations

import errno
import functools
import grp
import os
import pwd
import stat
import struct
from collections.abc import Iterator

from ansible_collections.kvmops.backup.plugins.module_utils import _mounts, _settings

_MAX_LINKS = 40  # as the kernel
# POSIX ACLs as the kernel hands them out (linux/posix_acl_xattr.h); what the mask takes away is not written into the entries.
_ACL, _ACL_HEAD_BYTES, _ACL_USER, _ACL_GROUP, _ACL_WRITE = "system.posix_acl_access", 4, 0x02, 0x08, 0x02
_WAYS_OUT = "see docs/SECURITY.md, or trust it with 'trust: true'"


def doubt(path: str, opened: os.stat_result | None = None) -> str:
    """Why a file is not ours to trust, as a clause; "" if it is. ``opened``: the status of the file that was opened by this path.

    Raises TargetError where the host's settings cannot be read.
    """
    return Doubts().of(path, opened)


class Doubts:
    """The same of many files, for lists: settings, mounts and the way to a directory are looked at once."""

    def __init__(self) -> None:
        self._ways: dict[tuple[str, frozenset[int]], str] = {}
        self._mounts: dict[tuple[str, int, frozenset[int]], str] = {}

    def of(self, path: str, opened: os.stat_result | None = None) -> str:
        """See doubt()."""
        real = os.path.realpath(path)
        owners = self._owners(real)
        try:
            status = opened if opened is not None else os.stat(real)
            now = os.stat(real)
            if (status.st_dev, status.st_ino) != (now.st_dev, now.st_ino):
                return "another file has its name by now"
            why = _of_others(status, owners, real) or self._on_mount(status, owners, real)
            if why:
                return f"it {why} ({_WAYS_OUT})"
            if os.path.islink(path):
                return _doubt_of_way(path, owners)
            key = (os.path.dirname(path), owners)
            if key not in self._ways:
                self._ways[key] = _doubt_of_way(path, owners)
            return self._ways[key]
        except OSError as error:
            return f"whose it is cannot be told ({error.strerror})"

    @functools.cached_property
    def _trusted(self) -> dict[str, frozenset[int]]:
        return {os.path.realpath(place): uids for place, uids in _settings.trusted_owners().items()}

    def _owners(self, real: str) -> frozenset[int]:
        """Users whose files in this place count as ours."""
        own = {0, os.geteuid()}
        for place, uids in self._trusted.items():
            if real.startswith(f"{place.rstrip('/')}/"):
                own |= uids
        return frozenset(own)

    def _on_mount(self, status: os.stat_result, owners: frozenset[int], real: str) -> str:
        # a file that is mounted over itself has another device than its directory, or the same owner
        key = (os.path.dirname(real), status.st_dev, owners)
        if key not in self._mounts:
            self._mounts[key] = _on_mount_of_others(status, owners, real)
        return self._mounts[key]


def _doubt_of_way(path: str, owners: frozenset[int]) -> str:
    for directory in _way(path):
        status = os.lstat(directory)
        if stat.S_ISLNK(status.st_mode):
            why = "" if status.st_uid in owners else f"is a link of {name_of(status.st_uid)}"
        elif status.st_mode & stat.S_ISVTX:  # nobody replaces the files of others there
            why = "" if status.st_uid in owners else f"belongs to {name_of(status.st_uid)}"
        else:
            why = _of_others(status, owners, directory)
        if why:
            return f"its directory {directory} {why} ({_WAYS_OUT})"
    return ""


def open_to_all(directory: str) -> str:
    """The directory, that or one on the way to it, in which every user may replace the files of others; "" if there is none."""
    for each in _way(os.path.join(directory, "")):
        mode = os.lstat(each).st_mode
        if stat.S_ISDIR(mode) and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return each
    return ""


def name_of(uid: int) -> str:
    """A user for people."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"the user {uid}"


def _of_others(status: os.stat_result, owners: frozenset[int], path: str) -> str:
    if status.st_uid not in owners:
        return f"belongs to {name_of(status.st_uid)}"
    if status.st_mode & stat.S_IWOTH:
        return "can be written to by every user"
    if status.st_mode & stat.S_IWGRP:  # or the mask of an ACL
        if not _is_private(status.st_gid, status.st_uid):
            return f"can be written to by the group {_group_name(status.st_gid)}"
        if _others_in_acl(path, owners):
            return "can be written to by others, as its ACL says (getfacl)"
    return ""


def _others_in_acl(path: str, owners: frozenset[int]) -> bool:
    """Whether an ACL lets a user or a group by name write, who is not one of the owners."""
    try:
        acl = os.getxattr(path, _ACL)
    except OSError:  # has none, or is on a file system without them
        return False
    entries = list(struct.iter_unpack("<HHI", acl[_ACL_HEAD_BYTES:]))
    return any(
        permissions & _ACL_WRITE and (tag == _ACL_GROUP or (tag == _ACL_USER and number not in owners))
        for tag, permissions, number in entries
    )


def _on_mount_of_others(status: os.stat_result, owners: frozenset[int], real: str) -> str:
    """A FUSE file system says of its files whatever the user likes who has mounted it."""
    if os.major(status.st_dev):
        return ""  # on a block device
    mount = _mounts.of(real, _mounts.now())
    return "" if mount.user in owners else f"is on a file system that {name_of(mount.user)} has mounted ({mount})"


def _is_private(gid: int, uid: int) -> bool:
    """Whether the group is that of this one user, as many distributions give one to each.

    Elsewhere `users` is everybody's first group, and lists nobody: only a group of the user's name is their own.
    """
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(uid)
    except KeyError:
        return False
    return (user.pw_gid, user.pw_name) == (gid, group.gr_name) and not set(group.gr_mem) - {user.pw_name}


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _way(path: str) -> Iterator[str]:
    """Every directory and every link that the kernel passes on the way to a file."""
    here, links = "/", 0
    pending = os.path.join(os.getcwd(), path).split("/")
    yield here
    while pending:
        part = pending.pop(0)
        if part in ("", "."):
            continue
        here, above = (os.path.dirname(here) if part == ".." else os.path.join(here, part)), here
        if os.path.islink(here):
            yield here
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(here)
            pending = target.split("/") + pending
            here = "/" if target.startswith("/") else above
        elif pending:
            yield here
