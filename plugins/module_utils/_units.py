# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Durations and sizes as people write and read them."""

from __future__ import annotations

import re

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"(\d{1,12})\s*([smhdw]?)", re.ASCII)

_BYTES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"(\d{1,20})\s*([kmgt]?)(?:i?b)?", re.ASCII)


def duration_s(text: str, option: str) -> int:
    """Seconds in ``90``, ``90s``, ``15m``, ``20h``, ``30d`` or ``2w``. Raises RefusedError naming the option."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise RefusedError(
            f"Option {option}",
            f"{text!r} is not a duration",
            "Write a whole number and s, m, h, d or w, for example 20h.",
        )
    return int(match.group(1)) * _SECONDS[match.group(2)]


def size_bytes(text: str, option: str) -> int:
    """Bytes in ``4096``, ``500K``, ``10G``, ``10GiB`` (powers of 1024). Raises RefusedError naming the option."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise RefusedError(
            f"Option {option}", f"{text!r} is not a size", "Write a whole number and K, M, G or T, for example 10G."
        )
    return int(match.group(1)) * _BYTES[match.group(2)]


def human_bytes(count: int) -> str:
    """A size as people read it: ``1.5 GiB``."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
