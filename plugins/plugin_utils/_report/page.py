# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The report as one HTML page that needs nothing else: no network, no scripts. Pure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, tzinfo
from html import escape
from typing import Optional

from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes
from ansible_collections.kvmops.backup.plugins.plugin_utils._report import charts
from ansible_collections.kvmops.backup.plugins.plugin_utils._report.model import Report, State, Vm
from ansible_collections.kvmops.backup.plugins.plugin_utils._report.style import CSS

_SIGNS = {State.GOOD: "✓", State.LATE: "!", State.NEVER: "\u2013", State.DAMAGED: "✕", State.GONE: "○"}


def render(report: Report, *, title: str, tz: Optional[tzinfo] = None) -> str:
    """The page; times in `tz`, None for the time zone of this machine."""

    def when(at: int) -> str:
        return f"{datetime.fromtimestamp(at, tz):%a %Y-%m-%d %H:%M}"

    zone = datetime.fromtimestamp(report.now, tz).astimezone(tz).strftime("%Z")
    present = [vm for vm in report.vms if vm.state is not State.GONE]
    gone = [vm for vm in report.vms if vm.state is State.GONE]
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f'<meta name="generator" content="kvmops.backup"><title>{escape(title)}</title><style>{CSS}</style></head><body><main>',
        f'<h1>{escape(title)}</h1><div class="when">As of {when(report.now)} {escape(zone)}</div>',
        _tiles(report),
    ]
    if report.silent_hosts:
        parts.append(
            f'<div class="note">Nothing is known of {escape(", ".join(report.silent_hosts))}: no answer.</div>'
        )
    if present:
        parts += [_key(), _table(present, report.now, when)]
    else:
        parts.append("<p>There are no virtual machines here.</p>")
    if gone:
        parts += ["<h2>Archives of VMs that are on none of these hosts</h2>", _table(gone, report.now, when)]
    if report.unreadable:
        rows = "".join(f"<li>{escape(path)}: {escape(why)}</li>" for path, why in report.unreadable)
        parts.append(f"<h2>Files that cannot be read</h2><ul>{rows}</ul>")
    if report.not_ours:
        rows = "".join(f"<li>{escape(path)}: {escape(why)}</li>" for path, why in report.not_ours)
        parts.append(f"<h2>Archives that are not trusted and count for nothing</h2><ul>{rows}</ul>")
    return "".join(parts) + "</main></body></html>\n"


def _tiles(report: Report) -> str:
    size = human_bytes(sum(vm.size_bytes for vm in report.vms))
    damaged, never, late = (report.count(state) for state in (State.DAMAGED, State.NEVER, State.LATE))
    tiles = [
        ("", str(sum(vm.state is not State.GONE for vm in report.vms)), "virtual machines"),
        ("good", str(report.count(State.GOOD)), "good"),
        ("late" if late else "", str(late), "late"),
        ("bad" if never else "", str(never), "without backup"),
        ("bad" if damaged else "", str(damaged), "damaged"),
        ("", size, "in archives"),
    ]
    cells = "".join(f'<div class="tile {kind}"><b>{value}</b>{label}</div>' for kind, value, label in tiles)
    return f'<div class="tiles">{cells}</div>'


def _key() -> str:
    marks = (("full", "full"), ("inc", "increment"), ("bad", "damaged"))
    shown = "".join(f'<span><i style="background:var(--{color})"></i>{text}</span>' for color, text in marks)
    return f'<div class="key">{shown}<span>thin lines: weeks, the last {charts.DAYS} days</span></div>'


def _table(vms: list[Vm], now: int, when: Callable[[int], str]) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("State", "VM", "Last good point", f"Last {charts.DAYS} days", "Size", "Verified")
    )
    rows = "".join(_row(vm, now, when) for vm in vms)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _row(vm: Vm, now: int, when: Callable[[int], str]) -> str:
    kind = {State.GOOD: "good", State.LATE: "late", State.DAMAGED: "bad", State.NEVER: "bad"}.get(vm.state, "")
    host = f"{escape(vm.host)}, {'running' if vm.running else 'not running'}" if vm.host else ""
    cells = [
        f'<td><span class="badge {kind}">{_SIGNS[vm.state]} {vm.state.value}</span></td>',
        f'<td><div class="name">{escape(vm.name)}</div><div class="soft">{host}</div></td>',
        f'<td data-label="Last good point">{_last(vm, when)}</td>',
        f'<td data-label="Last {charts.DAYS} days">{charts.timeline(vm, now, when)}{_details(vm)}</td>',
        f'<td data-label="Size"><div class="pair">{charts.sizes(vm, when)}<div>{_size(vm)}</div></div></td>',
        f'<td data-label="Verified">{_verified(vm, when)}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _last(vm: Vm, when: Callable[[int], str]) -> str:
    newest = vm.newest
    if newest is None or vm.age_s is None:
        return '<span class="badtext">none</span>'
    kind = "latetext" if vm.age_s > vm.objective_s and vm.host else "soft"
    shape = "full" if newest.full else "increment"
    consistency = f", {escape(newest.consistency)}" if newest.consistency else ""
    return (
        f'{when(newest.at)}<div class="{kind}">{_age(vm.age_s)} ago'
        f"{f', at most {_age(vm.objective_s)} wanted' if kind == 'latetext' else ''}</div>"
        f'<div class="soft">{shape}{consistency}</div>'
    )


def _size(vm: Vm) -> str:
    if not vm.archives:
        return '<span class="soft">&ndash;</span>'
    count = len(vm.archives)
    told = charts.trend(vm)
    text = f'{human_bytes(vm.size_bytes)}<div class="soft">{count} archive{"s" if count != 1 else ""}</div>'
    return text + (f'<div class="soft" title="the last full beside the one before">full {told}</div>' if told else "")


def _verified(vm: Vm, when: Callable[[int], str]) -> str:
    bad = [archive for archive in vm.archives if not archive.verified_ok]
    if bad:
        lost = sum(point.lost for archive in bad for point in archive.points)
        return f'<span class="badtext">{len(bad)} damaged</span><div class="soft">{lost} points lost</div>'
    known = [archive for archive in vm.archives if archive.verified_at is not None]
    if not known:
        return '<span class="soft">not known</span>'
    newest = max(archive.verified_at or 0 for archive in known)
    rest = "all" if len(known) == len(vm.archives) else f"{len(known)} of {len(vm.archives)}"
    more = ", points added since" if any(archive.added_since for archive in known) else ""
    return f'{when(newest)}<div class="soft">{rest} archives good{more}</div>'


def _details(vm: Vm) -> str:
    told = [*vm.warnings, *(f"{archive.path}: {text}" for archive in vm.archives for text in archive.warnings)]
    if not told:
        return ""
    rows = "".join(f"<li>{escape(text)}</li>" for text in told)
    return f"<details><summary>{len(told)} warning{'s' if len(told) != 1 else ''}</summary><ul>{rows}</ul></details>"


def _age(seconds: int) -> str:
    if seconds < 2 * 3600:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h" if seconds < 72 * 3600 else f"{seconds // 86400} days"
