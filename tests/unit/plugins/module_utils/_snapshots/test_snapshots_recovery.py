# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pure parts of recovery: definitions, journals' facts, files that may be removed."""

from __future__ import annotations

import json

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import former, overlays, way_back
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.situation import Seen

OVERLAY = overlays.Overlay("vda", "/p/a.raw", "raw", "/p/a.ov")
AFTER = (
    "<domain><devices><disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='/p/a.ov'/>"
    "<backingStore type='file'><format type='raw'/><source file='/p/a.raw'/></backingStore><target dev='vda' bus='virtio'/></disk>"
    "<disk type='file' device='disk'><source file='/p/b.ov'/><target dev='vdb'/></disk></devices></domain>"
)


def plan(**changes):
    values = {
        "vm_uuid": "u", "vm_name": "web", "name": "s", "description": "d", "overlays": (OVERLAY,),
        "excluded_targets": ("sda",), "memory_path": "", "quiesce": True, **changes,
    }  # fmt: skip
    return overlays.SnapshotPlan(**values)


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
    found = former.with_former_source(AFTER, OVERLAY, disk)
    assert found.replace('"', "'") == f"<domain><devices>{expected}{rest}"


def test_former_source_twice_is_the_same():
    disk = "<disk type='file'><source file='/p/a.raw'/><target dev='vda'/></disk>"
    once = former.with_former_source(AFTER, OVERLAY, disk)
    assert former.with_former_source(once, OVERLAY, disk) == once


def test_facts_survive_the_journal():
    owner = overlays.Owner(64055, 64055, 0o600, (("trusted.libvirt.security.dac", "+0:+0"),))
    formers = {"vda": overlays.Former("<disk/>", owner)}
    facts = json.loads(json.dumps(overlays.to_facts(plan(), formers)))
    assert overlays.plan_of(facts) == plan()
    assert overlays.formers_of(facts) == formers


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (("/p/c", "/p/b", "/p/a", "/p/template"), Seen.OVERLAY),
        (("/p/c", "/p/b"), Seen.OVERLAY),
        (("/p/c",), Seen.OVERLAY),
        (("/p/c", "/p/a"), Seen.OVERLAY),  # what REJOIN makes
        (("/p/c", "/p/other", "/p/a"), Seen.OTHER),
        (("/p/b", "/p/a"), Seen.OTHER),
        (("/p/a", "/p/template"), Seen.BASE),
        ((), Seen.NONE),
    ],
)
def test_what_a_view_has_of_several_layers(chain, expected):
    assert way_back._seen(chain, overlays.Overlay("vda", "/p/a", "qcow2", "/p/c", ("/p/b",))) is expected


def test_layers_in_between_survive_the_journal():
    several = plan(overlays=(overlays.Overlay("vda", "/p/a", "qcow2", "/p/c", ("/p/b",)),), expendable=("i",))
    assert overlays.plan_of(json.loads(json.dumps(overlays.to_facts(several, {})))) == several
    old = overlays.to_facts(plan(), {})
    del old["expendable"], old["overlays"][0]["between"]
    assert overlays.plan_of(old) == plan()
