# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What the administrator of a host has laid down for every operation on it."""

from __future__ import annotations

import pwd

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError


def read_only_places() -> frozenset[str]:
    """Pools (by name) and directories (absolute paths) that nothing may be written to: one in each line of the file.

    Raises TargetError where the file is there but cannot be read: what it protects must stay protected.
    """
    return frozenset(_lines(_paths.read_only_file()))


def trusted_owners() -> dict[str, frozenset[int]]:
    """Users, beside root and the one who runs, whose archives in a directory and below count as ours: USER DIRECTORY in each line.

    Raises TargetError where the file is there but cannot be read or names a user that this host does not have.
    """
    path = _paths.trusted_owners_file()
    found: dict[str, frozenset[int]] = {}
    for line in _lines(path):
        user, _space, directory = line.partition(" ")
        directory = directory.strip()
        if not directory.startswith("/"):
            raise TargetError(f"The settings {path}", f"{line!r} is no user and a directory", "Mend the file.")
        try:
            uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        except KeyError as error:
            raise TargetError(
                f"The settings {path}", f"this host has no user {user!r}", "Mend the file; a number will do too."
            ) from error
        found[directory] = found.get(directory, frozenset()) | {uid}
    return found


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(
            f"The settings {path}", f"they cannot be read ({error})", "Mend or remove the file."
        ) from error
    return [line for line in lines if line and not line.startswith("#")]
