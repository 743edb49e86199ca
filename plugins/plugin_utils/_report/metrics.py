# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The report as a Prometheus textfile. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from ansible_collections.kvmops.backup.plugins.plugin_utils._report.model import Report, State, Vm

_GAUGES: tuple[tuple[str, str, Callable[[Vm], Optional[int]]], ...] = (
    (
        "last_good_point_timestamp_seconds",
        "Unix time of the newest good point of the VM.",
        lambda vm: vm.newest.at if vm.newest else None,
    ),
    ("objective_seconds", "How old the newest good point of the VM may be.", lambda vm: vm.objective_s),
    (
        "ok",
        "1 if the VM has a good point that is young enough and no damage is known.",
        lambda vm: int(vm.state is State.GOOD),
    ),
    ("archives", "Archives of the VM.", lambda vm: len(vm.archives)),
    ("points", "Points of the VM that can be restored.", lambda vm: sum(not point.lost for point in vm.points)),
    ("size_bytes", "What the archives of the VM take.", lambda vm: vm.size_bytes),
    (
        "damaged_archives",
        "Archives of the VM in which the last verification has found damage.",
        lambda vm: sum(not archive.verified_ok for archive in vm.archives),
    ),
    (
        "last_verified_timestamp_seconds",
        "Unix time of the last verification of the VM's newest archive.",
        lambda vm: vm.archives[-1].verified_at if vm.archives else None,
    ),
)


def render(report: Report, *, name: str = "", place: str = "") -> str:
    """The text of the file; every VM that is on a host.

    `name` and `place`: labels of every series, so that the files of several reports can lie in one directory.
    """
    common = f'report="{_label(name)}",place="{_label(place)}"'
    lines = []
    vms = sorted((vm for vm in report.vms if vm.host), key=lambda vm: (vm.host, vm.name, vm.uuid))
    for gauge, text, value in _GAUGES:
        lines += [f"# HELP kvmops_backup_{gauge} {text}", f"# TYPE kvmops_backup_{gauge} gauge"]
        for vm in vms:
            number = value(vm)
            if number is not None:
                labels = f'{common},host="{_label(vm.host)}",vm="{_label(vm.name)}",uuid="{_label(vm.uuid)}"'
                lines.append(f"kvmops_backup_{gauge}{{{labels}}} {number}")
    for gauge, text, number in (
        ("silent_hosts", "Hosts that did not answer when the report was made.", len(report.silent_hosts)),
        ("unreadable_files", "Files in the places of archives that cannot be read.", len(report.unreadable)),
        ("archives_not_ours", "Archives that count for nothing, as others can have written them.", len(report.not_ours)),
        ("report_timestamp_seconds", "Unix time of the report.", report.now),
    ):
        lines += [
            f"# HELP kvmops_backup_{gauge} {text}",
            f"# TYPE kvmops_backup_{gauge} gauge",
            f"kvmops_backup_{gauge}{{{common}}} {number}",
        ]
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
