# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a user asks about attached disks: the options of ``vdisk_cross_attach`` and its ``_info`` as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._units import duration_s, size_bytes


class Wish(str, Enum):
    """What shall be true."""

    ATTACHED = "attached"
    DETACHED = "detached"
    RECONCILED = "reconciled"


class FreezeWish(str, Enum):
    """How the disks are frozen. AUTO: by the guest agent where one can, else as after a power failure."""

    AUTO = "auto"
    AGENT = "agent"
    CRASH = "crash"


@dataclass(frozen=True)
class AttachRequest:
    """One run of ``vdisk_cross_attach``.

    `vm`: the receiver, "" for all (RECONCILED). `vdisk`: id, path or serial of a disk, or with `source_vm` its target.
    `thin_clone`: name or uuid of the clone whose disk is meant where `vdisk` is a template's. `lease_s` 0: no limit.
    `expired`: detach those whose lease is over (RECONCILED). `wait_timeout_s` as everywhere.
    """

    vm: str = ""
    vdisk: str = ""
    source_vm: str = ""
    thin_clone: str = ""
    wish: Wish = Wish.ATTACHED
    consistency: FreezeWish = FreezeWish.AUTO
    lease_s: int = 0
    expired: bool = False
    uri: str = "qemu:///system"
    wait_timeout_s: int = 0
    bandwidth_bps: int = 0
    check_mode: bool = False


@dataclass(frozen=True)
class AttachInfoRequest:
    """One run of ``vdisk_cross_attach_info``: the disks at one receiver, of one source, or both; "" for any."""

    receiver: str = ""
    source_vm: str = ""
    uri: str = "qemu:///system"


def from_params(params: Mapping[str, Any]) -> AttachRequest:
    """The request behind the parameters of the module. Raises RefusedError for what cannot be meant."""
    wish = Wish(params["state"])
    if params["lease"] and wish is not Wish.ATTACHED:
        raise RefusedError("Option lease", "it belongs to state: attached", "Leave it out.")
    if params["expired"] and wish is not Wish.RECONCILED:
        raise RefusedError("Option expired", "it belongs to state: reconciled", "Leave it out.")
    if wish is Wish.RECONCILED and (params["vdisk"] or params["thin_clone"]):
        raise RefusedError(
            "Option vdisk", "state: reconciled looks at all disks of a VM", "Name vm or source_vm, or neither."
        )
    for option in ("vm", "vdisk"):
        if wish is not Wish.RECONCILED and not params[option]:
            raise RefusedError(f"Option {option}", "it is empty", "Name the receiver as vm, and its disk-to-be as vdisk.")
    lease_s = duration_s(params["lease"], "lease") if params["lease"] else 0
    if params["lease"] and not lease_s:
        raise RefusedError("Option lease", "it would be over at once", "Leave it out for an attach without an end.")
    return AttachRequest(
        vm=params["vm"] or "",
        vdisk=params["vdisk"] or "",
        source_vm=params["source_vm"] or "",
        thin_clone=params["thin_clone"] or "",
        wish=wish,
        consistency=FreezeWish(params["consistency"]),
        lease_s=lease_s,
        expired=params["expired"],
        uri=params["uri"],
        wait_timeout_s=duration_s(params["wait_timeout"], "wait_timeout"),
        bandwidth_bps=size_bytes(params["bandwidth"], "bandwidth"),
        check_mode=params["check_mode"],
    )


def info_from_params(params: Mapping[str, Any]) -> AttachInfoRequest:
    """The request behind the parameters of the info module."""
    return AttachInfoRequest(params["another_domain"] or "", params["source_vm"] or "", params["uri"])
