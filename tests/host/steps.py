# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests on a whole host have in common."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.kvmops.backup.tests.lab.host.machine import Machine

PATH = "/srv/backup"
RESTORED = "/srv/restored"


def back_up(host: Machine, vm: str, **arguments: Any) -> dict[str, Any]:
    """As the weekly policy does, by the module itself."""
    return host.module("vm_backup", **{"vm": vm, "path": PATH, "mode": "auto", **arguments})


def snapshots(host: Machine, vm: str) -> list[str]:
    """As libvirt lists them."""
    return host.root("virsh", "snapshot-list", vm, "--name").split()


def is_flat(host: Machine, vm: str) -> bool:
    """One file for each disk, as libvirt and the images say, and no snapshot."""
    return all(len(chain) == 1 for chain in host.call("chains", name=vm).values()) and not snapshots(host, vm)


def partial_files(host: Machine, directory: str = PATH) -> list[str]:
    """What a run has begun and not published."""
    return [name for name in host.call("files", directory=directory) if "partial" in name]


def restored_content(host: Machine, archive: str, point: int) -> dict[str, str]:
    """Digests of the disks of a point, restored under another name and removed again."""
    host.module("vm_restore", source=archive, point=point, name="restored", path=RESTORED)
    try:
        content: dict[str, str] = host.call("content", name="restored")
    finally:
        host.call("remove_vm", name="restored")
    return content


@dataclass
class Points:
    """Points of one VM, each with what was on the disks when it was frozen, told by qemu-img from the frozen layers."""

    host: Machine
    vm: str
    taken: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)

    def take(self, **arguments: Any) -> dict[str, Any]:
        """A backup whose snapshot stays, after the guest has written."""
        done = back_up(self.host, self.vm, **arguments)
        self.remember(done)
        return done

    def remember(self, done: dict[str, Any]) -> None:
        """What a backup's frozen layers hold."""
        content = self.host.call("content", name=self.vm, frozen=True)
        self.taken.append((done["archive"]["path"], done["point"], content))

    def assert_all_restore(self) -> None:
        """Every point of every archive comes back byte by byte."""
        for archive, point, content in self.taken:
            assert restored_content(self.host, archive, point) == content, f"{archive}, point {point}"


def set_clock(host: Machine, moment: float) -> None:
    """Moves the host's clock."""
    host.root("date", "-u", "-s", f"@{moment:.0f}")


def clock(host: Machine) -> float:
    """The host's clock."""
    return float(host.ssh("date +%s"))


def wait_for_ssh_command(host: Machine, command: str, timeout_s: float) -> str:
    """Standard output of a command, once it succeeds."""
    deadline = time.monotonic() + timeout_s
    while True:
        output = host.ssh(f"{command} || echo NOT YET")
        if "NOT YET" not in output or time.monotonic() > deadline:
            assert "NOT YET" not in output, f"{command}: not within {timeout_s:.0f} s"
            return output
        time.sleep(2)
