# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One snapshot of a lab VM, its oracle, and a worker process that is killed in the middle of it.

As a program: cycle.py NAME MODE KILL_AT takes and removes a snapshot and kills itself before event number KILL_AT
(every journal record and every call that changes the VM is one); prints the number of events when it gets through.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import libvirt

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, vm_key
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import (
    blockjobs,
    connection,
    domain,
    monitor,
    snapshots,
    views,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import original_disk, overlays, snapshot
from ansible_collections.kvmops.backup.tests.lab import daemons, markers, recovery, truth
from ansible_collections.kvmops.backup.tests.lab._run import wait_for, within
from ansible_collections.kvmops.backup.tests.lab.kills import Steps

NAME = "kvmops-test"
EVENTS = (
    (Journal, "record"),
    (snapshots, "create"),
    (blockjobs, "start_commit"),
    (blockjobs, "wait_ready"),
    (blockjobs, "pivot"),
    (snapshots, "forget"),
    (qemu_img, "commit"),
    (os, "unlink"),
)


def plan_for(vm, mode="agent"):
    """The snapshot that a backup of the VM would take; mode agent, memory or crash."""
    view = domain.parse(vm.xml())
    disks = [disk for disk in view.disks if disk.device == "disk"]
    directory = os.path.dirname(disks[0].path)
    return snapshot.SnapshotPlan(
        vm_uuid=view.uuid,
        vm_name=view.name,
        name=NAME,
        description="made by a test",
        overlays=tuple(
            snapshot.Overlay(disk.target, disk.path, disk.format, f"{directory}/{disk.target}.overlay")
            for disk in disks
        ),
        excluded_targets=tuple(disk.target for disk in view.disks if disk.device != "disk"),
        memory_path=f"{directory}/state.memory" if mode == "memory" else "",
        quiesce=mode == "agent",
    )


def open_journal(plan):
    facts = overlays.SnapshotFacts({}, plan.vm_uuid, plan.vm_name)
    return Journal.open(vm_key(plan.vm_uuid), snapshot.OPERATION, facts)


class Cycle:
    """take() and remove() of one snapshot, with its own connection."""

    def __init__(self, vm, mode="agent"):
        self.plan = plan_for(vm, mode)
        self.conn = connection.connect(daemons.URI)
        self.domain = connection.find_domain(self.conn, vm.name)
        self.journal = open_journal(self.plan)

    def take(self):
        return snapshot.take(self.conn, self.domain, self.plan, self.journal)

    def remove(self):
        snapshot.remove(self.conn, self.domain, self.plan, self.journal, Progress())
        self.journal.done()

    def whole(self):
        self.take()
        self.remove()

    def die(self):
        """What is left when the worker is killed: the journal without its holder."""
        self.journal.close()


def settle(vm):
    """As the next run would do it."""
    return recovery.settle(vm.domain.UUIDString())


class Before:
    """How the VM was; same() fails when it is not so again."""

    def __init__(self, vm):
        self.vm = vm
        self.definition = vm.xml(inactive=True)
        self.chains = {disk.target: (disk.path, disk.chain) for disk in domain.parse(vm.xml()).disks}
        self.directory = Path(plan_for(vm).overlays[0].base_path).parent
        self.files = sorted(os.listdir(self.directory))
        self.owners = {name: original_disk.owner_of(self.directory / name) for name in self.files}

    def same(self):
        vm = self.vm
        assert vm.xml(inactive=True) == self.definition
        assert {disk.target: (disk.path, disk.chain) for disk in domain.parse(vm.xml()).disks} == self.chains
        assert sorted(os.listdir(self.directory)) == self.files
        owners = {name: original_disk.owner_of(self.directory / name) for name in self.files}
        assert owners == self.owners, f"{owners}, before {self.owners}"
        assert vm.domain.snapshotListNames() == []
        assert recovery.pending(vm.domain.UUIDString()) == []
        seen = views.gather(connection.connect(daemons.URI), vm.domain)
        assert all(disk.agree for disk in seen.disks)
        if seen.running:
            assert blockjobs.jobs(vm.domain) == ()
            nodes = monitor.execute(vm.domain, "query-named-block-nodes", flat=True)
            assert [node["file"] for node in nodes if node["file"].endswith(".overlay")] == []


def assert_writing(vm, targets=("vda", "vdb"), at_least=2):
    """The guest writes on, and no line of its logs is missing or torn.

    After a power cycle look at vda only: the guest takes its next number from there, whether vdb had the last one or not.
    """
    number = patiently(vm, vm.last_marker).number
    wait_for(f"more markers than {number}", lambda: patiently(vm, vm.last_marker).number >= number + 2, 180)
    for target in targets:
        log = patiently(vm, lambda target=target: vm.log(target))
        assert len(markers.parse_log(log)) > at_least


def patiently(vm, question):
    """The answer of the guest, asked again while its agent is busy or being connected anew."""

    def ask():
        with suppress(libvirt.libvirtError):
            return question()
        return None

    return wait_for(f"the agent of {vm.name} to answer", ask, 180, every_s=0.5)


def assert_clean_after_shutdown(vm, scratch):
    """The disks of the VM, shut down, hold clean file systems and whole logs."""
    files = vm.disks()
    # a writer that dies at the power button may still hold its disk when that is to be unmounted
    vm.agent.shell("kill -KILL -$(cat /run/writer.pid); sync; sleep 1")
    vm.shutdown()
    for target, path in files.items():
        raw = truth.to_raw(path, path.suffix[1:], scratch / f"{target}.raw")
        truth.assert_clean_ext4(raw)
        markers.parse_log(truth.read_ext4_file(raw, "/log"))


def thawed_within(vm, limit_s):
    """Seconds until the guest says thawed; fails if it was later than the limit."""
    taken_s = vm.wait_until_thawed()
    assert within(taken_s, limit_s), f"{vm.name} was thawed after {taken_s:.1f} s"
    return taken_s


def killed_libvirtd(cycle, work, function, delay_s):
    """Run work() and kill libvirtd delay_s after it has called function (module, name). Returns work()'s error."""
    module, name = function
    original = getattr(module, name)
    called = threading.Event()
    errors = []

    def hook(*arguments, **named):
        called.set()
        return original(*arguments, **named)

    def run():
        try:
            work()
        except (KvmopsError, libvirt.libvirtError) as error:  # what run_module() makes a failed task of
            errors.append(error)

    setattr(module, name, hook)
    try:
        worker = threading.Thread(target=run)
        worker.start()
        assert called.wait(120)
        time.sleep(delay_s)
        daemons.kill()
        worker.join(300)
        assert not worker.is_alive()
    finally:
        setattr(module, name, original)
    cycle.die()
    return errors[0] if errors else None


def main(name, mode, kill_at):
    """See the top of the file."""

    class Named:
        """As much of a LabVm as plan_for() and Cycle need."""

        def __init__(self):
            self.name = name

        def xml(self):
            return connection.find_domain(connection.connect(daemons.URI), name).XMLDesc()

    steps = Steps(EVENTS, kill_at)
    Cycle(Named(), mode).whole()
    print(steps.count)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
