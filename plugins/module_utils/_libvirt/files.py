# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The files in which libvirt's system daemon keeps what it knows about VMs."""

from __future__ import annotations

import os

from ansible_collections.kvmops.backup.plugins.module_utils import _files
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Domain

_DEFINITIONS = "/etc/libvirt/qemu"
_SNAPSHOTS = "/var/lib/libvirt/qemu/snapshot"


def of_snapshots(vm_name: str) -> str:
    """The directory with a file NAME.xml for each snapshot of the VM; there is none for a VM that never had one."""
    return os.path.join(_SNAPSHOTS, vm_name)


def forget_transient(domain: Domain) -> None:
    """Remove the file by which libvirt would define a transient VM when it starts next.

    Seen with libvirt 9.0: it writes the file at the end of a block job of any VM, and reads it at its start.
    """
    path = os.path.join(_DEFINITIONS, f"{domain.name()}.xml")
    if domain.connect().getURI().endswith("/system") and not domain.isPersistent() and os.path.isfile(path):
        _files.remove(path)


def sync(uri: str, *vm_names: str) -> None:
    """Make durable what libvirt has written about these VMs: it syncs the files, but not the directories with their names.

    Images must not go, and a point must not be published, while a power cut would bring an older definition back.
    Raises TargetError.
    """
    if not uri.endswith("/system"):
        return
    directories = [_DEFINITIONS, os.path.join(_DEFINITIONS, "autostart"), _SNAPSHOTS]
    for directory in directories + [of_snapshots(name) for name in vm_names]:
        if os.path.isdir(directory):
            _files.sync_directory(directory)
