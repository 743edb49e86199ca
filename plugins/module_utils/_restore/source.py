# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a restore reads from: an archive (_archive/reader.py), or another product's package (_ovf/archive.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Protocol

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ReadAt
from ansible_collections.kvmops.backup.plugins.module_utils._image.sink import ImageSink
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress


class Source(Protocol):
    """See ArchiveReader for what these are."""

    @property
    def path(self) -> str:
        """Its file."""

    @property
    def distrust(self) -> str:
        """Why its file is not ours to trust; "" if it is."""

    @property
    def random_access(self) -> bool:
        """Whether a member can be read in pieces without reading everything before it."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a member."""

    def read_at(self, name: str) -> ReadAt:
        """`read` of one member."""

    def extract(
        self, wanted: Sequence[tuple[Member, ImageSink]], *, threads: int = 0, progress: Optional[Progress] = None
    ) -> int:
        """Hands the bytes of members to their sinks in one pass."""
