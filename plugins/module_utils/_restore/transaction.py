# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Carries a restore out: write and check every byte, swap files, define the VM and its snapshots; all of it or nothing."""

from __future__ import annotations

import os
import secrets
import stat
import threading
from dataclasses import replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import (
    _capabilities,
    _filenames,
    _files,
    _mounts,
    _ownership,
    _vm_state,
    _xml,
)
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Role
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    BusyError,
    DamagedError,
    KvmopsError,
    RefusedError,
    SplitViewError,
    TargetError,
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
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import firmware_state, security, snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.views import require_really_off
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._restore import disks, mark, recovery
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import (
    DiskState,
    ExistingVm,
    MadeFile,
    Mark,
    PlannedFile,
    RepairedImage,
    RestorePlan,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.source import Source
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import retained_layers
from ansible_collections.kvmops.backup.plugins.module_utils._template import requirement


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


class Transaction:
    """One restore, from the first partial file to the definition that commits it."""

    def __init__(
        self,
        conn: Connection,
        archive: Source | None,
        plan: RestorePlan,
        progress: Progress,
        uri: str,
        source: str,
    ) -> None:
        self._conn, self._archive, self._plan, self._progress = conn, archive, plan, progress
        self.repaired: list[RepairedImage] = []
        self._made: dict[str, tuple[int, int]] = {}  # what tells the files that were made here, by path
        token = secrets.token_hex(8)
        for file in plan.files:
            if file.member.role is Role.TPM:
                os.makedirs(os.path.dirname(file.path), mode=0o711, exist_ok=True)
        directories = sorted({os.path.dirname(file.path) for file in plan.all_files})
        mounts = self._mounts = _mounts.now()
        self._facts = recovery.RestoreFacts(
            uri=uri,
            uuid=plan.uuid,
            name=plan.name,
            token=token,
            source=source,
            files=tuple(_step(file, number, plan, token) for number, file in enumerate(plan.all_files)),
            old=None if plan.replaced is None else self._old(plan.replaced),
            autostart=plan.autostart,
            pools=plan.refresh_pools,
            states=tuple(recovery.StateRecord(each.name, each.xml, each.current) for each in plan.states),
            directories={path: os.stat(path).st_ino for path in directories},
            mounts={path: str(_mounts.of(os.path.realpath(path), mounts)) for path in directories},
        )

    def run(self) -> int:
        """The number of bytes written."""
        for path in self._plan.set_aside:
            if _filenames.is_there(path) and os.path.isfile(path) and qemu_img.is_in_use(path, "raw"):
                raise RefusedError(
                    f"The file {path}", "a process has it open and writes to it", f"Find it with: fuser -v {path}"
                )
        journal = Journal.open(f"restore-{self._plan.uuid}", recovery.OPERATION, self._facts)
        try:
            self._require_fit()
            written = self._write()
            states = self._finish_files()
            journal.record(stamps=self._stamps())
            self._facts = journal.facts
            self._require_template()
            self._end_cycles()
            self._swap()
            journal.record(defining=True)
            self._facts = journal.facts
            self._define(states)
        except BaseException as error:
            self._undo(journal, error)
            raise
        # the VM stands: what follows is clearing up, and the next run repeats it if it fails
        try:
            recovery.finish(self._conn, self._conn.lookupByUUIDString(self._plan.uuid), self._facts)
        except (libvirt.libvirtError, OSError) as error:
            journal.close()
            raise KvmopsError(
                f"The VM {self._plan.name}",
                f"it is restored, but the old one's files are still there: {error}",
                "The next restore removes them.",
            ) from error
        journal.done()
        return written

    def _require_fit(self) -> None:
        """Raises TargetError, before any file is made, where a file system cannot do what files need or hold one of them."""
        for directory in self._facts.directories:
            can = _capabilities.probe(directory)
            for file in self._plan.files:
                if os.path.dirname(file.path) == directory:
                    objection = can.objection(os.path.basename(file.path), file.member.size_bytes)
                    if objection:
                        why = f"the file system of {directory} cannot hold it: {objection}"
                        raise TargetError(f"The file {file.path}", why, "Choose another place.")

    def _old(self, vm: ExistingVm) -> recovery.OldVm:
        try:
            domain = self._conn.lookupByUUIDString(vm.uuid)
            states = snapshots.tree(domain)
            checkpoints = domain.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
            return recovery.OldVm(
                uuid=vm.uuid,
                name=vm.name,
                xml=vm.xml,
                autostart=bool(domain.autostart()),
                states=tuple(recovery.StateRecord(state.name, state.xml, state.current) for state in states),
                checkpoints=tuple(
                    (each.getName(), each.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_SECURE)) for each in checkpoints
                ),
            )
        except libvirt.libvirtError as error:
            raise translate(error, f"The VM {vm.name}") from error

    # --- files -----------------------------------------------------------------------------------

    def _write(self) -> int:
        """Every member into its partial file, each chunk checked on its way, all durable."""
        if self._archive is None or not self._plan.files:
            return 0
        sinks: list[_CountedSink] = []
        try:
            for file, step in zip(self._plan.files, self._facts.files):
                sinks.append(_CountedSink(self._sink(self._archive, file, step)))
            self._archive.extract(
                [(file.member, sink) for file, sink in zip(self._plan.files, sinks)], progress=self._progress
            )
        finally:
            for sink in sinks:
                sink.close()
        return sum(sink.written_bytes for sink in sinks)

    def _create(self, path: str) -> int:
        fd = _files.create(path)
        self._is_own(path, os.fstat(fd))
        return fd

    def _is_own(self, path: str, status: os.stat_result) -> None:
        self._made[path] = (status.st_dev, status.st_ino)

    def _require_own(self, path: str, made: str = "") -> None:
        """The file at a path is the one that was made here (as ``made``), not one of others. Raises TargetError."""
        identity = self._made.get(made or path)
        if identity is None:
            return  # the directory with the state of a TPM, which is libvirt's
        status = os.lstat(path)
        place = os.path.realpath(os.path.dirname(path))
        same = _mounts.has_passing_inodes(_mounts.of(place, self._mounts).fs_type) or identity == (
            status.st_dev,
            status.st_ino,
        )
        if not stat.S_ISREG(status.st_mode) or not same:
            raise _files.swapped(path)

    def _sink(self, archive: Source, file: PlannedFile, step: recovery.FileStep) -> ImageSink:
        """Where a member's bytes go; a qcow2 that becomes raw is streamed as such where that is possible."""
        member = file.member
        if member.role is Role.TPM:
            return FileSink(self._create(step.scratch), member.size_bytes)
        fd = self._create(step.partial)
        if not step.scratch:
            return FileSink(fd, member.size_bytes)
        read_at = archive.read_at(member.name)
        info = probe.probe(read_at, member.size_bytes) if archive.random_access else None
        if info is not None and not info.corrupt and can_stream_as_raw(info, read_at):
            mapping = read_mapping(read_at, member.size_bytes)
            return RawSink(fd, mapping.virtual_size_bytes, mapping)
        os.close(fd)
        return FileSink(self._create(step.scratch), member.size_bytes)

    def _finish_files(self) -> tuple[DiskState, ...]:
        """No image is opened by QEMU before its header has been read here; layers get the new names of those below."""
        self._progress.phase("check")
        count = len(self._plan.files)
        partials = {file.path: step.partial for file, step in zip(self._plan.all_files, self._facts.files)}
        states = []
        for file, step in zip(self._plan.files, self._facts.files):
            self._finish_member(file, step, partials)
            if not file.temporary and file.member.role in (Role.DISK, Role.LAYER, Role.ISO):
                states.append(self._durable(file.path, file.member.target, file.format, step.partial))
        for made, step in zip(self._plan.made, self._facts.files[count:]):
            self._make(made, step, partials)
            states.append(self._durable(made.path, made.target, made.format, step.partial))
        self._give_to_their_owners()
        return tuple(states)

    def _give_to_their_owners(self) -> None:
        """Each file is for whom the one that it replaces was for, a new one for QEMU's user where libvirt does not see to it."""
        plan = self._plan
        new = security.owner_of_new_files(self._conn, _xml.parse(plan.domain_xml, f"the definition of {plan.name}"))
        for file, step in zip(plan.all_files, self._facts.files):
            if isinstance(file, PlannedFile) and file.member.role is Role.TPM:
                continue  # libvirt gives it to swtpm's user at each start
            wanted = _ownership.of(step.path) if step.aside else new
            if step.path and wanted is not None:
                _ownership.give(step.partial, wanted)

    def _finish_member(self, file: PlannedFile, step: recovery.FileStep, partials: dict[str, str]) -> None:
        if file.member.role is Role.TPM:
            firmware_state.unpack_tpm(firmware_state.read_file(step.scratch), step.partial)
            os.unlink(step.scratch)
            return
        self._require_own(step.partial)
        if file.head:
            _replace_head(file, step.partial)
        if step.scratch and os.path.exists(step.scratch):
            self._require_own(step.scratch)
            self._check_qcow2(file, step.scratch)
            qemu_img.convert(step.scratch, "qcow2", step.partial, "raw", untrusted=True)
            os.unlink(step.scratch)
        elif file.format == "qcow2":
            self._check_qcow2(file, step.partial)
        if file.backing:
            backing = partials.get(file.backing, file.backing) if file.temporary else file.backing
            qemu_img.rebase_unsafe(step.partial, backing, file.backing_format)
        if file.public:
            _ownership.set_mode(step.partial, 0o644)
        if file.member.role in (Role.MEMORY, Role.NVRAM, Role.BOOT):
            self._durable(file.path, "", file.format, step.partial)

    def _check_qcow2(self, file: PlannedFile, partial: str) -> None:
        """Fit to be opened by QEMU; repaired where QEMU would do so at its next start, or the user wants it."""
        info = _read_header(partial)
        if info.format != "qcow2":
            raise ArchiveError(f"The member {file.member.name}", f"its content is {info.format} and not qcow2")
        probe.check_archive_image(info, allowed_backing=file.backing or None, repair=self._plan.repair)
        if info.corrupt or info.dirty:
            self._progress.phase("repair", file.member.target)
            found = qemu_img.repair(partial)
            self.repaired.append(RepairedImage(file.member.target, file.path, found.corruptions, found.leaks))

    def _make(self, made: MadeFile, step: recovery.FileStep, partials: dict[str, str]) -> None:
        below = partials.get(made.backing, made.backing)
        if not made.flat:
            size_bytes = (
                os.path.getsize(below) if made.backing_format == "raw" else _read_header(below).virtual_size_bytes
            )
            self._is_own(
                step.partial,
                qemu_img.create_overlay_unsafe(step.partial, made.backing, made.backing_format, size_bytes),
            )
            return
        self._progress.phase("flatten", made.target)
        os.close(self._create(step.partial))
        qemu_img.convert(below, made.backing_format, step.partial, made.format, untrusted=True)

    def _durable(self, path: str, target: str, image_format: str, partial: str) -> DiskState:
        self._require_own(partial)
        fd = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            _files.sync(fd, partial)
            now = os.fstat(fd)
        finally:
            os.close(fd)
        top = any(disk.path == path for disk in self._plan.disks)
        return DiskState(target, path, image_format, now.st_ino, now.st_size, now.st_mtime_ns, top)

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """What tells the new files when they have got their names."""
        found = {step.path: os.lstat(step.partial) for step in self._facts.files if step.path}
        return {path: (each.st_size, each.st_mtime_ns) for path, each in found.items()}

    # --- the VM ----------------------------------------------------------------------------------

    def _require_template(self) -> None:
        """The template is still what the plan has seen: nothing kept it from being changed or replaced meanwhile."""
        required = self._plan.requires
        if required is None:
            return
        found = requirement.match_on_host(self._conn, required, self._progress, thorough=True)
        here = {disk.path for disk in found.template.disks} if found.template is not None else set()
        below = {file.backing for file in self._plan.files if file.member.template_disk}
        if found.mismatch is not None or not below <= here:
            why = found.text or "its disks are in another place now"
            raise BusyError(
                f"The template {required.name}", f"it was changed during the restore ({why})", "Run the task again."
            )

    def _end_cycles(self) -> None:
        """No backup goes on from here as if nothing had happened."""
        old = self._plan.replaced
        for uuid in {self._plan.uuid, *((old.uuid,) if old is not None else ())}:
            _vm_state.end_cycle(uuid, "the VM was restored in place")

    def _swap(self) -> None:
        """All old files aside before the first new one takes its name: at no moment would a start find a mixture."""
        replaced = self._plan.replaced
        self._progress.phase("define")
        if replaced is not None:
            self._require_untouched(replaced)
        steps = self._facts.files
        for step in steps:
            if step.aside:
                _rename(step.path, step.aside)
        if replaced is not None:
            self._require_untouched(replaced, moved={step.path: step.aside for step in steps if step.aside})
        for step in steps:
            if step.path:
                self._require_own(step.partial)
                _rename(step.partial, step.path)
                self._require_own(step.path, step.partial)
        for directory in self._facts.directories:
            _files.sync_directory(directory)

    def _require_untouched(self, vm: ExistingVm, moved: dict[str, str] | None = None) -> None:
        """The replaced VM is off and is what the plan has seen."""
        domain = self._conn.lookupByUUIDString(vm.uuid)
        flags = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE
        if domain.isActive() or domain.XMLDesc(flags) != vm.xml:
            raise BusyError(f"The VM {vm.name}", "it was started or changed during the restore", "Run the task again.")
        renamed = {_filenames.canonical(path): aside for path, aside in (moved or {}).items()}
        # opened as raw: QEMU's lock is the same whatever the format
        paths = [renamed.get(path, path) for path in sorted(vm.disk_files)]
        require_really_off(domain, [(path, "raw") for path in paths if _filenames.is_there(path) and os.path.isfile(path)])

    def _define(self, states: tuple[DiskState, ...]) -> None:
        """The VM without its final mark, its snapshots, and when all of it is as planned, the mark: that is the commit."""
        plan, facts = self._plan, self._facts
        old = facts.old
        found = Mark(plan.point, plan.configuration, facts.token, states, plan.flat)
        try:
            if old is not None and (old.uuid != plan.uuid or old.name != plan.name):
                self._conn.lookupByUUIDString(old.uuid).undefineFlags(recovery.KEEP_FILES)
            domain = self._conn.defineXML(mark.add(plan.domain_xml, replace(found, token=facts.pending_token)))
            if old is not None:
                recovery.forget(domain, old.states)
                recovery.forget_checkpoints(domain, old)
            recovery.define_states(domain, facts.states)
            self._require_as_planned(domain, replace(found, token=facts.pending_token))
            retained_layers.save(plan.uuid, {**retained_layers.load(plan.uuid), **dict.fromkeys(_left_layers(plan), "")})
            self._conn.defineXML(mark.add(plan.domain_xml, found))
        except libvirt.libvirtError as error:
            raise translate(error, f"The definition of the VM {plan.name}") from error

    def _require_as_planned(self, domain: Domain, found: Mark) -> None:
        plan = self._plan
        root = _xml.parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), f"the definition of {plan.name}")
        states = {(state.name, state.parent, state.current) for state in snapshots.tree(domain)}
        wanted = {(state.name, state.parent, state.current) for state in plan.states}
        in_place = all(self._facts.has_new(step) for step in self._facts.files if step.path)
        if mark.read(root) != found or not _shows(root, plan) or states != wanted or not in_place:
            raise SplitViewError(
                f"The definition of the VM {plan.name}",
                "libvirt made something else of it than it was given",
                "Please report this.",
            )

    def _undo(self, journal: Journal[recovery.RestoreFacts], error: BaseException) -> None:
        """Back to before; where that fails the journal stays, and the next run goes on from there."""
        try:
            recovery.conclude(self._conn, self._facts)
        except KvmopsError as second:
            journal.close()
            if isinstance(error, KvmopsError):
                error.args = (f"{str(error).rstrip('.')}. This could not be taken back: {second}",)
            error.__cause__ = second
        else:
            journal.done()


