# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever a host has told: a report, or an error of the filter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from hypothesis import strategies as st

from ansible_collections.kvmops.backup.plugins.filter.report_html import report_html
from ansible_collections.kvmops.backup.plugins.filter.report_metrics import report_metrics
from ansible_collections.kvmops.backup.tests.unit.fuzz import fuzz, json_values
from ansible_collections.kvmops.backup.tests.unit.plugins.plugin_utils import report_hosts

NOW = report_hosts.NOW


def told() -> list[dict[str, Any]]:
    """By one host: a VM and its archive."""
    return [
        {
            "host": "kvm01",
            "vms": [report_hosts.vm("web")],
            "archives": [report_hosts.archive("web", NOW - 7 * report_hosts.DAY_S)],
        }
    ]


@st.composite
def odd_hosts(draw: st.DrawFn) -> list[Any]:
    """The same with something else in one place or two."""
    found = copy.deepcopy(told())
    for _dummy in range(draw(st.integers(1, 2))):
        places: list[tuple[Any, Any]] = []

        def collect(value: Any, places: list[tuple[Any, Any]]) -> None:
            for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
                places.append((value, key))
                collect(value[key], places)

        collect(found, places)
        container, key = draw(st.sampled_from([*places, (found, 0)]))
        container[key] = draw(json_values("web", "host", "point", "2026-11-22T23:20:00Z"))
    return found


def test_a_host_that_tells_what_it_should() -> None:
    assert "web" in report_html(told(), now=NOW) and "web" in report_metrics(told(), now=NOW)


@pytest.mark.parametrize("odd", [5, [5], "x", {"a": 1}, [[]]])
@pytest.mark.parametrize("key", ["vms", "archives"])
def test_odd_facts_are_an_error_of_the_filter(key: str, odd: Any) -> None:
    hosts = told()
    hosts[0][key] = odd
    for use in (report_html, report_metrics):
        with pytest.raises(AnsibleFilterError, match="report_"):
            use(hosts, now=NOW)


@fuzz(0.02, odd_hosts())
def test_fuzz_what_hosts_tell(hosts: list[Any]) -> None:
    for use in (report_html, report_metrics):
        try:
            use(hosts, now=NOW)
        except AnsibleFilterError as error:
            assert str(error)
