# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The only place that runs qemu-img. Formats are always explicit and names are always plain files.

``untrusted=True`` is for images whose content others made: qemu-img then runs with bounded memory and CPU time.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError

_QUICK_S = 60.0
_MAP_S = 3600.0  # the tables of a large, fragmented image on slow storage
_LONG_S = 7 * 24 * 3600.0
_UNTRUSTED_MEMORY_BYTES = 2 << 30
_UNTRUSTED_CPU_S = 600
_UNTRUSTED_BYTES_PER_CPU_S = 20 << 20  # what an honest image takes at the very most, compressed and all


@dataclass(frozen=True)
class QemuImageInfo:
    """What ``qemu-img info`` says about one image; ``full_backing_file`` is the file that QEMU opens for the backing name."""

    path: str
    format: str
    virtual_size_bytes: int
    actual_size_bytes: int
    cluster_bytes: int
    backing_file: str
    full_backing_file: str
    backing_format: str
    encrypted: bool
    internal_snapshots: tuple[str, ...]


@dataclass(frozen=True)
class CheckResult:
    """Outcome of ``qemu-img check``; ``ok`` means no errors, no corruptions and no leaks (always true for raw)."""

    ok: bool
    errors: int
    leaks: int
    corruptions: int


def info(path: str, fmt: str, *, untrusted: bool = False) -> QemuImageInfo:
    """Header of one image; works on images in use. Raises ImageError."""
    command = ["info", "-U", "-f", fmt, "--output=json"]
    return _parse_info(json.loads(_run(command, path, cpu_s=_cpu_s([path]) if untrusted else 0)))


def backing_chain(path: str, fmt: str) -> list[QemuImageInfo]:
    """The image and all it stands on, top first. For this host's own disks only: opens what the headers name."""
    try:
        output = _run(["info", "-U", "-f", fmt, "--backing-chain", "--output=json"], path)
    except ImageError:
        lower = layers.below(path)
        for layer in lower:
            unseen = _filenames.why_unseen(layer)
            if unseen:
                what = f"it stands on {layer}: {unseen}" if layer != lower[0] else unseen
                raise ImageError(f"disk image {path}", what) from None
        missing = next((layer for layer in lower[1:] if not os.path.exists(layer)), "")
        if not missing:
            raise
        hint = "Put that file back; the disk of a template comes back with the archive of the template."
        raise ImageError(f"disk image {path}", f"it stands on {missing}, which is not there", hint) from None
    return [_parse_info(layer) for layer in json.loads(output)]


def check(path: str, fmt: str, *, untrusted: bool = False, window: tuple[int, int] | None = None) -> CheckResult:
    """Metadata check of one image by itself; its backing file is not opened. Raises ImageError when that fails.

    ``window``: offset and size in bytes of the image within the file, for one inside a plain archive.
    """
    if fmt == "raw":
        return CheckResult(ok=True, errors=0, leaks=0, corruptions=0)
    command = ["check", "--output=json", "json:" + json.dumps(block_device(path, fmt, window))]
    done = _execute(command, path, cpu_s=_cpu_s([path]) if untrusted else 0, timeout_s=_LONG_S)
    # 0 clean, 2 corruptions, 3 leaks; 1 means the check itself failed.
    if done.returncode not in (0, 2, 3):
        raise _failed(command, path, done)
    found = json.loads(done.stdout)
    errors, leaks, corruptions = (int(found.get(key, 0)) for key in ("check-errors", "leaks", "corruptions"))
    return CheckResult(ok=not (errors or leaks or corruptions), errors=errors, leaks=leaks, corruptions=corruptions)


def block_device(path: str, fmt: str, window: tuple[int, int] | None) -> dict[str, Any]:
    """QEMU's words for one image by itself, at an offset of a file if there is a window."""
    file: dict[str, Any] = {"driver": "file", "filename": _absolute(path)}
    if window:
        file = {"driver": "raw", "offset": window[0], "size": window[1], "file": file}
    # "backing": null keeps QEMU from opening what the header names; plain file names cannot say that.
    backing = {"backing": None} if fmt == "qcow2" else {}
    return {"driver": fmt, **backing, "file": file}


@dataclass(frozen=True)
class Repaired:
    """What ``qemu-img check -r all`` has mended."""

    corruptions: int
    leaks: int


