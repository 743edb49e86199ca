# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What dead runs left for the next run that changes a VM, for those who only look. Reads journals only."""

from __future__ import annotations

from collections.abc import Iterable

from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import recover, restores


def of_vm(uri: str, name: str, uuid: str) -> list[str]:
    """One sentence for each run about this VM that ended before it had finished."""
    return [*restores.pending(uri, name), *recover.pending(uuid)]


def of_host(uri: str, uuids: Iterable[str]) -> list[str]:
    """The same for these VMs, and for all interrupted restores, whose VM may not be there."""
    runs = [text for uuid in uuids for text in recover.pending(uuid)]
    return [*restores.pending(uri), *(f"The next run that changes the VM will put right: {text}" for text in runs)]
