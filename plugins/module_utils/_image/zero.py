# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finding zeros fast."""

from __future__ import annotations

_ZEROS = bytes(4 << 20)
_ZEROS_VIEW = memoryview(_ZEROS)


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
