# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which operations keep journals about VMs, and how each brings to its end what a dead run of it left.

A package that changes VMs registers its operations here (by way of `_operations`); this layer knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, Union

from ansible_collections.kvmops.backup.plugins.module_utils._journal import Facts_co, Journal, JournalHead
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress


@dataclass
class Unmerged:
    """What a run went on without, one sentence each; ``urgent``: what cannot go on like that, "" if all can."""

    texts: list[str] = field(default_factory=list)
    urgent: str = ""

    def add(self, names: Iterable[str], why: object) -> None:
        """These snapshots are still there. ``why``: an error."""
        self.texts.append(f"still to be merged: {', '.join(names)}. {why}")


@dataclass(frozen=True)
class VmOperation(Generic[Facts_co]):
    """An operation on one VM that is defined all the time. Its journals have the VM's key (`_journal.vm_key`).

    ``settle`` gets the VM's uuid and runs under the VM's lock; it returns what was put right, one sentence each. What cannot be
    merged and may stay for now goes to Unmerged; without one, that is an error. libvirtd may have been restarted then.
    ``tell``: one clause about a dead run.
    """

    name: str  # as the journal has it
    facts: type[Facts_co]
    settle: Callable[[Connection, str, Journal[Facts_co], Progress, Union[Unmerged, None]], list[str]]
    tell: Callable[[Facts_co, JournalHead], str]


class HostOperationFacts(Protocol):
    """What the journal of an operation on several VMs says at least."""

    @property
    def uri(self) -> str:
        """The connection that the VMs were found on."""


AnyHostFacts = TypeVar("AnyHostFacts", bound=HostOperationFacts)


@dataclass(frozen=True)
class HostOperation(Generic[AnyHostFacts]):
    """An operation on several VMs, or on one that may not be defined for a moment.

    ``concerns``: whether it is about the VM of that name or uuid. ``settle`` takes all locks itself: no VM is locked when it is
    called. Where something cannot be put right, it raises KvmopsError, and the journal stays. ``tell`` as above.
    """

    name: str  # as the journal has it
    facts: type[AnyHostFacts]
    concerns: Callable[[AnyHostFacts, str], bool]
    settle: Callable[[Connection, Journal[AnyHostFacts], Progress], list[str]]
    tell: Callable[[AnyHostFacts, JournalHead], str]


@dataclass(frozen=True)
class LastingOperation:
    """Something that outlives its run, and may end without one. It has a record of its own, and no journal that is left.

    ``settle`` gets the VM's uuid and runs under its lock, after all journals; it returns what was put right, one sentence each,
    and leaves what it cannot put right to its record. ``pending``: what it would put right, by connection and VM (name or uuid).
    ``remind``: what a person should know about that VM.
    """

    name: str
    settle: Callable[[Connection, str, Progress], list[str]]
    pending: Callable[[str, str], list[str]]
    remind: Callable[[str], list[Notice]]


Operation = Union[VmOperation[Any], HostOperation[Any]]
_sources: list[Callable[[], Iterable[Operation]]] = []
_lasting: list[Callable[[], Iterable[LastingOperation]]] = []


def register(source: Callable[[], Iterable[Operation]]) -> None:
    """Makes those known that this function returns; it is called once a dead run's journal is found."""
    if source not in _sources:
        _sources.append(source)


def known() -> dict[str, Operation]:
    """All that are registered, by name."""
    found: dict[str, Operation] = {}
    for operation in (each for source in _sources for each in source()):
        if found.setdefault(operation.name, operation) != operation:
            raise AssertionError(f"two operations are named {operation.name}")
    return found


def register_lasting(source: Callable[[], Iterable[LastingOperation]]) -> None:
    """The same of what lasts; asked before every change."""
    if source not in _lasting:
        _lasting.append(source)


def lasting() -> list[LastingOperation]:
    """All that are known, and have something to look after."""
    return [operation for source in _lasting for operation in source()]


def of_host(head: JournalHead) -> HostOperation[Any] | None:
    """The operation of this journal, None if it is not about several VMs, or not known."""
    found = known().get(head.operation)
    return found if isinstance(found, HostOperation) else None


def of_vm(head: JournalHead) -> VmOperation[Any] | None:
    """The operation of this journal, None if it is not about one VM, or not known."""
    found = known().get(head.operation)
    return found if isinstance(found, VmOperation) else None
