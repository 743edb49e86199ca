# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What QEMU, libvirt and the files say of disks whose active overlays are to be merged: the facts that `situation.decide` judges.

Nothing here changes anything. `active_merge` looks here before each act, and after it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers, qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import (
    blockjobs,
    snapshots,
    views,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.layers import other_vms
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.overlays import (
    MergeFacts,
    OriginalDisk,
    Overlay,
    Step,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.situation import (
    Content,
    DiskSituation,
    JobSeen,
    Power,
    SeenActive,
    Situation,
)


@dataclass(frozen=True)
class ActiveMerge:
    """Overlays of one VM that are to be merged into their bases.

    ``originals``: what the disks were, and shall be again, by target. ``expendable``: internal snapshots that may go with the
    overlays they lie in. ``snapshot``: the one that goes with the overlays, "" where several do; ``frozen``: what tells whether a
    base that it has frozen was written to since, by target.
    """

    vm_uuid: str
    vm_name: str
    overlays: tuple[Overlay, ...]
    originals: Mapping[str, OriginalDisk]
    expendable: tuple[str, ...] = ()
    snapshot: str = ""
    frozen: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def observe(conn: Connection, domain: Domain | None, merge: ActiveMerge, facts: MergeFacts) -> Situation:
    """The disks of one VM as decide() wants them; touches nothing. ``domain`` is None when it is not defined any more."""
    seen = views.gather(conn, domain) if domain is not None else views.NOWHERE
    jobs = {job.target: job for job in (blockjobs.jobs(domain) if domain is not None and seen.running else ())}
    opened = blockjobs.open_files(domain) if domain is not None and seen.running else frozenset()
    power = Power.RUNNING if seen.running else Power.SAVED if seen.managed_save else Power.OFF
    return Situation(
        power=Power.GONE if domain is None else power,
        listed=False,
        memory_image=False,
        thaw=False,
        disks=tuple(_look(conn, domain, merge, overlay, facts, seen, jobs, opened) for overlay in merge.overlays),
        domain_job=blockjobs.domain_job(domain) if domain is not None and seen.running else "",
    )


def _look(
    conn: Connection,
    domain: Domain | None,
    merge: ActiveMerge,
    overlay: Overlay,
    facts: MergeFacts,
    seen: views.VmView,
    jobs: Mapping[str, blockjobs.BlockJob],
    opened: Collection[str],
) -> DiskSituation:
    disk, step = seen.disk(overlay.target), facts.step(overlay.target)
    attached = bool(disk.qemu or disk.live)
    in_use = not attached and _in_use(overlay)
    detached = not attached and not in_use
    on_overlay = seen_active(disk.qemu, overlay) is SeenActive.OVERLAY
    kept = seen_active(disk.persistent, overlay)
    gone = domain is not None and not attached and kept in (SeenActive.NONE, SeenActive.OTHER) and step is not Step.LEFT
    claimed = _claimed(conn, domain, merge, overlay, seen) if gone else ""
    return DiskSituation(
        target=overlay.target,
        qemu=seen_active(disk.qemu, overlay),
        live=seen_active(disk.live, overlay),
        persistent=kept,
        job=_job_seen(jobs.get(overlay.target), step),
        step=step,
        # on the overlay in QEMU, all that matters is that it is not a leftover; in use by others, it is not looked into
        content=Content.DATA
        if on_overlay or in_use
        else _content(overlay, compare=detached and not claimed and _is_open(kept, step)),
        in_use=in_use,
        ghost=disk.mirror and overlay.target not in jobs,
        stray=seen.running and not on_overlay and any(views.real(path) in opened for path in overlay.layers),
        inside=tuple(name for name in _inside(overlay) if name not in merge.expendable),
        claimed=claimed,
    )


def seen_active(chain: tuple[str, ...], overlay: Overlay) -> SeenActive:
    """Which image a view that has this chain shows as the disk's active one."""
    if not chain:
        return SeenActive.NONE
    if chain[0] == views.real(overlay.overlay_path):
        # what the overlay stands on must be ours too, as far as the view says it; after REJOIN that is the base itself
        below = [views.real(path) for path in (*overlay.between, overlay.base_path)]
        ours = all(here == there for here, there in zip(chain[1:], below)) or chain[1] == below[-1]
        return SeenActive.OVERLAY if ours else SeenActive.OTHER
    return SeenActive.BASE if chain[0] == views.real(overlay.base_path) else SeenActive.OTHER


def _job_seen(job: blockjobs.BlockJob | None, step: Step) -> JobSeen:
    if job is None:
        return JobSeen.NONE
    if job.id.startswith(blockjobs.OWN_PREFIX):
        return JobSeen.OURS_QEMU
    return JobSeen.OURS if job.type == "commit" and step is not Step.NONE else JobSeen.FOREIGN


def _in_use(overlay: Overlay) -> bool:
    images = ((overlay.overlay_path, "qcow2"), (overlay.base_path, overlay.base_format))
    return any(
        _filenames.is_there(path) and not _is_blank(path, image_format) and qemu_img.is_in_use(path, image_format)
        for path, image_format in images
    )


def _is_blank(path: str, image_format: str) -> bool:
    """An overlay begins as an empty file, which nobody has made an image of yet."""
    return image_format == "qcow2" and not os.path.getsize(path)


def _is_open(persistent: SeenActive, step: Step) -> bool:
    """Whether only the files themselves can tell what to do: comparing them reads both whole."""
    if persistent is SeenActive.OVERLAY:
        return step not in (Step.NONE, Step.COMMITTING)
    if persistent is SeenActive.BASE:
        return step not in (Step.PIVOTING, Step.PIVOTED)
    return step is not Step.LEFT


def _claimed(conn: Connection, domain: Domain, merge: ActiveMerge, overlay: Overlay, seen: views.VmView) -> str:
    """Which VM, other disk or snapshot has the files of an unplugged disk, or stands on them; "" for none."""
    files_of_disk = {views.real(path) for path in (*overlay.layers, overlay.base_path)}
    others = other_vms(conn, merge.vm_uuid)
    for path in files_of_disk & others.keys():
        return f"the VM {others[path]}"
    for disk in seen.disks:
        tops = [chain[0] for chain in (disk.live, disk.persistent) if chain]
        if any(files_of_disk & {views.real(path) for path in layers.below(top)} for top in tops):
            return f"its disk {disk.target}"
    layers_gone = {views.real(path) for path in overlay.layers}  # its older snapshots may well name the base
    for node in snapshots.tree(domain):
        sources = _xml.parse(node.xml, f"The snapshot {node.name}").iterfind(".//disk/source")
        if node.name != merge.snapshot and layers_gone & {views.real(source.get("file", "")) for source in sources}:
            return f"its snapshot {node.name}"
    return ""


def _content(overlay: Overlay, *, compare: bool) -> Content:
    if not _filenames.is_there(overlay.overlay_path, follow=False):
        return Content.MISSING
    empty = os.path.getsize(overlay.overlay_path) == 0
    if empty:
        return Content.EMPTY  # libvirt makes an empty file first
    if not any(map(layers.has_data, overlay.layers)) and _is_same_size(overlay):
        return Content.EMPTY
    if not compare:
        return Content.DATA
    if os.stat(overlay.overlay_path).st_mtime_ns > os.stat(overlay.base_path).st_mtime_ns:
        return Content.NEWER
    same = qemu_img.same_content(overlay.overlay_path, "qcow2", overlay.base_path, overlay.base_format)
    return Content.MERGED if same and _is_same_size(overlay) else Content.OLDER


def _is_same_size(overlay: Overlay) -> bool:
    """Whether base and overlay are disks of one size: a disk may have been resized since, and nothing written to it."""
    return layers.size_bytes(overlay.overlay_path, "qcow2") == layers.size_bytes(overlay.base_path, overlay.base_format)


def _inside(overlay: Overlay) -> list[str]:
    names: list[str] = []
    for path in overlay.layers:
        # a look at the header: qemu-img for each disk at every step takes longer than the merges
        if _filenames.is_there(path, follow=False) and os.path.getsize(path) and layers.header(path).internal_snapshots:
            names += qemu_img.info(path, "qcow2").internal_snapshots
    return names
