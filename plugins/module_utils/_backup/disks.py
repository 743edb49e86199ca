# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The one table that says what a backup does with each kind of disk: store, skip with a warning, or refuse.

docs/DISKS.md is this table for people; tests/unit/plugins/module_utils/_backup/test_disks.py holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import Disk
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import PlaceKind, Use, objection
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.storage import described
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice


class DiskVerdict(str, Enum):
    """What happens to a disk. FREEZE: a snapshot freezes it first; COPY: copied as it stands, nobody writes to it."""

    FREEZE = "freeze"
    COPY = "copy"
    ISO = "iso"
    SKIP = "skip"
    REFUSE = "refuse"
    NOTHING = "nothing"


_KEY_NOT_STORED = Notice(
    Code.KEY_NOT_STORED, "the disk is encrypted; its key is not part of the backup: keep it elsewhere"
)


@dataclass(frozen=True)
class Judgement:
    """The verdict on a disk; `reason` says why it is skipped or refused, `warning` what else a person should know."""

    verdict: DiskVerdict
    reason: str = ""
    warning: Notice | None = None


@dataclass(frozen=True)
class Image:
    """One image file or device of this host that a disk or one of its layers stands on.

    `allocated_bytes`: what it takes on its file system. `packed_bytes`: of a raw image, its size as qcow2. `backing_path` "" for
    the lowest layer. `kind`, `group`, `pool`, `pool_type`, `read_only`: of its place, as in `_libvirt.storage.Place`.
    `template_disk`: the disk of a template that it stands on, counted from 1; it has no `backing_path` then. `corrupt`: QEMU
    has marked it as that, and does not open it for writing any more. `dirty`: it was not closed, or is open now.
    `longest_name`: how many bytes a file beside it may have in its name.
    """

    path: str
    format: str
    size_bytes: int
    allocated_bytes: int
    virtual_size_bytes: int
    backing_path: str = ""
    has_data_file: bool = False
    is_device: bool = False
    kind: PlaceKind = PlaceKind.DIR
    group: str = ""
    pool: str = ""
    pool_type: str = ""
    read_only: str = ""
    device_id: int = 0
    fs_type: str = ""
    packed_bytes: int = 0
    template_disk: int = 0
    corrupt: bool = False
    dirty: bool = False
    longest_name: int = 255

    def objection(self, *, incrementable: bool, running: bool, snapshots: bool) -> str:
        """Why it cannot be backed up where it lies; "" if it can."""
        use = Use.INCREMENT if incrementable else Use.BACKUP
        why = objection(self.kind, use, running=running, snapshots=snapshots, read_only=self.read_only)
        where = described(self.kind, self.group, self.pool, self.pool_type)
        return f"{self.path} is on {where}, {why}" if why else ""


STORED_FORMATS = ("qcow2", "raw")


def judge(
    disk: Disk,
    image: Image | None,
    *,
    running: bool,
    snapshots: bool,
    include_iso: bool,
    incrementable: bool = False,
    below: Sequence[Image] = (),
    unseen: str = "",
) -> Judgement:
    """What happens to one disk; `image` is its topmost image, None where the host has none for it; `below`: those it stands on.
    `unseen`: why nobody can tell whether its image is there.

    `incrementable`: a snapshot is to stay, so that disks are frozen also while the VM is off.
    """
    if disk.device in ("cdrom", "floppy"):
        return _removable(disk, image, include_iso, unseen)
    if disk.device == "lun":
        return Judgement(DiskVerdict.SKIP, "a LUN is passed through to the guest and is not part of a backup")
    if disk.transient:
        return Judgement(DiskVerdict.SKIP, "the disk is transient: what is written to it is meant to be lost")
    if disk.type in ("network", "nvme", "vhostuser", "vhostvdpa", "dir"):
        return Judgement(
            DiskVerdict.REFUSE, f"disks of type {disk.type} ({disk.network or 'no local file'}) cannot be read here"
        )
    if disk.mirror:
        return Judgement(DiskVerdict.REFUSE, f"a block job ({disk.mirror}) that kvmops.backup did not start is at work on it")
    if image is None:
        gone = unseen or f"{disk.path} is not there"
        if disk.volume and not unseen:
            gone = f"the volume {disk.volume} of the pool {disk.pool} is not there, or the pool is not active"
        return Judgement(DiskVerdict.REFUSE, gone if disk.path or disk.volume else "it has no source")
    return _data(disk, image, running, snapshots, incrementable, below)


def is_stored(judgement: Judgement) -> bool:
    """Whether the disk's images are in a backup (or would be, if it were not refused)."""
    return judgement.verdict in (DiskVerdict.FREEZE, DiskVerdict.COPY, DiskVerdict.REFUSE)


def _removable(disk: Disk, image: Image | None, include_iso: bool, unseen: str) -> Judgement:
    if not disk.path and not disk.network and not disk.volume:
        return Judgement(DiskVerdict.NOTHING)
    if disk.device == "floppy":
        return Judgement(DiskVerdict.SKIP, "floppy images are not part of a backup")
    if not include_iso:
        return Judgement(DiskVerdict.SKIP, "include_iso is false")
    if image is None or image.is_device:
        name = f"the CD image {disk.path or disk.network or disk.volume}"
        return Judgement(DiskVerdict.SKIP, f"{name}: {unseen}" if unseen else f"{name} is no file of this host")
    return Judgement(DiskVerdict.ISO)


def _data(
    disk: Disk, image: Image, running: bool, snapshots: bool, incrementable: bool, below: Sequence[Image]
) -> Judgement:
    written = not (disk.readonly or disk.shareable)
    why = image.objection(
        incrementable=incrementable and written, running=running and written, snapshots=snapshots
    )
    # a layer further down is only read
    lower = (each.objection(incrementable=False, running=False, snapshots=snapshots) for each in below)
    why = why or next(filter(None, lower), "")
    if why:
        return Judgement(DiskVerdict.REFUSE, why)
    if image.format not in STORED_FORMATS:
        return Judgement(DiskVerdict.REFUSE, f"images of format {image.format} are not supported; qcow2 and raw are")
    if image.has_data_file or disk.has_data_file:
        return Judgement(DiskVerdict.REFUSE, f"{image.path} keeps its data in an external data file")
    if disk.has_slices:
        return Judgement(DiskVerdict.REFUSE, "it is a slice of a larger file")
    if image.is_device and image.format == "qcow2":
        return Judgement(
            DiskVerdict.REFUSE, f"{image.path} is a block device with qcow2 on it; raw block devices and files work"
        )
    warning = _KEY_NOT_STORED if disk.encrypted else None
    if disk.readonly:
        return Judgement(DiskVerdict.COPY, warning=warning)
    if disk.shareable:
        return Judgement(DiskVerdict.SKIP, "the disk is shareable: other VMs may write to it at any time")
    if (running or incrementable) and disk.encrypted:
        why = "it is encrypted and its overlay would not be"
        return Judgement(DiskVerdict.REFUSE, f"{why}: make full backups that are not incrementable, while the VM is off")
    return Judgement(DiskVerdict.FREEZE if running or incrementable else DiskVerdict.COPY, warning=warning)
