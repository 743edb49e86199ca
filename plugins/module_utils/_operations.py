# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""All operations that keep journals about VMs. Every module that changes VMs, or tells of them, begins with `register`.

A module that knew only some of them would change a VM that another operation has left half-way.
"""

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments
from ansible_collections.kvmops.backup.plugins.module_utils._recovery import operations


def register() -> None:
    """Makes them known to `_recovery`."""
    operations.register(_all)
    operations.register_lasting(_lasting)


def _all() -> tuple[operations.Operation, ...]:
    # Asked only where a dead run has left a journal, which is rare: half of the collection hangs on it.
    from ansible_collections.kvmops.backup.plugins.module_utils._backup import recovery as backup
    from ansible_collections.kvmops.backup.plugins.module_utils._restore import recovery as restore
    from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import recovery as snapshots

    return (*snapshots.OPERATIONS, *backup.OPERATIONS, *restore.OPERATIONS)


def _lasting() -> tuple[operations.LastingOperation, ...]:
    if not _attachments.are_there():
        return ()
    from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach import settle as attached

    return (attached.LASTING,)
