# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Snapshots and clones of ZFS datasets."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError

_TIMEOUT_S = 120


def snapshot(names: Sequence[str]) -> None:
    """Take these snapshots (DATASET@NAME) of one pool, all at one moment."""
    _run("snapshot", *names)


def clone(snapshot_name: str, dataset: str) -> str:
    """A new dataset with the content of a snapshot; the directory that it is mounted at."""
    _run("clone", snapshot_name, dataset)
    return _run("get", "-H", "-o", "value", "mountpoint", dataset).strip()


def exists(name: str) -> bool:
    """Whether there is a dataset, or a snapshot, of that name. Raises KvmopsError where ZFS does not say."""
    try:
        return name in _run("list", "-H", "-o", "name", "-t", "all", name).split("\n")
    except KvmopsError as error:
        if "does not exist" in error.why:
            return False
        raise


def clones_of(snapshot_name: str) -> list[str]:
    """Datasets that stand on a snapshot."""
    rows = (
        line.split("\t") for line in _run("list", "-H", "-o", "name,origin", "-t", "filesystem,volume").splitlines()
    )
    return [name for name, origin in rows if origin == snapshot_name]


def destroy(name: str) -> None:
    """Remove a dataset or a snapshot, without anything that stands on it."""
    _run("destroy", name)


def _run(*arguments: str) -> str:
    what = f"zfs {' '.join(arguments)}"
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            ["zfs", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=environment,
        )
    except FileNotFoundError:
        raise KvmopsError(what, "the command zfs is not installed", "Install ZFS's tools.") from None
    except subprocess.TimeoutExpired:
        raise KvmopsError(what, f"it did not answer within {_TIMEOUT_S} seconds", "Look at: zpool status") from None
    if done.returncode:
        raise KvmopsError(what, done.stderr.strip()[-500:] or "it failed", "Look at: zpool status")
    return done.stdout
