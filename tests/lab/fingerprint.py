# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything about a VM and some directories that an operation may have changed, to compare before and after."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .vm import LabVm


def definition(vm: LabVm) -> dict[str, Any]:
    """Definitions, snapshots, checkpoints and power state of a VM, as libvirt shows them."""
    domain = vm.domain
    return {
        "live": _without_moments(vm.xml()) if vm.is_running() else "",
        "persistent": vm.xml(inactive=True),
        "snapshots": sorted(each.getXMLDesc(0) for each in domain.listAllSnapshots(0)),
        "checkpoints": sorted(each.getName() for each in domain.listAllCheckpoints(0)),
        "state": domain.state()[0],
        "managed save": domain.hasManagedSaveImage(0),
    }


def _without_moments(xml: str) -> str:
    """Without what changes while a guest boots: whether its agent is connected."""
    return re.sub(" state='(dis)?connected'", "", xml)


def files(*directories: Path) -> Mapping[str, tuple[int, int, str]]:
    """Mode, size and SHA-256 of every file below the directories, by path. For directories that nobody writes to."""
    found = {}
    for directory in directories:
        for path in sorted(directory.rglob("*")):
            status = path.lstat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path)] = (status.st_mode, status.st_size if path.is_file() else 0, digest)
    return found


def names(*directories: Path) -> list[str]:
    """Names of all files below the directories, hidden ones too."""
    return sorted(
        os.path.join(root, name) for d in directories for root, _dirs, all_names in os.walk(d) for name in all_names
    )
