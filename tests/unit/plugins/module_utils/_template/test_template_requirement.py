# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a clone's and a template's configuration say about the content of the template's disks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive import config
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Member,
    Role,
    TemplateDisk,
    TemplateRequirement,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError

DISKS = (TemplateDisk("vda", 1 << 30, "a" * 64), TemplateDisk("vdb", 1 << 20, "b" * 64))
REQUIRED = TemplateRequirement("5c1f5c54-0000-4000-8000-000000000001", "base", DISKS)
DOMAIN = "<domain type='qemu'><name>web</name><uuid>5c1f5c54-0000-4000-8000-000000000002</uuid></domain>"
LAYER = Member("vda_0.qcow2", Role.DISK, 4096, target="vda", image_format="qcow2", active=True, template_disk=1)


def point(**changes: object) -> Configuration:
    made = Configuration(1700000000, DOMAIN, "web", "5c1f5c54-0000-4000-8000-000000000002", (LAYER,), requires=REQUIRED)
    return replace(made, **changes)  # type: ignore[arg-type]


def read_back(configuration: Configuration) -> Configuration:
    data, _digest = config.encode(configuration)
    found = config.decode(data, "1700000000_web.xml")
    assert found is not None
    return found


def test_a_clone_names_the_disks_of_its_template_and_which_one_each_layer_stands_on() -> None:
    found = read_back(point())
    assert found.requires == REQUIRED
    assert found.members[0].template_disk == 1
    assert found.provides == ()


def test_a_template_names_its_own_disks() -> None:
    found = read_back(point(requires=None, members=(), template=True, provides=DISKS))
    assert (found.requires, found.template, found.provides) == (None, True, DISKS)


@pytest.mark.parametrize("number", [3, 99])
def test_a_layer_on_a_disk_that_the_template_does_not_have_is_refused(number: int) -> None:
    data, _digest = config.encode(point(members=(replace(LAYER, template_disk=number),)))
    with pytest.raises(HostileError, match="does not name"):
        config.decode(data, "1700000000_web.xml")


@pytest.mark.parametrize(
    ("disks", "fits"),
    [
        (DISKS, True),
        (tuple(replace(disk, target=f"sd{disk.target[-1]}") for disk in DISKS), True),
        (DISKS[::-1], False),
        (DISKS[:1], False),
        ((*DISKS, DISKS[0]), False),
        ((DISKS[0], replace(DISKS[1], digest="c" * 64)), False),
        ((DISKS[0], replace(DISKS[1], virtual_size_bytes=2 << 20)), False),
    ],
)
def test_only_the_same_content_in_the_same_order_fits(disks: tuple[TemplateDisk, ...], fits: bool) -> None:
    assert REQUIRED.fits(disks) is fits
