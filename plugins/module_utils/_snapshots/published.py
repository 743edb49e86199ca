# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Did a dead run publish its point? Its journal may not know: a kill can fall between the commit and the note of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import overlays

KEEP = "keep"  # fact of a journal: the archive and the point (unix time) that the snapshot is to stay for


def keep_facts(archive: str, point: int) -> dict[str, Any]:
    """The fact that goes into the journal before the snapshot is taken."""
    return {KEEP: {"archive": archive, "point": point}}


def is_published(facts: Mapping[str, Any]) -> bool:
    """Whether the snapshot in this journal stays, because the point that it was taken for is in its archive."""
    if facts.get(overlays.PHASE) == overlays.Phase.REMOVING:
        return False  # the run had given it up, and part of it may be gone
    if facts.get(overlays.PUBLISHED):
        return True
    keep = facts.get(KEEP)
    if not keep:
        return False
    try:
        with open_archive(keep["archive"]) as reader:
            return any(point.timestamp == keep["point"] for point in reader.points)
    except ArchiveError:
        return False
