# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Logical volumes as `lvs` reports them: also those that are not active, or that other hosts use."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils._errors import SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import PlaceKind

_TIMEOUT_S = 30
_FIELDS = "lv_path,lv_dm_path,vg_name,segtype,vg_lock_type,vg_clustered,lv_kernel_major,lv_kernel_minor"
# Without these, volume groups that have locks across hosts, or belong to another one, are left out of the report.
_OPTIONS = ("--reportformat", "json", "--readonly", "--shared", "--foreign", "-o", _FIELDS)


@dataclass(frozen=True)
class LogicalVolume:
    """One logical volume. `paths`: its names in /dev; `device`: (major, minor), (-1, -1) while it is not active."""

    paths: tuple[str, ...]
    volume_group: str
    kind: PlaceKind
    device: tuple[int, int]


def parse(report: str) -> tuple[LogicalVolume, ...]:
    """The JSON report of `lvs` with our fields; one row per segment. Pure."""
    rows = [row for part in json.loads(report)["report"] for row in part["lv"]]
    return tuple(
        LogicalVolume(
            paths=tuple(path for path in (row["lv_path"], row["lv_dm_path"]) if path),
            volume_group=row["vg_name"],
            kind=_kind(row),
            device=(int(row["lv_kernel_major"]), int(row["lv_kernel_minor"])),
        )
        for row in rows
    )


def _kind(row: dict[str, str]) -> PlaceKind:
    if row["vg_lock_type"] not in ("", "none") or row["vg_clustered"]:
        return PlaceKind.SHARED_LVM
    return PlaceKind.THIN_LVM if row["segtype"].startswith("thin") else PlaceKind.LVM


def find(path: str, volumes: Sequence[LogicalVolume]) -> LogicalVolume | None:
    """The logical volume that a path in /dev names, or in whose volume group's directory it lies."""
    device = (-1, -1)
    if os.path.exists(path):
        number = os.stat(path).st_rdev
        device = (os.major(number), os.minor(number))
    for volume in volumes:
        if path in volume.paths or (device != (-1, -1) and device == volume.device):
            return volume
    return next((each for each in volumes if path == f"/dev/{each.volume_group}"), None)


def volumes() -> tuple[LogicalVolume, ...]:
    """All logical volumes that this host can see; () where LVM is not installed, or for users who may not ask it.

    Raises SourceError when `lvs` fails or hangs: not knowing is not the same as no LVM.
    """
    if os.geteuid() != 0:
        return ()
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "LVM_SUPPRESS_FD_WARNINGS": "1"}
    try:
        done = subprocess.run(
            ["lvs", *_OPTIONS],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=environment,
        )
    except FileNotFoundError:
        return ()
    except subprocess.TimeoutExpired:
        why = f"lvs did not answer within {_TIMEOUT_S} seconds"
        raise SourceError("The logical volumes of this host", why, "Check multipath and SAN devices.") from None
    if done.returncode:
        raise SourceError("The logical volumes of this host", f"lvs failed: {done.stderr.strip()[-500:]}")
    return parse(done.stdout)
