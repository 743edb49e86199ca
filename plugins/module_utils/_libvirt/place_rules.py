# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The one table that says which kind of place may be used for what. Pure.

docs/DISKS.md explains it to users.
"""

from __future__ import annotations

from enum import Enum


class PlaceKind(str, Enum):
    """What the bytes of a path lie on. LVM is a volume group's devices; a file system made on one of them is a DIR."""

    DIR = "dir"  # a directory of a local file system
    NETWORK_FS = "network_fs"  # a directory of NFS, CIFS and the like
    LVM = "lvm"
    THIN_LVM = "thin_lvm"
    SHARED_LVM = "shared_lvm"  # a volume group with locks across hosts
    ZFS = "zfs"  # a dataset
    ZVOL = "zvol"
    BLOCK = "block"  # any other block device
    NETWORK = "network"  # a pool without local files: rbd, gluster, …


class Use(str, Enum):
    """What a place is wanted for."""

    BACKUP = "backup"  # a disk on it is read for a full backup
    INCREMENT = "increment"  # a snapshot of a disk on it stays, for increments to stand on
    RESTORE = "restore"  # disks are restored to it
    ARCHIVE = "archive"  # archives are written to it


NAMES = {
    PlaceKind.DIR: "a directory",
    PlaceKind.NETWORK_FS: "a network file system",
    PlaceKind.LVM: "LVM",
    PlaceKind.THIN_LVM: "thin LVM",
    PlaceKind.SHARED_LVM: "shared LVM",
    PlaceKind.ZFS: "ZFS",
    PlaceKind.ZVOL: "ZFS",
    PlaceKind.BLOCK: "a block device",
    PlaceKind.NETWORK: "network storage",
}
VOLUME_MANAGERS = frozenset({PlaceKind.LVM, PlaceKind.THIN_LVM, PlaceKind.SHARED_LVM})
FILES = frozenset({PlaceKind.DIR, PlaceKind.NETWORK_FS, PlaceKind.ZFS})
_DEVICES = frozenset({PlaceKind.BLOCK, PlaceKind.ZVOL})
_ZFS = frozenset({PlaceKind.ZFS, PlaceKind.ZVOL})


def objection(
    kind: PlaceKind, use: Use, *, running: bool = False, snapshots: bool = False, read_only: str = ""
) -> str:
    """Why a place of this kind cannot be used so; "" if it can. A clause that goes on after "it is on …".

    `running`, `snapshots`: of the VM that is backed up. `read_only`: why nothing may be written there, "" where it may.
    """
    if use in (Use.RESTORE, Use.ARCHIVE):
        if kind not in FILES:
            return "which cannot hold files; use a directory"
        return read_only
    if kind in VOLUME_MANAGERS:
        return "which this collection does not back up"
    if kind is PlaceKind.NETWORK:
        return "which cannot be read here"
    if kind in _ZFS and snapshots:
        return "and the VM has snapshots; ZFS works without them only"
    if kind in _ZFS and use is Use.INCREMENT:
        return "where backups cannot be incrementable"
    if kind in _DEVICES and use is Use.INCREMENT:
        return "of which there are full backups only"
    if kind in _DEVICES and running:
        return "which can be backed up only while the VM is off"
    if read_only and (running or use is Use.INCREMENT):
        return f"and what the guest writes meanwhile has no place: {read_only}"
    return ""
