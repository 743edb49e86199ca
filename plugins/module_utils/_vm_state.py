# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What this host remembers about a VM between runs: ``<state>/vms/<uuid>.json``.

Evidence of frozen files, which is a cache (without it they are read again), and the mark that ends the VM's backup cycles.
Whoever writes holds the lock ``vm-<uuid>``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _json, _paths, _state_file


@dataclass(frozen=True)
class Evidence:
    """A file that had exactly the bytes of an archive's member of this digest when it had this `stat` (see `evidence`)."""

    digest: str
    stat: tuple[int, ...]


@dataclass(frozen=True)
class VmState:
    """The memory of one VM.

    `frozen`: evidence by path. `ended`: why no archive of the VM can be continued, "" if nothing happened; `begun`: archives
    (unix time of their full) that were begun since and are not meant. `to_merge`: snapshots ("CREATED NAME") that a run has
    decided to merge and that may still be there.
    """

    frozen: Mapping[str, Evidence] = field(default_factory=dict)
    ended: str = ""
    begun: tuple[int, ...] = ()
    to_merge: tuple[str, ...] = ()

    def why_ended(self, full: int) -> str:
        """Why the archive whose full was made at this unix time cannot be continued; "" if nothing is known against it."""
        return "" if full in self.begun else self.ended


def evidence(path: str) -> tuple[int, ...]:
    """What changes when a file is replaced or written to, also by somebody who sets its times back (ctime). Raises OSError."""
    return (*_files.evidence(path), os.stat(path).st_ctime_ns)


def load(uuid: str) -> VmState:
    """The memory of a VM; an empty one where there is none that can be read."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return _decode(_json.parse(_files.read_kept(_path(uuid))))
    return VmState()


def save(uuid: str, state: VmState) -> None:
    """Keeps it, durably. Raises KvmopsError where the state directory cannot take it."""
    frozen = {name: {"digest": each.digest, "stat": each.stat} for name, each in state.frozen.items()}
    data = {"frozen": frozen, "ended": state.ended, "begun": state.begun, "to_merge": state.to_merge}
    _state_file.save(_path(uuid), data)


def end_cycle(uuid: str, reason: str) -> None:
    """No archive of the VM that exists now is continued from now on; durable when it returns.

    Called before the first change that would break their chains. `reason`: a clause, as in "the VM was restored in place".
    """
    save(uuid, replace(load(uuid), ended=reason, begun=()))


def _decode(found: Mapping[str, Any]) -> VmState:
    return VmState(
        frozen={
            str(path): Evidence(str(each["digest"]), tuple(map(_json.whole, each["stat"])))
            for path, each in found["frozen"].items()
        },
        ended=str(found["ended"]),
        begun=tuple(map(_json.whole, found["begun"])),
        to_merge=tuple(str(each) for each in found["to_merge"]),
    )


def _path(uuid: str) -> str:
    if not uuid or "/" in uuid or uuid.startswith("."):
        raise ValueError(f"not a uuid: {uuid!r}")
    return os.path.join(_paths.state_dir(), "vms", f"{uuid}.json")
