# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's plug is pulled in the middle, and its VM starts with it: the next run puts all right. (In a copy: test_apparmor.)"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ansible_collections.kvmops.backup.tests.host.steps import Points, back_up, is_flat
from ansible_collections.kvmops.backup.tests.lab.host.machine import Machine

VM = "web01"


@pytest.fixture(scope="module")
def points(host: Machine) -> Iterator[Points]:
    """Backups of a VM that starts with the host; whatever a test did, they restore at the end."""
    host.call("create_vm", name=VM, autostart=True)
    value = Points(host, VM)
    value.take()
    yield value
    value.assert_all_restore()


def reset_in(host: Machine, phases: list[str], module: str, **arguments: Any) -> None:
    host.call("begin", module=module, arguments={"vm": VM, **arguments})
    host.call("wait_for_phase", phases=phases)
    host.reset()
    host.call("wait_until_up", name=VM)


def test_in_a_merge(host: Machine, points: Points) -> None:
    host.call("write_more", name=VM)

    reset_in(host, ["merge"], "vm_snapshot", snapshot="all", state="absent", bandwidth="64k")
    host.module("vm_snapshot", vm=VM, snapshot="all", state="absent")

    assert is_flat(host, VM)
    points.take()


def test_in_a_revert(host: Machine, points: Points) -> None:
    host.module("vm_snapshot", vm=VM, snapshot="before")
    frozen = host.call("content", name=VM, frozen=True)
    host.call("write_more", name=VM)

    host.call("destroy", name=VM)
    host.call("begin", module="vm_snapshot", arguments={"vm": VM, "snapshot": "before", "state": "reverted"})
    host.call("wait_for_phase", phases=["prepare", "copy", "define"])
    host.reset()
    host.call("destroy", name=VM)
    host.module("vm_snapshot", vm=VM, snapshot="before", state="reverted")

    assert host.call("content", name=VM) == frozen
    host.call("start", name=VM)


def test_in_a_restore_in_place(host: Machine, points: Points) -> None:
    archive, point, content = points.taken[0]
    host.call("destroy", name=VM)
    arguments = {"source": archive, "point": point, "force": True}
    host.call("begin", module="vm_restore", arguments=arguments)
    host.call("wait_for_phase", phases=["restore"])
    host.reset()

    host.call("destroy", name=VM)
    host.module("vm_restore", **arguments)

    assert host.call("content", name=VM) == content
    host.call("start", name=VM)
    assert back_up(host, VM)["mode"] == "full"
