# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""File names that cannot be shown as they are, and the way back from what is shown (_text) to the file."""

from __future__ import annotations

import os
import re

from ansible_collections.kvmops.backup.plugins.module_utils import _text
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError

_SHOWN = re.compile("%[0189A-F][0-9A-F]|%7F")


def meant(path: str) -> str:
    """The path that a user means by one that a result may have shown: as it is written, or of the file that is shown so.

    Raises RefusedError where several are.
    """
    if not _SHOWN.search(path):
        return path
    found = "/" if path.startswith("/") else ""
    for part in filter(None, path.split("/")):
        there = _shown_as(part, found or ".") if _SHOWN.search(part) else []
        if len(there) > 1:
            why = f"{len(there)} files are shown as {part}: their names differ in bytes that do not print"
            raise RefusedError(f"Path {path}", why, "Rename one of them.")
        found = os.path.join(found, there[0] if there else part)
    return found


def _shown_as(name: str, directory: str) -> list[str]:
    try:
        return [each for each in os.listdir(directory) if _text.shown(each) == name]
    except OSError:
        return []
