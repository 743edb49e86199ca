# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""JSON files below the state directory."""

from __future__ import annotations

import json
import os
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError


def save(path: str, data: Any) -> None:
    """Replaces the file, durably. Raises KvmopsError where the state directory cannot take it."""
    partial = f"{path}.new"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump(data, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _files.sync_directory(os.path.dirname(path))
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: str, error: OSError) -> KvmopsError:
    """What it means to a person that a file of the state directory cannot be written. Pure."""
    hint = "Free space on the file system of the state directory, and see that it is not mounted read-only."
    return KvmopsError(f"The state file {path}", error.strerror or str(error), hint)
