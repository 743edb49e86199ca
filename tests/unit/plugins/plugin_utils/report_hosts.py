# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What hosts tell a report, made up: any number of VMs with five weeks of archives, some of them in trouble."""

from __future__ import annotations

import random
import time
from typing import Any

NOW = 1795392000  # Sun 2026-11-22 23:20 UTC
DAY_S = 86400


def iso(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def vm(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "uuid": f"uuid-of-{name}", "state": "running", **more}


def archive(name: str, at: int, days: int = 7, *, size: int = 20 << 30, **more: Any) -> dict[str, Any]:
    """One of a weekly cycle that began at `at` and has so many points."""
    points = [
        {
            "point": at + day * DAY_S,
            "time": iso(at + day * DAY_S),
            "mode": "incremental" if day else "full",
            "consistency": "agent",
            "size": size // 60 if day else size,
        }
        for day in range(days)
    ]
    return {
        "path": f"/srv/backup/{name}_{at}.tar",
        "vm": {"name": name, "uuid": f"uuid-of-{name}"},
        "size": sum(int(point["size"]) for point in points),
        "protected": False,
        "incrementable": False,
        "points": points,
        "verified": None,
        "incrementable_reason": "no increment can be added: its cycle has ended",
        "warnings": ["no increment can be added: its cycle has ended"],
        **more,
    }


def verified(at: int, *, ok: bool = True, lost: tuple[int, ...] = (), current: bool = True) -> dict[str, Any]:
    return {"time": iso(at), "ok": ok, "coverage": "full", "points": [], "lost": list(lost), "current": current}


def many(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Two hosts with so many VMs; among the first five are one late, one without backup and one damaged."""
    chance = random.Random(seed)
    sunday = NOW - NOW % DAY_S + 3600  # tonight's full
    hosts: list[dict[str, Any]] = [{"host": f"kvm0{number}", "vms": [], "archives": []} for number in (1, 2)]
    for number in range(count):
        name = (
            f"{chance.choice(['web', 'db', 'mail', 'build', 'a-rather-long-name-of-an-application-server'])}{number:03}"
        )
        host = hosts[number % 2]
        host["vms"].append(vm(name, state="running" if chance.random() < 0.8 else "shut off"))
        if number % 40 == 1:
            continue  # no backup
        size = chance.randrange(1 << 30, 200 << 30)
        begins = [sunday - week * 7 * DAY_S for week in range(5, -1, -1)]
        if number % 40 == 2:
            begins = begins[:-1]  # late
        for begin in begins:
            missing = chance.random() < 0.05
            days = 1 if begin == sunday else 5 if missing else 4 if number % 40 == 2 and begin == begins[-1] else 7
            size = int(size * chance.uniform(0.98, 1.06))
            found = archive(name, begin, days, size=size)
            if number % 3 == 0:
                found["verified"] = verified(begin + 6 * 3600, current=begin != sunday)
            host["archives"].append(found)
        if number % 40 == 3:
            spoilt = host["archives"][-2]
            lost = tuple(int(point["point"]) for point in spoilt["points"][3:])
            spoilt["verified"] = verified(NOW - DAY_S, ok=False, lost=lost)
            spoilt["warnings"] = [f"the verification of {iso(NOW - DAY_S)} has found damage"]
    hosts[0]["archives"].append(archive("decommissioned", sunday - 21 * DAY_S, 3))
    return hosts
