# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Takes back a restore that did not come to its end, or clears up behind one that did.

The one question is whether the VM carries the mark of the restore: the definition is its commit. Before it, the old files
have kept their content under another name; after it, they are what is left to remove. Every step can be repeated.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _locks, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, SplitViewError
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore import mark

OPERATION = "restore"
_DEFINITIONS = "/etc/libvirt/qemu"


@dataclass(frozen=True)
class FileStep:
    """A file on its way: written as `partial`, renamed to `path`; what was there before waits as `aside` ("": nothing was).

    `scratch`: a qcow2 that is still to be converted to `partial` ("": none is).
    """

    partial: str
    path: str
    aside: str = ""
    scratch: str = ""


@dataclass(frozen=True)
class OldState:
    """A saved state of the replaced VM."""

    name: str
    xml: str
    current: bool


@dataclass(frozen=True)
class OldVm:
    """The replaced VM, complete enough to be defined again. `checkpoints`: name → XML."""

    uuid: str
    name: str
    xml: str
    autostart: bool
    states: tuple[OldState, ...] = ()
    checkpoints: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Operation:
    """What the journal of a restore says.

    `directories`: inode of each directory that gets files, so that a missing mount is not taken for missing files.
    `inodes`: those of the new files, known once they are complete.
    """

    uri: str
    uuid: str
    name: str
    token: str
    source: str
    files: tuple[FileStep, ...]
    directories: Mapping[str, int]
    old: OldVm | None = None
    pools: tuple[str, ...] = ()
    inodes: Mapping[str, int] | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Operation:
        """The inverse of `facts`."""
        old = facts.get("old")
        return cls(
            uri=facts["uri"],
            uuid=facts["uuid"],
            name=facts["name"],
            token=facts["token"],
            source=facts["source"],
            files=tuple(FileStep(**step) for step in facts["files"]),
            directories=facts["directories"],
            old=None
            if old is None
            else OldVm(
                uuid=old["uuid"],
                name=old["name"],
                xml=old["xml"],
                autostart=old["autostart"],
                states=tuple(OldState(**state) for state in old["states"]),
                checkpoints=tuple((name, xml) for name, xml in old["checkpoints"]),
            ),
            pools=tuple(facts["pools"]),
            inodes=facts.get("inodes"),
        )


def locks(name: str, *uuids: str) -> contextlib.ExitStack:
    """The locks of a restore, taken: one writer per VM, and one restore to a name. Raises BusyError."""
    stack = contextlib.ExitStack()
    try:
        by_name = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        for lock in (f"restore-{by_name}", *sorted({f"vm-{uuid}" for uuid in uuids if uuid})):
            stack.enter_context(_locks.hold(lock, what=f"restore of VM {name}"))
    except BaseException:
        stack.close()
        raise
    return stack


def settle(conn: Connection, uri: str) -> list[str]:
    """Puts right what dead restores left; says what was done. What cannot be put right now stays journalled and is said too."""
    done = []
    for journal in Journal.left_behind(lambda facts: facts.get("operation") == OPERATION and facts.get("uri") == uri):
        operation = Operation.from_facts(journal.facts)
        try:
            with locks(operation.name, operation.uuid, operation.old.uuid if operation.old else ""):
                done.append(conclude(conn, operation))
        except KvmopsError as error:
            journal.close()
            done.append(
                f"The restore of {operation.name} from {operation.source} could not be taken back: {error} "
                f"If what it wrote to is gone for good, remove {journal.path}."
            )
        else:
            journal.done()
    return done


def pending(uri: str) -> list[str]:
    """What `settle` would find; changes nothing."""
    left = Journal.peek(lambda facts: facts.get("operation") == OPERATION and facts.get("uri") == uri)
    return [
        f"A restore of {facts['name']} from {facts['source']} was interrupted; the next restore clears up."
        for facts in left
    ]


