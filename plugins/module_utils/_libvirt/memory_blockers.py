# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What QEMU knows to keep the memory of a running VM from being saved: devices and features without a migration."""

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import monitor
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Domain


def of(domain: Domain) -> tuple[str, ...]:
    """QEMU's own words, one for each (ivshmem, emulated NVMe, virgl, a mounted 9p, invtsc, …). Raises KvmopsError."""
    return tuple(str(reason).rstrip(".") for reason in monitor.execute(domain, "query-migrate").get("blocked-reasons", ()))


def require_none(domain: Domain, what: str) -> None:
    """Raises RefusedError where there is one."""
    found = of(domain)
    if found:
        raise RefusedError(what, f"its memory cannot be saved: {'; '.join(found)}", "Take the snapshot without memory.")
