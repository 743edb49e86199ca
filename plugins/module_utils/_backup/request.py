# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a user asks of a backup: the options of ``vm_backup`` as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._units import duration_s, size_bytes


class Mode(str, Enum):
    """What kind of point is asked for."""

    FULL = "full"


class ConsistencyWish(str, Enum):
    """Which consistency is asked for; `_archive.model.Consistency` is what was reached."""

    AUTO = "auto"
    AGENT = "agent"
    MEMORY = "memory"
    CRASH = "crash"


@dataclass(frozen=True)
class BackupRequest:
    """One run of ``vm_backup``.

    Exactly one of `pool` (name of a storage pool) and `path` (directory) is not "".
    `threads` 0: one per core.
    `max_age_s` None: always make a backup; otherwise a good point younger than this is enough.
    `wait_timeout_s`: how long to wait for another operation on the same VM; 0: report it as busy at once.
    `bandwidth_bps`: limit of the bytes written to the archive in a second; 0: none.
    `notes` is stored with the new archive.
    """

    vm: str
    pool: str = ""
    path: str = ""
    uri: str = "qemu:///system"
    mode: Mode = Mode.FULL
    compress: bool = False
    compress_level: int = 2
    threads: int = 0
    consistency: ConsistencyWish = ConsistencyWish.AUTO
    include_iso: bool = True
    include_secrets: bool = False
    max_age_s: int | None = None
    wait_timeout_s: int = 0
    bandwidth_bps: int = 0
    notes: str = ""
    check_mode: bool = False
    diff: bool = False


def from_params(params: Mapping[str, Any]) -> BackupRequest:
    """The request behind the parameters of the module, with ``check_mode`` and ``diff`` (_argspec.run_module).

    Raises RefusedError for durations and sizes that are none.
    """
    return BackupRequest(
        vm=params["vm"],
        pool=params["pool"] or "",
        path=params["path"] or "",
        uri=params["uri"],
        mode=Mode(params["mode"]),
        compress=params["compress"],
        compress_level=params["compress_level"],
        threads=params["threads"],
        consistency=ConsistencyWish(params["consistency"]),
        include_iso=params["include_iso"],
        include_secrets=params["include_secrets"],
        max_age_s=None if params["max_age"] is None else duration_s(params["max_age"], "max_age"),
        wait_timeout_s=duration_s(params["wait_timeout"], "wait_timeout"),
        bandwidth_bps=size_bytes(params["bandwidth"], "bandwidth"),
        notes=params["notes"] or "",
        check_mode=params["check_mode"],
        diff=params["diff"],
    )
