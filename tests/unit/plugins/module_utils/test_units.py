# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Durations and sizes as people write them."""

from __future__ import annotations

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._units import duration_s, size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("90s", 90), ("15m", 900), ("20h", 72000), (" 30D ", 2592000), ("2 w", 1209600)],
)
def test_duration(text: str, seconds: int) -> None:
    assert duration_s(text, "max_age") == seconds


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1024),
        ("50M", 52428800),
        ("10G", 10737418240),
        ("10GiB", 10737418240),
        ("2tb", 2**41),
    ],
)
def test_size(text: str, count: int) -> None:
    assert size_bytes(text, "bandwidth") == count


@pytest.mark.parametrize("text", ["", "h", "-1h", "1.5h", "1y", "1h30m", "٣h", "9" * 5000])
def test_what_is_no_duration_is_refused_with_the_option(text: str) -> None:
    with pytest.raises(RefusedError, match="Option max_age"):
        duration_s(text, "max_age")


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "1X", "10GG", "9" * 5000])
def test_what_is_no_size_is_refused_with_the_option(text: str) -> None:
    with pytest.raises(RefusedError, match="Option bandwidth"):
        size_bytes(text, "bandwidth")
