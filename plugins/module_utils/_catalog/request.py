# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a user asks of archives: the options of ``backup_info``, ``backup_verify``, ``backup_archive``, ``backup_retention``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _json
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._priority import USUAL, Priority
from ansible_collections.kvmops.backup.plugins.module_utils._retention import Rules
from ansible_collections.kvmops.backup.plugins.module_utils._units import size_bytes

#: The options keep_…, which are the fields of Rules.
RULES = ("last", "days", "hourly", "daily", "weekly", "monthly", "yearly")


@dataclass(frozen=True)
class Selection:
    """Which archives: one (`archive`), those of a place (`pool` or `path`), or those of all active pools (all "").

    `vm` (name or UUID, "" for all) narrows it down to one VM's.
    """

    archive: str = ""
    pool: str = ""
    path: str = ""
    vm: str = ""
    uri: str = "qemu:///system"

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Selection:
        """From the parameters of a module."""
        return cls(
            archive=params["archive"] or "",
            pool=params["pool"] or "",
            path=params["path"] or "",
            vm=params["vm"] or "",
            uri=params["uri"],
        )


@dataclass(frozen=True)
class InfoRequest:
    """One run of ``backup_info``; `point` None: the newest of each archive; `query` "": none."""

    selection: Selection
    point: int | None = None
    refresh: bool = False
    query: str = ""

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> InfoRequest:
        """From the parameters of the module."""
        return cls(Selection.of(params), params["point"], params["refresh"], params["query"] or "")


@dataclass(frozen=True)
class VerifyRequest:
    """One run of ``backup_verify``; `threads` 0: one per core.

    `expected`: hex digests that points of archives had once, by path or file name; "" as the key means the one archive.
    """

    selection: Selection
    deep: bool = False
    fail_on_damage: bool = True
    threads: int = 0
    priority: Priority = USUAL
    expected: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> VerifyRequest:
        """From the parameters of the module. Raises RefusedError where they name nothing: checking nothing is no success."""
        if not (params["archive"] or params["pool"] or params["path"]):
            raise RefusedError("What to check", "archive, pool and path are empty", "Name one of them.")
        return cls(
            Selection.of(params),
            params["deep"],
            params["fail_on_damage"],
            params["threads"],
            Priority.of(params),
            _expected(params["expected_digest"], bool(params["archive"])),
        )


def _expected(given: Any, one_archive: bool) -> Mapping[str, str]:
    """The option ``expected_digest``: one digest, or a map of archives to theirs; nothing for an archive is no expectation."""
    what, hint = "Option expected_digest", "Give what vm_backup returned as archive.digest, or a map of archives to it."
    if given is None or given == "":
        return {}
    if isinstance(given, str) and given.lstrip().startswith("{"):  # on a command line every value is a text
        try:
            given = _json.parse(given)
        except ValueError as error:
            raise RefusedError(what, f"it is no map: {error}", hint) from error
    if isinstance(given, str):
        if not one_archive:
            raise RefusedError(what, "one digest is of one archive", "Name it as archive, or give a map of archives.")
        given = {"": given}
    if not isinstance(given, Mapping):
        raise RefusedError(what, "it is neither a digest nor a map", hint)
    found = {str(key): str(value).strip().lower() for key, value in given.items() if value}
    for digest in found.values():
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise RefusedError(what, f"{digest!r} is no digest: these have 64 hexadecimal digits", hint)
    return found


@dataclass(frozen=True)
class RetentionRequest:
    """One run of ``backup_retention`` in a pool or a directory; `vm` "": all VMs; `free_space_bytes` 0: no such rule."""

    rules: Rules
    pool: str = ""
    path: str = ""
    vm: str = ""
    free_space_bytes: int = 0
    uri: str = "qemu:///system"
    check_mode: bool = False
    diff: bool = False

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> RetentionRequest:
        """From the parameters of the module. Raises RefusedError for numbers and sizes that are none."""
        return cls(
            rules=Rules(**{name: params[f"keep_{name}"] or 0 for name in RULES}),
            pool=params["pool"] or "",
            path=params["path"] or "",
            vm=params["vm"] or "",
            free_space_bytes=size_bytes(params["free_space"], "free_space") if params["free_space"] else 0,
            uri=params["uri"],
            check_mode=params["check_mode"],
            diff=params["diff"],
        )

    @property
    def selection(self) -> Selection:
        """Whose archives are meant."""
        return Selection(pool=self.pool, path=self.path, vm=self.vm, uri=self.uri)


@dataclass(frozen=True)
class ChangeRequest:
    """One run of ``backup_archive``; None leaves that property as it is; `threads` 0: one per core."""

    archive: str
    present: bool = True
    compressed: bool | None = None
    compress_level: int = 2
    threads: int = 0
    protected: bool | None = None
    notes: str | None = None
    force: bool = False
    trust: bool = False
    uri: str = "qemu:///system"
    check_mode: bool = False
    diff: bool = False

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> ChangeRequest:
        """From the parameters of the module, with ``check_mode`` and ``diff`` (_argspec.run_module)."""
        return cls(
            archive=params["archive"],
            present=params["state"] == "present",
            compressed=params["compressed"],
            compress_level=params["compress_level"],
            threads=params["threads"],
            protected=params["protected"],
            notes=params["notes"],
            force=params["force"],
            trust=params["trust"],
            uri=params["uri"],
            check_mode=params["check_mode"],
            diff=params["diff"],
        )
