# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Whether archives can be continued, for those who only look: computed against the VMs of this host, changes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ansible_collections.kvmops.backup.plugins.module_utils._backup import chain_facts
from ansible_collections.kvmops.backup.plugins.module_utils._backup import facts as vm_facts
from ansible_collections.kvmops.backup.plugins.module_utils._backup.decide import newest_of
from ansible_collections.kvmops.backup.plugins.module_utils._backup.model import VmFacts
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView
from ansible_collections.kvmops.backup.plugins.module_utils._errors import CancelledError, KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    connect,
    libvirt,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._template import find
from ansible_collections.kvmops.backup.plugins.module_utils._units import human_bytes

_READ_BYTES = 2**30  # who lists archives does not wait for more; about a second


class Judge:
    """Judges archives of one libvirt; each VM is looked at once. `thorough`: read again whatever nothing proves."""

    def __init__(self, uri: str, context: Context, *, thorough: bool) -> None:
        self._uri, self._context, self._limit = uri, context, None if thorough else _READ_BYTES
        self._conn: Connection = None
        self._vms: dict[str, tuple[Domain, VmFacts] | None] = {}
        self._host: find.Host | None = None

    def __call__(self, view: ArchiveView) -> tuple[bool | None, str]:
        """Whether the archive can be continued (None: not known here), and why not or why that is not known."""
        if not view.newest.incrementable:
            return False, "it was not made incrementable"
        try:
            found = self._vm(view.newest.vm_uuid)
            if found is None:
                return None, "the VM is not on this host"
            domain, facts = found
            progress = self._context.progress
            judged = chain_facts.stands(self._conn, domain, facts, view.path, progress, read_limit_bytes=self._limit)
        except CancelledError:
            raise
        except KvmopsError as error:
            return None, str(error)
        if judged.reason:
            return False, judged.reason
        if judged.unread_bytes:
            return None, f"{human_bytes(judged.unread_bytes)} of the VM's files would have to be read again (refresh)"
        return True, ""

    def continued(self, views: Sequence[ArchiveView]) -> str:
        """Of the archives of one VM in a place, the path of the one that mode auto would go on with, "" for none.

        Where nobody can tell it is the newest that was made incrementable.
        """
        try:
            found = self._vm(views[0].newest.vm_uuid)
        except CancelledError:
            raise
        except KvmopsError:
            found = None
        states = {state.name for state in found[1].snapshots} if found else set()
        path = newest_of(views, states, int(time.time()))
        view = next((each for each in views if each.path == path), None)
        newest = max(views, key=lambda each: each.newest.timestamp)
        if view is None or view is newest:
            return path  # the newest stays anyway: no need to read anything of the VM
        return "" if self(view)[0] is False else path

    def _vm(self, uuid: str) -> tuple[Domain, VmFacts] | None:
        if uuid not in self._vms:
            self._conn = self._conn or connect(self._uri)
            self._vms[uuid] = None
            try:
                domain = self._conn.lookupByUUIDString(uuid)
            except libvirt.libvirtError:
                return None
            self._host = self._host or find.Host(self._conn)
            found = vm_facts.gather(
                self._conn, domain, secrets=False, ask_agent=False, ask_locks=False, host=self._host
            )
            self._vms[uuid] = (domain, found)
        return self._vms[uuid]
