# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The way back to the VM's own disks after a run was killed, libvirtd died, or the VM was powered off in between."""

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection


def settle(conn: Connection, uuid: str) -> list[str]:
    """Finish or undo what dead runs left on the VM; returns what was put right, one sentence each.

    Raises SplitViewError, with nothing touched, when what is found has no written recovery; BusyError when somebody else's
    job is at work on a disk.
    """
    raise NotImplementedError


def pending(uuid: str) -> list[str]:
    """What settle() would look at, one sentence each. Reads journals only."""
    raise NotImplementedError
