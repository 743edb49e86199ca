# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Whether a VM with a QEMU also runs, and what keeps it from being frozen by a snapshot."""

from __future__ import annotations

from enum import Enum

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Domain, libvirt, translate


class Standing(str, Enum):
    """Why the guest of a VM stands still although there is a QEMU; RUNS also where there is none."""

    RUNS = "it runs"
    PAUSED = "it is paused"
    IO_ERROR = "it is paused because of an I/O error on one of its disks"
    CRASHED = "its guest has crashed"
    SUSPENDED = "its guest is suspended to RAM"
    ENDING = "its guest has shut down, and its QEMU is about to end"


def of(domain: Domain) -> Standing:
    """Of a VM as libvirt sees it now. Raises KvmopsError."""
    try:
        state, reason = domain.state()
    except libvirt.libvirtError as error:
        raise translate(error, f"VM {domain.name()}") from error
    reasons = {
        libvirt.VIR_DOMAIN_PAUSED_IOERROR: Standing.IO_ERROR,
        libvirt.VIR_DOMAIN_PAUSED_CRASHED: Standing.CRASHED,
        libvirt.VIR_DOMAIN_PAUSED_SHUTTING_DOWN: Standing.ENDING,
    }
    states = {
        libvirt.VIR_DOMAIN_PAUSED: reasons.get(reason, Standing.PAUSED),
        libvirt.VIR_DOMAIN_CRASHED: Standing.CRASHED,
        libvirt.VIR_DOMAIN_PMSUSPENDED: Standing.SUSPENDED,
        libvirt.VIR_DOMAIN_SHUTDOWN: Standing.ENDING,
    }
    return states.get(state, Standing.RUNS)


def require_freezable(standing: Standing, vm_name: str, what: str) -> None:
    """Raises RefusedError where libvirt takes no snapshot, or one of a VM that is gone the next moment. Pure."""
    if standing is Standing.SUSPENDED:
        hint = f"Wake it (virsh dompmwakeup {vm_name}) or shut it down first."
        raise RefusedError(what, f"{standing.value}, and libvirt takes no snapshot of such a VM", hint)
    if standing is Standing.ENDING:
        hint = f"Run the task again when it is off; should it stay like this, end it: virsh destroy {vm_name}"
        raise RefusedError(what, standing.value, hint)
