# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The drawings of the report: inline SVG that takes its colours from the page. Pure."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes
from ansible_collections.kvmops.backup.plugins.plugin_utils._report.model import Vm

DAYS = 35
_DAY_S = 86400
_STEP = 7  # units per day
_HEIGHT = 26


def timeline(vm: Vm, now: int, when: Callable[[int], str]) -> str:
    """The last weeks of a VM: tall marks are full backups, short ones increments, a line joins the points of one archive."""
    width = DAYS * _STEP + 8
    begin = now - DAYS * _DAY_S

    def x(at: int) -> float:
        return round((at - begin) / _DAY_S * _STEP, 1)

    parts = [
        f'<line class="week" x1="{x(now - week * 7 * _DAY_S)}" x2="{x(now - week * 7 * _DAY_S)}" y1="2" y2="24"/>'
        for week in range(6)
    ]
    shown = 0
    for archive in vm.archives:
        points = [point for point in archive.points if begin <= point.at <= now + _DAY_S]
        if len(points) > 1:
            parts.append(f'<line class="chain" x1="{x(points[0].at)}" x2="{x(points[-1].at)}" y1="20" y2="20"/>')
        for point in points:
            kind = "lost" if point.lost else "full" if point.full else "inc"
            top = 5 if point.full else 13
            told = f"{when(point.at)}, {'full' if point.full else 'increment'}, {human_bytes(point.size_bytes)}"
            told += ", damaged" if point.lost else ""
            parts.append(
                f'<rect class="{kind}" x="{x(point.at) - 1.5}" y="{top}" width="3.4" height="{22 - top}" rx="1">'
                f"<title>{escape(told)}</title></rect>"
            )
            shown += 1
    label = f"{shown} points in the last {DAYS} days"
    return (
        f'<svg class="timeline" viewBox="0 0 {width} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def sizes(vm: Vm, when: Callable[[int], str]) -> str:
    """A bar for each of the last archives: the full at the bottom, its increments on top."""
    last = [archive for archive in vm.archives if archive.points][-8:]
    if not last:
        return ""
    largest = max(sum(point.size_bytes for point in archive.points) for archive in last) or 1
    parts = []
    for number, archive in enumerate(last):
        full = sum(point.size_bytes for point in archive.points if point.full)
        added = sum(point.size_bytes for point in archive.points if not point.full)
        full_high, added_high = (max(1.0, round(20 * size / largest, 1)) if size else 0.0 for size in (full, added))
        left = number * 8
        told = f"{when(archive.points[0].at)}: full {human_bytes(full)}, increments {human_bytes(added)}"
        bars = [("full", full_high, 24 - full_high), ("inc", added_high, 24 - full_high - added_high)]
        drawn = [
            f'<rect class="{kind}" x="{left}" y="{top:.1f}" width="6" height="{high}"/>'
            for kind, high, top in bars
            if high
        ]
        parts.append(f"<g><title>{escape(told)}</title>{''.join(drawn)}</g>")
    return f'<svg class="sizes" viewBox="0 0 64 {_HEIGHT}" role="img" aria-label="sizes of archives">{"".join(parts)}</svg>'


def trend(vm: Vm) -> str:
    """How the last full compares with the one before, in words; "" where there are not two."""
    fulls = [point.size_bytes for point in vm.points if point.full]
    if len(fulls) < 2 or not fulls[-2]:
        return ""
    percent = round(100 * (fulls[-1] - fulls[-2]) / fulls[-2])
    return f"{percent:+d} %" if percent else "as before"
