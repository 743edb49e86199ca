# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What the administrator of a host has laid down for every operation on it."""

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError


def read_only_places() -> frozenset[str]:
    """Pools (by name) and directories (absolute paths) that nothing may be written to: one in each line of the file.

    Raises TargetError where the file is there but cannot be read: what it protects must stay protected.
    """
    path = _paths.read_only_file()
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        return frozenset()
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(
            f"The settings {path}", f"they cannot be read ({error})", "Mend or remove the file."
        ) from error
    return frozenset(line for line in lines if line and not line.startswith("#"))
