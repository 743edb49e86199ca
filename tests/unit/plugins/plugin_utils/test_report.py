# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a report says, as values, as a page and as metrics. How the page looks is tested in a browser (targets/report)."""

from __future__ import annotations

import re
from datetime import timezone
from typing import Any
from xml.etree import ElementTree

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.plugin_utils._report import metrics, model, page
from ansible_collections.kvmops.backup.plugins.plugin_utils._report.model import State
from ansible_collections.kvmops.backup.tests.unit.plugins.plugin_utils.report_hosts import (
    DAY_S,
    NOW,
    archive,
    many,
    verified,
    vm,
)


def make(*hosts: dict[str, Any], **options: Any) -> model.Report:
    return model.report(hosts, now=NOW, **{"max_age": "26h", **options})


def host(vms: list[dict[str, Any]], archives: list[dict[str, Any]], name: str = "kvm01") -> dict[str, Any]:
    return {"host": name, "vms": vms, "archives": archives}


@pytest.mark.parametrize(
    ("found", "state"),
    [
        ([archive("a", NOW - 3600, 1)], State.GOOD),
        ([archive("a", NOW - 26 * 3600, 1)], State.GOOD),
        ([archive("a", NOW - 26 * 3600 - 1, 1)], State.LATE),
        ([], State.NEVER),
        ([archive("a", NOW + DAY_S, 1)], State.NEVER),  # made while the clock was wrong
        ([archive("a", NOW - 3600, 1, verified=verified(NOW - 60, ok=False, lost=(NOW - 3600,)))], State.DAMAGED),
        ([archive("a", NOW - 3600, 1, verified=verified(NOW - 60))], State.GOOD),
    ],
)
def test_state(found: list[dict[str, Any]], state: State) -> None:
    (only,) = make(host([vm("a")], found)).vms
    assert only.state is state


def test_a_lost_point_is_no_good_point() -> None:
    late = archive("a", NOW - 6 * DAY_S, 7, verified=verified(NOW - 60, ok=False, lost=(NOW - DAY_S, NOW)))
    (only,) = make(host([vm("a")], [late])).vms
    assert only.newest
    assert only.newest.at == NOW - 2 * DAY_S


def test_a_point_from_the_future_hides_no_age() -> None:
    found = [archive("a", NOW - 3 * DAY_S, 1), archive("a", NOW + 3650 * DAY_S, 1)]
    told = make(host([vm("a")], found))
    assert told.vms[0].state is State.LATE
    said = [
        line.rsplit(" ", 1)[1]
        for line in metrics.render(told).splitlines()
        if "last_good_point_timestamp_seconds{" in line
    ]
    assert said == [str(NOW - 3 * DAY_S)]


def test_an_objective_of_its_own() -> None:
    told = host([vm("db1"), vm("web1")], [archive("db1", NOW - 14 * 3600, 1), archive("web1", NOW - 14 * 3600, 1)])
    report = make(told, objectives={"db*": "13h", "*": "20h"})
    assert {each.name: each.state for each in report.vms} == {"db1": State.LATE, "web1": State.GOOD}
    with pytest.raises(RefusedError, match="objectives"):
        make(told, objectives={"db*": "soon"})


def test_a_place_that_hosts_share_is_counted_once() -> None:
    here = archive("a", NOW - 3600, 1)
    there = archive("a", NOW - 3600, 1, verified=verified(NOW - 60))
    (only,) = make(host([vm("a")], [here]), host([], [there], "kvm02")).vms
    assert only.host == "kvm01"
    assert len(only.archives) == 1
    assert only.archives[0].verified_at == NOW - 60


def test_trouble_comes_first() -> None:
    states = [each.state for each in make(*many(50)).vms]
    assert states == sorted(states, key=list(State).index)
    assert states[-1] is State.GONE
    assert set(states) == set(State)


def test_what_cannot_be_read_and_who_does_not_answer() -> None:
    unreadable = {"path": "/srv/x.tar", "vm": None, "warnings": ["it is no archive"]}
    report = make(host([], [unreadable]), {"host": "kvm02"}, {"host": "kvm03", "vms": None, "archives": None})
    assert report.unreadable == (("/srv/x.tar", "it is no archive"),)
    assert report.silent_hosts == ("kvm02", "kvm03")
    text = page.render(report, title="t", tz=timezone.utc)
    assert "kvm02, kvm03" in text
    assert "it is no archive" in text


def test_an_archive_of_others_counts_for_nothing() -> None:
    told = many(1)
    before = make(*told)
    forged = [{**entry, "path": "/srv/forged.tar", "not_ours": "it belongs to <mallory>"} for entry in told[0]["archives"]]
    for each in told:
        each["archives"] = list(each["archives"]) + forged
    report = make(*told)
    assert report.vms == before.vms and report.not_ours == (("/srv/forged.tar", "it belongs to <mallory>"),)
    assert "it belongs to &lt;mallory&gt;" in page.render(report, title="t", tz=timezone.utc)
    assert 'kvmops_backup_archives_not_ours{report="",place=""} 1\n' in metrics.render(report)


@pytest.mark.parametrize("count", [0, 5, 200])
def test_the_page_is_well_formed_and_stands_alone(count: int) -> None:
    text = page.render(make(*many(count)), title="Backups", tz=timezone.utc)
    body = text[text.index("<body>") : text.index("</html>")].replace("&ndash;", "-")
    ElementTree.fromstring(body)
    assert not re.search(r"(src|href)=|url\(|@import|<script|https?:", text)
    assert text.count('<svg class="timeline"') == count + 1  # and the VM that is gone


def test_what_vms_are_called_is_text() -> None:
    name = "<script>alert('1')</script>&\"x"
    text = page.render(make(host([vm(name)], [archive(name, NOW - 60, 2, warnings=["<b>"])], "<i>")), title="<u>")
    assert "<script" not in text
    assert "<b>" not in re.sub(r"<b>\d[^<]*</b>", "", text)
    assert "<i>" not in text.replace("<i style", "")
    assert "<u>" not in text
    assert "&lt;script&gt;" in text


def test_metrics() -> None:
    name = 'a"b\\c\nd'
    report = make(host([vm(name), vm("never")], [archive(name, NOW - DAY_S, 2)]), {"host": "kvm02"})
    text = metrics.render(report, name="night", place='/srv/"a"')
    common = 'report="night",place="/srv/\\"a\\""'
    labels = common + ',host="kvm01",vm="a\\"b\\\\c\\nd",uuid="uuid-of-a\\"b\\\\c\\nd"'
    assert f"kvmops_backup_last_good_point_timestamp_seconds{{{labels}}} {NOW}\n" in text
    assert f"kvmops_backup_points{{{labels}}} 2\n" in text
    assert f'kvmops_backup_ok{{{common},host="kvm01",vm="never",uuid="uuid-of-never"}} 0\n' in text
    assert f'timestamp_seconds{{{common},host="kvm01",vm="never"' not in text
    assert f"kvmops_backup_silent_hosts{{{common}}} 1\n" in text
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) kvmops_backup_\w+ .+|kvmops_backup_\w+(\{.*"\})? -?\d+', line), line


def test_what_is_attached_to_other_vms_is_told() -> None:
    held = [{"target": "vda", "receiver": "appliance", "expired": expired} for expired in (False, True)]
    (only,) = make(host([vm("a", attached=held)], [archive("a", NOW - 3600, 1)])).vms
    assert only.warnings == (
        "vda is attached to appliance: no backups meanwhile",
        "vda is attached to appliance, past its lease: no backups meanwhile",
    )
    assert "past its lease" in page.render(make(host([vm("a", attached=held)], [])), title="t")
