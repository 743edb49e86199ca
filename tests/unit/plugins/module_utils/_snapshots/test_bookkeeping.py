# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Definitions after a merge, what is remembered about layers, revert plans, and what a user may ask."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _journal, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import (
    bookkeeping,
    request,
    retained_layers,
    revert,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.layers import (
    Layer,
    LayeredSnapshot,
    Layers,
    SnapshotDisk,
    SnapshotKind,
)

REPLACED = {"/p/b": ("/p/a", "raw"), "/p/c": ("/p/a", "raw")}


def disk(body):
    return f'<disk type="file" device="disk">{body}<target dev="vda"/></disk>'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # the chain is not listed
        (
            '<driver name="qemu" type="qcow2"/><source file="/p/c"/>',
            '<driver name="qemu" type="raw"/><source file="/p/a"/>',
        ),
        # the active image is one that goes: all in between goes too
        (
            '<driver name="qemu" type="qcow2"/><source file="/p/c"/><backingStore type="file"><format type="qcow2"/>'
            '<source file="/p/b"/><backingStore type="file"><format type="raw"/><source file="/p/a"/><backingStore/>'
            "</backingStore></backingStore>",
            '<driver name="qemu" type="raw"/><source file="/p/a"/><backingStore/>',
        ),
        # one in the middle
        (
            '<driver name="qemu" type="qcow2"/><source file="/p/d"/><backingStore type="file"><format type="qcow2"/>'
            '<source file="/p/c"/><backingStore type="file"><format type="qcow2"/><source file="/p/b"/>'
            '<backingStore type="file"><format type="raw"/><source file="/p/a"/><backingStore/></backingStore>'
            "</backingStore></backingStore>",
            '<driver name="qemu" type="qcow2"/><source file="/p/d"/><backingStore type="file"><format type="raw"/>'
            '<source file="/p/a"/><backingStore/></backingStore>',
        ),
        ('<source file="/p/other"/>', '<source file="/p/other"/>'),
        ('<source pool="p" volume="v"/>', '<source pool="p" volume="v"/>'),
    ],
)
def test_replaced_images(before, after):
    wrap = "<devices>{}</devices>"
    domain = "<domain>{}</domain>"
    assert bookkeeping.replace_in_domain(domain.format(wrap.format(disk(before))), REPLACED) == domain.format(
        wrap.format(disk(after))
    )
    state = (
        "<domainsnapshot><disks><disk name='vda'><source file='{0}'/></disk></disks>"
        "<domain><devices>{1}</devices></domain><inactiveDomain><devices>{1}</devices></inactiveDomain></domainsnapshot>"
    )
    found = bookkeeping.replace_in_snapshot(state.format("/p/x", disk(before)), REPLACED)
    assert found == state.format("/p/x", disk(after)).replace("'", '"')


def test_another_parent():
    state = "<domainsnapshot><name>b</name>{}<disks/></domainsnapshot>"
    child = state.format("<parent><name>a</name></parent>")
    assert bookkeeping.with_parent(child, "z") == child.replace("<name>a<", "<name>z<")
    assert bookkeeping.with_parent(child, "") == state.format("")
    assert bookkeeping.with_parent(state.format(""), "") == state.format("")


@pytest.fixture
def state_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    return tmp_path


def test_layers_are_remembered_while_they_are_the_same_files(state_directory):
    image = state_directory / "a"
    image.write_bytes(b"1")
    assert retained_layers.load("u") == {}
    retained_layers.save("u", {})
    assert os.listdir(state_directory) == ["a"]
    retained_layers.save("u", {str(image): "<disk/>", "/nowhere": ""})
    assert retained_layers.load("u") == {str(image): "<disk/>"}
    image.rename(state_directory / "old")
    image.write_bytes(b"2")
    assert retained_layers.load("u") == {}
    (state_directory / "layers" / "u.json").write_text("{")
    assert retained_layers.load("u") == {}


