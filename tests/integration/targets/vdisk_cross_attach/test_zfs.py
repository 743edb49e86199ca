# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks on ZFS: attached from a clone, which goes with the last detach by the original (D9)."""

from __future__ import annotations

from contextlib import suppress

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments
from ansible_collections.kvmops.backup.tests.integration.targets.vdisk_cross_attach import appliance
from ansible_collections.kvmops.backup.tests.integration.targets.vdisk_cross_attach.stepwise import stepwise
from ansible_collections.kvmops.backup.tests.lab import zfs
from ansible_collections.kvmops.backup.tests.lab._run import LabError, run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, make_image

pytestmark = pytest.mark.skipif(not zfs.is_there(), reason="zfs-fuse is not installed")


def datasets():
    """All datasets and snapshots of the pool."""
    return run("zfs", "list", "-H", "-o", "name", "-t", "all").split()


def destroyed(name):
    with suppress(LabError):
        run("zfs", "destroy", name)
    return name not in datasets()


def test_zfs(module_lab, receiver, run_module, chosen):
    with zfs.ZfsPool("tank", module_lab.directory / "zfs") as pool:
        directory = pool.create("vms")
        images = [make_image(directory / f"{name}.qcow2", Disk()) for name in ("vda", "vdb")]
        source = module_lab.create_vm("nas01", [Disk(path=path) for path in images], freeze_mode="pause")
        source.wait_for_marker(2)
        before, there = source.disks(), datasets()

        def attach(vdisk, state="attached", **options):
            return run_module("vdisk_cross_attach", vm="backup01", vdisk=str(vdisk), state=state, **options)

        first, second = attach(images[0]), attach(images[1])
        frozen = source.frozen_digests()
        for target, result in zip(("vda", "vdb"), (first, second)):
            [vdisk] = result["vdisks"]
            assert vdisk["consistency"] == "agent" and vdisk["attached_as"]["path"] != vdisk["path"]
            device = appliance.device(receiver, vdisk["attached_as"]["serial"])
            assert appliance.files(receiver, device).replace(" ./", f" /disk/{target}/") == "".join(
                line for line in frozen.splitlines(keepends=True) if f"/disk/{target}/" in line
            )
        assert appliance.snapshots(source) == [] and source.disks() == before
        refused = run_module("vm_backup", vm="nas01", path=str(module_lab.path("backups")), fails=True)
        assert "attached to backup01" in refused.message
        assert not attach(images[0]).changed
        assert attach(images[0], state="detached").changed
        assert len(datasets()) == len(there) + 2
        assert attach(images[1], state="detached").changed
        assert datasets() == there and appliance.held(receiver) == ([], [])

        [vdisk] = attach(images[0])["vdisks"]
        kept = attach(vdisk["attached_as"]["path"], state="detached")
        [clone] = [name for name in datasets() if "vdisks_attached" in name and "@" not in name]
        assert kept.changed and clone in " ".join(kept.warnings)
        assert appliance.held(receiver) == ([], [])
        assert clone in attach(images[0], state="detached", fails=True).message
        assert clone in run_module("vdisk_cross_attach", state="reconciled", fails=True).message
        wait_for("the clone to go", lambda: destroyed(clone), 60)  # QEMU has just let go of it
        assert attach(images[0], state="detached").changed
        assert datasets() == there
        assert not attach(images[0], state="detached").changed

        def step(state, kill_at=0):
            return stepwise(kill_at, "backup01", "nas01", "vda", state)

        counts = {state: step(state) for state in ("attached", "detached")}
        for state, count in counts.items():
            for kill_at in chosen(count)[1:]:  # before the first is before anything
                if state == "detached":
                    step("attached")
                step(state, kill_at)
                print(f"killed before {kill_at} of {count} ({state})")
                live, config = appliance.held(receiver)
                records = [each.serial for record in _attachments.everything() for each in record.attachments]
                assert {*live, *config} <= set(records)
                step("detached")
                assert datasets() == there and appliance.held(receiver) == ([], [])
                source.wait_for_marker(source.last_marker().number + 1)  # it is not frozen
        source.remove()
