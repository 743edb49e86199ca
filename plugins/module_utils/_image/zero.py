# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finding zeros fast."""

from __future__ import annotations

_ZEROS = bytes(4 << 20)
_ZEROS_VIEW = memoryview(_ZEROS)

#: Smallest run of zeros that is left as a hole, and a larger step over long runs.
_HOLE_BYTES = 4096
_LONG_HOLE_BYTES = 64 << 10


def is_zero(data: memoryview) -> bool:
    """Whether all bytes of ``data`` are zero."""
    # bytes.startswith takes any buffer without a copy and is one memcmp; comparing memoryviews unpacks every element.
    step = len(_ZEROS)
    if len(data) <= step:
        return _ZEROS.startswith(data)
    return all(_ZEROS.startswith(data[start : start + step]) for start in range(0, len(data), step))


def zero_fill(data: memoryview) -> None:
    """Overwrite ``data`` with zeros."""
    step = len(_ZEROS)
    for start in range(0, len(data), step):
        part = data[start : start + step]
        part[:] = _ZEROS_VIEW[: len(part)]


def nonzero_runs(offset: int, data: memoryview) -> list[tuple[int, int]]:
    """Ranges of ``data`` that hold more than zeros, in blocks of 4 KiB of the file where ``data`` stands at ``offset``."""
    head = min(-offset % _HOLE_BYTES, len(data))
    end = head + (len(data) - head) // _HOLE_BYTES * _HOLE_BYTES
    # The first 8 bytes of each block, taken in C, tell for most blocks that they are not zeros.
    samples = data[head:end].cast("Q")[:: _HOLE_BYTES // 8].tolist()
    runs: list[tuple[int, int]] = []
    start = 0  # behind the last zeros
    for at, sample in zip(range(head, end, _HOLE_BYTES), samples):
        if sample or at < start:
            continue
        for zeros in (_LONG_HOLE_BYTES, _HOLE_BYTES):
            if at + zeros <= end and is_zero(data[at : at + zeros]):
                if start < at:
                    runs.append((start, at))
                start = at + zeros
                break
    if start < len(data) and not is_zero(data[start:]):
        runs.append((start, len(data)))
    return runs
