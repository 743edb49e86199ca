# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What vm_backup_many returns and says; how it runs is tested with real VMs (targets/weekly_backup, targets/awx)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleConnectionFailure

from ansible_collections.kvmops.backup.plugins.action import vm_backup_many
from ansible_collections.kvmops.backup.plugins.action.vm_backup_many import ActionModule, outcome, summary
from ansible_collections.kvmops.backup.plugins.plugin_utils import _progress_action as base

GOOD: dict[str, Any] = {
    "changed": True,
    "mode": "full",
    "bytes_written": 2048,
    "duration": 1.5,
    "invocation": {"module_args": {}},
}
DONE: dict[str, Any] = {"changed": False, "mode": "none", "reason": "young enough"}
BAD: dict[str, Any] = {"failed": True, "msg": "The VM c: it is not there.", "exception": "Traceback"}


def test_summary_keeps_the_order_and_names_those_that_failed() -> None:
    found = summary([{"vm": "a"}, {"vm": "b"}, {"vm": "c"}], [GOOD, DONE, BAD])
    assert (found["changed"], found["failed"]) == (True, True)
    assert found["msg"] == "1 of 3 VMs failed: c"
    assert [(each["vm"], each["failed"], each["changed"]) for each in found["backups"]] == [
        ("a", False, True),
        ("b", False, False),
        ("c", True, False),
    ]
    assert not any("exception" in each or "invocation" in each for each in found["backups"])


def test_summary_of_success() -> None:
    assert "failed" not in summary([{"vm": "b"}], [DONE])
    assert summary([{"vm": "b"}], [DONE])["changed"] is False
    assert summary([], []) == {"changed": False, "backups": []}


def test_warnings_are_text() -> None:
    """Newer releases of Ansible have objects for them."""
    typed = SimpleNamespace(event=SimpleNamespace(msg="slow"))
    (only,) = summary([{"vm": "a"}], [{**GOOD, "warnings": ["plain", typed]}])["backups"]
    assert only["warnings"] == ["plain", "slow"]


def test_warnings_of_a_module_are_read_here() -> None:
    """As ansible-core 2.19 and later print them; older ones print text."""
    event = {"__ansible_type": "Event", "msg": "the guest was slow"}
    printed = {**GOOD, "warnings": ["plain", {"__ansible_type": "WarningSummary", "event": event}], "archive": {"points": [1]}}
    found = vm_backup_many._plain(printed)
    assert found == {**GOOD, "warnings": ["plain", "the guest was slow"], "archive": {"points": [1]}}
    assert summary([{"vm": "a"}], [found])["backups"][0]["warnings"] == ["plain", "the guest was slow"]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (GOOD, "full, 2.0 KiB written, 1.5 s"),
        (DONE, "nothing to do, young enough"),
        (BAD, "FAILED: The VM c: it is not there."),
    ],
)
def test_outcome(result: dict[str, Any], text: str) -> None:
    assert outcome(result) == text


class _Host(ActionModule):
    """Runs backups without a host: `lost` are the numbers of the looks and starts at which it does not answer."""

    def __init__(self, lost: set[int]) -> None:
        self._host, self._lost, self._count = "kvm01", lost, 0
        self.begun: list[str] = []
        self.cancelled: list[str] = []

    def _answer(self) -> None:
        self._count += 1
        if self._count in self._lost:
            raise AnsibleConnectionFailure("lost")

    def _begin(self, index: int, arguments: dict[str, Any], task_vars: dict[str, Any]) -> Any:
        self._answer()
        self.begun.append(arguments["vm"])
        reporter = base.Reporter("title", 0.0)
        return vm_backup_many._Running(index, base.Job(arguments["vm"], "", "", ""), reporter, 0.0)

    def _poll_all(self, jobs: Any) -> list[base.Poll]:
        self._answer()
        return [base.Poll(None, {**GOOD, "of": job.id}) for job in jobs]

    def _remove(self, job: base.Job) -> None:
        pass

    def _cancel_all(self, jobs: Any) -> None:
        self.cancelled += [job.id for job in jobs]


def test_a_host_that_does_not_answer_for_a_moment_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is a start or a look."""
    monkeypatch.setattr(base, "FIRST_POLL_S", 0.001)
    monkeypatch.setattr(vm_backup_many, "_BETWEEN_STARTS_S", 0)
    tasks = [{"vm": name} for name in "abc"]
    for moment in range(2, 12):
        host = _Host({moment})
        assert [each["of"] for each in host._run_all(tasks, 2, {})] == ["a", "b", "c"]
        assert host.begun == ["a", "b", "c"] and host.cancelled == []
    host = _Host({1})
    with pytest.raises(AnsibleConnectionFailure):
        host._run_all(tasks, 2, {})
    monkeypatch.setattr(base, "LOST_CONNECTION_LIMIT_S", 0.05)
    host = _Host(set(range(2, 10000)))
    with pytest.raises(AnsibleConnectionFailure):
        host._run_all(tasks, 2, {})
    assert host.cancelled == ["a"]
