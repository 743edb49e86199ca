# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Five weeks of the weekly policy with real archives of a real VM that is off; only the module's clock is set.

The weeks lie in the past, so that no file is newer than the clock allows, and end with a change of the clocks.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult, module_argv, module_result
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils.weekly_model import Model, nights

BERLIN = ZoneInfo("Europe/Berlin")
FIRST = date(2025, 9, 28)  # a Sunday
DAYS = 37
CHANGE = date(2025, 10, 26)  # back to winter time, a Sunday
MISSED = {
    "wednesday": date(2025, 10, 8),
    "saturday": date(2025, 10, 18),
    "sunday": date(2025, 11, 2),
}
AD_HOC = date(2025, 10, 11)  # a Saturday, at noon
# So that files go within the five weeks; the worked example has 30.
KEEP_DAYS = 12
# What the role gives to vm_backup by default.
POLICY: dict[str, Any] = {
    "mode": "auto",
    "full_weekday": "sunday",
    "increment_limit": 7,
    "max_age": "20h",
    "keep_days": KEEP_DAYS,
}


# Runs the module named by the second argument with a clock that stands at the first when it begins.
LATER = """
import runpy, sys, time
clock, begin = time.time, time.time()
at, module = int(sys.argv[1]), sys.argv[2]
time.time = lambda: at + clock() - begin
sys.argv[1:3] = []
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def backup_at(now: int, vm: LabVm, target: Path, **options: Any) -> ModuleResult:
    """A run of vm_backup that believes it begins at `now`, on a host in Berlin."""
    environment = {**os.environ, "TZ": "Europe/Berlin"}
    argv = module_argv("vm_backup", {"vm": vm.name, "path": str(target), **options})
    argv[1:3] = ["-c", LATER, str(now), argv[2]]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment)
    result = module_result("vm_backup", done.stdout, done.stderr)
    assert not result.failed, f"{datetime.fromtimestamp(now, BERLIN)}: {result.message}"
    return result


def listing(target: Path, run_module: Callable[..., ModuleResult]) -> list[tuple[date, int]]:
    found = run_module("backup_info", path=str(target))["archives"]
    assert len(found) == len([path for path in target.iterdir() if not path.name.startswith(".")])
    files = sorted((each["points"][0]["point"], len(each["points"])) for each in found)
    return [(datetime.fromtimestamp(full, BERLIN).date(), points) for full, points in files]


def test_five_weeks(lab: Lab, run_module: Callable[..., ModuleResult]) -> None:
    vm = lab.create_vm("worked example", [Disk(size_mib=16, ext4=False)], start=False)
    target = lab.path("target")
    disk = vm.disks()["vda"]
    foreign = target / "worked example_20250901T000000Z_00000000.tar"
    foreign.write_bytes(b"not ours, whatever its name")
    os.utime(foreign, (0, 0))
    kept_aside = lab.path("aside") / "foreign"

    model = Model(BERLIN, keep_days=KEEP_DAYS)
    for number, (day, one_o_clock) in enumerate(nights(FIRST, DAYS, BERLIN, list(MISSED.values()))):
        # a little later each night, so that no file's age is a matter of how fast this machine is
        now = one_o_clock + 20 * number
        assert foreign.read_bytes() == b"not ours, whatever its name"
        expected = model.run(now)
        result = backup_at(now, vm, target, **POLICY)
        if expected.startswith("full"):
            assert (result["mode"], day.weekday() == 6 or day - timedelta(days=1) in MISSED.values()) == (
                "full",
                True,
            ), day
        else:
            assert result["mode"] == "incremental", (day, result["reason"])
        assert abs(result["point"] - now) <= 30
        assert bool(
            [name for name in result["merged_snapshots"] if expected.endswith("merge")]
        ) == expected.endswith("merge")
        if expected.endswith("merge"):
            assert vm.domain.listAllSnapshots() == []
            assert vm.disks()["vda"] == disk
        foreign.rename(kept_aside)
        assert listing(target, run_module) == model.listing(), day
        kept_aside.rename(foreign)
        if day.weekday() in (2, 6):
            again = backup_at(now + 3 * 3600, vm, target, **POLICY)
            assert (again.changed, again["mode"]) == (False, "none"), day
        if day == AD_HOC:
            at_noon = int(datetime.combine(day, time(12), BERLIN).timestamp())
            model.ad_hoc_full(at_noon)
            assert backup_at(at_noon, vm, target, mode="full")["reason"] == "full backup as asked"

    assert day > CHANGE
    # What is there is whole, and the last point is the VM's disk.
    foreign.unlink()
    checked = run_module("backup_verify", path=str(target), deep=True)["archives"]
    assert all(each["ok"] and each["coverage"] == "full" for each in checked)
    newest = max(target.iterdir(), key=lambda path: path.name)
    run_module("vm_restore", source=str(newest), name="back", path=str(lab.path("restored")))
    back = lab.adopt("back").disks()["vda"]
    assert truth.content_sha256(back, "qcow2") == truth.content_sha256(vm.disks()["vda"], "qcow2")
