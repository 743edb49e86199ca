# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Digests: SHA-256 of every 4 MiB chunk, kept in one binary member per point. See docs/FORMAT.md, "Digests"."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES, Member
from ansible_collections.kvmops.backup.plugins.module_utils._errors import DamagedError
from ansible_collections.kvmops.backup.plugins.module_utils._image.zero import is_zero

ALGORITHM = "sha256"
DIGEST_BYTES = 32
HEAD = bytes(512)  # an increment's commit needs these to be zero
MAX_BYTES = 128 * 2**20  # 16 TiB of members in one archive: bounds the memory that reading takes
ZEROS = bytes(CHUNK_BYTES)  # the one object that stands for a chunk of a hole
ZERO_CHUNK = hashlib.sha256(ZEROS).digest()


def chunk_count(size_bytes: int) -> int:
    """Number of chunks of a member."""
    return -(-size_bytes // CHUNK_BYTES)


def of_chunk(data: bytes | memoryview) -> bytes:
    """Binary digest of one chunk; one of zeros is known without hashing it."""
    if data is ZEROS or (len(data) == CHUNK_BYTES and is_zero(memoryview(data))):
        return ZERO_CHUNK
    return hashlib.sha256(data).digest()


def room(members: Iterable[Member]) -> int:
    """Size of the digests member of a point that adds these members."""
    return len(HEAD) + DIGEST_BYTES * sum(chunk_count(member.size_bytes) for member in members)


def of_member(chunk_digests: bytes | memoryview) -> str:
    """Hex digest of a member: the SHA-256 over its chunks' binary digests."""
    return hashlib.sha256(chunk_digests).hexdigest()


def pack(chunk_digests: Sequence[bytes]) -> bytes:
    """The digests member: 512 zero bytes, then the chunk digests of the point's new members in the order of its member table."""
    return HEAD + b"".join(chunk_digests)


def unpack(data: bytes, members: Sequence[Member]) -> Mapping[str, memoryview]:
    """Chunk digests by member name. Raises DamagedError where table and digests do not fit each other."""
    if data[: len(HEAD)] != HEAD or len(data) != room(members):
        raise DamagedError("digests member", "its size does not fit the member table", offset=0, length=len(data))
    found, position, view = dict[str, memoryview](), len(HEAD), memoryview(data)
    for member in members:
        end = position + DIGEST_BYTES * chunk_count(member.size_bytes)
        found[member.name] = view[position:end]
        if of_member(found[member.name]) != member.digest:
            raise DamagedError(
                "digests member", f"it does not fit the digest of {member.name}", offset=position, length=end - position
            )
        position = end
    return found
