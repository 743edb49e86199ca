# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of who, what and why."""

from __future__ import annotations

from typing import Any

from ansible_collections.kvmops.backup.plugins.plugin_utils._outcomes import outcomes, table


def backup(vm: str, **more: Any) -> dict[str, Any]:
    archive = {"path": f"/b/{vm}.tar"}
    return {"vm": vm, "failed": False, "changed": True, "mode": "full", "reason": "asked", "archive": archive, **more}


def test_failures_come_first_then_names() -> None:
    rows = outcomes(
        [
            backup("web", bytes_written=2048, warnings=["slow"]),
            backup("app", changed=False, mode="none", reason="young enough"),
            {"vm": "db", "failed": True, "changed": False, "msg": "The VM db: gone."},
        ]
    )
    assert [(row["vm"], row["result"], row["why"]) for row in rows] == [
        ("db", "FAILED", "The VM db: gone."),
        ("app", "done already", "young enough"),
        ("web", "full", "asked"),
    ]
    assert table(rows) == [
        "db   FAILED                 The VM db: gone.",
        "app  done already           young enough",
        "web  full          2.0 KiB  asked",
        "    Warning: slow",
    ]
    assert [line.split()[0] for line in table(rows, warnings=False)] == ["db", "app", "web"]


def test_a_row_is_one_line_however_many_warnings_there_are() -> None:
    settled = [f"left by an earlier run\nand put right: snapshot {number} of {'x' * 50} was merged" for number in range(12)]
    lines = table(outcomes([backup("web", warnings=["word " * 100, *settled], reason="asked\nfor"), backup("app")]))
    assert [line for line in lines if not line.startswith(" ")] == ["app  full    asked", "web  full    asked for"]
    below = lines[lines.index("web  full    asked for") + 1 :]
    assert len(below) == 6 and below[-1] == "    and 8 more warnings"
    assert below[0].endswith("word …") and max(map(len, below)) <= 220
    assert below[1] == f"    Warning: left by an earlier run and put right: snapshot 0 of {'x' * 50} was merged"


def test_damage_that_a_verification_finds_is_a_failure() -> None:
    found = {
        "archives": [
            {"path": "/b/web.tar", "ok": False, "lost": [5, 7], "damage": [{"member": "vda_0.qcow2", "reason": "bad digest"}]}
        ]
    }
    rows = outcomes([backup("web"), backup("app")], [found, {"archives": [{"path": "/b/app.tar", "ok": True}]}])
    assert [(row["vm"], row["result"]) for row in rows] == [("web", "FAILED"), ("app", "full")]
    assert rows[0]["why"] == "verification has found damage, lost points: 5, 7: vda_0.qcow2: bad digest"


def test_a_verification_that_did_not_run_is_a_failure() -> None:
    rows = outcomes([backup("web")], [{"failed": True, "msg": "no such file"}])
    assert rows[0]["result"] == "FAILED"
    assert "no such file" in rows[0]["why"]


def test_a_verification_in_a_loop_that_goes_on_fails_its_vm() -> None:
    """As Ansible registers it under ``failed_when: false``."""
    gone = {
        "failed": False,
        "failed_when_result": False,
        "msg": "Archive /b/web.tar: it is not there.",
        "ansible_loop_var": "written",
        "written": backup("web"),
    }
    rows = outcomes([backup("web"), {"vm": "db", "failed": True, "msg": "gone"}], [gone])
    assert [(row["vm"], row["result"], row["why"]) for row in rows] == [
        ("db", "FAILED", "gone"),
        ("web", "FAILED", "verification failed: Archive /b/web.tar: it is not there."),
    ]


def test_a_name_is_missed_only_where_no_host_has_it() -> None:
    rows = outcomes([], [], [["web*", "db"], ["db", "app"]])
    assert [(row["vm"], row["result"]) for row in rows] == [("db", "FAILED")]
    assert outcomes([], [], [["web"], []]) == []


def test_nothing_chosen_is_said() -> None:
    assert table([]) == ["no VM was chosen"]


def test_one_line_for_each() -> None:
    rows = outcomes([{"vm": "a", "failed": True, "msg": "first\nsecond"}])
    assert table(rows) == ["a  FAILED    first second"]


def test_a_vm_whose_disks_are_attached_to_others_is_skipped_or_failed() -> None:
    told = [backup("web"), {"vm": "db", "failed": True, "msg": "attached to appliance", "attached_to": ["appliance"]}]
    assert [(row["vm"], row["result"], row["why"]) for row in outcomes(told)] == [
        ("db", "skipped", "attached to appliance"),
        ("web", "full", "asked"),
    ]
    assert [row["result"] for row in outcomes(told, attached="fail")] == ["FAILED", "full"]
