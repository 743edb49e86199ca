# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Volume groups that `lvs` reports, linear, thin and shared, without a device mapper: their volumes are never active."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from ._run import run

_SETTINGS = """global { activation = 0 }
devices { use_devicesfile = 0 filter = [ "a|^/dev/loop|", "r|.*|" ] }
"""
_THIN = """
    thin_pool { id = "AAAAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAAA1" status = ["READ", "WRITE", "VISIBLE"] flags = [] segment_count = 1
      segment1 { start_extent = 0 extent_count = 2 type = "thin-pool" metadata = "thin_tmeta" pool = "thin_tdata"
        transaction_id = 1 chunk_size = 128 discards = "passdown" zero_new_blocks = 1 } }
    thin { id = "AAAAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAAA2" status = ["READ", "WRITE", "VISIBLE"] flags = [] segment_count = 1
      segment1 { start_extent = 0 extent_count = 2 type = "thin" thin_pool = "thin_pool" transaction_id = 0 device_id = 1 } }
    thin_tmeta { id = "AAAAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAAA3" status = ["READ", "WRITE"] flags = [] segment_count = 1
      segment1 { start_extent = 0 extent_count = 1 type = "striped" stripe_count = 1 stripes = [ "pv0", 2 ] } }
    thin_tdata { id = "AAAAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAAA4" status = ["READ", "WRITE"] flags = [] segment_count = 1
      segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = [ "pv0", 3 ] } }
"""


def is_there() -> bool:
    """Whether LVM's tools are installed."""
    return shutil.which("lvs") is not None


class VolumeGroup:
    """A volume group on a loop device with the volumes ``linear`` and ``thin``; ``shared``: with locks across hosts.

    A context manager. What looks at it needs ``environment``: settings for a host without a device mapper. With ``nodes`` its
    volumes have names in /dev, links to a loop device each, as if they were active.
    """

    def __init__(self, name: str, directory: Path, *, shared: bool = False, nodes: bool = False) -> None:
        self.name, self.directory, self._shared, self._nodes = name, directory, shared, nodes
        self.environment = {"LVM_SYSTEM_DIR": str(directory / "lvm"), "LVM_SUPPRESS_FD_WARNINGS": "1"}
        self._loops: list[str] = []

    def __enter__(self) -> VolumeGroup:
        settings = self.directory / "lvm"
        settings.mkdir(parents=True, exist_ok=True)
        (settings / "lvm.conf").write_text(_SETTINGS)
        os.environ.update(self.environment)
        device = self._loop("pv", 64)
        run("pvcreate", "-q", device)
        run("vgcreate", "-q", self.name, device)
        run("lvcreate", "-q", "-an", "-Zn", "-Wn", "-L", "8M", "-n", "linear", self.name)
        text = self.directory / "vg"
        run("vgcfgbackup", "-f", str(text), self.name)
        content = text.read_text()
        at = content.rindex("\t}\n")
        content = content[:at] + _THIN + content[at:]
        if self._shared:
            locks = 'lock_type = "sanlock"\nlock_args = "1.0.0:lvmlock"\nmax_lv'
            content = content.replace("max_lv", locks, 1)
        text.write_text(content)
        run("vgcfgrestore", "--force", "-f", str(text), self.name)
        if self._nodes:
            os.mkdir(f"/dev/{self.name}")
            for volume in ("linear", "thin"):
                os.symlink(self._loop(volume, 8), f"/dev/{self.name}/{volume}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(f"/dev/{self.name}", ignore_errors=True)
        for device in self._loops:
            run("losetup", "-d", device)
        for name in self.environment:
            del os.environ[name]

    def _loop(self, name: str, size_mib: int) -> str:
        image = self.directory / name
        with open(image, "wb") as file:
            file.truncate(size_mib << 20)
        self._loops.append(run("losetup", "-f", "--show", str(image)).strip())
        return self._loops[-1]
