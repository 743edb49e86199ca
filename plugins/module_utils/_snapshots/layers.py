# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The snapshots of a VM and the files they lie in: which file stands on which, and who else needs them.

All paths are resolved (`views.real`), so that they can be compared.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    RefusedError,
    SplitViewError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image import probe, qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import blockjobs, snapshots, storage, views
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import Snapshot
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import retained_layers
from ansible_collections.kvmops.backup.plugins.module_utils._template import find

_FORMATS = ("qcow2", "raw")


class SnapshotKind(str, Enum):
    """Where the state of one disk is."""

    EXTERNAL = "external"  # frozen in a file of its own
    INTERNAL = "internal"  # inside a qcow2
    NONE = "no"  # not part of the snapshot


@dataclass(frozen=True)
class SnapshotDisk:
    """One disk in a snapshot.

    ``path`` is the file that the disk was then: what EXTERNAL has frozen, what INTERNAL lies in. ``overlay_path`` is the
    file that EXTERNAL made for the guest to write to, "" otherwise. ``definition`` is the <disk> as the VM's definition had it.
    """

    target: str
    kind: SnapshotKind
    path: str
    overlay_path: str
    definition: str


@dataclass(frozen=True)
class LayeredSnapshot:
    """A snapshot with its disks."""

    info: Snapshot
    disks: tuple[SnapshotDisk, ...]

    @property
    def name(self) -> str:
        """The name that libvirt has it under."""
        return self.info.name

    def disk(self, target: str) -> SnapshotDisk | None:
        """Its disk of that target."""
        return next((disk for disk in self.disks if disk.target == target), None)


@dataclass(frozen=True)
class Layer:
    """One image file; ``backing`` is what it stands on, "" for nothing; ``internal`` are the snapshots inside it."""

    path: str
    format: str
    backing: str
    virtual_size_bytes: int
    internal: tuple[str, ...] = ()
    modified_ns: int = 0


@dataclass(frozen=True)
class Layers:
    """A VM with its snapshots (parents first), its disks' active files and every file that belongs to either."""

    vm_uuid: str
    vm_name: str
    running: bool
    managed_save: bool
    states: tuple[LayeredSnapshot, ...]
    active: Mapping[str, str]  # target: file of every disk with a local file that is not read-only
    files: Mapping[str, Layer]  # files that are there, by path
    other_vms: Mapping[str, str]  # file: VM that has it in a chain of its own
    left: Mapping[str, str] = field(default_factory=dict)  # see retained_layers.py: path and <disk>
    copies: Mapping[str, str] = field(default_factory=dict)  # the same: copy and original
    shared: Mapping[str, str] = field(default_factory=dict)  # file of the active chains: VM that must not have it too

    def state(self, name: str) -> LayeredSnapshot | None:
        """The snapshot of that name."""
        return next((state for state in self.states if state.name == name), None)

    def chain(self, path: str) -> tuple[str, ...]:
        """The file and all that it stands on, as far as they are there."""
        found: list[str] = []
        while path in self.files and path not in found:
            found.append(path)
            path = self.files[path].backing
        return tuple(found)

    def roots(self, path: str) -> set[str]:
        """The lowest file under this one, and those of its copies and of what it is a copy of."""
        found = set(self.chain(path)[-1:])
        pairs = [(set(self.chain(copy)[-1:]), set(self.chain(original)[-1:])) for copy, original in self.copies.items()]
        for _dummy in pairs:
            for pair in pairs:
                if any(each & found for each in pair):
                    found |= pair[0] | pair[1]
        return found

    def holders(self, path: str) -> tuple[LayeredSnapshot, ...]:
        """Snapshots that have frozen this file."""
        return tuple(
            state
            for state in self.states
            if any(disk.kind is SnapshotKind.EXTERNAL and disk.path == path for disk in state.disks)
        )


def look(conn: Connection, domain: Domain) -> Layers:
    """What libvirt and the files say; touches nothing. Raises KvmopsError for what cannot be read."""
    try:
        running, persistent = bool(domain.isActive()), bool(domain.isPersistent())
        flags = 0 if running else libvirt.VIR_DOMAIN_XML_INACTIVE
        disks = domain_xml.parse(domain.XMLDesc(flags | libvirt.VIR_DOMAIN_XML_SECURE)).disks
        managed_save = persistent and bool(domain.hasManagedSaveImage(0))
        uuid = str(domain.UUIDString())
    except libvirt.libvirtError as error:
        raise translate(error, f"The VM {domain.name()}") from error
    states = tuple(_state(conn, info) for info in snapshots.tree(domain))
    active: dict[str, str] = {}
    tops: list[str] = []
    files: dict[str, Layer] = {}
    for disk in disks:
        path = storage.disk_path(conn, disk)
        if path and disk.device == "disk" and not disk.readonly and disk.format in (*_FORMATS, ""):
            active[disk.target] = views.real(path)
            if not disk.shareable:
                tops.append(path)
            _follow(path, disk.format or "raw", files)
    for state in states:
        for each in state.disks:
            if each.kind is not SnapshotKind.NONE:
                _follow(each.path, "" if each.kind is SnapshotKind.EXTERNAL else "qcow2", files)
                _follow(each.overlay_path, "qcow2", files)
    neighbours = find.neighbours(conn)
    copies = retained_layers.load(uuid, retained_layers.COPIES)
    for path in copies:
        _follow(path, "qcow2", files)
    kept = retained_layers.load(uuid)
    shared, others = find.shared(tops, uuid, neighbours), _users(neighbours, uuid)
    return Layers(uuid, str(domain.name()), running, managed_save, states, active, files, others, kept, copies, shared)


