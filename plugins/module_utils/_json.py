# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""JSON that others wrote, or that a crash has cut off: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
from typing import Any

_LARGEST = 2**63  # of the numbers that we write; Python's own go on without end


def parse(text: str | bytes) -> Any:
    """What a text says. Raises ValueError, also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def whole(value: Any) -> int:
    """A whole number. Raises ValueError for anything else, also for those that no file here holds."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
        raise ValueError(f"{str(value)[:40]} is no whole number")
    return value
