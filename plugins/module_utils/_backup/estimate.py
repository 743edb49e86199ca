# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""How large a point will be: its members laid out as the archive lays them out. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ansible_collections.kvmops.backup.plugins.module_utils._archive import config, digests, tar
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration
from ansible_collections.kvmops.backup.plugins.module_utils._backup.disks import Image
from ansible_collections.kvmops.backup.plugins.module_utils._backup.members import PlannedMember, image_of

_DIGEST = "0" * 64


def member_bytes(planned: PlannedMember, images: Mapping[str, Image], file_bytes: Mapping[str, int]) -> int:
    """Size of a member: exact for files that nobody writes to. A raw disk counts with all of its allocated clusters."""
    image = image_of(images, planned.path)
    if image is None:
        return file_bytes.get(planned.path, 0)
    return image.packed_bytes if planned.from_raw else image.size_bytes


def point_bytes(planned: Sequence[PlannedMember], sizes: Sequence[int], configuration: Configuration) -> int:
    """What the point takes in a plain archive: members with their headers and fill, digests, configuration and end."""
    rows = tuple(replace(each.member, size_bytes=size, digest=_DIGEST) for each, size in zip(planned, sizes))
    members = (*configuration.members, *rows)
    xml, _digest = config.encode(replace(configuration, members=members, digests_digest=_DIGEST))
    at = 0
    for size in (*sizes, digests.room(sizes, digests.ALGORITHMS[configuration.digest_algorithm])):
        at = tar.round_up(tar.data_offset(at) + size, tar.BLOCK)
    return tar.data_offset(at) + len(xml) + len(tar.END)