def path_of(conn: Connection, disk: domain_xml.Disk) -> str:
    """The resolved local file of a disk, "" if it has none or its pool cannot tell."""
    return views.real(storage.disk_path(conn, disk))


def require_quiet(conn: Connection, domain: Domain, layers: Layers) -> None:
    """Nobody is at work on the disks, the views agree, off means off. Raises RefusedError, BusyError or SplitViewError."""
    what = f"The VM {layers.vm_name}"
    if layers.managed_save:
        hint = f"Start it (virsh start {layers.vm_name}) or give its memory up (virsh managedsave-remove {layers.vm_name})."
        raise RefusedError(what, "it has a managed-save image: its memory belongs to its disks as they are now", hint)
    seen = views.gather(conn, domain).disks
    for disk in seen:
        _require_as_listed(layers, disk.live or disk.persistent, f"The disk {disk.target} of {layers.vm_name}")
    if not layers.running:
        images = [(path, layers.files[path].format) for path in layers.active.values() if path in layers.files]
        views.require_really_off(domain, images)
        return
    blockjobs.require_idle(domain, what)
    for disk in seen:
        if not disk.agree:
            raise SplitViewError(
                f"The disk {disk.target} of {layers.vm_name}",
                f"QEMU has {' on '.join(disk.qemu)}, the live definition {' on '.join(disk.live)}, the persistent one "
                f"{' on '.join(disk.persistent)}",
                "Nothing was touched. A configuration change that waits for the next start is applied by a restart.",
            )


def _require_as_listed(layers: Layers, listed: Sequence[str], what: str) -> None:
    """QEMU opens what the definition lists, merges of a VM that is off what the images say. Raises SplitViewError."""
    for path, below in zip(listed, listed[1:]):
        layer = layers.files.get(path)
        # one that says it stands on nothing has been flattened: what is listed below it does not show
        if layer and layer.backing and layer.backing != below:
            raise SplitViewError(
                what,
                f"its definition lists {path} on {below}, and the image itself says that it stands on {layer.backing}",
                "Nothing was touched. Back it up first (a backup has it as the guest sees it); then point the image "
                f"to the right file while the VM is off: qemu-img rebase -u -f qcow2 -F FORMAT -b {below} {path}",
            )


def require_free(layers: Layers, paths: Iterable[str], what: str) -> None:
    """None of the files belongs to another VM too. Raises RefusedError."""
    for path in paths:
        if path in layers.other_vms:
            raise RefusedError(
                what,
                f"the VM {layers.other_vms[path]} uses {path} too",
                "Take the disk out of that VM first; nothing was touched.",
            )


def _state(conn: Connection, info: Snapshot) -> LayeredSnapshot:
    return LayeredSnapshot(info, disks_of(conn, info))


def disks_of(conn: Connection, info: Snapshot) -> tuple[SnapshotDisk, ...]:
    """The disks in a snapshot."""
    root = _xml.parse(info.xml, f"The snapshot {info.name}")
    then = root.find("domain")
    if then is None:
        return ()
    kept = root.find("inactiveDomain")
    listed = {disk.get("name", ""): disk for disk in root.iterfind("disks/disk")}
    disks = []
    for disk in domain_xml.view(then).disks:
        entry = listed.get(disk.target)
        kind = SnapshotKind.NONE
        overlay = ""
        if entry is not None and entry.get("snapshot") in (SnapshotKind.EXTERNAL.value, SnapshotKind.INTERNAL.value):
            kind = SnapshotKind(entry.get("snapshot"))
            source = entry.find("source")
            if kind is SnapshotKind.EXTERNAL and source is not None:
                overlay = views.real(source.get("file", ""))
        definition = _definition(then if kept is None else kept, disk.target) or _definition(then, disk.target)
        disks.append(SnapshotDisk(disk.target, kind, path_of(conn, disk), overlay, definition))
    return tuple(disks)


def _definition(domain: etree._Element, target: str) -> str:
    for disk in domain.iterfind("devices/disk"):
        if domain_xml.target_of(disk) == target:
            return etree.tostring(disk, encoding="unicode", with_tail=False)
    return ""


def _follow(named: str, image_format: str, files: dict[str, Layer]) -> None:
    """Add a file and all that it stands on, each as QEMU is given it."""
    while named and views.real(named) not in files and _filenames.is_there(named):
        found = qemu_img.info(named, image_format or _probed_format(named))
        path, backing = views.real(named), views.real(found.full_backing_file)
        files[path] = Layer(
            path, found.format, backing, found.virtual_size_bytes, found.internal_snapshots, os.stat(path).st_mtime_ns
        )
        named, image_format = found.full_backing_file, found.backing_format


def _probed_format(path: str) -> str:
    """What the first bytes say; only for a file that is known to be one of the VM's frozen layers.

    Raises ImageError where the storage does not give its bytes: taken for raw, it would stand on nothing.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = probe.probe(probe.reads(file.fileno(), path), size)
    except OSError as error:
        if error.errno != errno.EIO:
            return "raw"  # it cannot be opened: qemu-img says so, too
        raise probe.ImageError(f"disk image {path}", f"it cannot be read ({error.strerror})") from error
    except probe.ImageError:
        return "raw"
    return "qcow2" if found.format == "qcow2" else "raw"


def other_vms(conn: Connection, uuid: str) -> dict[str, str]:
    """Every file that another VM's disk is or stands on, by any of its definitions, with the name of that VM."""
    return _users(find.neighbours(conn), uuid)


def _users(vms: Sequence[find.Neighbour], but: str) -> dict[str, str]:
    return {path: vm.name for vm in reversed(vms) if vm.uuid != but for path in vm.files | vm.attached}
