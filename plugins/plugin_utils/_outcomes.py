# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Who, what and why: the outcomes of a policy's run as rows of a table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

FAILED, SKIPPED, NOTHING_NEW = "FAILED", "skipped", "done already"
WARNINGS, WARNING_WIDTH = 5, 200  # shown below a row of the table


def outcomes(
    backups: Sequence[Mapping[str, Any]],
    verified: Sequence[Mapping[str, Any]] = (),
    unmatched: Sequence[Sequence[str]] = (),
    attached: str = "skip",
) -> list[dict[str, Any]]:
    """One row ``{vm, result, why, archive, bytes, warnings}`` for each VM, failures first.

    `backups`: those of ``vm_backup_many``; `verified`: results of ``backup_verify``;
    `unmatched`: for each host, the names that mean none of its VMs. `attached`: "skip" or "fail", what a VM is that is not
    backed up because other VMs have its disks. `result` is full, incremental, "done already", skipped or FAILED.
    """
    bad = _bad(verified)
    rows = [_row(each, bad, skips=attached == "skip") for each in backups]
    nowhere = [name for name in (unmatched[0] if unmatched else ()) if all(name in each for each in unmatched)]
    rows += [_failure(name, "no VM of this name is on any host of the play") for name in nowhere]
    rows += [_failure("", why) for path, why in bad.items() if path not in {row["archive"] for row in rows}]
    return sorted(rows, key=lambda row: (row["result"] != FAILED, row["result"] != SKIPPED, row["vm"]))


def _bad(verified: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is wrong with archives by path; what could not be looked at is "verification 1" and so on, if nothing names it."""
    bad = {}
    for number, result in enumerate(verified, 1):
        if "archives" not in result:  # `failed` may be taken away, by a task that goes on all the same
            written = result.get(result.get("ansible_loop_var", ""))
            path = written["archive"]["path"] if isinstance(written, Mapping) else f"verification {number}"
            bad[path] = f"verification failed: {result.get('msg') or 'no message'}"
        for archive in result.get("archives", ()):
            if not archive["ok"]:
                damage = "; ".join(f"{item['member'] or 'archive'}: {item['reason']}" for item in archive["damage"])
                lost = ", ".join(map(str, archive.get("lost", ())))
                bad[archive["path"]] = f"verification has found damage{f', lost points: {lost}' if lost else ''}: {damage}"
    return bad


def _row(backup: Mapping[str, Any], bad: Mapping[str, str], *, skips: bool) -> dict[str, Any]:
    archive = (backup.get("archive") or {}).get("path", "")
    if backup.get("failed"):
        is_attached = backup.get("attached_to") is not None and skips
        result, why = SKIPPED if is_attached else FAILED, str(backup.get("msg") or backup.get("module_stderr") or "no message")
    elif archive in bad:
        result, why = FAILED, bad[archive]
    else:
        result = str(backup.get("mode") or "") if backup.get("changed") else NOTHING_NEW
        why = str(backup.get("reason", ""))
    return {
        "vm": str(backup["vm"]),
        "result": result if result != "none" else NOTHING_NEW,
        "why": why,
        "archive": archive,
        "bytes": int(backup.get("bytes_written") or 0),
        "warnings": [str(warning) for warning in backup.get("warnings", [])],
    }


def _failure(vm: str, why: str) -> dict[str, Any]:
    return {"vm": vm, "result": FAILED, "why": why, "archive": "", "bytes": 0, "warnings": []}


def table(rows: Sequence[Mapping[str, Any]], warnings: bool = True) -> list[str]:
    """The rows as lines of text: who, what and why; below each its first warnings, cut to be read. The rows have all of them."""
    if not rows:
        return ["no VM was chosen"]
    cells = [
        (str(row["vm"]), str(row["result"]), human_bytes(row["bytes"]) if row["bytes"] else "", _one_line(row["why"]))
        for row in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = []
    for row, cell in zip(rows, cells):
        lines.append("  ".join([*(cell[column].ljust(widths[column]) for column in range(3)), cell[3]]).rstrip())
        lines += _warnings(row["warnings"]) if warnings else []
    return lines


def _warnings(texts: Sequence[str]) -> list[str]:
    lines = [f"    Warning: {shorten(_one_line(text), WARNING_WIDTH, placeholder=' …')}" for text in texts[:WARNINGS]]
    more = len(texts) - WARNINGS
    return [*lines, f"    and {more} more {'warning' if more == 1 else 'warnings'}"] if more > 0 else lines


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())
