# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Three views of a VM's disks (QEMU's, libvirt's live one, the persistent definition), and whether a VM is really off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import monitor, storage
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    libvirt,
    translate,
)

real = _filenames.real


@dataclass(frozen=True)
class DiskView:
    """One disk as the three see it. Chains are paths, the active image first; () where a view does not have the disk."""

    target: str
    qemu: tuple[str, ...]
    live: tuple[str, ...]
    live_complete: bool  # the live definition lists the chain down to its end
    persistent: tuple[str, ...]
    node: str  # QEMU's node name of the active image, else ""
    mirror: bool = False  # the live definition speaks of a running block job

    @property
    def agree(self) -> bool:
        """Same active image in every view that has the disk, same chain in QEMU and the live definition."""
        if self.qemu or self.live:
            if self.qemu[: len(self.live)] != self.live or not self.live:
                return False
            if self.live_complete and self.qemu != self.live:
                return False
        active = {chain[0] for chain in (self.qemu, self.live, self.persistent) if chain}
        return len(active) <= 1


@dataclass(frozen=True)
class VmView:
    """A VM's disks now. ``running`` is what libvirt says; see require_really_off()."""

    running: bool
    persistent: bool
    managed_save: bool
    disks: tuple[DiskView, ...]

    def disk(self, target: str) -> DiskView:
        """The views of one disk; all empty where nobody has it."""
        empty = DiskView(target, (), (), False, (), "")
        return next((each for each in self.disks if each.target == target), empty)


NOWHERE = VmView(running=False, persistent=False, managed_save=False, disks=())


def gather(conn: Connection, domain: Domain) -> VmView:
    """Ask libvirt and QEMU about all disks with a local path (empty drives and network disks are left out)."""
    try:
        running, persistent = bool(domain.isActive()), bool(domain.isPersistent())
        # QEMU first: libvirt answers this when a snapshot that is being taken is done
        devices = monitor.execute(domain, "query-block") if running else []
        live = domain_xml.parse(domain.XMLDesc(0)).disks if running else ()
        kept = domain_xml.parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)).disks if persistent else ()
        managed_save = bool(domain.hasManagedSaveImage(0))
    except libvirt.libvirtError as error:
        raise translate(error, f"The VM {domain.name()}") from error
    live_of = {disk.target: disk for disk in live}
    kept_of = {disk.target: disk for disk in kept}
    disks = []
    for target in dict.fromkeys([*live_of, *kept_of]):
        here, there = live_of.get(target), kept_of.get(target)
        chain, node = _qemu_chain(devices, here.alias) if here else ((), "")
        live_chain = _chain(conn, here) if here else ()
        kept_chain = _chain(conn, there) if there else ()
        if live_chain or kept_chain:
            complete = bool(here and here.chain_complete)
            mirror = bool(here and here.mirror)
            disks.append(DiskView(target, chain if live_chain else (), live_chain, complete, kept_chain, node, mirror))
    return VmView(running, persistent, managed_save, tuple(disks))


def require_really_off(domain: Domain, images: Iterable[tuple[str, str]]) -> None:
    """Raise RefusedError unless libvirt says off AND there is no managed-save image AND nobody writes to (path, format)."""
    name = domain.name()
    if domain.isActive():
        raise RefusedError(f"The VM {name}", "it is running")
    if domain.hasManagedSaveImage(0):
        raise RefusedError(
            f"The VM {name}",
            "it has a managed-save image: its memory belongs to its disks as they are now",
            f"Start it (virsh start {name}) or give its memory up (virsh managedsave-remove {name}).",
        )
    for path, image_format in images:
        if _filenames.is_there(path) and qemu_img.is_in_use(path, image_format):
            raise RefusedError(
                f"The VM {name}",
                f"libvirt says it is off, but a process has {path} open and writes to it",
                f"Find it with: fuser -v {path}. If it is this VM's QEMU, libvirt has lost it: shut the guest down from inside.",
            )


def _chain(conn: Connection, disk: domain_xml.Disk) -> tuple[str, ...]:
    if not disk.path and not disk.volume:
        return ()
    links: list[domain_xml.Disk | domain_xml.ChainLink] = [disk, *disk.chain]
    return tuple(
        real(storage.volume_path(conn, each.pool, each.volume) if each.volume else each.path) for each in links
    )


def _qemu_chain(devices: Iterable[dict[str, Any]], alias: str) -> tuple[tuple[str, ...], str]:
    """Chain and top node of the device with libvirt's alias in QEMU's query-block."""
    for device in devices:
        # /machine/peripheral/virtio-disk0/virtio-backend, or the bare alias
        if alias and alias in device.get("qdev", "").split("/") and "inserted" in device:
            inserted = device["inserted"]
            files = [real(monitor.file_of(name)) for name in _files(inserted["image"])]
            # a filter on top of an image (a backup's, a throttle's) goes by the name of what it filters
            chain = tuple(path for path, above in zip(files, ["", *files]) if path != above)
            return chain, inserted.get("node-name", "")
    return (), ""


def _files(image: dict[str, Any]) -> Iterator[str]:
    here: dict[str, Any] | None = image
    while here:
        yield here["filename"]
        here = here.get("backing-image")
