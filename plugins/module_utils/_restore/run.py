# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Runs a restore: settle what dead runs left, plan, carry the plan out, say what was done."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive import archive_locks, config, names, reader
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import ArchiveReader
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    BusyError,
    DamagedError,
    KvmopsError,
    RefusedError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image import probe
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain, receivers, storage
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    connect_to_change,
    libvirt,
    renewed,
)
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import archive as packages
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.hardware import CHECK
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._recovery import recovery
from ansible_collections.kvmops.backup.plugins.module_utils._restore import facts, foreign_memory, states
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import RestorePlan, RestoreResult
from ansible_collections.kvmops.backup.plugins.module_utils._restore.plan import plan as make_plan
from ansible_collections.kvmops.backup.plugins.module_utils._restore.recovery import locks
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import RestoreRequest
from ansible_collections.kvmops.backup.plugins.module_utils._restore.source import Source
from ansible_collections.kvmops.backup.plugins.module_utils._restore.transaction import Transaction


def restore(request: RestoreRequest, context: Context) -> dict[str, Any]:
    """One run of ``vm_restore``; the module's return values. Raises KvmopsError; nothing has changed then."""
    conn = connect_to_change(request.uri)
    with _source(request, conn) as (archive, stored):
        configuration = packages.for_host(stored, kvm=facts.has_kvm(conn))
        if request.check_mode:
            for notice in recovery.pending(request.uri, everywhere=True):
                context.warn(notice)
            plan = _draft(conn, archive, configuration, request, context.progress)
            for notice in recovery.pending(request.uri, plan.replaced.uuid) if plan.replaced is not None else ():
                context.warn(notice)
            result = _predicted(plan)
        else:
            recovery.settle_host(conn, request.uri, context)
            conn = renewed(conn)
            draft = _draft(conn, archive, configuration, request, context.progress)
            replaced = draft.replaced.uuid if draft.replaced is not None else ""
            for vm in filter(None, (draft.name, draft.uuid, replaced)):
                recovery.settle_host(conn, request.uri, context, vm)  # raises: what waits must not be overtaken
            with locks(draft.name, draft.uuid, replaced):
                if replaced:
                    recovery.settle_vm(conn, replaced, context)
                    conn = renewed(conn)
                plan = _draft(conn, archive, configuration, request, context.progress)
                if plan.replaced is not None and plan.replaced.uuid != replaced:
                    raise BusyError(
                        f"The VM {plan.name}", "it has just been defined by somebody else", "Run the task again."
                    )
                result = run(conn, archive, plan, context.progress, request.uri, source=request.source)
    if configuration.conversion and result.changed:
        context.warn(CHECK)
        if configuration is not stored:
            context.warn(packages.NO_KVM)
    for notice in (*plan.warnings, *plan.lacking, *plan.left_out):
        context.warn(notice)
    for image in result.repaired:
        mended = f"{image.corruptions} corruptions and {image.leaks} leaked clusters"
        context.warn(Notice(Code.REPAIRED, f"{image.path} ({image.target}) was repaired: qemu-img has mended {mended}."))
    return {**_values(result, plan, request), **_conversion(configuration)}


def _draft(
    conn: Connection,
    archive: Source | None,
    configuration: Configuration,
    request: RestoreRequest,
    progress: Progress,
) -> RestorePlan:
    """The plan. Raises AttachedError, before any other reason, for a VM whose disks others have, also one that is undefined now."""
    name = request.name or configuration.vm_name

    def refuse(uuids: Collection[str]) -> None:
        for uuid in uuids:
            receivers.refuse(conn, uuid, f"Restoring VM {name}", settled=False)

    try:
        plan = _plan(conn, archive, configuration, request, progress)
    except RefusedError:
        refuse({str(each.UUIDString()) for each in conn.listAllDomains(0) if each.name() == name})
        raise
    refuse({plan.uuid, plan.replaced.uuid if plan.replaced is not None else plan.uuid})
    return plan


