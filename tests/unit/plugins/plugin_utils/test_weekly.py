# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each VM of the weekly policy gets, which keep snapshots, and which host of a play tells of failures."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.plugin_utils import _weekly


def vm(name: str, *snapshots: str, template: bool = False) -> dict[str, Any]:
    return {"name": name, "template": template, "snapshots": list(snapshots)}


def test_each_vm_gets_its_mode() -> None:
    vms = [vm("web"), vm("golden", template=True), vm("db"), vm("clone")]
    assert _weekly.choices(vms, [vm("db"), vm("golden", template=True), vm("of another host")]) == [
        {"vm": "web", "mode": "auto"},
        {"vm": "db", "mode": "full"},
        {"vm": "clone", "mode": "auto"},
        {"vm": "golden", "mode": "full", "max_age": "164h"},
    ]
    assert _weekly.choices([]) == []


def test_a_vm_without_increments_that_still_has_their_snapshots() -> None:
    vms = [vm("web"), vm("db"), vm("app")]
    fulls = [vm("db", "before upgrade", "kvmops-1795309200"), vm("app", "kvmops-of-mine"), vm("elsewhere", "kvmops-5")]
    (text,) = _weekly.held_back(vms, fulls)
    assert text.startswith("db keeps the snapshots of earlier increments") and "vm_snapshot" in text


def rows(*failed: str, good: int = 1) -> list[dict[str, Any]]:
    return [{"vm": name, "result": "FAILED"} for name in failed] + [{"vm": "x", "result": "full"}] * good


@pytest.mark.parametrize(
    ("results", "host", "hosts", "batch", "failed", "of"),
    [
        # all at once: each host its own
        ({"a": rows("1"), "b": rows("2")}, "a", "ab", "ab", ["1"], 2),
        ({"a": rows("1"), "b": rows("2")}, "b", "ab", "ab", ["2"], 2),
        # with serial: the first batches tell nothing, the first host of the last one tells of all
        ({"a": rows("1")}, "a", "abc", "a", [], 0),
        ({"a": rows("1"), "b": rows(), "c": rows("3")}, "c", "abc", "c", ["3", "1"], 5),
        ({"a": rows("1"), "b": rows(), "c": rows("3")}, "c", "abc", "bc", ["3"], 2),
        ({"a": rows("1"), "b": rows(), "c": rows("3")}, "b", "abc", "bc", ["1"], 3),
        # the last host of the play does not answer: whoever comes last has all results
        ({"a": rows("1"), "b": rows("2")}, "b", "ab", "b", ["2", "1"], 4),
    ],
)
def test_who_tells_of_failures(
    results: dict[str, Any], host: str, hosts: str, batch: str, failed: list[str], of: int
) -> None:
    told = _weekly.failures(results, host, list(hosts), list(batch), list("abc"))
    assert [row["vm"] for row in told["failed"]] == failed and told["of"] == of and told["turn"] is bool(of)
