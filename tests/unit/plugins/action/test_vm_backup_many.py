# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What vm_backup_many returns and says; how it runs is tested with real VMs (targets/weekly_backup, targets/awx)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.action.vm_backup_many import outcome, summary

GOOD: dict[str, Any] = {
    "changed": True,
    "mode": "full",
    "bytes_written": 2048,
    "duration": 1.5,
    "invocation": {"module_args": {}},
}
DONE: dict[str, Any] = {"changed": False, "mode": "none", "reason": "young enough"}
BAD: dict[str, Any] = {"failed": True, "msg": "The VM c: it is not there.", "exception": "Traceback"}


def test_summary_keeps_the_order_and_names_those_that_failed() -> None:
    found = summary([{"vm": "a"}, {"vm": "b"}, {"vm": "c"}], [GOOD, DONE, BAD])
    assert (found["changed"], found["failed"]) == (True, True)
    assert found["msg"] == "1 of 3 VMs failed: c"
    assert [(each["vm"], each["failed"], each["changed"]) for each in found["backups"]] == [
        ("a", False, True),
        ("b", False, False),
        ("c", True, False),
    ]
    assert not any("exception" in each or "invocation" in each for each in found["backups"])


def test_summary_of_success() -> None:
    assert "failed" not in summary([{"vm": "b"}], [DONE])
    assert summary([{"vm": "b"}], [DONE])["changed"] is False
    assert summary([], []) == {"changed": False, "backups": []}


def test_warnings_are_text() -> None:
    """Newer releases of Ansible have objects for them."""
    typed = SimpleNamespace(event=SimpleNamespace(msg="slow"))
    (only,) = summary([{"vm": "a"}], [{**GOOD, "warnings": ["plain", typed]}])["backups"]
    assert only["warnings"] == ["plain", "slow"]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (GOOD, "full, 2.0 KiB written, 1.5 s"),
        (DONE, "nothing to do, young enough"),
        (BAD, "FAILED: The VM c: it is not there."),
    ],
)
def test_outcome(result: dict[str, Any], text: str) -> None:
    assert outcome(result) == text
