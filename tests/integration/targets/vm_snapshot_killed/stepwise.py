# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""vm_snapshot in a process that kills itself: stepwise.py KILL_AT VM SNAPSHOT STATE.

Every journal record, every file made, merged or removed, and every call that changes the VM is an event, counted from 1;
SIGKILL comes before event KILL_AT. Without one (0) the number of events is printed.
"""

from __future__ import annotations

import os
import sys

import libvirt

from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import copying, run
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.request import SnapshotRequest, SnapshotWish
from ansible_collections.kvmops.backup.tests.lab.kills import Steps

EVENTS = (
    (Journal, "record"),
    (Journal, "done"),
    (qemu_img, "commit"),
    (qemu_img, "rebase_unsafe"),
    (qemu_img, "delete_internal"),
    (qemu_img, "create_overlay"),
    (copying, "copy"),
    (os, "unlink"),
    (libvirt.virConnect, "defineXML"),
    (libvirt.virConnect, "restoreFlags"),
    (libvirt.virDomain, "destroy"),
    (libvirt.virDomain, "snapshotCreateXML"),
    (libvirt.virDomain, "revertToSnapshot"),
    (libvirt.virDomain, "blockCommit"),
    (libvirt.virDomain, "blockJobAbort"),
    (libvirt.virDomainSnapshot, "delete"),
)


def main(kill_at, vm, snapshot, state):
    """See the top of the file."""
    steps = Steps(EVENTS, kill_at)
    request = SnapshotRequest(vm=vm, snapshot=snapshot, wish=SnapshotWish(state))
    run.ensure(request, Context(Progress(), lambda text: None))
    print(steps.count)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
