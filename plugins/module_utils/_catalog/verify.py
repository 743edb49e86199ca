# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What ``backup_verify`` does: check every byte of archives, and on request every disk image in them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._archive import busy
from ansible_collections.kvmops.backup.plugins.module_utils._archive import verify as archive_verify
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Damage, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import ArchiveReader, open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, select, verified
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import Selection, VerifyRequest
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    BusyError,
    DamagedError,
    KvmopsError,
    RefusedError,
    TargetError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image import probe, qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._image.sink import FileSink
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context


def verify(request: VerifyRequest, context: Context) -> dict[str, Any]:
    """The result of ``backup_verify``; ``failed`` is set where there is damage and that was asked for, and where something
    could not be checked, which costs nothing of the rest.

    Raises ArchiveError for a place that cannot be listed and for the one archive that was named and cannot be opened,
    BusyError for that, RefusedError where `deep` cannot be had.
    """
    if request.deep and not shutil.which("qemu-img"):
        raise RefusedError("Option deep", "qemu-img is not installed", "Install qemu-utils (RHEL: qemu-img).")
    selected = list(_selected(request.selection, context))
    if request.selection.archive and not os.path.exists(selected[0]):
        raise ArchiveError(f"Archive {selected[0]}", "there is no such file", "Check the path.")
    if request.selection.archive and os.path.isdir(selected[0]):
        raise ArchiveError(f"Archive {selected[0]}", "it is a directory", "Name it with the option path.")
    if not selected:
        selection = request.selection
        whose = f"of {selection.vm} " if selection.vm else ""
        context.warn(f"Nothing was checked: no archive {whose}is in {selection.pool or selection.path}")
    with request.priority.lowered():
        archives, not_checked = _all_checked(selected, request, context)
    damaged = [archive["path"] for archive in archives if not archive["ok"]]
    result: dict[str, Any] = {"archives": archives}
    if not_checked or (damaged and request.fail_on_damage):
        hint = "Restore from other archives; `damage` says what is lost."
        problems = [DamagedError(f"Archive {path}", "it is damaged", hint) for path in damaged] + not_checked
        told = [f"Damaged: {', '.join(damaged)}. {hint}"] if damaged else []
        first = problems[0]
        result.update(failed=True, msg=" ".join([*told, *map(str, not_checked)]), cancelled=False)
        result.update(what=first.what, why=first.why, hint=first.hint)
    return result


def _all_checked(
    selected: Sequence[str], request: VerifyRequest, context: Context
) -> tuple[list[dict[str, Any]], list[KvmopsError]]:
    """What was checked, and why something was not; of a place, what is gone by now is only warned of."""
    archives: list[dict[str, Any]] = []
    not_checked: list[KvmopsError] = []
    for path in selected:
        try:
            archives.append(_checked(path, request, context, not_checked))
        except (ArchiveError, BusyError) as error:
            if request.selection.archive:
                raise
            if os.path.lexists(path):
                not_checked.append(error)
            else:
                context.warn(f"{path} is not checked: it is not there any more")
    return archives, not_checked


def _selected(selection: Selection, context: Context) -> Iterator[str]:
    """Paths to check. What cannot be read is checked too, unless only one VM's archives are asked for."""
    paths = select.paths(selection)
    if not selection.vm:
        yield from paths
        return
    views = []
    for path in paths:
        try:
            views.append(catalog.look(path))
        except ArchiveError as error:
            context.warn(f"{path} is not checked, as nobody knows whose it is: {error}")
    for view in select.of_vm(views, selection.vm, select.vm_on_host(selection, context)):
        yield view.path


def _checked(path: str, request: VerifyRequest, context: Context, not_checked: list[KvmopsError]) -> dict[str, Any]:
    """As `_check`; the archive is not deleted meanwhile. Raises BusyError, ArchiveError where that began already."""
    with busy.reading(path) if os.path.isfile(path) else contextlib.nullcontext():
        return _check(path, request, context, not_checked)