def _source(request: RestoreRequest, conn: Connection) -> contextlib.AbstractContextManager[tuple[Source | None, Configuration]]:
    """The archive (None for a bare configuration file) and the point that is asked for."""
    _refuse_what_does_not_apply(request)
    if request.source.endswith(".xml"):
        configuration = _bare(request.source)
        if request.point not in (None, configuration.timestamp):
            raise ArchiveError(f"The configuration {request.source}", f"it is not point {request.point}", "Leave the option out.")
        return contextlib.nullcontext((None, configuration))
    return _package(request, conn) if names.is_package(request.source) else _archive(request)


def _refuse_what_does_not_apply(request: RestoreRequest) -> None:
    """Raises RefusedError for an option that says nothing about such a source: what it asks for would not be done."""
    what, package = f"source {request.source}", names.is_package(request.source)
    bare = not package and request.source.endswith(".xml")
    if not (request.disks or package or bare):
        why = f"{what} is an archive, and a VM is restored from it with its disks"
        raise RefusedError("Option disks", why, "For the VM without its disks, unpack a configuration (.xml) and restore that.")
    if request.disk_images and bare:
        raise RefusedError("Option disk_images", f"{what} is a Domain XML, which has no images")
    for option, value in (("system", request.system), ("configuration", request.configuration)):
        if value and not package:
            raise RefusedError(f"Option {option}", f"{what} is no package of OVF", "Leave the option out.")


@contextlib.contextmanager
def _archive(request: RestoreRequest) -> Iterator[tuple[Source | None, Configuration]]:
    with archive_locks.reading(request.source), reader.open_archive(request.source) as archive:
        chosen = archive.point(request.point)
        if request.disk_images:
            chosen = archive.with_images(chosen, request.disk_images)
        point = foreign_memory.adopt(chosen, archive.read)
        check_images(archive, point, leave_out=[target for target, name in request.disk_images.items() if not name])
        yield archive, point


@contextlib.contextmanager
def _package(request: RestoreRequest, conn: Connection) -> Iterator[tuple[Source | None, Configuration]]:
    what = f"package {request.source}"
    if request.disk_images:
        raise RefusedError("Option disk_images", f"{what} says itself whose image is whose")
    chosen = packages.choice(request.name, request.system, request.configuration)
    if not request.disks:
        if not request.source.lower().endswith(".ovf"):
            raise RefusedError("Option disks", f"{what} is an OVA", "Only of an .ovf the definition alone can be restored.")
        yield None, packages.without_disks(request.source, chosen)
        return
    with packages.open_package(request.source, chosen, _scratch(request, conn)) as package:
        point = package.configuration
        if request.point not in (None, point.timestamp):
            raise ArchiveError(what, f"it has no point {request.point}", f"It has {point.timestamp}.")
        yield package, point


def _scratch(request: RestoreRequest, conn: Connection) -> str:
    """Where what has to be unpacked goes, without a name: the target, else beside the source if that can be written to."""
    if request.pool or request.path:
        path = _filenames.absolute(request.path) if request.path else ""
        return storage.resolve_target(conn, pool=request.pool, path=path).path
    beside = os.path.dirname(_filenames.absolute(request.source))
    return beside if os.access(beside, os.W_OK) else tempfile.gettempdir()


def check_images(archive: ArchiveReader, point: Configuration, leave_out: Collection[str] = ()) -> None:
    """Refuses a foreign archive that may have an image of a disk which the VM would be restored without.

    Raises RefusedError where nothing tells whose an image is, DamagedError where a member is named like an image and is none.
    Without the disk the VM would pass for restored.
    """
    undecided = archive.undecided.get(point.member_name)
    if undecided:
        raise RefusedError(
            f"archive {archive.path}",
            undecided,
            "Say it with the option disk_images, as in disk_images: {vda: MEMBER}; an empty name leaves the disk out.",
        )
    if archive.images.bad:
        disks = (disk.target for disk in domain.parse(point.domain_xml).disks if disk.device == "disk")
        missing = [target for target in disks if target not in {*point.tops, *leave_out}]
        if missing:
            name, why = next(iter(archive.images.bad.items()))
            raise DamagedError(
                f"archive {archive.path}",
                f"it has no image for {', '.join(missing)}, and {name} in it cannot be one ({why.rstrip('.')})",
                "Restore from another archive.",
                member=name,
            )


