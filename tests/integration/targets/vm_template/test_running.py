# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A template and two running clones that go their own ways: everything is lost, and everything comes back thin."""

from __future__ import annotations

import os
from pathlib import Path

from ansible_collections.kvmops.backup.tests.integration.targets.vm_template import thin
from ansible_collections.kvmops.backup.tests.lab.markers import parse_log
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab


def test_a_template_and_two_running_clones_are_lost_and_come_back_byte_by_byte(lab: Lab, run_module: thin.Run) -> None:
    base = lab.create_vm("base", [Disk(), Disk("raw")], freeze_mode="pause")
    base.wait_for_marker(3)
    base.shutdown()
    digest = run_module("vm_template", vm="base")["template"]["digest"]
    template_was = thin.contents(base)
    target = lab.path("backups")

    one = lab.adopt(run_module("vm_thin_clone", template="base", name="one", start=True)["vm"]["name"])
    two = lab.adopt(run_module("vm_thin_clone", template="base", name="two", start=True)["vm"]["name"])
    one.wait_until_up().wait_for_marker(6)
    two.wait_until_up().wait_for_marker(8)
    assert one.domain.UUIDString() != two.domain.UUIDString()

    template_archive = thin.backup(run_module, base, target)
    full = run_module("vm_backup", vm="one", path=str(target), mode="auto")
    first = one.frozen_digests()
    one.agent.shell("rm /run/frozen.sha256")
    one.wait_for_marker(one.last_marker().number + 3)
    increment = run_module("vm_backup", vm="one", path=str(target), mode="auto")
    second = one.frozen_digests()
    assert (full["mode"], increment["mode"]) == ("full", "incremental")
    assert increment["archive"]["path"] == full["archive"]["path"]
    other = thin.backup(run_module, two, target)
    of_two = two.frozen_digests()
    assert first != second != of_two
    assert all(
        os.path.getsize(path) < 42 << 20 for path in (full["archive"]["path"], other)
    )  # 128 MiB of disks, and memory; the kernel is 18 MiB

    one.shutdown()
    two.shutdown()
    run_module("vm_snapshot", vm="one", snapshot="all", state="absent")
    assert thin.contents(base) == template_was  # no merge has written to the template
    assert run_module("vm_template", vm="base")["template"]["digest"] == digest

    for vm in (one, two, base):
        thin.lose(vm)
    refused = run_module("vm_restore", source=other, fails=True).message
    assert "no template" in refused
    run_module("vm_restore", source=template_archive)
    again = run_module("vm_template", vm="base")
    assert not again.changed and again["template"]["digest"] == digest
    assert thin.contents(lab.vm("base")) == template_was

    run_module("vm_restore", source=other)
    run_module("vm_restore", source=full["archive"]["path"])
    run_module(
        "vm_restore", source=full["archive"]["path"], point=full["point"], name="earlier", path=str(lab.path("x"))
    )
    bases = {target: str(path) for target, path in base.disks().items()}
    for name, truth in (("two", of_two), ("one", second), ("earlier", first)):
        vm = lab.adopt(name)
        for target_name, path in vm.disks().items():
            assert thin.chain(path)[-1] == bases[target_name]
            assert os.stat(path).st_blocks * 512 < 16 << 20
        reader = lab.read_back(f"reader-{name}", [Disk("qcow2", path=path) for path in vm.disks().values()])
        assert reader.digests() == truth
        reader.remove()
    before = parse_log(lab.vm("two").start().log())[-1].number
    lab.vm("two").wait_for_marker(before + 2)
    lab.vm("two").destroy()
    assert thin.contents(lab.vm("base")) == template_was
    assert not [name for name in os.listdir(Path(template_archive).parent) if name.startswith(".")]


def test_a_running_clone_comes_back_with_its_memory_and_snapshots(lab: Lab, run_module: thin.Run) -> None:
    base = lab.create_vm("base", agent=False, start=False)
    run_module("vm_template", vm="base")
    was = thin.contents(base)
    web = lab.adopt(run_module("vm_thin_clone", template="base", name="web")["vm"]["name"]).start()
    run_module("vm_snapshot", vm="web", snapshot="mine", memory=True)
    done = run_module("vm_backup", vm="web", path=str(lab.path("backups")))
    assert done["consistency"] == "memory"
    (top,) = web.disks().values()
    thin.lose(web)
    for left in top.parent.glob("web*"):  # the frozen layer and the memory image of its snapshot
        left.unlink()
    restored = run_module("vm_restore", source=done["archive"]["path"])
    assert len(restored["snapshots"]) == 2 and "mine" in restored["snapshots"]
    web = lab.vm("web")
    for name in restored["snapshots"]:
        run_module("vm_snapshot", vm="web", snapshot=name, state="reverted")
        assert web.is_running()
        assert web.console_line("GUEST-UP")
    web.destroy()
    run_module("vm_snapshot", vm="web", snapshot="all", state="absent")
    (path,) = web.disks().values()
    assert thin.chain(path)[-1] == str(base.disks()["vda"]) and thin.contents(base) == was
