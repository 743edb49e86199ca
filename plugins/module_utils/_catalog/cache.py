# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Files under the cache directory: what is lost there is found out again."""

from __future__ import annotations

import contextlib
import os

from ansible_collections.kvmops.backup.plugins.module_utils import _paths


def directory(name: str) -> str:
    """The directory for files of one kind. Raises OSError: for the caller no reason to fail."""
    path = os.path.join(_paths.cache_dir(), name)
    os.makedirs(path, mode=0o700, exist_ok=True)
    return path


def replace_file(target: str, data: bytes) -> None:
    """Writes a file, whole or not at all. Raises OSError."""
    partial = f"{target}.{os.getpid()}"
    try:
        with open(partial, "wb") as stream:
            stream.write(data)
        os.replace(partial, target)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def remove_oldest(path: str, count: int) -> None:
    """Leaves so many files in a directory. Raises OSError."""
    by_age = []
    with os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another run removes them too
                by_age.append((entry.stat().st_mtime_ns, entry.path))
    for _age, old in sorted(by_age)[:-count]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(old)
