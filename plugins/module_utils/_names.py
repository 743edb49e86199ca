# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""File names that are not UTF-8, in a form that results, libvirt and terminals can carry, and back.

Python keeps the bytes that are not UTF-8 as lone surrogates, which Ansible and XML refuse. Shown, such a byte is %FC, as in a URL:
unlike a backslash that passes through a command line, YAML and Jinja as it is. Nothing else of a name is escaped.
"""

from __future__ import annotations

import os
import re
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError

_UNDECODED = re.compile("[\udc80-\udcff]")
_SHOWN = re.compile("%[89A-F][0-9A-F]")


def shown(text: str) -> str:
    """A name, or a message with one in it, without surrogates."""
    return _UNDECODED.sub(lambda found: f"%{ord(found.group()) - 0xDC00:02X}", text)


def all_shown(value: Any) -> Any:
    """A result (dicts, lists, strings and so on) with every string in it as `shown`."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {all_shown(key): all_shown(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [all_shown(each) for each in value]
    return value


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
            why = f"{len(there)} files are shown as {part}: their names differ in bytes that are not UTF-8"
            raise RefusedError(f"Path {path}", why, "Rename one of them.")
        found = os.path.join(found, there[0] if there else part)
    return found


def _shown_as(name: str, directory: str) -> list[str]:
    try:
        return [each for each in os.listdir(directory) if shown(each) == name]
    except OSError:
        return []
