# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Takes back a restore that did not come to its end, or clears up behind one that did.

The one question is whether the VM carries the mark of the restore: the definition with it is its commit. Before it, the old
files have kept their content under another name; after it, they are what is left to remove. Every step can be repeated.
A VM whose snapshots are still being defined carries a mark that is not the final one (`pending_token`). Of a replaced VM
the journal then holds the only whole copy, until `_complete` has given it back everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Optional

from ansible_collections.kvmops.backup.plugins.module_utils import (
    _capabilities,
    _filenames,
    _files,
    _locks,
    _mounts,
    _xml,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.config import NAMESPACE
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, SplitViewError
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, JournalHead
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import files, snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    by_uuid,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.operations import HostOperation

MARK = f"{{{NAMESPACE}}}restored"  # the element in a definition's metadata; its attribute `token` names the operation
OPERATION = "restore"
KEEP_FILES = 0  # flags to undefine a VM and nothing else

if libvirt is not None:
    KEEP_FILES = (
        libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
        # since libvirt 8.9; older ones have no way to keep it
        | getattr(libvirt, "VIR_DOMAIN_UNDEFINE_KEEP_TPM", 0)
    )


@dataclass(frozen=True)
class FileStep:
    """A file on its way: written as `partial`, renamed to `path`; what was there before waits as `aside` ("": nothing was).

    `path` "": the file is only needed while the restore runs. `scratch`: a qcow2 that is still to be converted to `partial`
    ("": none is).
    """

    partial: str
    path: str
    aside: str = ""
    scratch: str = ""


@dataclass(frozen=True)
class StateRecord:
    """A snapshot as libvirt takes it, of the replaced VM or of the new one."""

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
    states: tuple[StateRecord, ...] = ()
    checkpoints: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RestoreFacts:
    """What the journal of a restore says.

    `directories`: inode of each directory that gets files, so that a missing mount is not taken for missing files; `mounts`: what
    each is on. `states`: snapshots of the new VM, parents first. `stamps`: size and time of change of the new files, once they are
    complete.
    `autostart`: the new VM starts with the host, where the replaced one's does not decide it. `defining`: what libvirt knows of the
    replaced VM is being replaced, and may lack anything since.
    """

    uri: str
    uuid: str
    name: str
    token: str
    source: str
    files: tuple[FileStep, ...]
    directories: Mapping[str, int]
    old: Optional[OldVm] = None
    pools: tuple[str, ...] = ()
    states: tuple[StateRecord, ...] = ()
    autostart: bool = False
    defining: bool = False
    mounts: Mapping[str, str] = field(default_factory=dict)
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def pending_token(self) -> str:
        """The mark's token while the snapshots of the new VM are still being defined."""
        return f"{self.token}-pending"

    def concerns(self, vm: str) -> bool:
        """Whether it is about the VM of that name or uuid, as the old one or as the new one."""
        return vm in {self.name, self.uuid, *((self.old.name, self.old.uuid) if self.old is not None else ())}

    def has_new(self, step: FileStep) -> bool:
        """Whether the file that the restore has made is at the step's `path`, as nobody has written to it since.

        Told by size and time of change: sshfs gives a hard link another inode, and other file systems give a new file the inode of
        one that was removed.
        """
        try:
            found = os.stat(step.path)
        except FileNotFoundError:
            return False
        if step.aside and not os.path.lexists(step.aside):
            return False  # what was there before is there still
        return self.stamps.get(step.path) == (found.st_size, found.st_mtime_ns)


def locks(name: str, *uuids: str) -> contextlib.ExitStack:
    """The locks of a restore, taken: one writer per VM, and one restore to a name. Raises BusyError."""
    stack = contextlib.ExitStack()
    try:
        by_name = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        wanted = {f"restore-{by_name}": name, **{_locks.of_vm(uuid): uuid for uuid in sorted(uuids) if uuid}}
        for lock, vm in wanted.items():
            stack.enter_context(_locks.hold(lock, of=f"The VM {vm}", what=f"restore of VM {name}"))
    except BaseException:
        stack.close()
        raise
    return stack


def settle(conn: Connection, journal: Journal[RestoreFacts], _progress: Progress) -> list[str]:
    """Puts right what a dead restore left, see HostOperation."""
    facts = journal.facts
    try:
        with locks(facts.name, facts.uuid, facts.old.uuid if facts.old else ""):
            return [conclude(conn, facts)]
    except KvmopsError as error:
        raise KvmopsError(
            f"The restore of {facts.name} from {facts.source} could not be taken back: {error} "
            f"If what it wrote to is gone for good, remove {journal.path}."
        ) from error


def tell(facts: RestoreFacts, _head: JournalHead) -> str:
    """What a dead restore left that settle() would look at, as one clause."""
    return f"a restore of {facts.name} from {facts.source} was interrupted"


def conclude(conn: Connection, facts: RestoreFacts) -> str:
    """Forwards if the VM carries the restore's mark, else back. Raises KvmopsError if neither can be done."""
    for directory, number in facts.directories.items():
        if not _mounts.is_still(directory, number, facts.mounts.get(directory, "")):
            raise KvmopsError(
                f"The interrupted restore of {facts.name}",
                f"the directory {directory} is not the one it wrote to{_kept(facts)}",
                "Mount what belongs there and restore again.",
            )
    try:
        domain = by_uuid(conn, facts.uuid)
        refused = _finish_writes(domain)
        if domain is not None and _token(domain) == facts.token:
            finish(conn, domain, facts)
            done = f"The restore of {facts.name} from {facts.source} was complete; its remains are removed."
            return " ".join([done, *refused])
        roll_back(conn, facts)
        refused = _finish_writes(by_uuid(conn, facts.old.uuid)) if facts.old is not None else []
    except libvirt.libvirtError as error:
        raise translate(error, f"The interrupted restore of {facts.name}") from error
    except OSError as error:
        raise KvmopsError(
            f"The interrupted restore of {facts.name}", f"{error.filename}: {error.strerror}{_kept(facts)}"
        ) from error
    return " ".join([f"An interrupted restore of {facts.name} from {facts.source} was taken back.", *refused])


def roll_back(conn: Connection, facts: RestoreFacts) -> None:
    """The host as it was before the restore."""
    new = [step for step in facts.files if step.path and facts.has_new(step)]
    for step in new:
        if os.path.isfile(step.path) and qemu_img.is_in_use(step.path, "raw"):
            raise SplitViewError(
                f"The interrupted restore of {facts.name}",
                f"a process uses the new file {step.path}, while the VM is still the old one",
                "Shut down the VM that uses it and restore again.",
            )
    _take_back_definition(conn, facts)
    files.sync(facts.uri, facts.name)
    for step in new:
        _remove(step.path)
    for step in facts.files:
        _remove(step.partial, step.scratch)
        if step.aside and _filenames.is_there(step.aside, follow=False):
            _put_back(facts, step)
    _sync_directories(facts)
    if facts.old is not None and facts.defining:
        _complete(conn, facts.old)
        files.sync(facts.uri, facts.old.name)
    refresh(conn, facts.pools)


def _put_back(facts: RestoreFacts, step: FileStep) -> None:
    """The former file gets its name again; a rename by hard link that was interrupted has left it both."""
    try:
        _files.rename_new(step.aside, step.path)
    except FileExistsError as error:
        if _stamp(step.aside) == _stamp(step.path):
            os.unlink(step.aside)
            return
        raise SplitViewError(
            f"The interrupted restore of {facts.name}",
            f"at {step.path} is a file that is not the restore's{_kept(facts)}",
            f"Move that file elsewhere and run the task again, which puts {step.aside} back.",
        ) from error


def _stamp(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _kept(facts: RestoreFacts) -> str:
    """Where the former files are that have no name of their own now: the end of a clause."""
    kept = [f"{step.path} is kept as {step.aside}" for step in facts.files if os.path.lexists(step.aside)]
    return f"; what was {' and what was '.join(kept)}" if kept else ""


def _take_back_definition(conn: Connection, facts: RestoreFacts) -> None:
    """A VM that was defined, but does not have all its snapshots yet, is not the new one."""
    domain, old = by_uuid(conn, facts.uuid), facts.old
    if domain is None or _token(domain) != facts.pending_token:
        return
    if domain.isActive():
        raise SplitViewError(
            f"The interrupted restore of {facts.name}",
            "the VM was started before its snapshots were complete",
            "Shut it down and restore again.",
        )
    forget(domain, facts.states)
    # libvirt does not rename by defining: a VM that had another name was undefined, and is defined again as a whole
    if old is not None and (old.uuid, old.name) == (facts.uuid, facts.name):
        forget(domain, old.states)
        conn.defineXML(old.xml)
    else:
        domain.undefineFlags(KEEP_FILES)


def forget(domain: Domain, states: Sequence[StateRecord]) -> None:
    """Removes the bookkeeping of snapshots, children first; those that are not there are fine."""
    for state in reversed(states):
        snapshots.forget(domain, state.name)


def define_states(domain: Domain, states: Sequence[StateRecord]) -> None:
    """Gives a VM its snapshots, parents first, without touching any file."""
    for state in states:
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        if state.current:
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
        domain.snapshotCreateXML(state.xml, flags)


def finish(conn: Connection, domain: Domain, facts: RestoreFacts) -> None:
    """Removes what the replaced VM leaves; the new one stands."""
    old = facts.old
    if facts.autostart or (old is not None and old.autostart):
        domain.setAutostart(1)  # also where the old VM's uuid was kept: with another name it was undefined
    files.sync(facts.uri, facts.name)
    for step in facts.files:
        _remove(step.partial, step.scratch, step.aside)
    _sync_directories(facts)
    refresh(conn, facts.pools)


def _complete(conn: Connection, old: OldVm) -> None:
    """Gives the replaced VM what it lacks, whenever it was lost; what it has gained since stays. Can be repeated."""
    domain = by_uuid(conn, old.uuid)
    if domain is None:
        domain = conn.defineXML(old.xml)
    lacking = _lacking(domain, old.states)
    if lacking:
        # libvirt takes no snapshot of a VM that is off and has checkpoints
        if not domain.isActive():
            forget_checkpoints(domain, old)
        define_states(domain, lacking)
    here = {each.getName() for each in domain.listAllCheckpoints()}
    for name, xml in old.checkpoints:
        if name not in here:
            domain.checkpointCreateXML(xml, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)
    if old.autostart and not domain.autostart():
        domain.setAutostart(1)


def _lacking(domain: Domain, states: Sequence[StateRecord]) -> list[StateRecord]:
    """What is to be defined, parents first: the missing ones, and as they are those that libvirt takes for roots without them.

    The one that the VM stood on is the current one again if it is missing, or if none is: a libvirtd that finds one without its
    parent forgets which. Not if the VM stands on one that is not of these.
    """
    here = {state.name: state for state in snapshots.tree(domain)}
    roots = {each.getName() for each in domain.listAllSnapshots(libvirt.VIR_DOMAIN_SNAPSHOT_LIST_ROOTS)}
    names = {state.name for state in states}
    current = {state.name for state in here.values() if state.current}
    lacking = []
    for state in states:
        found = here.get(state.name)
        if found is None:
            lacking.append(replace(state, current=state.current and current <= names))
        elif (found.parent and found.name in roots) or (state.current and not current):
            lacking.append(StateRecord(found.name, found.xml, found.current or (state.current and not current)))
    return lacking


def forget_checkpoints(domain: Domain, old: OldVm) -> None:
    """Removes libvirt's bookkeeping of the replaced VM's checkpoints, children first; those that are not there are fine."""
    for name, _dummy in reversed(old.checkpoints):
        _forget_checkpoint(domain, name)


def _forget_checkpoint(domain: Domain, name: str) -> None:
    try:
        domain.checkpointLookupByName(name).delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
            raise


def _finish_writes(domain: Domain | None) -> list[str]:
    return snapshots.finish_writes(domain) if domain is not None else []


def _token(domain: Domain) -> str:
    root = _xml.parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), f"the definition of {domain.name()}")
    found = root.find(f"metadata/{MARK}")
    return "" if found is None else found.get("token") or ""


def _remove(*paths: str) -> None:
    """Files, and the directories of TPM states."""
    for path in filter(None, paths):
        with contextlib.suppress(FileNotFoundError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


def _sync_directories(facts: RestoreFacts) -> None:
    for directory in facts.directories:
        _capabilities.sweep(directory)
        _files.sync_directory(directory)


def refresh(conn: Connection, pools: tuple[str, ...]) -> None:
    """Lets libvirt see the files of its pools as they are now; a pool that is busy sees them at its next refresh."""
    for name in pools:
        with contextlib.suppress(libvirt.libvirtError):
            conn.storagePoolLookupByName(name).refresh(0)


OPERATIONS = (HostOperation(OPERATION, RestoreFacts, RestoreFacts.concerns, settle, tell),)
