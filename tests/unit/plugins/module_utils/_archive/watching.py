# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Watches what writes an archive: dead at any step, with failing system calls, and looked at by other tools after each of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import driver

HERE = Path(__file__).parent


def died_at(step: int, body: Callable[[], object]) -> bool:
    """Runs `body` in a child that dies before its `step`th system call that changes files; whether it died."""
    child = os.fork()
    if child == 0:
        try:
            driver.kill_at(step)
            body()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 137), code
    return code == 137


def strace(rule: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", rule, sys.executable, str(HERE / "driver.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)])},
    )


def tool_views(path: Path) -> dict[str, tuple[str, ...]]:
    """What each tool sees: the names of the members, then the digest of all their bytes."""
    flags = ["--zstd"] if path.suffix == ".zst" else []
    views: dict[str, tuple[str, ...]] = {}
    tools = {"GNU tar": ["tar", *flags], "bsdtar": ["bsdtar"]}
    if not flags:
        tools["busybox"] = ["busybox", "tar"]
        tools["7z"] = ["7z"]
    for name, tool in tools.items():
        if shutil.which(tool[0]):
            listing = ["7z", "l", "-ba", "-slt", path] if name == "7z" else [*tool, "-tf", path]
            content = ["7z", "e", "-so", path] if name == "7z" else [*tool, "-xOf", path]
            lines = output(listing).decode().splitlines()
            lines = [line[7:] for line in lines if line.startswith("Path = ")] if name == "7z" else lines
            views[name] = (*lines, hashlib.sha256(output(content)).hexdigest())
    if flags:
        output(["zstd", "-tq", path])
        stream = output(["zstd", "-dqc", path])
        listed = subprocess.run(["tar", "-tf", "-"], input=stream, capture_output=True, check=True).stdout
        content = subprocess.run(["tar", "-xOf", "-"], input=stream, capture_output=True, check=True).stdout
        views["zstd | tar"] = (*listed.decode().splitlines(), hashlib.sha256(content).hexdigest())
    else:
        with tarfile.open(path, errorlevel=2) as file:
            found = [(member.name, file.extractfile(member).read()) for member in file]  # type: ignore[union-attr]
        views["Python"] = (*(n for n, _d in found), hashlib.sha256(b"".join(d for _n, d in found)).hexdigest())
    return views


def output(command: list[object]) -> bytes:
    done = subprocess.run([str(part) for part in command], capture_output=True, check=False)
    assert done.returncode == 0, (command, done.returncode, done.stderr)
    return done.stdout


@contextlib.contextmanager
def after_every_change(path: Path, look: Callable[..., None]) -> Iterator[None]:
    """Calls `look` after each system call of the block that changes the file, with its name and arguments."""
    patch = pytest.MonkeyPatch()
    busy_looking = False

    def tap(module: object, name: str) -> None:
        original = getattr(module, name)

        def call(fd: int, *arguments: object) -> object:
            nonlocal busy_looking
            result = original(fd, *arguments)
            if not busy_looking and os.readlink(f"/proc/self/fd/{fd}") == str(path):
                busy_looking = True
                try:
                    look(name, fd, *arguments)
                finally:
                    busy_looking = False
            return result

        patch.setattr(module, name, call)

    try:
        for name in ("pwrite", "ftruncate"):
            tap(os, name)
        tap(fcntl, "ioctl")
        yield
    finally:
        patch.undo()