def conclude(conn: Connection, operation: Operation) -> str:
    """Forwards if the VM carries the restore's mark, else back. Raises KvmopsError if neither can be done."""
    for directory, inode in operation.directories.items():
        if _inode(directory) != inode:
            raise KvmopsError(
                f"The interrupted restore of {operation.name}",
                f"the directory {directory} is not the one it wrote to",
                "Mount what belongs there and restore again.",
            )
    try:
        domain = _lookup(conn, operation.uuid)
        if domain is not None and _token(domain) == operation.token:
            finish(conn, domain, operation)
            return f"The restore of {operation.name} from {operation.source} was complete; its remains are removed."
        roll_back(conn, operation)
    except libvirt.libvirtError as error:
        raise translate(error, f"The interrupted restore of {operation.name}") from error
    except OSError as error:
        raise KvmopsError(
            f"The interrupted restore of {operation.name}", f"{error.filename}: {error.strerror}"
        ) from error
    return f"An interrupted restore of {operation.name} from {operation.source} was taken back."


def roll_back(conn: Connection, operation: Operation) -> None:
    """The host as it was before the restore."""
    inodes = operation.inodes or {}
    new = [step for step in operation.files if step.path in inodes and _inode(step.path) == inodes[step.path]]
    for step in new:
        if qemu_img.is_in_use(step.path, "raw"):
            raise SplitViewError(
                f"The interrupted restore of {operation.name}",
                f"a process uses the new file {step.path}, while the VM is still the old one",
                "Shut down the VM that uses it and restore again.",
            )
    for step in new:
        os.unlink(step.path)
    for step in operation.files:
        _remove(step.partial, step.scratch)
        if step.aside and os.path.lexists(step.aside):
            _files.rename_new(step.aside, step.path)
    _sync_directories(operation)
    old = operation.old
    if old is not None and _lookup(conn, old.uuid) is None:
        _define_again(conn, old)
    refresh(conn, operation.pools)


def finish(conn: Connection, domain: Domain, operation: Operation) -> None:
    """Removes what the replaced VM leaves; the new one stands."""
    sync_definitions(operation.uri)
    for step in operation.files:
        _remove(step.partial, step.scratch, step.aside)
    _sync_directories(operation)
    old = operation.old
    if old is not None and old.uuid == operation.uuid:
        for name, _dummy in old.checkpoints:
            _forget_checkpoint(domain, name)
        for state in reversed(old.states):  # children first
            snapshots.forget(domain, state.name)
    elif old is not None and old.autostart:
        domain.setAutostart(1)
    refresh(conn, operation.pools)


def _define_again(conn: Connection, old: OldVm) -> None:
    domain = conn.defineXML(old.xml)
    for state in old.states:
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        if state.current:
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
        domain.snapshotCreateXML(state.xml, flags)
    for _dummy, xml in old.checkpoints:
        domain.checkpointCreateXML(xml, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)
    if old.autostart:
        domain.setAutostart(1)


def _forget_checkpoint(domain: Domain, name: str) -> None:
    try:
        domain.checkpointLookupByName(name).delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
            raise


def _lookup(conn: Connection, uuid: str) -> Domain | None:
    try:
        return conn.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def _token(domain: Domain) -> str:
    root = _xml.parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), f"the definition of {domain.name()}")
    found = mark.read(root)
    return "" if found is None else found.token


def _remove(*paths: str) -> None:
    for path in filter(None, paths):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0


def _sync_directories(operation: Operation) -> None:
    for directory in operation.directories:
        _files.sync_directory(directory)


def sync_definitions(uri: str) -> None:
    """libvirt syncs a definition but not its name; the old files must not go before the name is durable."""
    if uri.endswith("/system") and os.path.isdir(_DEFINITIONS):
        _files.sync_directory(_DEFINITIONS)


def refresh(conn: Connection, pools: tuple[str, ...]) -> None:
    """Lets libvirt see the files of its pools as they are now; a pool that is busy sees them at its next refresh."""
    for name in pools:
        with contextlib.suppress(libvirt.libvirtError):
            conn.storagePoolLookupByName(name).refresh(0)
