# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is mounted, and what should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _mounts
from ansible_collections.kvmops.backup.plugins.module_utils._mounts import Expected

MOUNTS = r"""21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
30 21 0:25 / /mnt/with\040space rw,relatime - nfs4 server:/export rw,vers=4.2
31 21 7:0 / /mnt/ro ro,relatime - xfs /dev/loop0 rw
32 31 7:1 / /mnt/ro/inner rw - zfs tank/data rw,xattr
33 21 7:2 / /mnt/ro rw,relatime - btrfs /dev/loop2 rw
34 21 0:40 / /mnt/demand rw - autofs systemd-1 rw
35 21 0:41 / /mnt/nas rw - autofs systemd-1 rw
36 35 0:42 / /mnt/nas rw - cifs //nas/backup rw
"""


def test_mounts():
    mounts = _mounts.parse(MOUNTS)
    assert mounts[1] == _mounts.Mount("/mnt/with space", "nfs4", "server:/export", False, "0:25")
    assert mounts[2].read_only and not mounts[3].read_only
    assert _mounts.of("/mnt/with space/a", mounts).fs_type == "nfs4"
    assert _mounts.of("/mnt/with spaces", mounts).fs_type == "ext4"
    assert _mounts.of("/mnt/ro/a", mounts).fs_type == "btrfs"  # the later mount covers the earlier one
    assert _mounts.of("/mnt/ro/inner", mounts).fs_type == "zfs"


FSTAB = r"""# comment
UUID=1-2 / ext4 errors=remount-ro 0 1
nas:/export  /srv/backup  nfs4  noauto,_netdev  0 0
LABEL=USB /mnt/my\040disk exfat defaults
/swapfile none swap sw 0 0
broken
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host's configuration."""

    def write(path: str, text: str) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    write("etc/fstab", FSTAB)
    write("etc/systemd/system/srv-images.mount", "[Unit]\n# Where=/no\n[Mount]\nWhat=/dev/sdb1\nWhere = /srv/images\n")
    write("etc/systemd/system/srv-late.automount", "[Automount]\nWhere=/srv/late\n")
    package = write("usr/lib/systemd/system/srv-package.mount", "[Mount]\nWhat=x\nWhere=/srv/package\n")
    write("usr/lib/systemd/system/tmp.mount", "[Mount]\nWhat=tmpfs\nWhere=/tmp\n")  # nothing wants it
    machines = write("usr/lib/systemd/system/m.mount", "[Unit]\nConditionPathExists=/m.raw\n[Mount]\nWhere=/srv/m\n")
    masked = write("run/systemd/generator/srv-masked.mount", "[Mount]\nWhat=y\nWhere=/srv/masked\n")
    (tmp_path / "etc/systemd/system" / masked.name).symlink_to("/dev/null")
    (tmp_path / "etc/systemd/system/local-fs.target.wants").mkdir()
    (tmp_path / "etc/systemd/system/local-fs.target.wants" / package.name).symlink_to(package)
    (tmp_path / "usr/lib/systemd/system/x.target.requires").mkdir()
    (tmp_path / "usr/lib/systemd/system/x.target.requires" / machines.name).symlink_to(machines)
    return tmp_path


def test_what_the_host_says_is_to_be_mounted(root: Path):
    found = {each.mount_point: each.source for each in _mounts.expected(str(root))}
    assert found == {
        "/": "UUID=1-2",
        "/srv/backup": "nas:/export",
        "/mnt/my disk": "LABEL=USB",
        "/srv/images": "/dev/sdb1",
        "/srv/late": "what is mounted on demand",
        "/srv/package": "x",
    }
    assert _mounts.expected(str(root / "nowhere")) == ()


WANTED = (
    Expected("/", "/dev/vda", "/etc/fstab"),
    Expected("/mnt/with space", "server:/export", "/etc/fstab"),
    Expected("/mnt/ro/inner", "tank/data", "/etc/fstab"),
    Expected("/srv/backup", "nas:/export", "/etc/fstab"),
    Expected("/mnt/ro/inner/deep", "x", "/etc/fstab"),
)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("/var/backups", ""),
        ("/srv/backup", "nas:/export"),
        ("/srv/backup/vms", "nas:/export"),
        ("/srv/backups", ""),
        ("/mnt/with space/a", ""),
        ("/mnt/ro/inner", ""),
        ("/mnt/ro/inner/deep/a", "x"),
        ("/mnt/demand/a", "what is mounted on demand"),
        ("/mnt/nas/a", ""),
    ],
)
def test_what_is_not_mounted(path: str, source: str):
    missing = _mounts.missing(path, _mounts.parse(MOUNTS), WANTED)
    assert (missing.source if missing else "") == source


def test_a_directory_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inode = tmp_path.stat().st_ino
    here = _mounts.of(str(tmp_path), _mounts.now())
    assert _mounts.is_still(str(tmp_path), inode, "")
    assert not _mounts.is_still(str(tmp_path), inode + 1, str(here))
    assert not _mounts.is_still(str(tmp_path / "gone"), inode, str(here))
    sshfs = _mounts.Mount(str(tmp_path), "fuse.sshfs", "nas:/b", False, "0:50")  # other inodes after each mount
    monkeypatch.setattr(_mounts, "now", lambda: (sshfs,))
    assert _mounts.is_still(str(tmp_path), inode + 1, str(sshfs))
    assert not _mounts.is_still(str(tmp_path), inode + 1, str(here))