def _bare(path: str) -> Configuration:
    configuration, _size = config.of_file(path)
    # without its archive it is a definition like any other
    return replace(
        configuration,
        format_version=0,
        members=(),
        snapshots=(),
        warnings=(),
        digest="",
        template=False,
        autostart=False,
        requires=None,
    )


def _plan(
    conn: Connection,
    archive: Source | None,
    configuration: Configuration,
    request: RestoreRequest,
    progress: Progress,
) -> RestorePlan:
    heads = None
    if archive is not None and not request.flatten:
        heads = states.memory_heads(archive.read, configuration)
    host = facts.gather(conn, configuration, request, request.source, heads, progress)
    corrupt = () if archive is None else _marked_corrupt(archive, configuration)
    return make_plan(
        configuration,
        host,
        request,
        bare=archive is None,
        heads=heads,
        corrupt=corrupt,
        distrust="" if archive is None else archive.distrust,
    )


def _marked_corrupt(archive: Source, configuration: Configuration) -> set[str]:
    """Images that QEMU had marked, where that can be told without reading the whole archive; else it turns out on the way."""
    found = set()
    for member in configuration.layers.values() if archive.random_access else ():
        with contextlib.suppress(ImageError, ArchiveError):  # told when it is read
            if probe.probe(archive.read_at(member.name), member.size_bytes).corrupt:
                found.add(member.name)
    return found


def run(
    conn: Connection,
    archive: Source | None,
    plan: RestorePlan,
    progress: Progress,
    uri: str = "qemu:///system",
    *,
    source: str = "",
) -> RestoreResult:
    """Carries a plan out. ``archive`` may be None for a plan without files. Raises KvmopsError; the host is then as before."""
    begin = time.monotonic()
    transaction = None if plan.unchanged else Transaction(conn, archive, plan, progress, uri, source)
    written = transaction.run() if transaction else 0
    repaired = tuple(transaction.repaired) if transaction else ()
    if plan.start:
        progress.phase("start")
        try:
            conn.lookupByUUIDString(plan.uuid).create()
        except libvirt.libvirtError as error:
            raise KvmopsError(f"The VM {plan.name}", f"it is restored, but does not start: {error}") from error
    return replace(_predicted(plan), bytes_written=written, duration_s=time.monotonic() - begin, repaired=repaired)


def _predicted(plan: RestorePlan) -> RestoreResult:
    return RestoreResult(
        changed=not plan.unchanged or plan.start,
        name=plan.name,
        uuid=plan.uuid,
        point=plan.point,
        disks=plan.disks,
        snapshots=tuple(state.name for state in plan.states),
        skipped=plan.skipped,
    )


def _values(result: RestoreResult, plan: RestorePlan, request: RestoreRequest) -> dict[str, Any]:
    values: dict[str, Any] = {
        "changed": result.changed,
        "vm": {"name": result.name, "uuid": result.uuid},
        "point": result.point,
        "disks": [asdict(disk) for disk in result.disks],
        "snapshots": list(result.snapshots),
        "skipped_devices": [asdict(item) for item in result.skipped],
        "repaired": [asdict(image) for image in result.repaired],
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


def _conversion(configuration: Configuration) -> dict[str, Any]:
    """What became of the hardware of another product's VM."""
    made = configuration.conversion
    return {
        "replaced": [{"from": former, "to": here, "note": note} for former, here, note in made.replaced] if made else [],
        "ignored": [{"item": item, "note": note} for item, note in made.ignored] if made else [],
    }


def _without_secrets(domain_xml: str) -> str:
    """For the log of a play."""
    if "passwd" not in domain_xml:
        return domain_xml
    root = _xml.parse(domain_xml, "domain XML")
    for graphics in root.iterfind("devices/graphics"):
        graphics.attrib.pop("passwd", "")
    return _xml.text(root)
