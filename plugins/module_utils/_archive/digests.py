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
from ansible_collections.kvmops.backup.plugins.module_utils._errors import DamagedError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._image.zero import is_zero
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import xxhash

AUTO = "auto"
WISHES = (AUTO, "xxh3-128", "sha256")  # what a user may ask for
HEAD = bytes(512)  # an increment's commit needs these to be zero
MAX_BYTES = 128 * 2**20  # 16 TiB of members in one archive: bounds the memory that reading takes
ZEROS = bytes(CHUNK_BYTES)  # the one object that stands for a chunk of a hole
_INSTALL = "Install python3-xxhash (RHEL's family has it in EPEL)."


class Algorithm:
    """A hash of `digest_bytes` bytes; `name` is what the configuration XML calls it.

    `anchors`: it is cryptographic, so that the digest of a point stands for every byte of it.
    """

    def __init__(self, name: str, hash_of: Callable[[bytes | memoryview], bytes], digest_bytes: int, *, anchors: bool) -> None:
        self.name, self.digest_bytes, self.anchors = name, digest_bytes, anchors
        self._digest = hash_of
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


def _hashlib(new: Callable[..., Any], **parameters: Any) -> Callable[[bytes | memoryview], bytes]:
    def hash_of(data: bytes | memoryview) -> bytes:
        # hosts in FIPS mode allow what is not used for security
        result: bytes = new(data, usedforsecurity=False, **parameters).digest()
        return result

    return hash_of


def _xxh3(data: bytes | memoryview) -> bytes:
    if xxhash is None:
        require_library(XXH3, "The archive")
    # the one-shot function keeps Python's lock, so that only one thread would hash at a time
    result: bytes = xxhash.xxh3_128(data).digest()
    return result


def require_library(algorithm: Algorithm, what: str) -> None:
    """Raises RefusedError where this host cannot compute the digests of `what`, which is no damage."""
    if algorithm is XXH3 and xxhash is None:
        why = f"its digests are {algorithm.name}, and the Python library xxhash is not installed on this host"
        raise RefusedError(what, why, f"{_INSTALL} tar unpacks the archive without it.")


SHA256 = Algorithm("sha256", _hashlib(hashlib.sha256), 32, anchors=True)
BLAKE2B = Algorithm("blake2b-256", _hashlib(hashlib.blake2b, digest_size=32), 32, anchors=True)
XXH3 = Algorithm("xxh3-128", _xxh3, 16, anchors=False)
ALGORITHMS = {algorithm.name: algorithm for algorithm in (SHA256, BLAKE2B, XXH3)}


def chosen(wish: str) -> Algorithm:
    """The algorithm of a new archive; AUTO takes the fastest that this host has. Raises RefusedError where it has not got it."""
    if wish == AUTO:
        return fastest()
    if wish == XXH3.name and xxhash is None:
        raise RefusedError(
            "Option digest", "the Python library xxhash is not installed on this host", f"{_INSTALL} Or use digest: auto."
        )
    return ALGORITHMS[wish]


@functools.cache
def fastest() -> Algorithm:
    """XXH3 where its library is, else SHA-256 where the processor has instructions for it, else BLAKE2b (1.5 times as fast)."""
    if xxhash is not None:
        return XXH3
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line.split() for line in file if line.startswith(("flags", "Features"))), [])
    except OSError:
        return SHA256
    return SHA256 if "sha_ni" in flags or "sha2" in flags else BLAKE2B


def chunk_count(size_bytes: int) -> int:
    """Number of chunks of a member."""
    return -(-size_bytes // CHUNK_BYTES)


def room(sizes: Iterable[int], algorithm: Algorithm) -> int:
    """Size of the digests member of a point that adds members of these sizes, in bytes."""
    return len(HEAD) + algorithm.digest_bytes * sum(map(chunk_count, sizes))


def pack(chunk_digests: Sequence[bytes]) -> bytes:
    """The digests member: 512 zero bytes, then the chunk digests of the point's new members in the order of its member table."""
    return HEAD + b"".join(chunk_digests)


def unpack(data: bytes, members: Sequence[Member], algorithm: Algorithm) -> Mapping[str, memoryview]:
    """Chunk digests by member name. Raises DamagedError where table and digests do not fit each other."""
    if data[: len(HEAD)] != HEAD or len(data) != room((member.size_bytes for member in members), algorithm):
        raise DamagedError("digests member", "its size does not fit the member table", offset=0, length=len(data))
    found, position, view = dict[str, memoryview](), len(HEAD), memoryview(data)
    for member in members:
        end = position + algorithm.digest_bytes * chunk_count(member.size_bytes)
        found[member.name] = view[position:end]
        if algorithm.of_member(found[member.name]) != member.digest:
            raise DamagedError(
                "digests member", f"it does not fit the digest of {member.name}", offset=position, length=end - position
            )
        position = end
    return found
