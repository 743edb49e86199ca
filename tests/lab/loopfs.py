# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Small file systems on loop devices: to run out of space, to share blocks, to be read-only."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ._run import LabError, run

_MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
_SMALLEST_MIB = {"ext4": 4, "xfs": 300, "btrfs": 128}


def attach(image: Path) -> str:
    """A loop device of a file, for tests that detach it for a moment: of the last ones, which nobody else is given then."""
    for number in reversed(range(32, 64)):
        with suppress(LabError):  # somebody has it
            run("losetup", f"/dev/loop{number}", str(image))
            return f"/dev/loop{number}"
    raise LabError("no loop device is free")


@dataclass
class LoopFileSystem:
    """A mounted file system in a file; a context manager that always unmounts (which frees the loop device).

    ``kind`` ext4, xfs (with reflinks) or btrfs; ``directory`` gets the image and the mount point.
    """

    kind: str
    size_mib: int
    directory: Path

    def __post_init__(self) -> None:
        self.size_mib = max(self.size_mib, _SMALLEST_MIB[self.kind])
        self.image = self.directory / f"{self.kind}.img"
        self.path = self.directory / f"{self.kind}.mnt"

    def __enter__(self) -> LoopFileSystem:
        self.path.mkdir(parents=True)
        with open(self.image, "wb") as file:
            file.truncate(self.size_mib << 20)
        run(*_MKFS[self.kind], str(self.image))
        self.mount()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.path.ismount(self.path):
            self.unmount()

    def mount(self, options: str = "rw") -> None:
        """Mounts it; everybody may write, as QEMU runs as its own user."""
        run("mount", "-o", f"loop,{options}", str(self.image), str(self.path))
        if "ro" not in options.split(","):
            self.path.chmod(0o755)

    def unmount(self) -> None:
        """Unmounts it; the image stays and can be mounted again."""
        run("umount", str(self.path))

    def remount(self, mode: str) -> None:
        """``ro`` or ``rw``."""
        run("mount", "-o", f"remount,{mode}", str(self.path))

    def used_bytes(self) -> int:
        """Blocks in use on the file system, after everything is written out."""
        run("sync", "-f", str(self.path))
        status = os.statvfs(self.path)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def fill(self, leave_bytes: int) -> Path:
        """Takes all space but about ``leave_bytes`` with one file; remove it to get the space back."""
        filler = self.path / "filler"
        with open(filler, "wb") as file:
            end = 0
            for step in (1 << 20, 1 << 16, 1 << 12):
                with suppress(OSError):  # ENOSPC: go on with the smaller step
                    while os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize >= leave_bytes + step:
                        os.posix_fallocate(file.fileno(), end, step)
                        end += step
        return filler
