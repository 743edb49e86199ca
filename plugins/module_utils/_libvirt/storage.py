# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Places: which pool, file system and device a path is on, and whether it can be written to."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _mounts, _paths, _settings, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import SourceError, TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import lvm
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection, libvirt, translate
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import Disk
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import (
    FILES,
    NAMES,
    PlaceKind,
    Use,
    objection,
)

_Answer = TypeVar("_Answer")
ANSWER_TIMEOUT_S = 20.0
MOUNT_IT = "Mount it; or take the entry out there, if the directory itself is meant."
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "9p", "virtiofs"}
)
_DIRECTORY_POOLS = frozenset({"dir", "fs", "netfs"})
_NETWORK_POOLS = frozenset({"rbd", "gluster", "iscsi-direct", "sheepdog", "vstorage"})


@dataclass(frozen=True)
class Pool:
    """A storage pool as libvirt defines it."""

    name: str
    type: str  # dir, fs, netfs, logical, …
    active: bool
    target_path: str
    source: str  # device, directory or volume group it is made of; "" for dir


@dataclass(frozen=True)
class Place:
    """Where a path lies. Sizes are those of the file system (f_bavail: what an ordinary user may still write)."""

    path: str
    directory: str
    kind: PlaceKind
    pool: str  # "" outside all pools
    pool_type: str
    pool_active: bool
    group: str  # volume group or ZFS dataset, "" for others
    fs_type: str
    mount_point: str
    device: str
    is_network_fs: bool
    read_only: str  # why nothing may be written there, "" where it may
    writable: bool
    free_bytes: int
    total_bytes: int

    @property
    def description(self) -> str:
        """For messages: "thin LVM (volume group vg0, pool vms)"."""
        return described(self.kind, self.group, self.pool, self.pool_type)


def described(kind: PlaceKind, group: str, pool: str, pool_type: str = "") -> str:
    """A place for messages, with the volume group or dataset, and the pool."""
    parts = [f"{'dataset' if kind is PlaceKind.ZFS else 'volume group'} {group}"] if group else []
    parts += [f"pool {pool}" + (f" of type {pool_type}" if pool_type else "")] if pool else []
    return NAMES[kind] + (f" ({', '.join(parts)})" if parts else "")


def pools(conn: Connection) -> tuple[Pool, ...]:
    """All pools of the host, active or not."""
    try:
        return tuple(parse_pool(each.XMLDesc(0), active=bool(each.isActive())) for each in conn.listAllStoragePools(0))
    except libvirt.libvirtError as error:
        raise translate(error, "The storage pools of this host") from error


def volume_path(conn: Connection, pool: str, volume: str) -> str:
    """Where the volume of an active pool lies on this host. Raises SourceError with the pool's name."""
    try:
        return str(conn.storagePoolLookupByName(pool).storageVolLookupByName(volume).path())
    except libvirt.libvirtError as error:
        hint = f"Run: virsh pool-start {pool}; virsh pool-refresh {pool}"
        raise SourceError(f"The volume {volume} of the pool {pool}", str(error), hint) from error


def disk_path(conn: Connection, disk: Disk) -> str:
    """The local file or device of a disk as QEMU is given it, "" if it has none or its pool cannot tell."""
    if disk.path or not disk.volume:
        return disk.path
    try:
        return volume_path(conn, disk.pool, disk.volume)
    except SourceError:
        return ""


def expected_path(pool: Pool, volume: str) -> str:
    """Where the volume of a pool would lie that is not active or does not have it now; "" where that cannot be told. Pure."""
    if pool.type == "zfs":
        return f"/dev/zvol/{pool.source}/{volume}"
    return os.path.join(pool.target_path, volume) if pool.type == "logical" and pool.target_path else ""


def parse_pool(xml: str, *, active: bool) -> Pool:
    """The view of a <pool> document. Pure."""
    root = _xml.parse(xml, "A storage pool")
    source = ""
    for path, attribute in (("source/device", "path"), ("source/dir", "path")):
        element = root.find(path)
        if element is not None:
            source = source or element.get(attribute, "")
    return Pool(
        root.findtext("name", ""), root.get("type", ""), active, root.findtext("target/path", ""),
        source or root.findtext("source/name", ""),
    )  # fmt: skip


def describe(conn: Connection | None, path: str) -> Place:
    """Where a file, device or directory lies (it need not exist yet). `conn` None: libvirt does not answer.

    Raises TargetError when the file system hangs, or when a pool is named as read-only and nobody can say whether it is this.
    """
    return _describe(path, None if conn is None else pools(conn))