def repair(path: str) -> Repaired:
    """Repair the metadata of one qcow2 that others made, by itself, as QEMU does when it opens one that was not closed.

    Raises ImageError when that fails or anything but leaked clusters is left.
    """
    file = {"driver": "file", "filename": _absolute(path)}
    options = json.dumps({"driver": "qcow2", "backing": None, "file": file})
    command = ["check", "-r", "all", "--output=json", f"json:{options}"]
    done = _execute(command, path, cpu_s=_cpu_s([path]), timeout_s=_LONG_S)
    if done.returncode not in (0, 2, 3):
        raise _failed(command, path, done)
    found = json.loads(done.stdout)
    if found.get("corruptions", 0) or found.get("check-errors", 0):
        why = f"qemu-img could not repair it: {found.get('corruptions', 0)} corruptions are left"
        raise ImageError(f"disk image {path}", why)
    return Repaired(int(found.get("corruptions-fixed", 0)), int(found.get("leaks-fixed", 0)))


def create_overlay(path: str, backing: str, backing_format: str, virtual_size_bytes: int | None = None) -> None:
    """Create a new qcow2 at ``path`` that stands on ``backing``. Raises ImageError, also when ``path`` exists."""
    _new_file(path)
    size = [] if virtual_size_bytes is None else [str(virtual_size_bytes)]
    _run(["create", "-q", "-f", "qcow2", "-F", backing_format, "-b", _absolute(backing)], path, *size)


def create_overlay_unsafe(
    path: str, backing: str, backing_format: str, virtual_size_bytes: int
) -> os.stat_result:
    """As `create_overlay`, but without looking at ``backing``, which may not be there yet; the status of the file that was made."""
    made = _new_file(path)
    options = ["create", "-q", "-u", "-f", "qcow2", "-F", backing_format, "-b", _absolute(backing)]
    _run(options, path, str(virtual_size_bytes))
    return made


def _new_file(path: str) -> os.stat_result:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ImageError(f"overlay {path}", f"cannot be created: {error.strerror}") from error
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def rebase_unsafe(path: str, backing: str, backing_format: str) -> None:
    """Write another backing file name into a qcow2 without looking at either's content. Raises ImageError."""
    _run(["rebase", "-q", "-u", "-f", "qcow2", "-F", backing_format, "-b", _absolute(backing)], path)


