# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Durations as people write them in playbooks."""

from __future__ import annotations

import re

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"(\d+)\s*([smhdw]?)", re.ASCII)


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
