# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Digests: a hash of every 4 MiB chunk, kept in one binary member per point. See docs/FORMAT.md, "Digests"."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import CHUNK_BYTES, Member
from ansible_collections.kvmops.backup.plugins.module_utils._errors import DamagedError
from ansible_collections.kvmops.backup.plugins.module_utils._image.zero import is_zero

DIGEST_BYTES = 32
HEAD = bytes(512)  # an increment's commit needs these to be zero
MAX_BYTES = 128 * 2**20  # 16 TiB of members in one archive: bounds the memory that reading takes
ZEROS = bytes(CHUNK_BYTES)  # the one object that stands for a chunk of a hole


class Algorithm:
    """A cryptographic hash of 32 bytes; `name` is what the configuration XML calls it."""

    def __init__(self, name: str, new: Callable[..., Any]) -> None:
        self.name = name
        self._new = new
        self._zero_chunk = b""

    def of_chunk(self, data: bytes | memoryview) -> bytes:
        """Binary digest of one chunk; one of zeros is hashed once only."""
        if data is ZEROS or (len(data) == CHUNK_BYTES and is_zero(memoryview(data))):
            self._zero_chunk = self._zero_chunk or self._digest(ZEROS)
            return self._zero_chunk
        return self._digest(data)

    def of_member(self, chunk_digests: bytes | memoryview) -> str:
        """Hex digest of a member: the hash over its chunks' binary digests."""
        return self._digest(chunk_digests).hex()

    def _digest(self, data: bytes | memoryview) -> bytes:
        # damage is looked for, nothing is signed: hosts in FIPS mode allow that
        result: bytes = self._new(data, usedforsecurity=False).digest()
        return result


SHA256 = Algorithm("sha256", hashlib.sha256)
BLAKE2B = Algorithm("blake2b-256", functools.partial(hashlib.blake2b, digest_size=DIGEST_BYTES))
ALGORITHMS = {algorithm.name: algorithm for algorithm in (SHA256, BLAKE2B)}


@functools.cache
def fastest() -> Algorithm:
    """The one for new archives: SHA-256 where the processor has instructions for it, else BLAKE2b (1.5 times as fast then)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line.split() for line in file if line.startswith(("flags", "Features"))), [])
    except OSError:
        return SHA256
    return SHA256 if "sha_ni" in flags or "sha2" in flags else BLAKE2B


def chunk_count(size_bytes: int) -> int:
    """Number of chunks of a member."""
    return -(-size_bytes // CHUNK_BYTES)


def room(members: Iterable[Member]) -> int:
    """Size of the digests member of a point that adds these members."""
    return len(HEAD) + DIGEST_BYTES * sum(chunk_count(member.size_bytes) for member in members)


def pack(chunk_digests: Sequence[bytes]) -> bytes:
    """The digests member: 512 zero bytes, then the chunk digests of the point's new members in the order of its member table."""
    return HEAD + b"".join(chunk_digests)


def unpack(data: bytes, members: Sequence[Member], algorithm: Algorithm) -> Mapping[str, memoryview]:
    """Chunk digests by member name. Raises DamagedError where table and digests do not fit each other."""
    if data[: len(HEAD)] != HEAD or len(data) != room(members):
        raise DamagedError("digests member", "its size does not fit the member table", offset=0, length=len(data))
    found, position, view = dict[str, memoryview](), len(HEAD), memoryview(data)
    for member in members:
        end = position + DIGEST_BYTES * chunk_count(member.size_bytes)
        found[member.name] = view[position:end]
        if algorithm.of_member(found[member.name]) != member.digest:
            raise DamagedError(
                "digests member", f"it does not fit the digest of {member.name}", offset=position, length=end - position
            )
        position = end
    return found