def _left_layers(plan: RestorePlan) -> set[str]:
    """Files of the archive that others stand on and no snapshot has frozen: removals must know that they are the VM's own."""
    frozen = set()
    for state in plan.states:
        root = _xml.parse(state.xml, f"the snapshot {state.name}")
        external = {disk.get("name") for disk in root.iterfind("disks/disk[@snapshot='external']")}
        for disk in root.iterfind("domain/devices/disk"):
            target, source = disk.find("target"), disk.find("source")
            if target is not None and source is not None and target.get("dev") in external:
                frozen.add(source.get("file", ""))
    own = {file.path for file in plan.files} - frozen
    return {os.path.realpath(file.backing) for file in plan.all_files if file.backing in own}


def _step(file: PlannedFile | MadeFile, number: int, plan: RestorePlan, token: str) -> recovery.FileStep:
    directory, name = os.path.split(file.path)
    # the number keeps shortened names apart
    room = _capabilities.told(directory).max_name_bytes - len(f"..kvmops-partial-{token}-{number}-source")
    short = os.fsencode(name)[:room].decode("utf-8", "ignore")
    partial = os.path.join(directory, f".{short}.kvmops-partial-{token}-{number}")
    return recovery.FileStep(
        partial=partial,
        path="" if isinstance(file, PlannedFile) and file.temporary else file.path,
        aside=os.path.join(directory, f".{short}.kvmops-old-{token}-{number}") if file.path in plan.set_aside else "",
        scratch=f"{partial}-source" if isinstance(file, PlannedFile) and _is_converted(file) else "",
    )


def _is_converted(file: PlannedFile) -> bool:
    """Whether a qcow2 member becomes a raw file, or a tar a directory."""
    if file.member.role is Role.TPM:
        return True
    return file.format == "raw" and file.member.role in (Role.DISK, Role.LAYER) and file.member.image_format != "raw"


def _read_header(path: str) -> probe.ImageInfo:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return probe.probe(probe.reads(fd, path), os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _replace_head(file: PlannedFile, partial: str) -> None:
    """Gives a memory image its new name, uuid and places; what the plan has read must be what was just verified."""
    fd = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.pread(fd, len(file.former_head), 0) != file.former_head:
            raise DamagedError(
                f"The member {file.member.name}", "it is not what was read before", member=file.member.name
            )
        _files.write_all(fd, file.head, 0, partial)
    finally:
        os.close(fd)


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
