# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""At one in the morning a point of yesterday noon does not count; at two in the afternoon one of today does."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.kvmops.backup.plugins.filter.done_within import done_within


@pytest.mark.parametrize(
    ("max_age", "clock", "expected"),
    [
        ("20h", "01:00", "36000s"),
        ("20h", "14:00", "50407s"),
        ("20h", "23:00", "72000s"),
        ("20H ", "09:30", "36000s"),
        ("1d", "23:00", "82807s"),
        ("0s", "05:00", "0s"),
        ("90", "05:00", "90s"),
        ("2d", "05:00", "172800s"),
    ],
)
def test_a_point_of_yesterday_counts_for_half_of_the_age(max_age: str, clock: str, expected: str) -> None:
    assert done_within(max_age, {"hour": clock[:2], "minute": clock[3:], "second": "07"}) == expected


def test_no_duration() -> None:
    with pytest.raises(AnsibleFilterError, match="'soon' is not a duration"):
        done_within("soon", {"hour": "05", "minute": "00", "second": "00"})
