# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a plan needs to know about a VM, gathered without touching it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _files, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._backup import template_base
from ansible_collections.kvmops.backup.plugins.module_utils._backup.disks import STORED_FORMATS, Image
from ansible_collections.kvmops.backup.plugins.module_utils._backup.model import TargetFacts, VmFacts
from ansible_collections.kvmops.backup.plugins.module_utils._capabilities import Capabilities
from ansible_collections.kvmops.backup.plugins.module_utils._errors import SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import probe, reads
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import RawAsQcow2Source
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import (
    agent,
    blockjobs,
    boot_files,
    firmware_state,
    memory_blockers,
    place_rules,
    receivers,
    snapshots,
    standing,
    storage,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import backup_snapshots, unmerged
from ansible_collections.kvmops.backup.plugins.module_utils._template import find, mark


def gather(
    conn: Connection,
    domain: Domain,
    *,
    secrets: bool,
    ask_agent: bool,
    ask_locks: bool = True,
    host: find.Host | None = None,
) -> VmFacts:
    """The facts of one VM. `secrets`: definitions with passwords; `ask_agent`: whether the guest agent matters; `ask_locks`:
    whether it does that a QEMU has images open; `host`: the VMs of the host, if the caller looks at several.

    Raises SourceError where an image cannot be looked at, KvmopsError where libvirt cannot answer.
    """
    flags = libvirt.VIR_DOMAIN_XML_SECURE if secrets else 0
    try:
        running = bool(domain.isActive())
        live = domain.XMLDesc(flags) if running else ""
        persistent = domain.XMLDesc(flags | libvirt.VIR_DOMAIN_XML_INACTIVE) if domain.isPersistent() else ""
        autostart = bool(persistent) and bool(domain.autostart())
        managed_save = bool(domain.hasManagedSaveImage(0))
        jobs = _jobs(domain) if running else ()
        checkpoints = () if running else snapshots.checkpoints(domain)
    except libvirt.libvirtError as error:
        raise translate(error, f"VM {domain.name()}") from error
    host = host or find.Host(conn)
    now = domain_xml.parse(live or persistent)
    attached = tuple(disk for disk in now.disks if receivers.is_attached(disk))
    live, persistent = (receivers.without_attached(xml) if xml else "" for xml in (live, persistent))
    view = domain_xml.parse(live or persistent)
    view = replace(
        view,
        disks=tuple(_resolved(conn, disk) for disk in view.disks),
        nvram_path=firmware_state.nvram_path(conn, view),
    )
    states = own_states(domain, secrets=secrets)
    state_disks = {state.name: _state_disks(state) for state in states}
    all_images = _images(conn, [*view.disks, *(disk for disks in state_disks.values() for disk in disks)])
    all_images = _as_defined(conn, view.disks, all_images)
    stands, images = template_base.look(host, view.name, view.uuid, all_images)
    tpm_path = firmware_state.tpm_state_path(conn, view)
    boot = _boot_files([live, persistent, *(state.xml for state in states)])
    return VmFacts(
        name=view.name,
        uuid=view.uuid,
        running=running,
        attached=attached,
        standing=standing.of(domain),
        memory_blockers=memory_blockers.of(domain) if running else (),
        unmerged=tuple(unmerged.still_there(domain)),
        autostart=autostart,
        persistent_xml=persistent,
        live_xml=live,
        view=view,
        images=images,
        checkpoints=checkpoints,
        shared=find.shared(_written(view.disks, images), view.uuid, host.neighbours),
        unseen={disk.path: why for disk in view.disks if disk.path and (why := _filenames.why_unseen(disk.path))},
        snapshot_files=_snapshot_files(_written(view.disks, images)),
        thin=replace(stands, marked=mark.is_marked_xml(persistent or live)),
        snapshots=states,
        snapshot_disks=state_disks,
        agent=agent.available(domain) if running and ask_agent else agent.AgentState.OFF,
        managed_save=managed_save,
        foreign_jobs=jobs,
        locked_images=() if running or not ask_locks else _locked(view.disks, images),
        nvram_bytes=os.path.getsize(view.nvram_path) if view.nvram_path else 0,
        tpm_path=tpm_path,
        boot_files=boot,
        file_bytes=_file_bytes(
            [view.nvram_path, *(state.memory_path for state in states), *(each.path for each in boot)], tpm_path
        ),
        free_bytes={image.device_id: _free(image.path) for image in images.values() if not image.is_device},
    )


def own_states(domain: Domain, *, secrets: bool) -> tuple[snapshots.Snapshot, ...]:
    """The tree of snapshots, without the disks of other VMs that were attached then."""
    states = snapshots.tree(domain, secrets=secrets)
    return tuple(replace(each, xml=receivers.without_attached(each.xml)) for each in states)


def _written(disks: Iterable[domain_xml.Disk], images: Mapping[str, Image]) -> list[str]:
    """Images that the guest writes to, alone as far as its definition knows."""
    data = [disk for disk in disks if disk.device == "disk" and not disk.readonly and not disk.shareable]
    return [disk.path for disk in data if disk.path in images and not images[disk.path].is_device]


def _snapshot_files(paths: Iterable[str]) -> frozenset[str]:
    """Files in the directories of these images that are named as those of our snapshots."""
    found: set[str] = set()
    for directory in {os.path.dirname(os.path.realpath(path)) for path in paths}:
        found |= {os.path.join(directory, name) for name in os.listdir(directory) if backup_snapshots.is_file_name(name)}
    return frozenset(found)


def _boot_files(texts: Iterable[str]) -> tuple[boot_files.BootFile, ...]:
    """What the definitions and those in snapshots name, each path once, with what keeps it from being stored."""
    found: dict[str, boot_files.BootFile] = {}
    for text in filter(None, texts):
        root = _xml.parse(text, "a definition")
        for domain in [root] if root.tag == "domain" else [*root.iterfind("domain"), *root.iterfind("inactiveDomain")]:
            for each in boot_files.named(domain):
                if not (each.kind.packaged and os.path.realpath(each.path).startswith("/usr/")):
                    problem = _not_stored(each.path) if each.kind.stored else "files of this kind often hold secrets"
                    found.setdefault(each.path, boot_files.BootFile(each.path, each.kind, problem))
    return tuple(found.values())


def _not_stored(path: str) -> str:
    if os.path.realpath(path).startswith(("/sys/", "/proc/", "/dev/")):
        return "it belongs to this machine"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    try:
        return "" if stat.S_ISREG(os.fstat(fd).st_mode) else "it is no regular file"
    finally:
        os.close(fd)


def _file_bytes(paths: Iterable[str], tpm_path: str) -> dict[str, int]:
    """Sizes of what is stored besides images."""
    sizes = {path: os.path.getsize(path) for path in paths if path and os.path.isfile(path)}
    return {**sizes, tpm_path: firmware_state.tpm_bytes(tpm_path)} if tpm_path else sizes


def target_facts(place: storage.Place, can: Capabilities) -> TargetFacts:
    """What a plan needs to know about the directory that the archive goes to; `can`: what its file system can do."""
    return TargetFacts(
        directory=place.directory,
        free_bytes=_free_in(place.directory),
        device_id=os.stat(place.directory).st_dev,
        fs_type=place.fs_type,
        file_names=frozenset(os.listdir(place.directory)),
        can=can,
    )


def _jobs(domain: Domain) -> tuple[str, ...]:
    """Jobs at work on a running VM; after settling what dead runs left, none of them is ours."""
    whole = blockjobs.domain_job(domain)
    return (*((whole,) if whole else ()), *(f"block job {job.id} ({job.type})" for job in blockjobs.jobs(domain)))


def _resolved(conn: Connection, disk: domain_xml.Disk) -> domain_xml.Disk:
    """A disk of type volume with the path of its volume, where the pool can tell it or where it must be."""
    if not disk.volume or disk.path:
        return disk
    try:
        volume = conn.storagePoolLookupByName(disk.pool).storageVolLookupByName(disk.volume)
        return replace(disk, path=str(volume.path()))
    except libvirt.libvirtError:
        pool = next((each for each in storage.pools(conn) if each.name == disk.pool), None)
        # without a path it is judged as a disk whose source is not there
        return disk if pool is None else replace(disk, path=storage.expected_path(pool, disk.volume))


def _state_disks(state: snapshots.Snapshot) -> tuple[domain_xml.Disk, ...]:
    element = _xml.parse(state.xml, f"snapshot {state.name}").find("domain")
    return () if element is None else domain_xml.view(element).disks


def _images(conn: Connection, disks: Iterable[domain_xml.Disk]) -> dict[str, Image]:
    """Every image that the disks stand on, by path; disks without a local file have none."""
    found: dict[str, Image] = {}
    for disk in disks:
        # a logical volume that is not active has no device, and is one all the same
        if not disk.path or disk.path in found or not (_is_seen(disk.path) or disk.path.startswith("/dev/")):
            continue
        removable = disk.device in ("cdrom", "floppy")
        fmt = "raw" if removable else disk.format or "raw"
        place = storage.describe(conn, disk.path)
        if place.kind in place_rules.VOLUME_MANAGERS:
            found[disk.path] = _at(place, Image(disk.path, fmt, 0, 0, 0, is_device=True))
            continue
        if not _is_seen(disk.path):
            continue
        if disk.device == "lun" or fmt not in STORED_FORMATS:
            found[disk.path] = _image(conn, disk.path, fmt, "", 0, removable=True)
            continue
        found.update(_stack(conn, disk.path, fmt, removable=removable))
    return found


def _is_seen(path: str) -> bool:
    """What cannot be looked at is told by VmFacts.unseen: of a CD it is no reason to have no backup."""
    return not _filenames.why_unseen(path) and _filenames.is_there(path)


def _stack(conn: Connection, path: str, fmt: str, *, removable: bool = False) -> dict[str, Image]:
    """An image and all that it stands on as the images themselves say; the lower ones by their real paths."""
    found = {}
    chain = qemu_img.backing_chain(path, fmt)
    for link, lower in zip(chain, (*chain[1:], None)):
        if lower and not os.path.isabs(lower.path):
            hint = "Merge it into the disk first (virsh blockpull, or qemu-img rebase -b '')."
            raise SourceError(f"disk image {link.path}", f"it stands on {lower.path}, which is not simply a file", hint)
        below = os.path.realpath(lower.path) if lower else ""
        here = path if link is chain[0] else os.path.realpath(link.path)
        found[here] = _image(
            conn, here, link.format, below, link.virtual_size_bytes, removable=removable, named=link.path
        )
    return found


def _as_defined(conn: Connection, disks: Iterable[domain_xml.Disk], images: dict[str, Image]) -> dict[str, Image]:
    """The images, standing on each other as the definition lists it: QEMU goes by that, not by what the images say."""
    found = dict(images)
    for disk in disks:
        if disk.device != "disk" or disk.path not in found or not all(map(_is_seen, (link.path for link in disk.chain))):
            continue
        for link in disk.chain:
            if os.path.realpath(link.path) not in found:
                found.update(_stack(conn, os.path.realpath(link.path), link.format or "raw"))
        reals = [os.path.realpath(path) for path in (disk.path, *(link.path for link in disk.chain))]
        below = dict(zip(reals, [*reals[1:], ""] if disk.chain_complete else reals[1:]))
        for path, image in found.items():
            real = os.path.realpath(path)
            if real in below:
                found[path] = replace(image, backing_path=below[real])
    return found


def _at(place: storage.Place, image: Image) -> Image:
    return replace(
        image,
        kind=place.kind,
        group=place.group,
        pool=place.pool,
        pool_type=place.pool_type,
        read_only=place.read_only,
        fs_type=place.fs_type,
    )


def _image(
    conn: Connection,
    path: str,
    fmt: str,
    backing: str,
    virtual_size: int,
    *,
    removable: bool = False,
    named: str = "",
) -> Image:
    """`named`: as the layer above spells it, which tells more of a device than its real path."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SourceError(f"disk image {path}", f"it cannot be read ({error.strerror})") from error
    try:
        status = os.fstat(fd)
        is_device = stat.S_ISBLK(status.st_mode)
        size = os.lseek(fd, 0, os.SEEK_END)
        told = probe(reads(fd, path), size) if fmt == "qcow2" else None
    finally:
        os.close(fd)
    packed = 0
    if fmt == "raw" and not removable:
        raw = RawAsQcow2Source(path)
        packed = raw.size_bytes
        raw.close()
    image = Image(
        path=path,
        format=fmt,
        size_bytes=size,
        allocated_bytes=size if is_device else status.st_blocks * 512,
        packed_bytes=packed,
        virtual_size_bytes=virtual_size,
        backing_path=backing,
        has_data_file=told is not None and bool(told.data_file),
        corrupt=told is not None and told.corrupt,
        dirty=told is not None and told.dirty,
        is_device=is_device,
        device_id=status.st_dev,
        longest_name=_files.longest_name(os.path.dirname(os.path.realpath(path))),
    )
    return _at(storage.describe(conn, named or path), image)


def _locked(disks: Iterable[domain_xml.Disk], images: dict[str, Image]) -> tuple[str, ...]:
    """Images of an off VM's disks that a QEMU has open for writing."""
    found = []
    for disk in disks:
        image = images.get(disk.path)
        data = disk.device == "disk" and image is not None and image.format in STORED_FORMATS
        if data and image and _filenames.is_there(image.path) and qemu_img.is_in_use(image.path, image.format):
            found.append(image.path)
    return tuple(found)


def _free(path: str) -> int:
    """Beside the file that a path means."""
    return _free_in(os.path.dirname(os.path.realpath(path)))


def _free_in(directory: str) -> int:
    figures = os.statvfs(directory)
    return figures.f_bavail * figures.f_frsize