def resolve_target(conn: Connection | None, *, pool: str = "", path: str = "") -> Place:
    """The directory that ``pool`` or ``path`` (one of them) names, ready to be written to.

    Raises TargetError when the pool is unknown, inactive or not of files, when the directory is missing, not mounted though
    its pool, /etc/fstab or a mount unit names a file system for it, read-only (mounted so, or by the host's settings), not
    writable, hanging, or on LVM without a file system; and as `describe`.
    """
    if bool(pool) == bool(path):
        raise TargetError("The target", "give either pool or path")
    known = None if conn is None else pools(conn)
    what = f"The pool {pool}" if pool else f"The directory {path}"
    if pool:
        found = next((each for each in known or () if each.name == pool), None)
        if found is None:
            why = "there is no storage pool of that name on this host"
            raise TargetError(what, why, "virsh pool-list --all shows what there is.")
        if found.type not in _DIRECTORY_POOLS:
            why = f"it is of type {found.type}, which cannot hold files"
            raise TargetError(what, why, "Name a pool of type dir, fs or netfs.")
        if not found.active:
            raise TargetError(what, "it is not active", f"Run: virsh pool-start {pool}")
        path = found.target_path
    place = _describe(path, known)
    if place.kind not in FILES:
        why = f"it is on {place.description}, {objection(place.kind, Use.ARCHIVE)}"
        raise TargetError(what, why, "Name a directory of a file system.")
    missing = not_mounted(path)
    if missing:
        raise TargetError(what, missing, MOUNT_IT)
    if not _answers(os.path.isdir, path):
        raise TargetError(what, f"{path} is not a directory", "Create it, or mount what belongs there.")
    expected = _file_system_pool(place.path, known or ())
    if expected is not None and place.mount_point != os.path.realpath(expected.target_path):
        raise TargetError(
            what,
            f"nothing is mounted at {expected.target_path}, where the pool {expected.name} has {expected.source}",
            f"Run: virsh pool-destroy {expected.name} && virsh pool-start {expected.name}",
        )
    if place.read_only:
        raise TargetError(what, place.read_only, "Choose another target.")
    if not place.writable:
        why = f"{path} is not writable for this user"
        raise TargetError(what, why, "Run as root (become: true) or change its permissions.")
    return place


def not_mounted(path: str) -> str:
    """What the host's configuration mounts at a path, or above it, and is not: a clause; "" where nothing is missing."""
    named, real = _answers(_filenames.absolute, path), _answers(os.path.realpath, path)
    _answers(os.statvfs, _answers(_nearest_existing, real))  # mounts what is mounted on demand
    # Resolved are only those on the way: others may hang.
    wanted = [
        replace(each, mount_point=_answers(os.path.realpath, each.mount_point))
        for each in _mounts.expected()
        if _mounts.is_within(named, each.mount_point) or _mounts.is_within(real, each.mount_point)
    ]
    missing = _mounts.missing(real, _mounts.now(), wanted)
    if missing is None:
        return ""
    return f"nothing is mounted at {missing.mount_point}, where {missing.named_in} has {missing.source}"


def _describe(path: str, known: Sequence[Pool] | None) -> Place:
    named, real, directory, facts, is_device, writable = _answers(_look, path)
    mount = _mounts.of(directory, _mounts.now())
    # the link /dev/VG/LV is in the pool, the device behind it is not
    owner = _pool_of(real, known or ()) or (_pool_of(named, known or ()) if named.startswith("/dev/") else None)
    kind, group = _kind(named, real, is_device, mount, owner)
    read_only = f"{mount.mount_point} is mounted read-only" if facts.f_flag & os.ST_RDONLY or mount.read_only else ""
    read_only = read_only or _declared_read_only(real, owner, pools_are_known=known is not None)
    return Place(
        path=real,
        directory=directory,
        kind=kind,
        pool=owner.name if owner else "",
        pool_type=owner.type if owner else "",
        pool_active=bool(owner and owner.active),
        group=group,
        fs_type=mount.fs_type,
        mount_point=mount.mount_point,
        device=real if is_device else mount.source,
        is_network_fs=mount.fs_type in NETWORK_FILE_SYSTEMS,
        read_only=read_only,
        writable=writable and not read_only,
        free_bytes=facts.f_bavail * facts.f_frsize,
        total_bytes=facts.f_blocks * facts.f_frsize,
    )


class _Seen(NamedTuple):
    """What the file system of a path says: two forms of the path, the directory that is there, and what is known of that."""

    named: str
    real: str
    directory: str
    facts: os.statvfs_result
    is_device: bool
    writable: bool


def _look(path: str) -> _Seen:
    named, real = _filenames.absolute(path), os.path.realpath(path)
    existing = _nearest_existing(real)
    directory = existing if os.path.isdir(existing) else os.path.dirname(existing)
    facts = os.statvfs(directory)  # mounts what is mounted on demand, so before the list of mounts is read
    writable = os.access(directory, os.W_OK | os.X_OK, effective_ids=True)
    return _Seen(named, real, directory, facts, _is_block_device(real), writable)


