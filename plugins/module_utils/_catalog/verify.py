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
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames
from ansible_collections.kvmops.backup.plugins.module_utils._archive import archive_locks, names
from ansible_collections.kvmops.backup.plugins.module_utils._archive import verify as archive_verify
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Damage, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import ArchiveReader, open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, select, verified
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import Selection, VerifyRequest
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import Point
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
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context


def verify(request: VerifyRequest, context: Context) -> dict[str, Any]:
    """The result of ``backup_verify``; ``failed`` is set where there is damage and that was asked for, and where something
    could not be checked, which costs nothing of the rest.

    Raises ArchiveError for a place that cannot be listed and for the one archive that was named and cannot be opened,
    BusyError for that, RefusedError where `deep` cannot be had and for what is no archive.
    """
    if request.deep and not shutil.which("qemu-img"):
        raise RefusedError("Option deep", "qemu-img is not installed", "Install qemu-utils (RHEL: qemu-img).")
    selected = list(_selected(request.selection, context))
    if request.selection.archive and not _filenames.is_there(selected[0]):
        raise ArchiveError(f"Archive {selected[0]}", "there is no such file", "Check the path.")
    if request.selection.archive and os.path.isdir(selected[0]):
        hint = "Name a directory as path: to have the archives in it checked."
        raise ArchiveError(f"Archive {selected[0]}", "it is a directory", hint)
    if request.selection.archive and (names.is_package(selected[0]) or selected[0].endswith(".xml")):
        # It would pass for a damaged archive.
        hint = "backup_info shows what is in it; ova_convert checks the files of a package and makes an archive of it."
        raise RefusedError(f"Archive {selected[0]}", "it is not an archive, but a package or a Domain XML", hint)
    if not selected:
        selection = request.selection
        whose = f"of {selection.vm} " if selection.vm else ""
        text = f"Nothing was checked: no archive {whose}is in {selection.pool or selection.path}"
        context.warn(Notice(Code.NOTHING_FOUND, text))
    with request.priority.lowered():
        found = _all_checked(selected, request, context)
    result: dict[str, Any] = {"archives": found.archives}
    if found.not_checked or (found.damaged and request.fail_on_damage):
        problems = found.damaged + found.not_checked
        first = problems[0]
        result.update(failed=True, msg=" ".join(map(str, problems)), cancelled=False)
        result.update(what=first.what, why=first.why, hint=first.hint)
    return result


@dataclass
class _Found:
    """What was checked, in the shape of the result; what damage costs; why something was not checked."""

    archives: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[KvmopsError] = field(default_factory=list)
    not_checked: list[KvmopsError] = field(default_factory=list)


def _all_checked(selected: Sequence[str], request: VerifyRequest, context: Context) -> _Found:
    """Of a place, what is gone by now is only warned of."""
    found = _Found(not_checked=_not_there(selected, request))
    for path in selected:
        try:
            with archive_locks.reading(path) if os.path.isfile(path) else contextlib.nullcontext():  # it is not deleted meanwhile
                _check(path, request, context, found)
        except OSError as error:
            found.not_checked.append(ArchiveError(f"Archive {path}", f"it cannot be looked at ({error.strerror})"))
        except (ArchiveError, BusyError, RefusedError) as error:
            if request.selection.archive:
                raise
            if not _is_gone(path):
                found.not_checked.append(error)
            else:
                context.warn(Notice(Code.NOT_LOOKED_AT, f"{path} is not checked: it is not there any more"))
    return found


def _is_gone(path: str) -> bool:
    """Whether a file is surely not there. Storage that does not answer (EIO, ESTALE) says nothing of it."""
    try:
        os.lstat(path)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _selected(selection: Selection, context: Context) -> Iterator[str]:
    """Paths to check. What cannot be read is checked too, unless only one VM's archives are asked for."""
    paths = select.paths(selection, context)
    if not selection.vm:
        yield from paths
        return
    views = []
    for path in paths:
        try:
            views.append(catalog.glance(path))
        except ArchiveError as error:
            context.warn(Notice(Code.NOT_LOOKED_AT, f"{path} is not checked, as nobody knows whose it is: {error}"))
    for view in select.of_vm(views, selection.vm, select.vm_on_host(selection, context)):
        yield view.path


