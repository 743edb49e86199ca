# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Block jobs: who is at work on a VM's disks, and the merge of an overlay into its base."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._errors import BusyError, KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import apparmor, monitor
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Domain, libvirt, translate

POLL_S = 0.05
_LASTING_S = 2.0  # libvirt sees what its QEMU does within moments
_PIVOT_S = 60.0
_STUCK_S = 30.0
_STARTS = 3
_SMALL_BYTES = 4 << 20  # that much at once is no burden, whatever the limit
_MOST_BPS = 1 << 40  # as good as none
OWN_PREFIX = "kvmops-"
OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class BlockJob:
    """One job in QEMU. ``target`` is the disk libvirt made it for, "" for jobs it does not know."""

    id: str
    type: str  # commit, stream, mirror, backup, snapshot-save, …
    status: str  # running, ready, pending, concluded, …
    target: str
    done_bytes: int
    total_bytes: int


def jobs(domain: Domain) -> tuple[BlockJob, ...]:
    """All jobs of a running VM's QEMU."""
    found = []
    for each in monitor.execute(domain, "query-jobs"):
        found.append(
            BlockJob(
                each["id"],
                each["type"],
                each["status"],
                target_of(each["id"]),
                each.get("current-progress", 0),
                each.get("total-progress", 0),
            )
        )
    return tuple(found)


def require_idle(domain: Domain, what: str) -> None:
    """Raises BusyError when a job is at work on a running VM; after settling what dead runs left, none of them is ours."""
    at_work = domain_job(domain)
    if at_work:
        raise BusyError(what, f"{at_work} is at work on it", "Wait until it has finished.")
    found = jobs(domain)
    if found:
        named = ", ".join(f"{job.id} ({job.type}, {job.status})" for job in found)
        why = f"block jobs that kvmops.backup did not start are at work on it: {named}"
        raise BusyError(what, why, "Wait until they have finished.")


def require_open(domain: Domain, what: str) -> None:
    """Raises RefusedError for a running VM that has not gone on since its memory was saved: QEMU has given its disks up."""
    if monitor.execute(domain, "query-status")["status"] == "postmigrate":
        raise RefusedError(
            what,
            "it stands still since its memory was saved, and QEMU merges no disks of such a VM",
            f"Let it go on (virsh resume {domain.name()}) or end it (virsh destroy {domain.name()}), and run the task again.",
        )


def target_of(job_id: str) -> str:
    """The disk in the name of a job: libvirt's commit-vda-libvirt-4-format, our own kvmops-vda; "" otherwise. Pure."""
    parts = job_id.split("-")
    if job_id.startswith(OWN_PREFIX):
        return job_id[len(OWN_PREFIX) :]
    return parts[1] if len(parts) >= 2 and parts[0] in ("commit", "pull", "copy", "backup") else ""


def domain_job(domain: Domain) -> str:
    """What libvirt itself is doing with the whole VM (backup, migration, save, dump), "" if nothing."""
    try:
        stats = domain.jobStats(0)
    except libvirt.libvirtError as error:
        raise translate(error, f"The VM {domain.name()}") from error
    if stats.get("type", 0) == libvirt.VIR_DOMAIN_JOB_NONE:
        return ""
    names = {
        libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP: "a backup job (virsh domjobinfo; end it with virsh domjobabort)",
        libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "a migration",
        libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "a migration",
        libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "a save",
        libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "a memory dump",
        libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "a snapshot being taken",
        libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_REVERT: "a snapshot being reverted to",
    }
    return names.get(stats.get("operation", 0), "another job (virsh domjobinfo)")


def start_commit(domain: Domain, target: str, base: str, top: str, limit_bps: int = 0) -> None:
    """Start merging the active image ``top`` into ``base``; it stays in step until pivot(). ``limit_bps`` 0: no limit."""
    _start(domain, target, base, top, limit_bps, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)


def start_inner_commit(domain: Domain, target: str, base: str, top: str, limit_bps: int = 0) -> None:
    """Start merging ``top``, a layer below the active image, into ``base``; the job ends by itself."""
    _start(domain, target, base, top, limit_bps, 0)


