# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the chain of a thin clone ends, what its point says, and when an increment can stand on it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Member,
    Role,
    SnapshotNode,
    TemplateDisk,
    TemplateRequirement,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup import chain, template_base
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import Mode
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError, SourceError
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import describe
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._template.find import BaseDisk, Template
from ansible_collections.kvmops.backup.plugins.module_utils._vm_state import VmState
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._backup.test_plan import facts, image, make

GIB = 2**30
BASE = Template(
    "u1", "base", True, False, 0, (BaseDisk("vda", "/t/a", "qcow2", GIB), BaseDisk("vdb", "/t/b", "raw", GIB))
)
REQUIRED = TemplateRequirement("u1", "base", (TemplateDisk("vda", GIB, "a"), TemplateDisk("vdb", GIB, "b")))


@pytest.fixture
def look(monkeypatch):
    """``look(owners, images…)``: what thin.look makes of these images on a host where these VMs own files."""
    monkeypatch.setattr(qemu_img, "is_in_use", lambda path, fmt: False)

    def call(owners, *images):
        host = SimpleNamespace(owners=lambda paths, but: {p: owners[p] for p in paths if p in owners})
        return template_base.look(host, "web", "u9", {each.path: each for each in images})

    return call


def test_a_vm_without_a_template_keeps_all_its_layers(look):
    found, images = look({}, image("/i/top", backing_path="/i/low"), image("/i/low"))
    assert found == template_base.Thin() and [each.backing_path for each in images.values()] == ["/i/low", ""]


def test_the_chain_ends_above_the_template(look):
    layers = [image("/i/top", backing_path="/i/low"), image("/i/low", backing_path="/t/b"), image("/t/b", "raw")]
    found, images = look({"/t/b": BASE}, *layers)
    assert found.base == BASE and not found.base_trouble
    assert [(i.path, i.backing_path, i.template_disk) for i in images.values()] == [
        ("/i/top", "/i/low", 0),
        ("/i/low", "", 2),
    ]


def test_of_a_template_on_a_template_the_nearer_one_counts(look):
    above = replace(BASE, uuid="u2", name="above", disks=(BaseDisk("vda", "/t/above", "qcow2", GIB),))
    layers = [image("/i/top", backing_path="/t/above"), image("/t/above", backing_path="/t/a"), image("/t/a")]
    found, images = look({"/t/a": BASE, "/t/above": above}, *layers)
    assert found.base == above and list(images) == ["/i/top"]


def test_two_templates_are_refused(look):
    other = replace(BASE, uuid="u2", name="other", disks=(BaseDisk("vda", "/o/a", "qcow2", GIB),))
    layers = [image("/i/1", backing_path="/t/a"), image("/i/2", backing_path="/o/a"), image("/t/a"), image("/o/a")]
    with pytest.raises(RefusedError, match="base and other"):
        look({"/t/a": BASE, "/o/a": other}, *layers)


def test_a_disk_of_a_vm_without_the_mark_is_stored_and_named(look):
    plain = replace(BASE, marked=False, name="plain")
    found, images = look({"/t/a": plain}, image("/i/top", backing_path="/t/a"), image("/t/a"))
    assert found.base is None and found.foreign == {"/t/a": "plain"} and list(images) == ["/i/top", "/t/a"]


def test_a_template_that_runs_or_is_written_to_is_trouble(look, monkeypatch):
    layers = [image("/i/top", backing_path="/t/a"), image("/t/a")]
    found, _images = look({"/t/a": replace(BASE, running=True)}, *layers)
    assert "is running" in found.base_trouble
    with pytest.raises(RefusedError, match="template base is running"):
        make(facts(thin=found))
    found, _images = look({"/t/a": replace(BASE, suspended=True)}, *layers)
    assert "managed-save image" in found.base_trouble
    monkeypatch.setattr(qemu_img, "is_in_use", lambda path, fmt: True)
    found, _images = look({"/t/a": BASE}, *layers)
    assert "a process writes" in found.base_trouble


def test_a_template_that_has_lost_a_disk_is_named():
    """Also one that the clone does not stand on: the content of a template is that of all its disks."""
    with pytest.raises(SourceError, match="template base: its disk /t/a is not there"):
        template_base.with_content(template_base.Thin(base=BASE), None, Progress())


def test_the_point_names_the_template_and_holds_the_clones_own_layers():
    own = image(template_disk=1)
    made = make(
        facts(images=[own], thin=template_base.Thin(base=BASE, requires=REQUIRED, files={"/t/a": (1,)})), incrementable=True
    )
    assert made.configuration.requires == REQUIRED and not made.configuration.template and made.stays
    assert [(m.member.name, m.member.role, m.member.template_disk) for m in made.members] == [
        ("vda_0.qcow2", Role.DISK, 1)
    ]
    assert made.below == {"/t/a": (1,)}


def test_a_template_is_never_incrementable():
    marked = template_base.Thin(marked=True, provides=REQUIRED.disks)
    made = make(facts(running=False, thin=marked), incrementable=True, mode=Mode.AUTO)
    assert not made.stays and made.snapshot is None
    assert made.configuration.template and made.configuration.provides == REQUIRED.disks
    assert made.warnings == ()
    assert any(
        "not incrementable" in notice.text for notice in make(facts(running=False, thin=marked), incrementable=True).warnings
    )
    with pytest.raises(RefusedError, match="is a template and is running"):
        make(facts(thin=marked))


STATE = (
    "<domainsnapshot><name>k1</name><creationTime>2</creationTime><state>running</state><memory snapshot='no'/><disks>"
    "<disk name='vda' snapshot='external'><source file='/i/k1'/></disk></disks><domain><devices/></domain></domainsnapshot>"
)
LAYER = Member(
    "vda_0.qcow2", Role.DISK, 1, target="vda", virtual_size_bytes=GIB, former_path="/i/low", active=True, template_disk=1
)  # fmt: skip
POINT = Configuration(
    10, "<domain/>", "web", "u9", (LAYER,), incrementable=True, requires=REQUIRED,
    snapshots=(SnapshotNode("k1", STATE, current=True),),
)  # fmt: skip
NOW = chain.VmNow(
    "web", "u9", (describe(STATE, current=True),),
    (chain.DiskNow("vda", ("/i/k1", "/i/low"), GIB, ("/i/k1", "/i/low"), 1),), REQUIRED,
)  # fmt: skip


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (NOW, ""),
        (replace(NOW, requires=replace(REQUIRED, uuid="u2", name="renamed")), ""),
        (replace(NOW, requires=replace(REQUIRED, disks=REQUIRED.disks[::-1])), "is not what it was"),
        (replace(NOW, requires=None), "no longer stands on a template"),
        (replace(NOW, disks=(replace(NOW.disks[0], template_disk=2),)), "another disk of the template"),
    ],
)
def test_an_increment_needs_the_template_as_it_was(now, reason):
    found = chain.judge((POINT,), now, VmState())
    assert (reason in found) if reason else not found


def test_a_vm_that_was_put_on_a_template_since_needs_a_full():
    point = replace(POINT, requires=None, members=(replace(LAYER, template_disk=0),))
    assert "stands on the template base now" in chain.judge((point,), NOW, VmState())
