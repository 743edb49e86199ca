# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Owner, group, mode, ACL and security label of images: a file that we make beside another one, or in its place, has those.

libvirt sees to that itself only where dynamic_ownership is on, which it is not on nodes of OpenNebula, or with root_squash.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError

REMEMBERED = "trusted.libvirt.security."  # where libvirt keeps what a file had before its VM was started
_SELINUX, _ACL = "security.selinux", "system.posix_acl_access"
_NOT_OURS_TO_SET = (errno.ENOTSUP, errno.EPERM, errno.EACCES)


@dataclass(frozen=True)
class Ownership:
    """Who may use a file. `label`: of SELinux, `acl`: the kernel's form of it; b"" for none."""

    uid: int
    gid: int
    mode: int = 0o600
    label: bytes = b""
    acl: bytes = b""


def of(path: str, *, running: bool = False) -> Ownership:
    """What a file has while no VM runs on it, also if one does now; ``running``: what it has now."""
    found = os.stat(path)
    if running:
        owner = found.st_uid, found.st_gid
        return Ownership(*owner, stat.S_IMODE(found.st_mode), _attribute(path, _SELINUX), _attribute(path, _ACL))
    uid, gid = ids(_attribute(path, REMEMBERED + "dac").decode("ascii", "replace"), (found.st_uid, found.st_gid))
    remembered = _attribute(path, REMEMBERED + "selinux")
    label = remembered + b"\0" if remembered else _attribute(path, _SELINUX)
    return Ownership(uid, gid, stat.S_IMODE(found.st_mode), label, _attribute(path, _ACL))


def ids(label: str, otherwise: tuple[int, int]) -> tuple[int, int]:
    """User and group in a label of libvirt's DAC driver that has numbers: +0:+0."""
    uid, _dummy, gid = label.partition(":")
    try:
        return int(uid), int(gid)
    except ValueError:
        return otherwise


def give(path: str, wanted: Ownership) -> None:
    """A file of ours gets all of it, and nothing that somebody has put in its place. Raises TargetError where it cannot be.

    Labels and ACLs are kept where the file system and the kernel let us: a VM that needs another label says so at its start.
    """
    with _opened(path) as fd:
        _give(fd, path, wanted)


def set_mode(path: str, mode: int) -> None:
    """As `give`, only the mode."""
    with _opened(path) as fd:
        os.chmod(fd, mode)


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """A file of ours with one name, and no link."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _files.swapped(path) from error
        raise _files.target_error(path, error, "cannot be opened") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise _files.swapped(path)
        yield fd
    finally:
        os.close(fd)


def _give(fd: int, path: str, wanted: Ownership) -> None:
    found = os.fstat(fd)
    try:
        if (found.st_uid, found.st_gid) != (wanted.uid, wanted.gid):
            os.chown(fd, wanted.uid, wanted.gid)
        if stat.S_IMODE(found.st_mode) != wanted.mode:
            os.chmod(fd, wanted.mode)
    except OSError as error:
        owner = f"{wanted.uid}:{wanted.gid} with mode {wanted.mode:04o}"
        hint = "Run the task as root. On storage that shuts root out (NFS with root_squash) let the host's root in."
        raise TargetError(path, f"it cannot be given to {owner} as QEMU needs it ({error.strerror})", hint) from error
    _set(fd, path, _SELINUX, wanted.label)
    _set(fd, path, _ACL, wanted.acl)
    if not wanted.acl and _attribute(fd, _ACL):  # one that the directory has handed down
        with suppress(OSError):
            os.removexattr(fd, _ACL)
            os.chmod(fd, wanted.mode)


def create_like(path: str, model: str) -> None:
    """A new, empty file with all that another one has. Raises TargetError."""
    wanted = of(model)
    fd = _files.create(path)
    try:
        _give(fd, path, wanted)
    finally:
        os.close(fd)


def _attribute(file: str | int, name: str) -> bytes:
    try:
        return os.getxattr(file, name)
    except OSError:  # has none, or is on a file system without them
        return b""


def _set(fd: int, path: str, name: str, value: bytes) -> None:
    if not value or value == _attribute(fd, name):
        return
    try:
        os.setxattr(fd, name, value)
    except OSError as error:
        if error.errno not in _NOT_OURS_TO_SET:
            raise _files.target_error(path, error) from error
