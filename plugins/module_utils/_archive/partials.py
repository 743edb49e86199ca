# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Unfinished archives of operations that touch no VM: the next run of the operation removes what a dead one has left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from ansible_collections.kvmops.backup.plugins.module_utils._archive import trash
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context


@dataclass(frozen=True)
class PartialFacts:
    """What the journal of such an operation says.

    ``partial``: the unfinished archive; ``place``: tells its directory (`_mounts.identity`).
    """

    archive: str
    partial: str = ""
    place: Optional[Mapping[str, Any]] = None


def settle(operation: str, context: Context, *, check_mode: bool) -> None:
    """Remove the unfinished archives of runs whose process has died, with a warning for each; check mode only warns."""
    if check_mode:
        for found in Journal.peek(lambda remains: remains.head.operation == operation):
            partial = found.facts(PartialFacts).partial
            if partial:
                context.warn(
                    Notice(Code.TO_PUT_RIGHT, f"A dead run has left {partial}; the next run outside check mode removes it")
                )
        return
    for found in Journal.left_behind(lambda remains: remains.head.operation == operation):
        journal = found.journal(PartialFacts)
        partial = journal.facts.partial
        if partial:
            trash.remove_partial(partial, journal.facts.place)
            context.put_right(f"removed {partial}")
        journal.done()
