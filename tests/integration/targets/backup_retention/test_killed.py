# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Retention killed at any moment: archives are there and whole, or gone; the next run finishes it and leaves nothing behind.

A seeded sample; KVMOPS_SWEEP=all kills at every system call of every kind.
"""

from __future__ import annotations

import os
import random
import time

from ansible_collections.kvmops.backup.tests.lab import kills
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog import catalog_archives

SYSTEM_CALLS = ("rename", "unlink", "fsync", "fdatasync", "pwrite64")


def test_at_system_calls(lab, run_module):
    target = lab.path("backups")
    now = int(time.time())

    def fill():
        for days in (3, 2, 1):
            path = catalog_archives.write(target, timestamp=now - days * 86400)
            (target / f"{path.name}.notes").write_text("notes")
        return sorted(os.listdir(target))

    everything = fill()
    arguments = {"path": str(target), "keep_last": 1}
    counted = kills.count_system_calls("backup_retention", arguments, SYSTEM_CALLS)
    kept = [name for name in everything if name in os.listdir(target)]
    assert len(kept) == 2  # the newest and its notes
    seed = random.randrange(2**32)
    print("seed", seed, "calls", counted)
    chance = random.Random(seed)
    for name, count in counted.items():
        assert count, f"{name} is never called"
        wanted = {1, count, *(chance.randint(1, count) for _dummy in range(2))}
        for number in range(1, count + 1) if os.environ.get("KVMOPS_SWEEP") == "all" else sorted(wanted):
            print("kill at", name, number)
            for path in os.listdir(target):
                os.unlink(target / path)
            assert fill() == everything
            kills.kill_at_system_call("backup_retention", arguments, name, number)
            left = [path for path in os.listdir(target) if not path.startswith(".")]
            assert set(kept) <= set(left) <= set(everything)
            for archive in run_module("backup_verify", path=str(target))["archives"]:
                assert archive["ok"], archive
            run_module("backup_retention", **arguments)
            assert sorted(os.listdir(target)) == kept
            assert os.listdir("/var/lib/kvmops-backup/journal") == []
