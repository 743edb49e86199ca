# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The files that an image stands on, read from headers without QEMU."""

from __future__ import annotations

import os
import stat

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._image import probe

_MAX_LAYERS = 200


def below(path: str) -> list[str]:
    """The file and what it stands on, nearest first, as the headers name them; what cannot be read ends the chain.

    The last one need not exist.
    """
    found: list[str] = []
    while path and path not in found and len(found) < _MAX_LAYERS:
        found.append(path)
        backing = _backing_file(path)
        path = os.path.normpath(os.path.join(os.path.dirname(path), backing)) if backing else ""
    return found


def _backing_file(path: str) -> str:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return ""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        info = probe.probe(lambda offset, length: os.pread(fd, length, offset), os.fstat(fd).st_size)
    except KvmopsError:
        return ""
    finally:
        os.close(fd)
    return info.backing_file or ""
