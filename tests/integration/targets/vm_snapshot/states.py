# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots of lab VMs made with libvirt alone, and what is true about them."""

from __future__ import annotations

import os

from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import blockjobs, connection, snapshots, views
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import layers, merge, removal
from ansible_collections.kvmops.backup.tests.lab import daemons, recovery, truth


def external(vm, name, memory=False, targets=None):
    """An external snapshot; overlays and memory image lie beside the disks."""
    disks = vm.disks()
    targets = targets or list(disks)
    directory = os.path.dirname(disks[targets[0]])
    files = [(target, f"{directory}/{target}.{name}") for target in targets]
    memory_path = f"{directory}/{name}.memory" if memory else ""
    others = [target for target in disks if target not in targets]
    snapshots.create(vm.domain, snapshots.document(name, "", files, others, memory_path), memory=memory, quiesce=False)


def internal(vm, name):
    """An internal snapshot, with memory if the VM runs."""
    vm.domain.snapshotCreateXML(f"<domainsnapshot><name>{name}</name></domainsnapshot>")


def look(vm):
    """layers.Layers of the VM now."""
    conn = connection.connect(daemons.URI)
    return layers.look(conn, connection.find_domain(conn, vm.name))


def frozen(vm):
    """Digest of what each external snapshot has frozen, by name and target."""
    found = look(vm)
    return {
        (state.name, disk.target): truth.content_sha256(disk.path, found.files[disk.path].format, in_use=found.running)
        for state in found.states
        for disk in state.disks
        if disk.kind is layers.SnapshotKind.EXTERNAL
    }


def remove(vm, names=removal.ALL):
    """merge.remove_snapshots() as a module would call it."""
    conn = connection.connect(daemons.URI)
    context = Context(Progress(), lambda text: None)
    return merge.remove_snapshots(conn, connection.find_domain(conn, vm.name), names, context)


def noted(calls, name, function):
    """The function, which notes its calls by that name."""

    def call(*arguments, **named):
        calls.append(name)
        return function(*arguments, **named)

    return call


def settle(vm):
    """As the next run would do it."""
    return recovery.settle(vm.domain.UUIDString())


def names(vm):
    """Names of the snapshots, parents first."""
    return [state.name for state in snapshots.tree(vm.domain)]


def assert_consistent(vm, gone=()):
    """The three views agree, no job is left, no definition and no chain names a file that is not there."""
    found = look(vm)
    conn = connection.connect(daemons.URI)
    assert all(disk.agree for disk in views.gather(conn, vm.domain).disks)
    if found.running:
        assert blockjobs.jobs(vm.domain) == ()
    for path in found.files.values():
        assert not path.backing or path.backing in found.files, path
    texts = [vm.xml(), vm.xml(inactive=True), *(state.info.xml for state in found.states)]
    for text in texts:
        for name in gone:
            assert f"{name}'" not in text and f'{name}"' not in text, (name, text)
    for state in found.states:
        for disk in state.disks:
            if disk.kind is not layers.SnapshotKind.NONE:
                assert disk.path in found.files, (state.name, disk)
    assert recovery.pending(vm.domain.UUIDString()) == []