def convert(src: str, src_fmt: str, dst: str, dst_fmt: str, *, untrusted: bool = False) -> None:
    """Copy the virtual content into a new image, durable when it returns. Raises ImageError.

    Opens the backing file that ``src`` names: of an untrusted image it must have been refused or replaced before.
    """
    _run(
        ["convert", "-q", "-W", "-m", "8", "-f", src_fmt, "-O", dst_fmt],
        src,
        _absolute(dst),
        cpu_s=_cpu_s(layers.below(src)) if untrusted else 0,
        timeout_s=_LONG_S,
    )
    # convert writes with cache mode "unsafe", which never flushes.
    fd = os.open(dst, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        raise ImageError(f"disk image {dst}", f"cannot be made durable: {error.strerror}") from error
    finally:
        os.close(fd)


def commit(top: str, base: str, limit_bps: int = 0) -> None:
    """Merge the qcow2 ``top`` and the layers between into ``base``, all of them not in use. Raises ImageError."""
    limit = ["-r", str(limit_bps)] if limit_bps else []
    _run(["commit", "-q", "-f", "qcow2", *limit, "-b", _absolute(base)], top, timeout_s=_LONG_S)


def delete_internal(path: str, name: str) -> None:
    """Delete an internal snapshot from a qcow2 that is not in use. Raises ImageError."""
    _run(["snapshot", "-q", "-d", name], path, timeout_s=_LONG_S)  # goes through all refcounts of a large image


def is_in_use(path: str, fmt: str) -> bool:
    """Whether a process holds the image open for writing (QEMU's lock). Raises ImageError when it cannot be told."""
    command = ["info", "-f", fmt, "--output=json", "--", _absolute(path)]
    done = _execute(command, path)
    if done.returncode == 0:
        return False
    if "Failed to get" in done.stderr and "lock" in done.stderr:
        return True
    raise _failed(command, path, done)


def data_ranges(path: str, fmt: str) -> list[tuple[int, int]]:
    """Offset and length of what may not be zero in an image and all it stands on; works on images in use. Raises ImageError."""
    extents = json.loads(_run(["map", "-U", "-f", fmt, "--output=json"], path, timeout_s=_MAP_S))
    return [(each["start"], each["length"]) for each in extents if not each["zero"]]


def same_content(first: str, first_fmt: str, second: str, second_fmt: str) -> bool:
    """Whether two images, neither of them in use, look the same to a guest. Raises ImageError when it cannot be told."""
    command = ["compare", "-q", "-f", first_fmt, "-F", second_fmt, "--", _absolute(first), _absolute(second)]
    done = _execute(command, first, timeout_s=_LONG_S)
    if done.returncode in (0, 1):
        return done.returncode == 0
    raise _failed(command, first, done)


def _parse_info(found: dict[str, Any]) -> QemuImageInfo:
    return QemuImageInfo(
        path=found["filename"],
        format=found["format"],
        virtual_size_bytes=found["virtual-size"],
        actual_size_bytes=found.get("actual-size", 0),
        cluster_bytes=found.get("cluster-size", 0),
        backing_file=found.get("backing-filename", ""),
        full_backing_file=layers.named_file(found.get("full-backing-filename", "")),
        backing_format=found.get("backing-filename-format", ""),
        encrypted=found.get("encrypted", False),
        internal_snapshots=tuple(snapshot["name"] for snapshot in found.get("snapshots", [])),
    )


def _absolute(path: str) -> str:
    """QEMU takes ``nbd:…`` or ``json:…`` for protocols, but never a name that begins with a slash."""
    if not os.path.isabs(path):
        raise ImageError(f"disk image {path}", "its path is not absolute")
    return path


def _run(options: list[str], path: str, *operands: str, cpu_s: int = 0, timeout_s: float = _QUICK_S) -> str:
    command = [*options, "--", _absolute(path), *operands]
    done = _execute(command, path, cpu_s=cpu_s, timeout_s=timeout_s)
    if done.returncode:
        raise _failed(command, path, done)
    return done.stdout


def _execute(
    command: list[str], path: str, *, cpu_s: int = 0, timeout_s: float = _QUICK_S
) -> subprocess.CompletedProcess[str]:
    """`cpu_s`: for an untrusted image, the CPU time that it may take; its memory is bounded then too."""
    try:
        return subprocess.run(
            [*(_limits(cpu_s) if cpu_s else []), "qemu-img", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            # One malloc arena: each thread's own would count 64 MiB against the memory limit.
            env={**os.environ, "LC_ALL": "C", **({"MALLOC_ARENA_MAX": "1"} if cpu_s else {})},
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise ImageError(
            f"disk image {path}", f"{error.filename} is not installed", "Install qemu-utils (RHEL: qemu-img)."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(
            f"disk image {path}", f"'qemu-img {command[0]}' did not finish within {timeout_s:.0f} s"
        ) from error


def limits(files: list[str]) -> list[str]:
    """What to put before the command of a tool that opens an untrusted image of these files."""
    return _limits(_cpu_s(files))


def _limits(cpu_s: int) -> list[str]:
    # prlimit instead of preexec_fn, which can deadlock in a process with threads.
    return ["prlimit", f"--as={_UNTRUSTED_MEMORY_BYTES}", f"--cpu={cpu_s}", "--core=0"]


def _cpu_s(files: list[str]) -> int:
    """CPU time for an untrusted image of these files: enough for their bytes, whatever they say about themselves."""
    taken = sum(os.stat(file).st_blocks * 512 for file in files if os.path.exists(file))
    return _UNTRUSTED_CPU_S + taken // _UNTRUSTED_BYTES_PER_CPU_S


def _failed(command: list[str], path: str, done: subprocess.CompletedProcess[str]) -> ImageError:
    reason = done.stderr.strip() or f"exit code {done.returncode}"
    hint = (
        "Run the task as root (become: true), or as the user that owns the image."
        if "Permission denied" in reason
        else ""
    )
    return ImageError(f"disk image {path}", f"'qemu-img {command[0]}' failed: {reason}", hint)