def _check(path: str, request: VerifyRequest, context: Context, not_checked: list[KvmopsError]) -> dict[str, Any]:
    """One of the result's ``archives``; to `not_checked` comes why its images could not all be looked at."""
    context.progress.about(os.path.basename(path))
    try:
        report = archive_verify.verify_file(path, progress=context.progress, threads=request.threads)
    except (ArchiveError, OSError) as error:
        if not os.path.lexists(path):
            raise ArchiveError(f"Archive {path}", "it is not there any more") from error
        size = os.stat(path).st_size
        report = archive_verify.Report(False, archive_verify.STRUCTURE, 0, size, (Damage("", 0, size, (), str(error)),))
    for notice in report.notices:
        context.warn(f"{path}: {notice}")
    damage = list(report.damage)
    if request.deep:
        try:
            for fault in _check_images(path, {item.member for item in damage}, request.threads, context):
                damage.append(fault)
        except TargetError as error:
            why = f"its images were not all checked: {error.what}: {error.why}"
            not_checked.append(TargetError(f"Archive {path}", why, error.hint))
    _keep_finding(path, damage, report.coverage)
    return {
        "path": path,
        "ok": not damage,
        "coverage": report.coverage,
        "checked_bytes": report.checked_bytes,
        "unchecked_bytes": report.unchecked_bytes,
        "damage": [
            {
                "member": item.member,
                "offset": item.offset,
                "length": item.length,
                "points": list(item.points),
                "reason": item.reason,
            }
            for item in damage
        ],
    }


def _keep_finding(path: str, damage: list[Damage], coverage: str) -> None:
    points: tuple[Configuration, ...] = ()
    with contextlib.suppress(ArchiveError):
        points = catalog.look(path).points
    lost = {point for item in damage for point in item.points}
    verified.record(path, points, at=int(time.time()), ok=not damage, coverage=coverage, lost=lost)


def _check_images(path: str, known_damaged: set[str], threads: int, context: Context) -> Iterator[Damage]:
    """What qemu-img finds wrong with the images of the good points, and chains that are not complete. Raises TargetError."""
    try:
        reader = open_archive(path)
    except ArchiveError:
        return  # reported already
    with reader:
        for member in _images(reader):
            if member.name in known_damaged:
                continue
            context.progress.phase("check image", member.name)
            reason = _image_fault(reader, member, threads, context)
            if reason:
                lost = tuple(p.timestamp for p in reader.points if any(m.name == member.name for m in p.members))
                yield Damage(member.name, 0, member.size_bytes, lost, reason)


def _images(reader: ArchiveReader) -> list[Member]:
    images = {m.name: m for point in reader.points for m in point.members if m.role in (Role.DISK, Role.LAYER)}
    # those of a foreign archive that no disk is known to have
    return list({**reader.images.good, **images}.values())


def _chain_fault(member: Member, images: Mapping[str, Member]) -> str:
    """Why an image has no whole chain below it, "" where it has. The gap below a lower layer is that layer's fault."""
    if member.parent and member.parent not in images:
        return f"its backing image {member.parent} is not in the archive"
    seen = {member.name}
    below = images.get(member.parent)
    while below is not None:
        if below.name in seen:
            return "the layers below it form a circle"
        seen.add(below.name)
        below = images.get(below.parent)
    return ""


def _image_fault(reader: ArchiveReader, member: Member, threads: int, context: Context) -> str:
    """Why an image cannot be used, "" for a good one."""
    gap = _chain_fault(member, {image.name: image for image in _images(reader)})
    if gap:
        return gap
    try:
        info = probe.probe(reader.read_at(member.name), member.size_bytes)
        stands_on = member.parent or ("a disk of the template" if member.template_disk else None)
        probe.check_archive_image(info, allowed_backing=stands_on)
        found = _qemu_check(reader, member, info.format, threads, context)
    except (probe.ImageError, DamagedError) as error:
        return str(error)
    if found.ok:
        return ""
    return f"qemu-img check: {found.corruptions} corruptions, {found.errors} errors, {found.leaks} leaked clusters"


def _qemu_check(
    reader: ArchiveReader, member: Member, image_format: str, threads: int, context: Context
) -> qemu_img.CheckResult:
    if not reader.compressed:
        # QEMU wants whole sectors, and a qcow2 may end within one: the tar has zeros up to the next.
        window = (reader.entry(member.name).offset, -(-member.size_bytes // 512) * 512)
        # By its descriptor: QEMU takes no names that are not UTF-8.
        return qemu_img.check(f"/proc/{os.getpid()}/fd/{reader.bytes.fd}", image_format, untrusted=True, window=window)
    directory = os.environ.get("TMPDIR") or "/var/tmp"
    free = shutil.disk_usage(directory).free
    if free < member.size_bytes:
        raise TargetError(
            f"Directory {directory}",
            f"{member.name} needs up to {member.size_bytes} bytes for the deep check, {free} are free",
            "Free space there, set TMPDIR, or check without deep.",
        )
    # Without a name in the directory: it goes with this process, whatever ends it.
    with tempfile.TemporaryFile(dir=directory) as file:
        sink = FileSink(os.dup(file.fileno()), member.size_bytes)
        try:
            reader.extract([(member, sink)], threads=threads, progress=context.progress)
        finally:
            sink.close()
        return qemu_img.check(f"/proc/{os.getpid()}/fd/{file.fileno()}", image_format, untrusted=True)
