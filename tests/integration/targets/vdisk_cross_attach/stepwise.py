# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""vdisk_cross_attach in a process that kills itself, or libvirtd: stepwise.py WHAT KILL_AT VM SOURCE VDISK STATE.

Every record and journal that is written or removed, every file removed, and every call that changes a VM or a ZFS pool is an
event, counted from 1; SIGKILL comes before event KILL_AT, for this process ("worker") or for "libvirtd", which is started again
at once. Without a KILL_AT (0) the number of events is printed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import libvirt

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments, _operations
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach import run
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach.request import AttachRequest, Wish
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import zfs
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.tests.lab import daemons
from ansible_collections.kvmops.backup.tests.lab.kills import Steps

EVENTS = (
    (_attachments, "save"),
    (_attachments, "drop"),
    (Journal, "record"),
    (Journal, "done"),
    (qemu_img, "commit"),
    (os, "unlink"),
    (os, "chown"),
    (zfs, "snapshot"),
    (zfs, "clone"),
    (zfs, "destroy"),
    (libvirt.virConnect, "defineXML"),
    (libvirt.virDomain, "attachDeviceFlags"),
    (libvirt.virDomain, "detachDeviceFlags"),
    (libvirt.virDomain, "snapshotCreateXML"),
    (libvirt.virDomain, "blockCommit"),
    (libvirt.virDomain, "blockJobAbort"),
    (libvirt.virDomainSnapshot, "delete"),
)


def stepwise(kill_at, vm, source, vdisk, state):
    """Runs this file; the number of events if it was not to be killed."""
    argv = [sys.executable, __file__, "worker", str(kill_at), vm, source, vdisk, state]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    ended_before = done.returncode == 0 and kill_at > int(done.stdout)
    assert ended_before or done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr
    return 0 if kill_at else int(done.stdout)


def with_libvirtd_killed(kill_at, vm, source, vdisk, state):
    """Runs this file; libvirtd runs again when it has ended, as it may."""
    argv = [sys.executable, __file__, "libvirtd", str(kill_at), vm, source, vdisk, state]
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def restart_libvirtd():
    daemons.kill()
    daemons.start()


def main(what, kill_at, vm, source, vdisk, state):
    """See the top of the file."""
    _operations.register()
    steps = Steps(EVENTS, kill_at, restart_libvirtd) if what == "libvirtd" else Steps(EVENTS, kill_at)
    request = AttachRequest(vm=vm, source_vm=source, vdisk=vdisk, wish=Wish(state), wait_timeout_s=60)
    run.ensure(request, Context(Progress(), lambda text: None))
    print(steps.count)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
