# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the next run of a module does before anything else, without the module."""

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.module_utils import _operations
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._recovery import recovery
from ansible_collections.kvmops.backup.tests.lab import daemons

_operations.register()


def settle(uuid: str) -> list[str]:
    """Settles what dead runs left on the VM; what was done."""
    context = Context(Progress(), lambda text: None)
    recovery.settle_vm(connection.connect(daemons.URI), uuid, context)
    return context.settled


def pending(uuid: str) -> list[Notice]:
    """What settle() would look at."""
    return recovery.pending(daemons.URI, uuid)
