# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pure parts of recovery: definitions, and what a view has of several layers."""

from __future__ import annotations

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import active_disks, original_disk, overlays
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.situation import SeenActive

OVERLAY = overlays.Overlay("vda", "/p/a.raw", "raw", "/p/a.ov")
AFTER = (
    "<domain><devices><disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='/p/a.ov'/>"
    "<backingStore type='file'><format type='raw'/><source file='/p/a.raw'/></backingStore><target dev='vda' bus='virtio'/></disk>"
    "<disk type='file' device='disk'><source file='/p/b.ov'/><target dev='vdb'/></disk></devices></domain>"
)


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        (
            "<disk type='volume' device='disk'><source pool='p' volume='a.raw'/><target dev='vda'/></disk>",
            "<disk type='volume' device='disk'><driver name='qemu' type='raw' cache='none'/><source pool='p' volume='a.raw'/>",
        ),
        (
            "<disk type='file'><source file='/p/a.raw'/><backingStore/><target dev='vda'/></disk>",
            "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='/p/a.raw'/><backingStore/>",
        ),
        (
            "",
            "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='/p/a.raw'/>",
        ),
    ],
)
def test_former_source(disk, expected):
    rest = "<target dev='vda' bus='virtio'/></disk><disk type='file' device='disk'><source file='/p/b.ov'/>"
    rest += "<target dev='vdb'/></disk></devices></domain>"
    found = original_disk.with_original_source(AFTER, OVERLAY, disk)
    assert found.replace('"', "'") == f"<domain><devices>{expected}{rest}"


def test_former_source_twice_is_the_same():
    disk = "<disk type='file'><source file='/p/a.raw'/><target dev='vda'/></disk>"
    once = original_disk.with_original_source(AFTER, OVERLAY, disk)
    assert original_disk.with_original_source(once, OVERLAY, disk) == once


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (("/p/c", "/p/b", "/p/a", "/p/template"), SeenActive.OVERLAY),
        (("/p/c", "/p/b"), SeenActive.OVERLAY),
        (("/p/c",), SeenActive.OVERLAY),
        (("/p/c", "/p/a"), SeenActive.OVERLAY),  # what REJOIN makes
        (("/p/c", "/p/other", "/p/a"), SeenActive.OTHER),
        (("/p/b", "/p/a"), SeenActive.OTHER),
        (("/p/a", "/p/template"), SeenActive.BASE),
        ((), SeenActive.NONE),
    ],
)
def test_what_a_view_has_of_several_layers(chain, expected):
    assert active_disks.seen_active(chain, overlays.Overlay("vda", "/p/a", "qcow2", "/p/c", ("/p/b",))) is expected