def _start(domain: Domain, target: str, base: str, top: str, limit_bps: int, flags: int) -> None:
    flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
    names: dict[str, str] = {}
    for attempt in range(_STARTS):
        try:
            names = _listed(domain, target)
            domain.blockCommit(target, names.get(base, base), names.get(top, top), limit_bps, flags)
            return
        except libvirt.libvirtError as error:
            failed = translate(error, f"Merging {top} of {domain.name()} into {base}")
            # libvirt makes the profile anew whenever a job ends, and that may have been just now
            again = attempt + 1 < _STARTS and "Permission denied" in failed.why
            if not (again and apparmor.lift(domain, _written(list(names), base, top))):
                raise apparmor.explain(domain, failed, base) from error


def _written(chain: Sequence[str], base: str, top: str) -> list[str]:
    """What QEMU opens for writing: the base, and the image that stands on the top, to name another backing file in it. Pure."""
    return [base, *(above for above, path in zip(chain, chain[1:]) if path == top)]


def shorten(domain: Domain, target: str, base: str) -> None:
    """Make libvirt see that the active image stands on ``base`` directly, which it does in QEMU: a pull with nothing to pull."""
    try:
        domain.blockRebase(target, _listed(domain, target).get(base, base), 0, 0)
    except libvirt.libvirtError as error:
        raise translate(error, f"The chain of {target} of {domain.name()}") from error
    wait_ended(domain, [target], lambda _done, _total: None, Limit(domain, 0))


def _listed(domain: Domain, target: str) -> dict[str, str]:
    """The names of a disk's images in the live definition, by resolved path: libvirt compares names."""
    disk = domain_xml.parse(domain.XMLDesc(0)).disk(target)
    if disk is None:
        return {}
    return {os.path.realpath(path): path for path in (disk.path, *(link.path for link in disk.chain)) if path}


def wait_ended(domain: Domain, targets: Collection[str], on_bytes: OnBytes, limit: Limit) -> None:
    """Wait until no job is at work on any of the disks any more; whether each did its work is for the caller to see."""
    while True:
        try:
            found = {target: _bytes_of(info) for target in targets if (info := domain.blockJobInfo(target, 0))}
        except libvirt.libvirtError as error:
            raise translate(error, f"Merging {', '.join(targets)} of {domain.name()}") from error
        if not found and not any(job.target in targets for job in jobs(domain)):
            return
        if found:
            _tell(on_bytes, found)
            limit.look(found)
        time.sleep(POLL_S)


def _tell(on_bytes: OnBytes, found: Mapping[str, tuple[int, int]]) -> None:
    on_bytes(sum(done for done, _total in found.values()), sum(total for _done, total in found.values()))


def _bytes_of(info: dict[str, Any]) -> tuple[int, int]:
    return int(info["cur"]), int(info["end"])


