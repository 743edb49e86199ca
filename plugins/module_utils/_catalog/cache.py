# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a full read of a foreign compressed archive has shown, kept until the file changes.

One JSON file per archive under the cache directory, named after device, inode, size and modification time of the archive. It holds
nothing that cannot be computed again: a file that is damaged, of another version or not there is simply not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _json, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    FORMAT_VERSION,
    Configuration,
    Consistency,
    Member,
    Role,
    Skipped,
    SnapshotNode,
)

_VERSION = f"3/{FORMAT_VERSION}"
_MAX_FILES = 1000


def load(path: str) -> tuple[Configuration, ...] | None:
    """The points of the archive as kept; None where nothing is kept of the file as it is now."""
    key = _files.evidence(path)
    try:
        with open(_file(key), encoding="utf-8") as stream:
            kept = _json.parse(stream.read())
        if kept["version"] != _VERSION or tuple(kept["key"]) != key:
            return None
        return tuple(_configuration(point) for point in kept["points"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(path: str, key: tuple[int, ...], points: tuple[Configuration, ...]) -> None:
    """Keeps the points read from the file that had the evidence `key`, unless it has changed since; if that can be done."""
    with contextlib.suppress(OSError):
        if _files.evidence(path) != key:
            return
        target = _file(key)
        replace_file(target, {"version": _VERSION, "key": key, "points": [asdict(point) for point in points]})
        _remove_oldest(os.path.dirname(target))


def replace_file(target: str, kept: Mapping[str, Any]) -> None:
    """Writes a JSON file of the cache, whole or not at all. Raises OSError: for the caller no reason to fail."""
    partial = f"{target}.{os.getpid()}"
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump(kept, stream)
        os.replace(partial, target)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _file(key: tuple[int, ...]) -> str:
    directory = os.path.join(_paths.cache_dir(), "views")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    return os.path.join(directory, hashlib.sha256(repr(key).encode()).hexdigest()[:32] + ".json")


def _remove_oldest(directory: str) -> None:
    by_age = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another reader removes them too
                by_age.append((entry.stat().st_mtime_ns, entry.path))
    for _age, path in sorted(by_age)[:-_MAX_FILES]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _configuration(kept: Mapping[str, Any]) -> Configuration:
    rows = tuple(Member(**{**member, "role": Role(member["role"])}) for member in kept["members"])
    return replace(
        Configuration(**{**kept, "members": rows}),
        consistency=Consistency(kept["consistency"]),
        requires=None,  # only archives of ours have these two
        provides=(),
        snapshots=tuple(SnapshotNode(**state) for state in kept["snapshots"]),
        skipped=tuple(Skipped(**skipped) for skipped in kept["skipped"]),
        warnings=tuple(kept["warnings"]),
    )
