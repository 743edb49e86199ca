# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Runs a restore: settle what dead runs left, plan, write and check every byte, swap, define; all of it or nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive import config, reader
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import ArchiveReader
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    BusyError,
    KvmopsError,
    RefusedError,
    SplitViewError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image import probe, qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._image.sink import (
    FileSink,
    ImageSink,
    RawSink,
    can_stream_as_raw,
    read_mapping,
)
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    connect,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.views import require_really_off
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._restore import disks, facts, mark
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import (
    DiskState,
    ExistingVm,
    Mark,
    PlannedFile,
    RestorePlan,
    RestoreResult,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.plan import plan as make_plan
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import RestoreRequest
from ansible_collections.kvmops.backup.plugins.module_utils._saved_states import recover as vm_recover
from ansible_collections.kvmops.backup.plugins.module_utils._saved_states import restores


def restore(request: RestoreRequest, context: Context) -> dict[str, Any]:
    """One run of ``vm_restore``; the module's return values. Raises KvmopsError; nothing has changed then."""
    conn = connect(request.uri)
    with _source(request) as (archive, configuration):
        if request.check_mode:
            for text in restores.pending(request.uri):
                context.warn(text)
            plan = _plan(conn, archive, configuration, request)
            result = _predicted(plan)
        else:
            for text in restores.settle(conn, request.uri):
                context.warn(text)
            draft = _plan(conn, archive, configuration, request)
            replaced = draft.replaced.uuid if draft.replaced is not None else ""
            with restores.locks(draft.name, draft.uuid, replaced):
                if replaced:
                    for text in vm_recover.settle(conn, replaced):
                        context.warn(f"left by an earlier run and put right: {text}")
                plan = _plan(conn, archive, configuration, request)
                if plan.replaced is not None and plan.replaced.uuid != replaced:
                    raise BusyError(
                        f"The VM {plan.name}", "it has just been defined by somebody else", "Run the task again."
                    )
                result = run(conn, archive, plan, context.progress, request.uri, source=request.source)
    for text in (*plan.warnings, *(f"{item.device} is left out: {item.reason}" for item in plan.skipped)):
        context.warn(text)
    return _values(result, plan, request)


@contextlib.contextmanager
def _source(request: RestoreRequest) -> Iterator[tuple[ArchiveReader | None, Configuration]]:
    """The archive (None for a bare configuration file) and the point that is asked for."""
    if request.source.endswith(".xml"):
        yield None, _bare(request.source)
        return
    with reader.open_archive(request.source) as archive:
        yield archive, archive.point(request.point)


def _bare(path: str) -> Configuration:
    try:
        with open(path, "rb") as file:
            data = file.read(_xml.MAX_XML_BYTES + 1)
            mtime = int(os.fstat(file.fileno()).st_mtime)
    except OSError as error:
        raise ArchiveError(f"The configuration {path}", f"it cannot be read ({error.strerror})") from error
    configuration = config.decode(data, os.path.basename(path), mtime)
    if configuration is None:
        raise ArchiveError(f"The configuration {path}", "it is no libvirt domain XML")
    # without its archive it is a definition like any other
    return replace(configuration, format_version=0, members=(), saved_states=(), warnings=(), digest="")


def _plan(
    conn: Connection, archive: ArchiveReader | None, configuration: Configuration, request: RestoreRequest
) -> RestorePlan:
    host = facts.gather(conn, configuration, request, request.source)
    return make_plan(configuration, host, request, bare=archive is None)


def run(
    conn: Connection,
    archive: ArchiveReader | None,
    plan: RestorePlan,
    progress: Progress,
    uri: str = "qemu:///system",
    *,
    source: str = "",
) -> RestoreResult:
    """Carries a plan out. ``archive`` may be None for a plan without files. Raises KvmopsError; the host is then as before."""
    begin = time.monotonic()
    written = 0 if plan.unchanged else _Transaction(conn, archive, plan, progress, uri, source).run()
    if plan.start:
        try:
            conn.lookupByUUIDString(plan.uuid).create()
        except libvirt.libvirtError as error:
            raise KvmopsError(f"The VM {plan.name}", f"it is restored, but does not start: {error}") from error
    return replace(_predicted(plan), bytes_written=written, duration_s=time.monotonic() - begin)


def _predicted(plan: RestorePlan) -> RestoreResult:
    return RestoreResult(
        changed=not plan.unchanged or plan.start,
        name=plan.name,
        uuid=plan.uuid,
        point=plan.point,
        disks=plan.disks,
        skipped=plan.skipped,
        warnings=plan.warnings,
    )


def _values(result: RestoreResult, plan: RestorePlan, request: RestoreRequest) -> dict[str, Any]:
    values: dict[str, Any] = {
        "changed": result.changed,
        "vm": {"name": result.name, "uuid": result.uuid},
        "point": result.point,
        "disks": [asdict(disk) for disk in result.disks],
        "snapshots": list(result.snapshots),
        "skipped": [asdict(item) for item in result.skipped],
        "bytes_written": result.bytes_written,
        "estimated_bytes": plan.estimated_bytes,
        "duration": round(result.duration_s, 3),
    }
    if request.diff:
        before = plan.replaced.xml if plan.replaced is not None else plan.domain_xml if plan.unchanged else ""
        values["diff"] = {
            "before_header": f"{plan.name} before",
            "before": _without_secrets(before),
            "after_header": f"{plan.name} after",
            "after": _without_secrets(plan.domain_xml),
        }
    return values


def _without_secrets(domain_xml: str) -> str:
    """For the log of a play."""
    if "passwd" not in domain_xml:
        return domain_xml
    root = _xml.parse(domain_xml, "domain XML")
    for graphics in root.iterfind("devices/graphics"):
        graphics.attrib.pop("passwd", "")
    return _xml.text(root)


class _CountedSink:
    """A sink that counts what was really written; bytes that were cloned are not."""

    def __init__(self, sink: ImageSink) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self.written_bytes = 0

    def write(self, offset: int, data: memoryview) -> None:
        self._sink.write(offset, data)
        with self._lock:
            self.written_bytes += len(data)

    def clone(self, source_fd: int, source_offset: int, length: int) -> int:
        return self._sink.clone(source_fd, source_offset, length)

    def finish(self) -> None:
        self._sink.finish()

    def close(self) -> None:
        self._sink.close()


class _Transaction:
    """One restore, from the first partial file to the definition that commits it."""

    def __init__(
        self,
        conn: Connection,
        archive: ArchiveReader | None,
        plan: RestorePlan,
        progress: Progress,
        uri: str,
        source: str,
    ) -> None:
        self._conn, self._archive, self._plan, self._progress = conn, archive, plan, progress
        token = secrets.token_hex(8)
        self._operation = restores.Operation(
            uri=uri,
            uuid=plan.uuid,
            name=plan.name,
            token=token,
            source=source,
            files=tuple(_step(file, plan, token) for file in plan.files),
            old=None if plan.replaced is None else self._old(plan.replaced),
            pools=plan.refresh_pools,
            directories={
                path: os.stat(path).st_ino for path in sorted({os.path.dirname(file.path) for file in plan.files})
            },
        )

    def run(self) -> int:
        """The number of bytes written."""
        for path in self._plan.set_aside:
            if qemu_img.is_in_use(path, "raw"):
                raise RefusedError(
                    f"The file {path}", "a process has it open and writes to it", f"Find it with: fuser -v {path}"
                )
        journal = Journal.open(f"restore-{self._plan.uuid}", restores.OPERATION, self._operation.facts())
        try:
            written = self._write()
            states = self._check_files()
            self._operation = replace(self._operation, inodes=self._inodes())
            journal.record(inodes=self._operation.inodes)
            self._swap()
            self._define(states)
        except BaseException as error:
            self._undo(journal, error)
            raise
        # the VM stands: what follows is clearing up, and the next run repeats it if it fails
        try:
            restores.finish(self._conn, self._conn.lookupByUUIDString(self._plan.uuid), self._operation)
        except (libvirt.libvirtError, OSError) as error:
            journal.close()
            raise KvmopsError(
                f"The VM {self._plan.name}",
                f"it is restored, but the old one's files are still there: {error}",
                "The next restore removes them.",
            ) from error
        journal.done()
        return written

    def _old(self, vm: ExistingVm) -> restores.OldVm:
        try:
            domain = self._conn.lookupByUUIDString(vm.uuid)
            states = snapshots.tree(domain)
            checkpoints = domain.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
            return restores.OldVm(
                uuid=vm.uuid,
                name=vm.name,
                xml=vm.xml,
                autostart=bool(domain.autostart()),
                states=tuple(restores.StateRecord(state.name, state.xml, state.current) for state in states),
                checkpoints=tuple((each.getName(), each.getXMLDesc(0)) for each in checkpoints),
            )
        except libvirt.libvirtError as error:
            raise translate(error, f"The VM {vm.name}") from error

    def _write(self) -> int:
        """Every member into its partial file, each chunk checked on its way, all durable."""
        if self._archive is None or not self._plan.files:
            return 0
        sinks: list[_CountedSink] = []
        try:
            for file, step in zip(self._plan.files, self._operation.files):
                sinks.append(_CountedSink(_sink(self._archive, file, step)))
            self._archive.extract(
                [(file.member, sink) for file, sink in zip(self._plan.files, sinks)], progress=self._progress
            )
        finally:
            for sink in sinks:
                sink.close()
        return sum(sink.written_bytes for sink in sinks)

    def _check_files(self) -> tuple[DiskState, ...]:
        """No image is opened by QEMU before its header has been read here; layers get the new names of those below."""
        self._progress.phase("check")
        states: dict[str, DiskState] = {}
        tops = {disk.path: disk for disk in self._plan.disks}
        for file, step in zip(self._plan.files, self._operation.files):
            if step.scratch and os.path.exists(step.scratch):
                _check_qcow2(file, step.scratch)
                qemu_img.convert(step.scratch, "qcow2", step.partial, "raw", untrusted=True)
                os.unlink(step.scratch)
            elif file.format == "qcow2":
                _check_qcow2(file, step.partial)
            if file.backing:
                qemu_img.rebase_unsafe(step.partial, file.backing, file.backing_format)
            fd = os.open(step.partial, os.O_RDWR | os.O_CLOEXEC)
            try:
                _files.sync(fd, step.partial)
                now = os.fstat(fd)
            finally:
                os.close(fd)
            if file.path in tops:
                top = tops[file.path]
                states[file.path] = DiskState(
                    top.target, top.path, top.format, now.st_ino, now.st_size, now.st_mtime_ns
                )
        return tuple(states.values())

    def _inodes(self) -> dict[str, int]:
        return {step.path: os.stat(step.partial).st_ino for step in self._operation.files}

    def _swap(self) -> None:
        """All old files aside before the first new one takes its name: at no moment would a start find a mixture."""
        replaced = self._plan.replaced
        self._progress.phase("define")
        if replaced is not None:
            self._require_untouched(replaced)
        steps = self._operation.files
        for step in steps:
            if step.aside:
                _rename(step.path, step.aside)
        if replaced is not None:
            self._require_untouched(replaced, moved={step.path: step.aside for step in steps if step.aside})
        for step in steps:
            _rename(step.partial, step.path)
        for directory in self._operation.directories:
            _files.sync_directory(directory)

    def _require_untouched(self, vm: ExistingVm, moved: dict[str, str] | None = None) -> None:
        """The replaced VM is off and is what the plan has seen."""
        domain = self._conn.lookupByUUIDString(vm.uuid)
        flags = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE
        if domain.isActive() or domain.XMLDesc(flags) != vm.xml:
            raise BusyError(f"The VM {vm.name}", "it was started or changed during the restore", "Run the task again.")
        renamed = moved or {}
        # opened as raw: QEMU's lock is the same whatever the format
        paths = [renamed.get(path, path) for path in sorted(vm.disk_files)]
        require_really_off(domain, [(path, "raw") for path in paths if os.path.isfile(path)])

    def _define(self, states: tuple[DiskState, ...]) -> None:
        plan, old = self._plan, self._operation.old
        found = Mark(plan.point, plan.configuration, self._operation.token, states)
        try:
            if old is not None and (old.uuid != plan.uuid or old.name != plan.name):
                self._conn.lookupByUUIDString(old.uuid).undefineFlags(restores.KEEP_FILES)
            domain = self._conn.defineXML(mark.add(plan.domain_xml, found))
            root = _xml.parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), f"the definition of {plan.name}")
        except libvirt.libvirtError as error:
            raise translate(error, f"The definition of the VM {plan.name}") from error
        if mark.read(root) == found and _shows(root, plan):
            return
        self._withdraw(old)
        raise SplitViewError(
            f"The definition of the VM {plan.name}",
            "libvirt made something else of it than it was given",
            "Please report this.",
        )

    def _withdraw(self, old: restores.OldVm | None) -> None:
        if old is not None and old.uuid == self._plan.uuid and old.name == self._plan.name:
            self._conn.defineXML(old.xml)
        else:
            self._conn.lookupByUUIDString(self._plan.uuid).undefineFlags(restores.KEEP_FILES)

    def _undo(self, journal: Journal, error: BaseException) -> None:
        """Back to before; where that fails the journal stays, and the next run goes on from there."""
        try:
            restores.conclude(self._conn, self._operation)
        except KvmopsError as second:
            journal.close()
            error.__cause__ = second
        else:
            journal.done()


