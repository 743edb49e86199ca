# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Random trees of a VM that is off: taken, reverted to, removed in any order; whatever stays is what it was (S33)."""

from __future__ import annotations

import os
import random
import subprocess

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import run
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.request import SnapshotRequest, SnapshotWish
from ansible_collections.kvmops.backup.tests.integration.targets.vm_snapshot import states
from ansible_collections.kvmops.backup.tests.lab import daemons, truth
from ansible_collections.kvmops.backup.tests.lab.vm import Disk


class Tree:
    """The VM, and what every snapshot must show."""

    def __init__(self, vm, chance):
        self.vm, self.chance = vm, chance
        self.should, self.count = {}, 0
        self.conn = connection.connect(daemons.URI)

    def ask(self, name, wish):
        request = SnapshotRequest(vm=self.vm.name, snapshot=name, wish=wish)
        return run.ensure(request, Context(Progress(), lambda text: None))

    def now(self):
        found = states.look(self.vm)
        return {target: truth.content_sha256(path, found.files[path].format) for target, path in found.active.items()}

    def write(self):
        for target, path in self.vm.disks().items():
            fmt = states.look(self.vm).files[os.path.realpath(path)].format
            place = f"write -q -P {self.chance.randrange(1, 255)} {self.chance.randrange(64)}k 64k"
            subprocess.run(["qemu-io", "-f", fmt, "-c", place, str(path)], check=True)
            assert target

    def take(self):
        self.write()
        self.count += 1
        name = f"s{self.count}"
        kind = self.chance.choice(["external", "external", "internal"])
        if kind == "internal":
            states.internal(self.vm, name)
        else:
            self.ask(name, SnapshotWish.PRESENT)
        self.should[name] = self.now()
        return f"{kind} {name}"

    def revert(self):
        name = self.chance.choice(sorted(self.should))
        self.ask(name, SnapshotWish.REVERTED)
        assert self.now() == self.should[name], name
        return f"reverted to {name}"

    def remove(self):
        name = self.chance.choice(sorted(self.should))
        before = self.now()
        try:
            self.ask(name, SnapshotWish.ABSENT)
        except RefusedError as refused:
            assert "would be lost" in str(refused)
            return f"not removed: {name}"
        del self.should[name]
        assert self.now() == before
        return f"removed {name}"

    def check(self):
        """Every external one by its frozen file, every internal one by its content in its file."""
        found = states.look(self.vm)
        assert {state.name for state in found.states} == set(self.should)
        assert states.frozen(self.vm) == {
            (state.name, target): digest
            for state in found.states
            if state.info.external
            for target, digest in self.should[state.name].items()
        }
        states.assert_consistent(self.vm)


@pytest.mark.parametrize("seed", range(int(os.environ.get("KVMOPS_SWEEP", "4"))))
def test_whatever_stays_is_what_it_was(lab, seed):
    vm = lab.create_vm(
        "random", [Disk(size_mib=8, ext4=False), Disk(size_mib=8, ext4=False)], writer=False, start=False
    )
    tree = Tree(vm, random.Random(seed))
    print(f"seed {seed}")
    for _dummy in range(25):
        acts = [tree.take, tree.take, tree.revert, tree.remove] if tree.should else [tree.take]
        print(tree.chance.choice(acts)(), flush=True)
        tree.check()
    for name in sorted(tree.should):
        tree.ask(name, SnapshotWish.REVERTED)
        assert tree.now() == tree.should[name], name
        tree.check()
    last = tree.now()
    tree.ask("all", SnapshotWish.ABSENT)
    assert tree.now() == last
    # the original of a copy that the VM is now is never deleted
    files = set(os.listdir(os.path.dirname(vm.disks()["vda"])))
    assert files - {"vda.qcow2", "vdb.qcow2"} <= {os.path.basename(path) for path in vm.disks().values()}
