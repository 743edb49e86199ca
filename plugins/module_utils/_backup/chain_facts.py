# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Does a VM stand on an archive's newest point: gathers what `chain` judges by, and reads again what nothing proves."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ansible_collections.kvmops.backup.plugins.module_utils import _vm_state
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import ArchiveReader, open_archive, why_full
from ansible_collections.kvmops.backup.plugins.module_utils._backup import chain, disks, template_base
from ansible_collections.kvmops.backup.plugins.module_utils._backup.model import VmFacts
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError, RefusedError, SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import (
    FileSource,
    HeadSource,
    ImageSource,
    RawAsQcow2Source,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import memory_image, snapshots, views
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection, Domain
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice, Warn
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._template import find
from ansible_collections.kvmops.backup.plugins.module_utils._vm_state import Evidence, VmState

# NFS tells times by what the server and this host's cache think of them: every so many points the bytes have the word
_NFS_EVERY_POINTS = 5


@dataclass(frozen=True)
class ChainVerdict:
    """The verdict. `reason` "": the archive can be continued; `proved`: evidence that was found or renewed on the way.

    `unread_bytes`: what would have to be read to be sure (only where the caller has limited that; `reason` is "" then).
    `same_files`: CD images and boot files of the point that are still what the archive has.
    """

    reason: str
    proved: Mapping[str, Evidence] = field(default_factory=dict)
    unread_bytes: int = 0
    same_files: frozenset[str] = frozenset()


def vm_now(conn: Connection, domain: Domain, facts: VmFacts) -> chain.VmNow:
    """The VM as the chain sees it."""
    seen = views.gather(conn, domain) if facts.running else views.NOWHERE
    found = []
    for disk in facts.view.disks:
        image = facts.images.get(disk.path)
        verdict = disks.judge(
            disk, image, running=facts.running, snapshots=False, include_iso=True, incrementable=True
        )
        if image and disks.is_stored(verdict):
            headers = _headers(facts, disk.path)
            lowest = _image_of(facts, headers[-1])
            found.append(
                chain.DiskNow(
                    disk.target,
                    headers,
                    image.virtual_size_bytes,
                    _above_template(facts, seen.disk(disk.target).qemu),
                    lowest.template_disk if lowest else 0,
                )
            )
    return chain.VmNow(facts.name, facts.uuid, facts.snapshots, tuple(found), facts.thin.requires)


def stands(
    conn: Connection,
    domain: Domain,
    facts: VmFacts,
    archive: str,
    progress: Progress,
    *,
    read_limit_bytes: int | None = None,
    threads: int = 0,
) -> ChainVerdict:
    """Whether the archive can be continued. Changes nothing; the caller keeps what was `proved`.

    `read_limit_bytes`: with more than this to read again the verdict is left open. Raises ArchiveError for a file that cannot be
    read as an archive.
    """
    if facts.shared:
        return ChainVerdict(find.why_not_beside(facts.shared))
    if facts.checkpoints:
        return ChainVerdict(f"the VM is off: {snapshots.why_not_beside(facts.checkpoints)}")
    with open_archive(archive) as reader:
        point = reader.point()
        state = _vm_state.load(facts.uuid)
        if facts.thin.base and facts.thin.requires is None:
            if facts.thin.base_trouble:
                return ChainVerdict(f"its template {facts.thin.base.name} {facts.thin.base_trouble}")
            unread = template_base.unread_bytes(facts.thin)
            if read_limit_bytes is not None and unread > read_limit_bytes:
                return ChainVerdict("", unread_bytes=unread)
            facts = replace(facts, thin=template_base.with_content(facts.thin, None, progress, threads=threads))
        reason = chain.judge(reader.points, vm_now(conn, domain, facts), state) or why_full(reader)
        if reason:
            return ChainVerdict(reason)
        found, missing = _evidence(chain.frozen_files(point))
        if missing:
            return ChainVerdict(f"{missing.former_path} is gone, which point {point.timestamp} stands on")
        suspects = chain.suspects(point, state, found, _distrusted(reader.points, facts))
        unread = sum(member.size_bytes for member in suspects)
        if read_limit_bytes is not None and unread > read_limit_bytes:
            return ChainVerdict("", unread_bytes=unread)
        proved = {
            m.former_path: Evidence(m.digest, found[m.former_path])
            for m in chain.frozen_files(point)
            if m not in suspects
        }
        for member in suspects:
            if not _is_same(reader, member, threads, progress):
                return ChainVerdict(f"{member.former_path} was written to or replaced since point {point.timestamp}")
            # written to while it was read: the tuple from before does not fit any more, and it will be read again
            proved[member.former_path] = Evidence(member.digest, found[member.former_path])
        # whether a CD image or a kernel is stored again does not matter to whoever only looks
        same = _same_files(reader, facts, state, threads, progress) if read_limit_bytes is None else {}
    return ChainVerdict("", {**proved, **same}, 0, frozenset(same))


def open_source(path: str, from_raw: bool) -> ImageSource:
    """The bytes that a file has as a member."""
    return RawAsQcow2Source(path) if from_raw else FileSource(path)


def open_memory(path: str, warn: Warn = lambda _notice: None) -> ImageSource:
    """The bytes that an external memory image has as a member: without secrets."""
    what = f"The memory image {path}"
    try:
        with open(path, "rb") as file:
            header = file.read(memory_image.HEADER_BYTES)
            raw = header + file.read(memory_image.head_bytes(header, what) - len(header))
        head = memory_image.without_secrets(memory_image.parse(raw, what), what)
    except (RefusedError, HostileError) as error:  # of a kind that nobody can look into
        warn(Notice(Code.SECRETS_STORED, f"The archive may hold the passwords of the VM's displays: {error}"))
        return FileSource(path)
    except OSError as error:
        raise SourceError(what, f"it cannot be read ({error.strerror})") from error
    return FileSource(path) if head == raw else HeadSource(path, head)


def _above_template(facts: VmFacts, files: tuple[str, ...]) -> tuple[str, ...]:
    """What QEMU has open, without the disks of the template and what is below them."""
    bases = {disk.path for disk in facts.thin.base.disks} if facts.thin.base else set()
    return tuple(itertools.takewhile(lambda path: path not in bases, files))


def _image_of(facts: VmFacts, path: str) -> disks.Image | None:
    return facts.images.get(path) or next((i for i in facts.images.values() if os.path.realpath(i.path) == path), None)


def _headers(facts: VmFacts, path: str) -> tuple[str, ...]:
    found: list[str] = []
    while path and os.path.realpath(path) not in found:
        found.append(os.path.realpath(path))
        image = facts.images.get(path) or facts.images.get(os.path.realpath(path))
        path = image.backing_path if image else ""
    return tuple(found)


def _evidence(members: Sequence[Member]) -> tuple[dict[str, tuple[int, ...]], Member | None]:
    """Evidence of the files by path, and the first member whose file is not there."""
    found = {}
    for member in members:
        try:
            found[member.former_path] = _vm_state.evidence(member.former_path)
        except OSError:
            return found, member
    return found, None


def _distrusted(points: Sequence[Configuration], facts: VmFacts) -> frozenset[str]:
    if len(points) % _NFS_EVERY_POINTS:
        return frozenset()
    return frozenset(path for path, image in facts.images.items() if image.fs_type.startswith("nfs"))


def _is_same(reader: ArchiveReader, member: Member, threads: int, progress: Progress) -> bool:
    progress.phase("compare", member.target or member.name, member.size_bytes)
    path, from_raw = member.former_path, member.original_format == "raw" and member.role is Role.DISK
    # with or without secrets, as the archive has it; one that is not it differs in its first chunk
    ways: list[Callable[[], ImageSource]] = [lambda: open_source(path, from_raw)]
    if member.role is Role.MEMORY:
        ways.insert(0, lambda: open_memory(path))
    for opens in ways:
        try:
            with contextlib.closing(opens()) as source:
                if reader.matches(member, source, threads=threads, progress=progress):
                    return True
        except SourceError:
            return False
    return False


def _same_files(
    reader: ArchiveReader, facts: VmFacts, state: VmState, threads: int, progress: Progress
) -> dict[str, Evidence]:
    """CD images and boot files of the newest point that the VM has now and that have not changed, with the evidence."""
    used = {Role.ISO: {disk.path for disk in facts.view.disks if disk.device == "cdrom"}}
    used[Role.BOOT] = {each.path for each in facts.boot_files}
    same = {}
    for member in reader.point().members:
        if member.former_path not in used.get(member.role, ()):
            continue
        with suppress(OSError):
            found = Evidence(member.digest, _vm_state.evidence(member.former_path))
            if state.frozen.get(member.former_path) == found or _is_same(reader, member, threads, progress):
                same[member.former_path] = found
    return same