def _declared_read_only(path: str, owner: Pool | None, *, pools_are_known: bool) -> str:
    """Why the host's settings forbid to write there; "" where they do not. Raises TargetError where that cannot be told."""
    names = sorted(_settings.read_only_places())
    for name in names:
        if _within(path, name) if name.startswith("/") else owner is not None and owner.name == name:
            return f"{name} is named as read-only in {_paths.read_only_file()}"
    pool_names = [name for name in names if not name.startswith("/")]
    if pool_names and not pools_are_known:
        where = f"{_paths.read_only_file()} names as read-only ({', '.join(pool_names)})"
        raise TargetError(
            f"The path {path}",
            f"whether it is in a pool that {where} cannot be told, as libvirt does not answer",
            "Start libvirt, or name directories instead of pools there.",
        )
    return ""


def _kind(named: str, real: str, is_device: bool, mount: _mounts.Mount, owner: Pool | None) -> tuple[PlaceKind, str]:
    """The kind of a place, and the volume group or dataset that it belongs to."""
    pool_type = owner.type if owner is not None else ""
    if pool_type in _NETWORK_POOLS:
        return PlaceKind.NETWORK, ""
    if named.startswith("/dev/zvol/") or (
        is_device and (os.path.basename(real).startswith("zd") or pool_type == "zfs")
    ):
        return PlaceKind.ZVOL, ""
    if is_device or named.startswith("/dev/"):  # also a link from elsewhere, and a volume that is not active
        volumes = lvm.volumes()
        volume = lvm.find(named, volumes) or lvm.find(real, volumes)
        if volume is not None:
            return volume.kind, volume.volume_group
        if pool_type == "logical" and owner is not None:
            return PlaceKind.LVM, owner.source
        if "LVM-" in _mapped_uuid(real):  # a partition on a logical volume, or there is no lvs
            return (PlaceKind.THIN_LVM if _is_thin(real) else PlaceKind.LVM), ""
    if is_device:
        return PlaceKind.BLOCK, ""
    if mount.fs_type in ("zfs", "fuse.zfs"):
        return PlaceKind.ZFS, mount.source
    return (PlaceKind.NETWORK_FS if mount.fs_type in NETWORK_FILE_SYSTEMS else PlaceKind.DIR), ""


def _mapped_uuid(path: str) -> str:
    """The device mapper's name for the kind of a device ("LVM-…", "mpath-…"); "" for other devices."""
    try:
        with open(f"/sys/class/block/{os.path.basename(path)}/dm/uuid", encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _is_thin(path: str) -> bool:
    """A thin volume's table names the thin target; without a mapping there is nothing to ask."""
    slaves = f"/sys/class/block/{os.path.basename(path)}/slaves"
    try:
        return any(_mapped_uuid(name).endswith("-tpool") for name in os.listdir(slaves))
    except OSError:
        return False


def _pool_of(path: str, known: Sequence[Pool]) -> Pool | None:
    inside = [each for each in known if each.target_path and each.type != "disk" and _within(path, each.target_path)]
    return max(inside, key=lambda each: (len(os.path.realpath(each.target_path)), each.active), default=None)


def _file_system_pool(path: str, known: Sequence[Pool]) -> Pool | None:
    """The pool that mounts a file system at the directory or above it, also when the target was given as a path."""
    mounting = [each for each in known if each.type in ("fs", "netfs") and each.target_path]
    inside = [each for each in mounting if _within(path, each.target_path)]
    return max(inside, key=lambda each: len(each.target_path), default=None)


def _within(path: str, directory: str) -> bool:
    root = os.path.realpath(directory).rstrip("/")
    return path == root or path.startswith(root + "/")


def _nearest_existing(path: str) -> str:
    while path != "/":
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):  # other errors say something else than that it is not there
            path = os.path.dirname(path)
        else:
            break
    return path


def _is_block_device(path: str) -> bool:
    try:
        return os.stat(path).st_rdev != 0 and (os.stat(path).st_mode & 0o170000) == 0o060000
    except FileNotFoundError:
        return False


def _answers(call: Callable[[str], _Answer], path: str) -> _Answer:
    """The result of a file system call, in bounded time: a network file system may hang for ever."""
    answer: queue.Queue[_Answer | OSError] = queue.Queue()

    def ask() -> None:
        try:
            answer.put(call(path))
        except OSError as error:
            answer.put(error)

    # a daemon: the interpreter does not wait for a call that never returns
    threading.Thread(target=ask, daemon=True).start()
    try:
        result = answer.get(timeout=ANSWER_TIMEOUT_S)
    except queue.Empty:
        why = f"its file system did not answer within {ANSWER_TIMEOUT_S:g} seconds"
        raise TargetError(f"The path {path}", why, "Check the mount: a server may be gone.") from None
    if isinstance(result, OSError):
        raise TargetError(f"The path {path}", result.strerror or str(result)) from result
    return result
