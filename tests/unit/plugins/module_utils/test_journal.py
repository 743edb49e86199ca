# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Journals: facts survive the death of their writer, torn ones do not count, nobody takes a living one."""

from __future__ import annotations

import os
import pathlib
import signal

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path):
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    return tmp_path


def everything(_facts):
    return True


def files(state):
    return sorted(path.name for path in (state / "journal").glob("*.json"))


def test_facts_are_merged_and_gone_when_done(state):
    journal = Journal.open("vm-1", "backup", {"a": 1})
    journal.record(a=2, b="ä")
    assert (journal.facts["key"], journal.facts["operation"], journal.facts["a"], journal.facts["b"]) == (
        "vm-1",
        "backup",
        2,
        "ä",
    )
    assert journal.facts["holder"]["pid"] == os.getpid()
    journal.done()
    journal.close()
    assert files(state) == []


def test_a_living_journal_is_nobodys():
    journal = Journal.open("vm-1", "backup", {})
    assert Journal.left_behind(everything) == []
    assert Journal.peek(everything) == []
    journal.done()


def test_a_dead_one_is_taken_once():
    Journal.open("vm-1", "backup", {"a": 1}).close()
    assert [facts["a"] for facts in Journal.peek(everything)] == [1]
    (taken,) = Journal.left_behind(everything)
    assert Journal.left_behind(everything) == []
    taken.record(b=2)
    taken.close()
    assert Journal.peek(everything)[0]["b"] == 2


def test_only_what_matches_is_taken():
    Journal.open("vm-1", "backup", {}).close()
    Journal.open("vm-2", "backup", {}).close()
    taken = Journal.left_behind(lambda facts: facts["key"] == "vm-2")
    assert [each.facts["key"] for each in taken] == ["vm-2"]
    assert [facts["key"] for facts in Journal.peek(everything)] == ["vm-1"]
    taken[0].done()


def test_oldest_first():
    for number in range(5):
        Journal.open("vm-1", "backup", {"number": number}).close()
    journals = Journal.left_behind(everything)
    assert [each.facts["number"] for each in journals] == list(range(5))
    for each in journals:
        each.done()


def test_every_torn_length_gives_the_facts_of_whole_lines(state):
    journal = Journal.open("vm-1", "backup", {"step": 0})
    first = os.path.getsize(journal.path)
    journal.record(step=1)
    journal.close()
    data = pathlib.Path(journal.path).read_bytes()
    for length in range(len(data) + 1):
        with open(journal.path, "wb") as file:
            file.write(data[:length])
        found = Journal.peek(everything)
        if length < first:
            assert found == []
        else:
            assert [facts["step"] for facts in found] == [1 if length == len(data) else 0], length


def test_a_torn_line_is_written_over(state):
    journal = Journal.open("vm-1", "backup", {"step": 0})
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(b'{"step": 1, "longer": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx')
    (taken,) = Journal.left_behind(everything)
    taken.record(step=2)
    taken.close()
    (facts,) = Journal.peek(everything)
    assert facts["step"] == 2 and "longer" not in facts


@pytest.mark.parametrize("line", [b"5", b'"a"', b"[7]", b"[" * 100_000])
def test_a_line_that_is_no_set_of_facts_ends_it(state, line):
    journal = Journal.open("vm-1", "backup", {"step": 0})
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(line + b"\n")
    (facts,) = Journal.peek(everything)
    assert facts["step"] == 0


def test_a_journal_without_a_fact_goes(state):
    Journal.open("vm-1", "backup", {}).close()
    path = state / "journal" / files(state)[0]
    path.write_bytes(b"")
    assert Journal.left_behind(everything) == []
    assert files(state) == []


def test_a_failed_write_leaves_the_facts_as_they_were(monkeypatch):
    journal = Journal.open("vm-1", "backup", {"step": 0})
    size = os.path.getsize(journal.path)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:10], offset))
    with pytest.raises(KvmopsError):
        journal.record(step=1)
    monkeypatch.undo()
    assert journal.facts["step"] == 0
    assert os.path.getsize(journal.path) == size
    journal.close()


def test_killed_while_recording(state):
    for _number in range(5):
        pid = os.fork()
        if pid == 0:
            journal = Journal.open("vm-1", "backup", {"step": 0})
            step = 0
            while True:
                step += 1
                journal.record(step=step)
        while not files(state):
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for each in Journal.left_behind(everything):
            assert each.facts["step"] >= 0
            each.done()
        assert files(state) == []
