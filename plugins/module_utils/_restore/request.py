# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a user asks of a restore: the options of ``vm_restore`` as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class DiskFormat(str, Enum):
    """Format of the restored disks: as they were on their host, or all of them qcow2."""

    KEEP = "keep"
    QCOW2 = "qcow2"


@dataclass(frozen=True)
class RestoreRequest:
    """One run of ``vm_restore``.

    `point` None: the newest. `pool` and `path` both "": the former places (C3), at most one of them is given.
    `name` "": the VM's own.
    `uuid`: "" (kept, but new when `name` is new or the original exists), "keep", "new" or a UUID.
    `mac`: "" (as for `uuid`), "keep" or "new". `flatten`: one image per disk and no snapshots.
    `disk_images`: members of a foreign archive by target, "" for a disk that is left out.
    `disks` False: of an .ovf the definition only. `system`, `configuration`: those of a package, "" for the only or default one.
    `trust`: the source is taken as ours, whoever it belongs to; `start_reduced`: it is started also where something was left out.
    `networks` maps names of networks and bridges in the archive to those of this host.
    """

    source: str
    point: int | None = None
    pool: str = ""
    path: str = ""
    name: str = ""
    uuid: str = ""
    mac: str = ""
    networks: Mapping[str, str] = field(default_factory=dict)
    disk_format: DiskFormat = DiskFormat.KEEP
    flatten: bool = False
    start: bool = False
    force: bool = False
    uri: str = "qemu:///system"
    check_mode: bool = False
    diff: bool = False
    disk_images: Mapping[str, str] = field(default_factory=dict)
    repair: bool = False
    start_reduced: bool = False
    trust: bool = False
    disks: bool = True
    system: str = ""
    configuration: str = ""


def from_params(params: Mapping[str, Any]) -> RestoreRequest:
    """The request behind the parameters of the module, with ``check_mode`` and ``diff`` (_argspec.run_module)."""
    return RestoreRequest(
        source=params["source"],
        point=params["point"],
        pool=params["pool"] or "",
        path=params["path"] or "",
        name=params["name"] or "",
        uuid=params["uuid"] or "",
        mac=params["mac"] or "",
        networks={str(former): str(here) for former, here in (params["networks"] or {}).items()},
        disk_images={str(target): str(name or "") for target, name in (params["disk_images"] or {}).items()},
        disks=params["disks"],
        system=params["system"] or "",
        configuration=params["configuration"] or "",
        disk_format=DiskFormat(params["disk_format"]),
        flatten=params["flatten"],
        start=params["start"],
        start_reduced=params["start_reduced"],
        trust=params["trust"],
        force=params["force"],
        repair=params["repair"],
        uri=params["uri"],
        check_mode=params["check_mode"],
        diff=params["diff"],
    )
