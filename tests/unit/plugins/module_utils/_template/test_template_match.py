# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which template fits a thin clone, and the three reasons why none does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import TemplateDisk, TemplateRequirement
from ansible_collections.kvmops.backup.plugins.module_utils._image.probe import ImageError
from ansible_collections.kvmops.backup.plugins.module_utils._template.find import BaseDisk, Template
from ansible_collections.kvmops.backup.plugins.module_utils._template.match import Match, Mismatch, match

GIB = 1 << 30
REQUIRED = TemplateRequirement("u1", "base", (TemplateDisk("vda", GIB, "a"), TemplateDisk("vdb", GIB, "b")))


def disk(path: str, size: int = GIB) -> BaseDisk:
    """A disk whose digest is its path."""
    return BaseDisk("vd" + path[-1], path, "qcow2", size)


def template(*disks: BaseDisk, uuid: str = "u1", name: str = "base", running: bool = False) -> Template:
    return Template(uuid, name, True, running, 0, disks)


def digest(found: BaseDisk) -> str | None:
    return found.path


FITTING = template(disk("a"), disk("b"))


def test_the_template_with_the_same_content_fits() -> None:
    assert match(REQUIRED, [FITTING], digest) == Match(FITTING)


def test_neither_name_nor_uuid_matter_when_the_content_fits() -> None:
    other = replace(FITTING, uuid="u9", name="renamed")
    decoy = template(disk("x"), disk("b"))
    assert match(REQUIRED, [decoy, other], digest).template == other


@pytest.mark.parametrize(
    ("here", "mismatch"),
    [
        ([], Mismatch.NO_TEMPLATE),
        ([template(disk("x"), disk("y"), uuid="u2", name="other")], Mismatch.NO_TEMPLATE),
        ([template(disk("x"), uuid="u2", name="other")], Mismatch.NO_TEMPLATE),
        ([template(disk("x"), disk("b"))], Mismatch.DIFFERS),
        ([template(disk("x"), disk("b"), uuid="u2", name="renamed")], Mismatch.DIFFERS),
        ([template(disk("a"), disk("b", 2 * GIB))], Mismatch.DIFFERS),
        ([template(disk("a"), disk("b"), running=True)], Mismatch.DIFFERS),
        ([replace(FITTING, snapshots=1)], Mismatch.DIFFERS),
        ([replace(FITTING, suspended=True)], Mismatch.DIFFERS),
        ([template(disk("a"), disk("b", 0))], Mismatch.DIFFERS),
        ([template(disk("b"), disk("a"))], Mismatch.DISKS),
        ([template(disk("b"), disk("a"), uuid="u2", name="renamed")], Mismatch.DISKS),
        ([template(disk("a"))], Mismatch.DISKS),
        ([template(disk("a"), disk("b"), disk("c"))], Mismatch.DISKS),
    ],
)
def test_each_of_three_reasons(here: list[Template], mismatch: Mismatch) -> None:
    found = match(REQUIRED, here, digest)
    assert found.mismatch is mismatch
    assert found.text.startswith(f"{mismatch.value}: ")


def test_another_order_is_told_by_sizes_alone() -> None:
    required = replace(REQUIRED, disks=(TemplateDisk("vda", GIB, "a"), TemplateDisk("vdb", 2 * GIB, "b")))
    asked: list[str] = []

    def never(found: BaseDisk) -> str | None:
        asked.append(found.path)
        return None

    here = template(disk("b", 2 * GIB), disk("a"))
    assert match(required, [here], never).mismatch is Mismatch.DISKS
    assert not asked


def test_what_was_not_read_is_left_open() -> None:
    known: Mapping[str, str] = {"a": "a"}
    found = match(REQUIRED, [FITTING], lambda each: known.get(each.path))
    assert (found.unchecked, found.mismatch, found.template) == (True, None, FITTING)
    assert "not checked here" in found.text


def test_another_template_that_was_not_read_does_not_hide_what_is_wrong_with_the_one_that_is_meant() -> None:
    other = template(disk("x"), disk("y"), uuid="u2", name="other")
    found = match(REQUIRED, [other, replace(FITTING, running=True)], lambda _disk: None)
    assert found.mismatch is Mismatch.DIFFERS and not found.unchecked
    assert found.text.startswith("template differs: the template base is running")


def test_another_template_that_cannot_be_read_does_not_matter() -> None:
    def in_use(found: BaseDisk) -> str | None:
        if found.path in "xy":
            raise ImageError("disk image", "it is in use")
        return found.path

    other = template(disk("x"), disk("y"), uuid="u2", name="other")
    assert match(REQUIRED, [other, FITTING], in_use) == Match(FITTING)
    assert match(REQUIRED, [other, replace(FITTING, running=True)], in_use).text.startswith(
        "template differs: the template base"
    )
    assert match(REQUIRED, [other], in_use).mismatch is Mismatch.NO_TEMPLATE
    assert match(REQUIRED, [replace(other, name="base")], in_use).mismatch is Mismatch.DIFFERS
