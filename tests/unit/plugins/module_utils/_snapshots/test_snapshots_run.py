# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which disks have no overlay, and so no snapshot: each with its reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import run

FILE = "<driver type='{format}'/><source file='{path}'/>"


@pytest.mark.parametrize(
    ("kind", "inside", "why"),
    [
        ("file", FILE.format(format="qcow2", path="HERE/there"), ""),
        ("file", FILE.format(format="qcow2", path="HERE/missing"), "its file is not there. Bring it back"),
        ("file", FILE.format(format="vmdk", path="HERE/there"), "format vmdk"),
        ("file", FILE.format(format="qcow2", path="HERE/there") + "<transient/>", "it is transient"),
        ("block", "<source dev='/dev/null'/>", "it is no file.* move this one to a file"),
        ("block", "<source dev='/dev/zvol/tank/web'/>", "it is no file.* take it out of the VM"),
        ("network", "<source protocol='nbd' name='e'/>", "it is no file"),
    ],
)
def test_disks_that_a_snapshot_cannot_have(kind: str, inside: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"")
    xml = f"<disk type='{kind}' device='disk'>{inside}<target dev='vdb'/></disk>".replace("HERE", str(tmp_path))
    [disk] = domain_xml.parse(f"<domain><devices>{xml}</devices></domain>").disks
    vm = SimpleNamespace(vm_name="web")
    if not why:
        run._require_file(disk, disk.path, vm)  # type: ignore[arg-type]
        return
    with pytest.raises(RefusedError, match=f"^The disk vdb .* of web: .*{why}"):
        run._require_file(disk, disk.path, vm)  # type: ignore[arg-type]
