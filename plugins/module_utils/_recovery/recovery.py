# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The doors through which every operation on VMs passes: what dead runs left is settled before a change, and told to the others.

`before_change` for an operation on a VM, `pending` for one that only looks. A restore makes VMs, so it settles the host
(`settle_host`) and then, under its own locks, the VM that it replaces (`settle_vm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _locks
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import (
    Journal,
    JournalError,
    LeftBehind,
    Remains,
    vm_key,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    again,
    find_domain,
    renewed,
)
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._recovery import operations
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.operations import Unmerged


@contextmanager
def before_change(
    conn: Connection,
    uri: str,
    vm: str,
    context: Context,
    *,
    what: Callable[[str], str],
    timeout_s: float = 0,
    unmerged: Unmerged | None = None,
) -> Iterator[tuple[Connection, Domain]]:
    """The VM of this name or uuid, locked, and settled before; on a connection that lives.

    ``what`` says, with the VM's name, what others are told that wait for the lock; the progress says who is waited for here.
    ``unmerged`` gets what cannot be merged and may stay for now; without it, that is an error.

    Raises RefusedError where there is no such VM, BusyError after ``timeout_s``, CancelledError, SplitViewError with nothing
    touched when what is found has no written recovery, else KvmopsError.
    """
    settle_host(conn, uri, context, vm)  # the VM may be gone for the moment
    conn = renewed(conn)
    domain = find_domain(conn, vm)
    uuid, name = str(domain.UUIDString()), str(domain.name())
    with _locks.hold(
        _locks.of_vm(uuid),
        of=f"The VM {name}",
        what=what(name),
        timeout_s=timeout_s,
        on_wait=lambda who: context.progress.phase(f"wait for {who}"),
    ):
        context.progress.check()  # settling may merge for hours, and hears no wish to stop
        settle_vm(conn, uuid, context, unmerged)
        yield again(conn, domain)


def foresee(conn: Connection, uri: str, vm: str, context: Context) -> tuple[Domain, bool]:
    """Check mode's before_change(): the VM, and whether anything is to be settled first, of which warnings tell."""
    told = pending(uri, vm)
    for notice in told:
        context.warn(notice)
    domain = find_domain(conn, vm)
    for notice in pending(uri, str(domain.UUIDString())):  # it may have another name now
        if notice not in told:
            context.warn(notice)
            told.append(notice)
    for notice in reminders(str(domain.UUIDString())):
        context.warn(notice)
    return domain, bool(told)


def pending(uri: str, *vms: str, everywhere: bool = False) -> list[Notice]:
    """What the next change would settle on these VMs, one sentence each. Reads journals only.

    ``vms``: uuids; names will do for operations on several VMs. ``everywhere``: all of those, whichever VMs they concern.
    """
    keys = {vm_key(vm) for vm in vms}

    def is_meant(found: Remains) -> bool:
        return found.head.key in keys or _is_on_host(found, uri, None if everywhere else vms)

    texts = [_tell(found) for found in Journal.peek(is_meant)]
    texts += [text for each in operations.lasting() for vm in vms for text in each.pending(uri, vm)]
    return [Notice(Code.TO_PUT_RIGHT, f"The next run that changes the VM will put right: {text}") for text in texts]


def reminders(*vms: str) -> list[Notice]:
    """What a person should know about these VMs (names or uuids), and no run settles by itself."""
    return [notice for each in operations.lasting() for vm in vms for notice in each.remind(vm)]


def settle_host(conn: Connection, uri: str, context: Context, vm: str = "") -> None:
    """Settles what dead runs of operations on several VMs left, of all of them or of those that concern this VM.

    The caller holds no lock of a VM. Raises what cannot be put right (KvmopsError) with ``vm``, which may be half of a VM then;
    without, warns of it.
    """
    with _left_behind(lambda found: _is_on_host(found, uri, (vm,) if vm else None)) as remains:
        for found in remains:
            operation = operations.of_host(found.head)
            if operation is None:
                raise AssertionError("_is_on_host has let it through")
            conn = renewed(conn)
            try:
                with _taken_over(found, operation.facts) as journal:
                    done = operation.settle(conn, journal, context.progress)
            except KvmopsError as error:
                if vm:
                    raise
                context.warn(Notice(Code.CANNOT_PUT_RIGHT, str(error)))
            else:
                for text in done:
                    context.put_right(text)


def settle_vm(conn: Connection, uuid: str, context: Context, unmerged: Unmerged | None = None) -> None:
    """Settles what dead runs of operations on this one VM left, under its lock, which the caller holds.

    libvirtd may have been restarted then: go on with connection.again(). Raises as before_change() does.
    """
    with _left_behind(lambda found: found.head.key == vm_key(uuid)) as remains:
        for found in remains:
            operation = operations.of_vm(found.head)
            if operation is None:
                raise RefusedError(
                    f"The VM {uuid}",
                    f"this release cannot settle what an unfinished run of {found.head.operation} has left",
                    f"Run the task with the release that has left it, or remove {found.path} if nothing of it is there.",
                )
            conn = renewed(conn)
            with _taken_over(found, operation.facts) as journal:
                done = operation.settle(conn, uuid, journal, context.progress, unmerged)
            for text in done:
                context.put_right(text)
    for lasting in operations.lasting():
        conn = renewed(conn)
        for text in lasting.settle(conn, uuid, context.progress):
            context.put_right(text)
    for notice in reminders(uuid):
        context.warn(notice)


@contextmanager
def _taken_over(found: LeftBehind, facts: type[Any]) -> Iterator[Journal[Any]]:
    """The journal of a dead run, which is done when the block ends well, and is left to the next run otherwise."""
    journal = found.journal(facts)
    try:
        yield journal
        journal.done()
    finally:
        journal.close()


@contextmanager
def _left_behind(is_meant: Callable[[Remains], bool]) -> Iterator[list[LeftBehind]]:
    """Journals of dead runs; those that are not settled when the block ends are left to the next run."""
    with ExitStack() as stack:
        remains = Journal.left_behind(is_meant)
        for found in remains:
            stack.callback(found.close)
        yield remains


def _is_on_host(found: Remains, uri: str, vms: Iterable[str] | None) -> bool:
    """Whether it is an operation on several VMs, and about one of these (None: any)."""
    operation = operations.of_host(found.head)
    if operation is None:
        return False
    try:
        facts = found.facts(operation.facts)
    except JournalError:
        return True  # nobody can say which VM it has left half-way
    return facts.uri == uri and (vms is None or any(operation.concerns(facts, vm) for vm in vms))


def _tell(found: Remains) -> str:
    operation = operations.of_host(found.head) or operations.of_vm(found.head)
    try:
        if operation is not None:
            return operation.tell(found.facts(operation.facts), found.head)
    except JournalError:
        pass
    return f"a run of {found.head.operation}, whose journal {found.path} this release cannot read, ended before it had finished"
