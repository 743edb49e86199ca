# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which VMs are meant: names, globs, and expressions over their facts."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _vms
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress

KNOWN: list[dict[str, Any]] = [
    {"name": "web01", "uuid": "u1", "state": "running", "autostart": True, "snapshots": [], "vcpus": 0},
    {"name": "web02", "uuid": "u2", "state": "shut off", "autostart": True, "snapshots": ["a"], "vcpus": 1},
    {"name": "Web[1]", "uuid": "u3", "state": "running", "autostart": False, "snapshots": [], "vcpus": 2},
]


def test_what_cannot_be_read_of_one_vm_hides_no_other() -> None:
    """The weekly policy asks for all VMs: a damaged file of one must not cost the night's backup of all."""

    def damaged() -> None:
        raise KvmopsError("The record /x.json", "it cannot be read")

    told: list[str] = []
    context = Context(Progress(), lambda notice: told.append(notice.text))
    assert _vms._readable("what of VM web is attached", damaged, context) is None
    assert told == ["what of VM web is attached is not known: The record /x.json: it cannot be read"]
    assert _vms._readable("x", lambda: 5, context) == 5 and len(told) == 1


@pytest.mark.parametrize(
    ("wanted", "uuids", "unmatched"),
    [
        (None, ["u1", "u2", "u3"], []),
        ([], [], []),
        (["web01"], ["u1"], []),
        (["u2"], ["u2"], []),
        (["web*", "web01"], ["u1", "u2"], []),
        (["Web[1]"], ["u3"], []),  # a name before it is a glob
        (["web0[!1]"], ["u2"], []),
        (["web0?", "db*", "mail"], ["u1", "u2"], ["db*", "mail"]),
        (["web"], [], ["web"]),
    ],
)
def test_choose(wanted: list[str] | None, uuids: list[str], unmatched: list[str]) -> None:
    chosen, missed = _vms.choose(KNOWN, wanted)
    assert ([facts["uuid"] for facts in chosen], missed) == (uuids, unmatched)


@pytest.mark.parametrize(
    ("expression", "uuids"),
    [
        ("state == 'running'", ["u1", "u3"]),
        ("state == 'running' && autostart", ["u1"]),
        ("snapshots", ["u2"]),
        ("vcpus", ["u1", "u2", "u3"]),  # every number is true in JMESPath
        ("nothing", []),
        ("!nothing && starts_with(name, 'web')", ["u1", "u2"]),
    ],
)
def test_select(expression: str, uuids: list[str]) -> None:
    assert [facts["uuid"] for facts in _vms.select(KNOWN, expression)] == uuids


@pytest.mark.parametrize("wrong", ["state ==", "nonsense(name)", "starts_with(vcpus, 'a')"])
def test_what_is_no_expression_is_refused(wrong: str) -> None:
    with pytest.raises(RefusedError, match="select"):
        _vms.select(KNOWN, wrong)
