# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Templates and thin clones in the plan of a restore."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import TemplateDisk, TemplateRequirement
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import ExistingVm, MadeFile
from ansible_collections.kvmops.backup.plugins.module_utils._template.find import BaseDisk, Template
from ansible_collections.kvmops.backup.plugins.module_utils._template.match import Match, Mismatch
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._restore.restore_values import (
    ORIGINAL,
    VDA,
    VDB,
    configuration,
    host,
    planned,
)

BASE = Template("u1", "base", True, False, 0, (BaseDisk("vda", "/t/a", "raw", 1 << 30),))
REQUIRED = TemplateRequirement("u1", "base", (TemplateDisk("vda", 1 << 30, "a"),))
CLONE = configuration(members=(replace(VDA, template_disk=1), VDB), requires=REQUIRED)
TEMPLATE = configuration(template=True, provides=REQUIRED.disks)


def test_the_lowest_layer_stands_on_the_template_where_it_is_now() -> None:
    made = planned(host(template=Match(BASE)), CLONE)
    assert [(f.member.name, f.backing, f.backing_format) for f in made.files] == [
        ("vda_0.qcow2", "/t/a", "raw"),
        ("vdb_0.qcow2", "", ""),
    ]


def test_flattened_it_stands_on_nothing() -> None:
    made = planned(host(template=Match(BASE)), CLONE, flatten=True)
    assert made.flat
    (flat,) = made.made
    assert isinstance(flat, MadeFile) and (flat.target, flat.flat, flat.format) == ("vda", True, "qcow2")
    below = next(file for file in made.files if file.path == flat.backing)
    assert (below.temporary, below.backing) == (True, "/t/a")


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("mismatch", Mismatch)
def test_each_mismatch_is_a_refusal(mismatch: Mismatch, flatten: bool) -> None:
    here = None if mismatch is Mismatch.NO_TEMPLATE else replace(BASE, disks=())
    found = Match(here, mismatch, f"{mismatch.value}: so it is")
    with pytest.raises(RefusedError, match=f"{mismatch.value}: so it is"):
        planned(host(template=found), CLONE, flatten=flatten)


def test_a_restored_template_is_a_template_and_stays_off() -> None:
    assert "kvmops-template" in planned(point=TEMPLATE).domain_xml
    assert "kvmops-template" in planned(point=TEMPLATE, name="copy").domain_xml
    assert "kvmops-template" not in planned().domain_xml
    with pytest.raises(RefusedError, match="is not started"):
        planned(point=TEMPLATE, start=True)


def test_a_template_that_clones_stand_on_is_not_replaced() -> None:
    clone = ExistingVm("db", "u2", files=frozenset({"/i/db", "/vms/web.qcow2"}))
    old = replace(ORIGINAL, template=True)
    with pytest.raises(RefusedError, match="cannot be replaced: db stand"):
        planned(host(vms=(old, clone)), TEMPLATE, force=True)
    assert planned(host(vms=(old,)), TEMPLATE, force=True).replaced == old


def test_a_template_on_a_template_is_replaced_though_others_stand_on_the_lower_one() -> None:
    lower = frozenset({"/vms/lower.qcow2"})
    old = replace(ORIGINAL, template=True, disk_files=ORIGINAL.disk_files | lower, own_disks=ORIGINAL.disk_files)
    base = ExistingVm("base", "u2", files=lower, disk_files=lower, own_disks=lower, template=True)
    sibling = ExistingVm("sibling", "u3", files=lower | {"/vms/s"}, disk_files=lower | {"/vms/s"})
    assert planned(host(vms=(old, base, sibling)), TEMPLATE, force=True).replaced == old
    clone = ExistingVm("clone", "u4", files=lower | old.own_disks | {"/vms/c"}, template=True)
    with pytest.raises(RefusedError, match="cannot be replaced: clone stand"):
        planned(host(vms=(old, base, sibling, clone)), TEMPLATE, force=True)


def test_a_template_may_take_the_place_of_one_that_is_gone_and_nobody_else_may() -> None:
    bases = frozenset({"/vms/web.qcow2"})
    clone = ExistingVm("db", "u2", files=bases | {"/i/db"}, missing_bases=bases)
    made = planned(host(vms=(clone,)), TEMPLATE)
    assert any(notice.code is Code.TEMPLATE_IN_USE and "db" in notice.text for notice in made.warnings)
    with pytest.raises(RefusedError, match="belongs to the VM db"):
        planned(host(vms=(clone,)))
    with pytest.raises(RefusedError, match="belongs to the VM db"):
        planned(host(vms=(replace(clone, missing_bases=frozenset()),)), TEMPLATE)