def _step(file: PlannedFile, plan: RestorePlan, token: str) -> restores.FileStep:
    directory, name = os.path.split(file.path)
    # a file name has at most 255 bytes; the number keeps shortened ones apart
    short = os.fsencode(name)[:180].decode("utf-8", "ignore")
    number = plan.files.index(file)
    partial = os.path.join(directory, f".{short}.kvmops-partial-{token}-{number}")
    return restores.FileStep(
        partial=partial,
        path=file.path,
        aside=os.path.join(directory, f".{short}.kvmops-old-{token}-{number}") if file.path in plan.set_aside else "",
        scratch=f"{partial}-qcow2" if _is_converted(file) else "",
    )


def _is_converted(file: PlannedFile) -> bool:
    """Whether a qcow2 member becomes a raw file."""
    return file.format == "raw" and file.member.role in (Role.DISK, Role.LAYER) and file.member.image_format != "raw"


def _sink(archive: ArchiveReader, file: PlannedFile, step: restores.FileStep) -> ImageSink:
    """Where a member's bytes go; a qcow2 that becomes raw is streamed as such where that is possible."""
    member = file.member
    fd = _files.create(step.partial)
    if not step.scratch:
        return FileSink(fd, member.size_bytes)
    read_at = archive.read_at(member.name)
    if archive.bytes.random_access and can_stream_as_raw(probe.probe(read_at, member.size_bytes), read_at):
        mapping = read_mapping(read_at, member.size_bytes)
        return RawSink(fd, mapping.virtual_size_bytes, mapping)
    os.close(fd)
    return FileSink(_files.create(step.scratch), member.size_bytes)


def _read_header(path: str) -> probe.ImageInfo:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return probe.probe(lambda offset, length: os.pread(fd, length, offset), os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _check_qcow2(file: PlannedFile, partial: str) -> None:
    info = _read_header(partial)
    if info.format != "qcow2":
        raise ArchiveError(f"The member {file.member.name}", f"its content is {info.format} and not qcow2")
    probe.check_archive_image(info, allowed_backing=file.backing or None)


def _rename(old: str, new: str) -> None:
    try:
        _files.rename_new(old, new)
    except OSError as error:
        raise _files.target_error(new, error, "cannot be put in place") from error


def _shows(root: Any, plan: RestorePlan) -> bool:
    """Whether the definition that was read back has the planned identity and disks."""
    wanted = {disk.target: (disk.path, os.path.basename(disk.path)) for disk in plan.disks}
    here = {disk.target: disk.source for disk in disks.elements(root)}
    return (root.findtext("name"), root.findtext("uuid")) == (plan.name, plan.uuid) and all(
        here.get(target) in paths for target, paths in wanted.items()
    )
