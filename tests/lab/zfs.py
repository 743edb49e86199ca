# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real ZFS pool in a file, with zfs-fuse: datasets without a kernel module."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ._run import LabError, run, wait_for


def is_there() -> bool:
    """Whether zfs-fuse is installed."""
    return shutil.which("zfs-fuse") is not None


class ZfsPool:
    """A pool of one file in ``directory``, mounted at ``path``; a context manager that takes everything down again.

    In a private environment only: there is one daemon.
    """

    def __init__(self, name: str, directory: Path, size_mib: int = 256) -> None:
        self.name, self.directory, self.size_mib = name, directory, size_mib
        self.path = directory / name

    def __enter__(self) -> ZfsPool:
        self.directory.mkdir(parents=True, exist_ok=True)
        image = self.directory / f"{self.name}.zpool"
        with open(image, "wb") as file:
            file.truncate(self.size_mib << 20)
        Path("/run/zfs").mkdir(exist_ok=True)
        self._daemon = subprocess.Popen(
            ["zfs-fuse", "--no-daemon", "--no-kstat-mount"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for("zfs-fuse", self._answers, 120)
        run("zpool", "create", "-f", "-o", "cachefile=none", "-m", str(self.path), self.name, str(image))
        self.path.chmod(0o755)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if line.split()[2] == "fuse.zfs":
                run("umount", "--lazy", line.split()[1])
        # without a cache file the pool is gone with its daemon
        self._daemon.kill()
        self._daemon.wait(30)

    def create(self, name: str) -> Path:
        """A new dataset; its directory."""
        run("zfs", "create", f"{self.name}/{name}")
        path = self.path / name
        path.chmod(0o755)
        return path

    @staticmethod
    def _answers() -> bool:
        with suppress(LabError):
            run("zpool", "list", "-H")
            return True
        return False