def asked(**changes):
    values = {
        "vm": "web", "snapshot": "s", "state": "present", "memory": False, "quiesce": False, "description": None,
        "uri": "qemu:///system", "wait_timeout": "5m", "bandwidth": "8M", "check_mode": False, **changes,
    }  # fmt: skip
    return request.from_params(values)


def test_request():
    assert (asked().wait_timeout_s, asked().bandwidth_bps) == (300, 8 * 2**20)
    assert asked(snapshot="all", state="absent").wish is request.SnapshotWish.ABSENT
    for bad in ({"snapshot": ""}, {"snapshot": ".a"}, {"snapshot": "a/b"}, {"snapshot": "all"}, {"snapshot": "a\n"}):
        with pytest.raises(RefusedError):
            asked(**bad)
    with pytest.raises(RefusedError):
        asked(memory=True, quiesce=True)


DOMAIN = (
    "<domain><name>old</name><uuid>u</uuid><devices>"
    "<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/p/a'/><backingStore/><target dev='vda'/></disk>"
    "<disk type='file' device='disk'><source file='/p/data'/><target dev='vdb'/></disk>"
    "<disk type='file' device='cdrom'><source file='/p/cd.iso'/><target dev='sda'/></disk></devices></domain>"
)
STATE = (
    "<domainsnapshot><name>s</name><state>shutoff</state><memory snapshot='no'/><disks>"
    "<disk name='vda' snapshot='external'><source file='/p/a.s'/></disk><disk name='vdb' snapshot='no'/></disks>"
    f"{DOMAIN}</domainsnapshot>"
)


def layers_of(active="/p/a.s", files=("/p/a", "/p/a.s"), **changes):
    info = snapshots.describe(STATE, current=True)
    disks = (
        SnapshotDisk("vda", SnapshotKind.EXTERNAL, "/p/a", "/p/a.s", ""),
        SnapshotDisk("vdb", SnapshotKind.NONE, "/p/data", "", ""),
    )
    found = {path: Layer(path, "qcow2", "/p/a" if path != "/p/a" else "", 1) for path in files}
    values = {"active": {"vda": active}, "files": found, "other_vms": {}, **changes}
    return Layers("u", "new", False, False, (LayeredSnapshot(info, disks),), **values)


def test_revert_plan():
    plan = revert.plan_revert(layers_of(), "s", DOMAIN, 7)
    assert [(each.base_path, each.path) for each in plan.fresh] == [("/p/a", "/p/a.reverted-7.qcow2")]
    assert plan.discarded == ("/p/a.s",)
    assert "<name>new</name>" in plan.definition and "'" not in plan.definition
    assert '<driver name="qemu" type="qcow2"/><source file="/p/a.reverted-7.qcow2"/><target' in plan.definition
    assert plan.definition.count("/p/data") == plan.definition.count("/p/cd.iso") == 1
    assert '<source file="/p/a.reverted-7.qcow2"/>' in plan.state_xml and "/p/a.s" not in plan.state_xml
    assert _journal._decoded(revert.RevertPlan, json.loads(json.dumps(plan, default=asdict))) == plan


def test_what_a_revert_never_deletes():
    """The file of a disk that stands on nothing, or on something that no snapshot has frozen."""
    other = {
        "/p/other": Layer("/p/other", "qcow2", "/p/template", 1),
        "/p/template": Layer("/p/template", "qcow2", "", 1),
    }
    found = layers_of()
    for files in (other, {"/p/other": Layer("/p/other", "qcow2", "", 1)}):
        strange = replace(found, active={"vda": "/p/other"}, files={**found.files, **files})
        assert revert.plan_revert(strange, "s", DOMAIN, 7).discarded == ()


def test_a_snapshot_whose_file_is_written_to():
    with pytest.raises(RefusedError) as caught:
        revert.plan_revert(layers_of(active="/p/a"), "s", DOMAIN, 7)
    assert "damaged" in str(caught.value)


def test_a_snapshot_without_its_file():
    with pytest.raises(RefusedError) as caught:
        revert.plan_revert(layers_of(files=("/p/a.s",)), "s", DOMAIN, 7)
    assert "/p/a is not there" in str(caught.value).replace("its file ", "")
