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
from collections.abc import Iterator
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._archive import busy
from ansible_collections.kvmops.backup.plugins.module_utils._archive import verify as archive_verify
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Damage, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import ArchiveReader, open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, select, verified
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import Selection, VerifyRequest
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    DamagedError,
    RefusedError,
    TargetError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._image import probe, qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._image.sink import FileSink
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context


def verify(request: VerifyRequest, context: Context) -> dict[str, Any]:
    """The result of ``backup_verify``; ``failed`` is set where there is damage and that was asked for.

    Raises ArchiveError for a place that cannot be listed or an archive that is not there, RefusedError where `deep` cannot be had.
    """
    if request.deep and not shutil.which("qemu-img"):
        raise RefusedError("Option deep", "qemu-img is not installed", "Install qemu-utils (RHEL: qemu-img).")
    selected = list(_selected(request.selection, context))
    if request.selection.archive and not os.path.exists(selected[0]):
        raise ArchiveError(f"Archive {selected[0]}", "there is no such file", "Check the path.")
    with request.priority.lowered():
        archives = [_checked(path, request, context) for path in selected]
    damaged = [archive["path"] for archive in archives if not archive["ok"]]
    result: dict[str, Any] = {"archives": archives}
    if damaged and request.fail_on_damage:
        names = ", ".join(damaged)
        result.update(failed=True, msg=f"Damaged: {names}. Restore from other archives; `damage` says what is lost.")
    return result


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


def _checked(path: str, request: VerifyRequest, context: Context) -> dict[str, Any]:
    """As `_check`; the archive is not deleted meanwhile."""
    with busy.reading(path) if os.path.isfile(path) else contextlib.nullcontext():
        return _check(path, request, context)


def _check(path: str, request: VerifyRequest, context: Context) -> dict[str, Any]:
    context.progress.about(os.path.basename(path))
    try:
        report = archive_verify.verify_file(path, progress=context.progress, threads=request.threads)
    except ArchiveError as error:
        size = os.stat(path).st_size
        report = archive_verify.Report(False, archive_verify.STRUCTURE, 0, size, (Damage("", 0, size, (), str(error)),))
    for notice in report.notices:
        context.warn(f"{path}: {notice}")
    damage = list(report.damage)
    if request.deep:
        damage += _check_images(path, {item.member for item in damage}, request.threads, context)
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


def _check_images(path: str, known_damaged: set[str], threads: int, context: Context) -> list[Damage]:
    """What qemu-img finds wrong with the images of the good points, and chains that are not complete."""
    try:
        reader = open_archive(path)
    except ArchiveError:
        return []  # reported already
    with reader:
        found = []
        for member in _images(reader):
            if member.name in known_damaged:
                continue
            context.progress.phase("check image", member.name)
            reason = _image_fault(reader, member, threads, context)
            if reason:
                lost = tuple(p.timestamp for p in reader.points if any(m.name == member.name for m in p.members))
                found.append(Damage(member.name, 0, member.size_bytes, lost, reason))
        return found


def _images(reader: ArchiveReader) -> list[Member]:
    images = {m.name: m for point in reader.points for m in point.members if m.role in (Role.DISK, Role.LAYER)}
    return list(images.values())


def _image_fault(reader: ArchiveReader, member: Member, threads: int, context: Context) -> str:
    """Why an image cannot be used, "" for a good one."""
    if member.parent and member.parent not in {entry.name for entry in reader.entries}:
        return f"its backing image {member.parent} is not in the archive"
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
        return qemu_img.check(os.path.abspath(reader.path), image_format, untrusted=True, window=window)
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
