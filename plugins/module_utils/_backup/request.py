# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a user asks of a backup: the options of ``vm_backup`` as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._archive import digests, sidecars
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._priority import USUAL, Priority
from ansible_collections.kvmops.backup.plugins.module_utils._units import duration_s, size_bytes

SLOT_TIMEOUT_S = 86400  # who limits the backups at work wants the others to wait


class Mode(str, Enum):
    """What kind of point is asked for. AUTO: an increment where the newest archive can be continued, else a full."""

    FULL = "full"
    INCREMENTAL = "incremental"
    AUTO = "auto"


class Deletes(str, Enum):
    """Which snapshots go when an archive has reached its limit: all of the VM, or only those made by this collection."""

    ALL = "all"
    OWN = "own"


class OnUnmerged(str, Enum):
    """What snapshots that should be merged, and cannot be, make of a run whose point is published."""

    WARN = "warn"
    FAIL = "fail"


class ConsistencyWish(str, Enum):
    """Which consistency is asked for; `_archive.model.Consistency` is what was reached."""

    AUTO = "auto"
    AGENT = "agent"
    MEMORY = "memory"
    CRASH = "crash"


@dataclass(frozen=True)
class BackupRequest:
    """One run of ``vm_backup``.

    At most one of `pool` (name of a storage pool) and `path` (directory) is not ""; with neither, `archive` tells the place.
    `incrementable`: a full keeps its snapshot, so that increments can follow; always so in mode AUTO.
    `archive`: path of the archive to continue; "": the VM's newest one made incrementable in the place.
    `increment_limit`: points that an archive may have before snapshots are merged (`increment_limit_deletes`); 0: any number.
    `full_weekday` (one of _policy.WEEKDAYS): a full is owed if there is no good one since that day began; "": never.
    `threads` 0: one per core. `digest`: one of digests.WISHES.
    `max_age_s` None: always make a backup; otherwise a good point younger than this is enough.
    `keep_last`, `keep_days`: which archives of the VM stay in the place after a good backup; 0: no such rule.
    `free_space`: the oldest archives there go before it, until it fits.
    `max_parallel`: backups at work in the place at once; 0: any number. `slot_timeout_s`: how long to wait for that.
    `wait_timeout_s`: how long to wait for another operation on the same VM; 0: report it as busy at once.
    `bandwidth_bps`: limit of the bytes written in a second, to the archive and then in merges; 0: none.
    `unmerged`: what snapshots that cannot be merged make of a run.
    `priority` is that of the copying; what a guest waits for is done with the usual one.
    `notes` is stored with the new archive.
    """

    vm: str
    pool: str = ""
    path: str = ""
    uri: str = "qemu:///system"
    mode: Mode = Mode.FULL
    incrementable: bool = False
    archive: str = ""
    increment_limit: int = 0
    increment_limit_deletes: Deletes = Deletes.ALL
    full_weekday: str = ""
    compress: bool = False
    compress_level: int = 2
    threads: int = 0
    digest: str = digests.AUTO
    consistency: ConsistencyWish = ConsistencyWish.AUTO
    include_iso: bool = True
    include_boot_files: bool = True
    include_secrets: bool = False
    max_age_s: int | None = None
    keep_last: int = 0
    keep_days: int = 0
    free_space: bool = False
    max_parallel: int = 0
    wait_timeout_s: int = 0
    slot_timeout_s: int = SLOT_TIMEOUT_S
    bandwidth_bps: int = 0
    unmerged: OnUnmerged = OnUnmerged.WARN
    priority: Priority = USUAL
    notes: str = ""
    check_mode: bool = False
    diff: bool = False


def from_params(params: Mapping[str, Any]) -> BackupRequest:
    """The request behind the parameters of the module, with ``check_mode`` and ``diff`` (_argspec.run_module).

    Raises RefusedError for durations and sizes that are none, notes that are too long, and options that contradict each other.
    """
    mode, archive, limit = Mode(params["mode"]), params["archive"] or "", params["increment_limit"]
    if not (params["pool"] or params["path"] or archive):
        raise RefusedError("The target", "pool and path are empty", "Name a pool or a directory.")
    if mode is Mode.FULL and archive:
        raise RefusedError("Option archive", "a full makes a new archive", "Use mode: incremental or auto with it.")
    if limit < 0:
        raise RefusedError("Option increment_limit", f"{limit} is no number of points", "Use 0 for no limit.")
    if mode is Mode.INCREMENTAL and limit == 1:
        raise RefusedError("Option increment_limit", "with 1 every run is a full", "Use mode: auto, or a higher limit.")
    if params["full_weekday"] and mode is Mode.INCREMENTAL:
        raise RefusedError("Option full_weekday", "an incremental run makes no full", "Use mode: auto with it.")
    wait = params["wait_timeout"]
    return BackupRequest(
        vm=params["vm"],
        pool=params["pool"] or "",
        path=params["path"] or "",
        uri=params["uri"],
        mode=mode,
        incrementable=params["incrementable"] or mode is Mode.AUTO,
        archive=archive,
        increment_limit=limit,
        increment_limit_deletes=Deletes(params["increment_limit_deletes"]),
        full_weekday=params["full_weekday"] or "",
        compress=params["compress"],
        compress_level=params["compress_level"],
        threads=params["threads"],
        digest=params["digest"],
        consistency=ConsistencyWish(params["consistency"]),
        include_iso=params["include_iso"],
        include_boot_files=params["include_boot_files"],
        include_secrets=params["include_secrets"],
        max_age_s=None if params["max_age"] is None else duration_s(params["max_age"], "max_age"),
        keep_last=_count(params, "keep_last"),
        keep_days=_count(params, "keep_days"),
        free_space=params["free_space"],
        max_parallel=_count(params, "max_parallel"),
        wait_timeout_s=0 if wait is None else duration_s(wait, "wait_timeout"),
        slot_timeout_s=SLOT_TIMEOUT_S if wait is None else duration_s(wait, "wait_timeout"),
        bandwidth_bps=size_bytes(params["bandwidth"], "bandwidth"),
        unmerged=OnUnmerged(params["unmerged"]),
        priority=Priority.of(params),
        notes=sidecars.checked_notes(params["notes"] or ""),
        check_mode=params["check_mode"],
        diff=params["diff"],
    )


def _count(params: Mapping[str, Any], option: str) -> int:
    count = params[option] or 0
    if count < 0:
        raise RefusedError(f"Option {option}", f"{count} is no number to count with", "Use 0 for no limit.")
    return int(count)
