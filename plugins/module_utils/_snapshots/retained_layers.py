# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Files of a VM that no snapshot tells about: ``<state>/layers/<uuid>.json`` and ``<state>/copies/<uuid>.json``.

Layers that removed snapshots had frozen and that stay for now, because several branches stand on them: nothing else tells
them from the template below a thin clone, which is never merged into. And copies that reverts to internal snapshots have
made. Where a record is lost, such a file stays for good and does no harm.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _json, _paths, _state_file

LAYERS, COPIES = "layers", "copies"


def load(uuid: str, kind: str = LAYERS) -> dict[str, str]:
    """Those that are still the same files, by path.

    Of a layer, the <disk> of the time when it was the active image; of a copy, the path of its original.
    """
    found: dict[str, str] = {}
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        for path, each in _json.parse(_files.read_kept(_path(uuid, kind))).items():
            with suppress(OSError):
                if each["file"] == _identity(path):
                    found[path] = str(each["disk_xml"])
    return found


def save(uuid: str, layers: Mapping[str, str], kind: str = LAYERS) -> None:
    """Keep them, durably. Raises KvmopsError where the state directory cannot take it."""
    path = _path(uuid, kind)
    if not layers and not os.path.exists(path):
        return
    data = {name: {"file": _identity(name), "disk_xml": xml} for name, xml in layers.items() if os.path.exists(name)}
    _state_file.save(path, data)


def _identity(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_dev, found.st_ino]


def _path(uuid: str, kind: str) -> str:
    return os.path.join(_paths.state_dir(), kind, f"{uuid}.json")