def _check(path: str, request: VerifyRequest, context: Context, found: _Found) -> None:
    """Adds an archive to `found`, and why its images could not all be looked at. Raises ArchiveError where it is gone."""
    context.progress.about(os.path.basename(path))
    _require_anchor(path, request)
    try:
        report = archive_verify.verify_file(path, progress=context.progress, threads=request.threads)
    except (ArchiveError, OSError) as error:
        if _is_gone(path):
            raise ArchiveError(f"Archive {path}", "it is not there any more") from error
        size = os.stat(path).st_size
        report = archive_verify.VerifyReport(False, archive_verify.STRUCTURE, 0, size, (Damage("", 0, size, (), str(error)),))
    for notice in report.notices:
        context.warn(notice.about(path))
    damage = list(report.damage)
    if not request.deep:
        for text in _marked(path):
            context.warn(Notice(Code.IMAGE_CORRUPT, f"{path}: {text}"))
    if request.deep:
        try:
            for fault in _check_images(path, {item.member for item in damage}, request.threads, context):
                damage.append(fault)
        except TargetError as error:
            why = f"its images were not all checked: {error.what}: {error.why}"
            found.not_checked.append(TargetError(f"Archive {path}", why, error.hint))
    points: tuple[Point, ...] = ()
    with contextlib.suppress(ArchiveError):
        view = catalog.look(path)
        points = view.points
        if view.distrust:
            text = f"{path} is not trusted, so that its digests prove nothing of who made it: {view.distrust}"
            context.warn(Notice(Code.FOREIGN, text))
    lost = sorted({point for item in damage for point in item.points})
    verified.record(path, points, at=int(time.time()), ok=not damage, coverage=report.coverage, lost=lost)
    if damage:
        good = [point.timestamp for point in points if point.timestamp not in lost]
        found.damaged.append(_damaged(path, lost, good, damage[0].reason))
    changed = _changed(path, points, request, context)
    if changed:
        found.damaged.append(changed)
    found.archives.append(
        {
            "path": path,
            "ok": not damage and not changed,
            "coverage": report.coverage,
            "checked_bytes": report.checked_bytes,
            "unchecked_bytes": report.unchecked_bytes,
            "lost": lost,
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
    )


def _expected(path: str, request: VerifyRequest) -> str:
    keys = ("", path, os.path.basename(path)) if request.selection.archive else (path, os.path.basename(path))
    return next((request.expected[key] for key in keys if key in request.expected), "")


def _require_anchor(path: str, request: VerifyRequest) -> None:
    """Raises RefusedError where an archive's digests cannot tell whether it is the one that was expected."""
    if not _expected(path, request):
        return
    with contextlib.suppress(ArchiveError), open_archive(path) as reader:
        if not reader.algorithm.anchors:
            why = f"its digests are {reader.algorithm.name}: they find damage, and do not prove that nobody changed it"
            raise RefusedError(f"Archive {path}", why, "Make archives with digest: sha256 for that.")


def _not_there(selected: Sequence[str], request: VerifyRequest) -> list[KvmopsError]:
    """Archives that were expected and are not among those that are checked."""
    known = {"", *selected, *map(os.path.basename, selected)}
    return [
        ArchiveError(f"Archive {key}", "its digest is expected, and it is not here", "Check the place and the path.")
        for key in request.expected
        if key not in known
    ]


def _changed(
    path: str, points: Sequence[Point], request: VerifyRequest, context: Context
) -> ArchiveError | None:
    """Why a whole archive is not the one that was expected. Not remembered: a wrong expectation is no damage."""
    expected = _expected(path, request)
    if not expected or not points:
        return None
    found = next((point for point in points if point.digest == expected), None)
    if found is None:
        why = f"none of its points has the digest {expected}: somebody changed it, or the digest is of another archive"
        return ArchiveError(f"Archive {path}", why, "Trust no point of it; restore from another archive.")
    newer = [point.timestamp for point in points if point.timestamp > found.timestamp]
    if newer:
        context.warn(Notice(Code.NOT_COVERED, f"{path}: the expected digest does not cover {_points(newer)}, added later"))
    return None


def _damaged(path: str, lost: Sequence[int], good: Sequence[int], reason: str) -> DamagedError:
    """What damage costs, and what can still be had."""
    what = f"Archive {path}"
    if not lost:
        return DamagedError(what, f"it is damaged ({reason}), but no point is known to be lost" if good else reason)
    why = f"it is damaged: {_points(lost)} {'is' if len(lost) == 1 else 'are'} lost"
    if not good:
        return DamagedError(what, f"{why}, and it has no other", "Restore from another archive.")
    return DamagedError(what, why, f"{_points(good, 'Point')} can still be restored from it.")


def _points(timestamps: Sequence[int], word: str = "point") -> str:
    told = ", ".join(f"{timestamp} ({catalog.iso_time(timestamp)})" for timestamp in timestamps)
    return f"{word}{'s' if len(timestamps) > 1 else ''} {told}"


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


def _marked(path: str) -> list[str]:
    """What QEMU had marked before it was backed up: the bytes are right, and yet no restore works as usual."""
    marked = []
    with contextlib.suppress(ArchiveError), open_archive(path) as reader:
        for member in _images(reader) if reader.bytes.random_access else ():
            with contextlib.suppress(probe.ImageError, ArchiveError):
                if probe.probe(reader.read_at(member.name), member.size_bytes).corrupt:
                    marked.append(f"QEMU had marked {member.name} as corrupt before it was backed up: restore with 'repair: true'")
    return marked


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
    if info.dirty:  # QEMU makes its reference counts anew when it opens it, and a restore does
        text = f"{reader.path}: {member.name} was not closed when it was backed up: a restore renews its reference counts"
        context.warn(Notice(Code.IMAGE_NOT_CLOSED, text))
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
            "Free space there, set TMPDIR, or check with deep: false.",
        )
    # Without a name in the directory: it goes with this process, whatever ends it.
    with tempfile.TemporaryFile(dir=directory) as file:
        sink = FileSink(os.dup(file.fileno()), member.size_bytes)
        try:
            reader.extract([(member, sink)], threads=threads, progress=context.progress)
        finally:
            sink.close()
        return qemu_img.check(f"/proc/{os.getpid()}/fd/{file.fileno()}", image_format, untrusted=True)
