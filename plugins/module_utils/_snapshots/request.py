# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a user asks about snapshots: the options of ``vm_snapshot`` as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._units import duration_s, size_bytes

ALL_NAME = "all"


class SnapshotWish(str, Enum):
    """What shall be true of the snapshot."""

    PRESENT = "present"
    ABSENT = "absent"
    REVERTED = "reverted"


@dataclass(frozen=True)
class SnapshotRequest:
    """One run of ``vm_snapshot``. `snapshot` is a name, or ALL_NAME (absent only). `wait_timeout_s` as everywhere.

    `bandwidth_bps`: limit of the bytes that merges write in a second, 0: none.
    """

    vm: str
    snapshot: str
    wish: SnapshotWish = SnapshotWish.PRESENT
    memory: bool = False
    quiesce: bool = False
    description: str = ""
    uri: str = "qemu:///system"
    wait_timeout_s: int = 0
    bandwidth_bps: int = 0
    check_mode: bool = False


def from_params(params: Mapping[str, Any]) -> SnapshotRequest:
    """The request behind the parameters of the module. Raises RefusedError for what cannot be meant."""
    request = SnapshotRequest(
        vm=params["vm"],
        snapshot=params["snapshot"],
        wish=SnapshotWish(params["state"]),
        memory=params["memory"],
        quiesce=params["quiesce"],
        description=params["description"] or "",
        uri=params["uri"],
        wait_timeout_s=duration_s(params["wait_timeout"], "wait_timeout"),
        bandwidth_bps=size_bytes(params["bandwidth"], "bandwidth"),
        check_mode=params["check_mode"],
    )
    name = request.snapshot
    what = f"The snapshot {name!r}"
    if not name or name.startswith(".") or "/" in name or any(ord(letter) < 32 for letter in name):
        raise RefusedError(what, "libvirt takes no empty names, none with a slash and none that begins with a dot")
    if request.wish is not SnapshotWish.ABSENT and name == ALL_NAME:
        raise RefusedError(what, f"{ALL_NAME!r} stands for every snapshot, with state=absent only")
    if request.wish is SnapshotWish.PRESENT and request.memory and request.quiesce:
        raise RefusedError(
            what,
            "memory and quiesce exclude each other: frozen file systems would be frozen in the memory too",
            "With memory the guest resumes exactly where it was; without it, quiesce leaves clean file systems.",
        )
    return request