class Limit:
    """The limit of merges that run side by side, which share ``bps`` bytes a second; 0: no limit.

    With it they end, too: they come nearer to their end by at least half of it, however fast the guest writes, or it is doubled;
    and ``within_s`` (0: any time) is enough, if the storage can do that. A merge that has next to nothing left has none: QEMU
    sleeps off what it copied beyond a limit, and the guest writes again meanwhile.
    """

    def __init__(self, domain: Domain, bps: int, within_s: float = 0.0) -> None:
        self._domain, self._bps = domain, bps
        self._end = time.monotonic() + within_s if within_s else 0.0
        self._set: dict[str, int] = {}
        self._left_then, self._since = -1, 0.0

    def share(self, target: str, of: int) -> int:
        """What a job that begins as one of so many may take."""
        self._set[target] = -(-self._bps // of)
        return self._set[target]

    def look(self, found: Mapping[str, tuple[int, int]]) -> None:
        """Called now and then with bytes done and in total of each job, by target."""
        if not self._bps:
            return
        left = {target: total - done for target, (done, total) in found.items()}
        far = [target for target, (done, _total) in found.items() if left[target] > _SMALL_BYTES or not done]
        self._raise(sum(left[target] for target in far), time.monotonic())
        for target in found:
            self._limit(target, -(-self._bps // len(far)) if target in far else 0)

    def _raise(self, left: int, now: float) -> None:
        if self._end:
            self._bps = least_bps(self._bps, left, max(self._end - now, _STUCK_S))
        if self._left_then < 0:
            self._left_then, self._since = left, now
        elif now - self._since >= _STUCK_S:
            if left and self._left_then - left < self._bps * (now - self._since) / 2:
                self._bps *= 2
            self._left_then, self._since = left, now

    def _limit(self, target: str, bps: int) -> None:
        if self._set.get(target) == bps:
            return
        with suppress(libvirt.libvirtError):  # it may have ended in this moment
            flags = libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
            self._domain.blockJobSetSpeed(target, min(bps, _MOST_BPS), flags)
            self._set[target] = bps


def least_bps(bps: int, left_bytes: int, within_s: float) -> int:
    """The limit, high enough for so many bytes in that time; 0 stays: no limit. Pure."""
    return max(bps, int(left_bytes / within_s)) if bps and within_s else bps


def wait_ready(domain: Domain, targets: Collection[str], on_bytes: OnBytes, limit: Limit) -> None:
    """Wait until base and overlay of each disk are in step. Raises KvmopsError when a job ends instead (no space, I/O error).

    A libvirtd that died between starting a job and writing that down knows the job, but not that its disk has one.
    QEMU's word then counts.
    """
    unseen_since: dict[str, float] = {}
    while True:
        try:
            infos = {target: domain.blockJobInfo(target, 0) for target in targets}
            disks = {disk.target: disk for disk in domain_xml.parse(domain.XMLDesc(0)).disks}
        except libvirt.libvirtError as error:
            raise translate(error, f"Merging {', '.join(targets)} of {domain.name()}") from error
        for target, info in infos.items():
            if not info:
                raise KvmopsError(
                    f"Merging {target} of {domain.name()}",
                    "the block job ended before it was ready",
                    "Look for a full file system or I/O errors under the disk; the next run tries again.",
                )
        found = {target: _bytes_of(info) for target, info in infos.items()}
        _tell(on_bytes, found)
        limit.look(found)
        waiting = [target for target in targets if target not in disks or not disks[target].mirror_ready]
        ready = {job.target for job in jobs(domain) if job.status == "ready"} if waiting else set()
        now = time.monotonic()
        unseen_since = {target: unseen_since.get(target, now) for target in waiting if target in ready}
        if all(now - unseen_since.get(target, now) > _LASTING_S for target in waiting):
            return
        time.sleep(POLL_S)


def give_up(domain: Domain, targets: Collection[str]) -> None:
    """End merges that were not pivoted: each disk stays on its overlay. Tried only; the next run looks again."""
    for target in targets:
        with suppress(libvirt.libvirtError):
            domain.blockJobAbort(target, 0)


def _ready_in_qemu(domain: Domain, target: str) -> BlockJob | None:
    return next((job for job in jobs(domain) if job.target == target and job.status == "ready"), None)


def pivot(domain: Domain, target: str) -> None:
    """Let the guest go on with the base. Returns when libvirt has done it; the caller looks at the views."""
    disk = domain_xml.parse(domain.XMLDesc(0)).disk(target)
    unseen = _ready_in_qemu(domain, target)
    if disk is not None and not disk.mirror_ready and unseen is not None:
        # libvirt 9 refuses to pivot a job that its disk does not have, and dies when told to abort it; the end it takes note of
        monitor.execute(domain, "job-complete", id=unseen.id)
        deadline = time.monotonic() + _PIVOT_S
        while any(job.id == unseen.id for job in jobs(domain)):
            if time.monotonic() > deadline:
                raise KvmopsError(f"Switching {target} of {domain.name()} back to its base", "QEMU's job does not end")
            time.sleep(POLL_S)
        return
    try:
        domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    except libvirt.libvirtError as error:
        raise translate(error, f"Switching {target} of {domain.name()} back to its base") from error


def start_commit_qemu(domain: Domain, target: str, overlay: str, base: str, limit_bps: int = 0) -> None:
    """Start merging an active image that libvirt does not know, as our own job."""
    top_node, base_node = _format_node(domain, overlay), _format_node(domain, base)
    monitor.execute(
        domain, "block-commit", job_id=OWN_PREFIX + target, device=top_node, top_node=top_node, base_node=base_node,
        speed=limit_bps, auto_finalize=True, auto_dismiss=False,
    )  # fmt: skip


def finish_commit_qemu(domain: Domain, target: str, on_bytes: OnBytes, before_pivot: Callable[[], None]) -> None:
    """Bring our own job to its end: the guest goes on with the base. The job stays listed until dismiss_own()."""
    asked = False
    while True:
        job = next((each for each in jobs(domain) if each.id == OWN_PREFIX + target), None)
        if job is None or job.status in ("aborting", "null"):
            raise KvmopsError(f"Merging {target} of {domain.name()}", "the block job ended before it was ready")
        if job.status == "concluded":
            return
        on_bytes(job.done_bytes, job.total_bytes)
        if job.status == "ready" and not asked:
            before_pivot()
            monitor.execute(domain, "job-complete", id=job.id)
            asked = True
        time.sleep(POLL_S)


def dismiss_own(domain: Domain, target: str) -> None:
    """Forget our own ended job."""
    monitor.execute(domain, "job-dismiss", id=OWN_PREFIX + target)


def is_stale_creation(job: BlockJob) -> bool:
    """An ended job of the kind libvirt makes overlays with; a living libvirtd dismisses them at once. Pure."""
    return job.type == "create" and job.status == "concluded"


def dismiss_stale_creations(domain: Domain) -> None:
    """Forget what is_stale_creation() names: libvirt will want the jobs' names again for its next snapshot."""
    for job in jobs(domain):
        if is_stale_creation(job):
            monitor.execute(domain, "job-dismiss", id=job.id)


def open_files(domain: Domain) -> frozenset[str]:
    """The local files, resolved, that QEMU has block nodes of."""
    found = monitor.execute(domain, "query-named-block-nodes", flat=True)
    return frozenset(os.path.realpath(monitor.file_of(node["file"])) for node in found)


def drop_nodes(domain: Domain, paths: Collection[str]) -> None:
    """Take the block nodes of files, which no device uses, out of QEMU. QEMU refuses for nodes in use."""
    # the format node stands on the storage node and goes first
    for node in sorted(_nodes(domain, paths), key=lambda each: each["drv"] == "file"):
        monitor.execute(domain, "blockdev-del", node_name=node["node-name"])


def insert_overlay(domain: Domain, overlay: str, base: str, index: str) -> None:
    """Put a new, empty overlay between a device and its base, under the node names that libvirt has for it (see Disk.index)."""
    storage, image = f"libvirt-{index}-storage", f"libvirt-{index}-format"
    base_node = _format_node(domain, base)
    monitor.execute(domain, "blockdev-add", driver="file", filename=overlay, node_name=storage, discard="unmap")
    monitor.execute(
        domain, "blockdev-add", driver="qcow2", file=storage, backing=None, node_name=image, discard="unmap"
    )
    monitor.execute(domain, "blockdev-snapshot", node=base_node, overlay=image)


def _format_node(domain: Domain, path: str) -> str:
    # newer libvirt gives a raw image one node only, that of its file
    for node in sorted(_nodes(domain, [path]), key=lambda each: each["drv"] == "file"):
        return str(node["node-name"])
    raise KvmopsError(f"QEMU of {domain.name()}", f"it has no block node for {path}")


def _nodes(domain: Domain, paths: Collection[str]) -> list[dict[str, Any]]:
    found = monitor.execute(domain, "query-named-block-nodes", flat=True)
    wanted = {os.path.realpath(path) for path in paths}
    return [node for node in found if os.path.realpath(monitor.file_of(node["file"])) in wanted]
