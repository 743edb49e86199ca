# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Journals: facts survive the death of their writer, torn ones do not count, nobody takes a living one."""

from __future__ import annotations

import os
import pathlib
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Optional

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, JournalError


class Colour(str, Enum):
    """Kept as its value."""

    RED = "red"


@dataclass(frozen=True)
class Part:
    """A value in facts."""

    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Of an operation that exists in these tests only."""

    step: int = 0
    text: str = ""
    colour: Optional[Colour] = None
    parts: tuple[Part, ...] = ()
    by_name: Mapping[str, Part] = field(default_factory=dict)
    pairs: tuple[tuple[str, int], ...] = ()
    place: Optional[Mapping[str, Any]] = None


@dataclass(frozen=True)
class NewerFacts:
    """The same operation in another release."""

    weight: int


FULL = Facts(
    2, "ä", Colour.RED, (Part("a", (1, 2)), Part("b")), {"c": Part("c")}, (("d", 1), ("e", 2)), {"inode": 5, "mount": "x"}
)


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path):
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    return tmp_path


def everything(_found):
    return True


def peeked():
    """The facts of all journals of dead runs."""
    return [found.facts(Facts) for found in Journal.peek(everything)]


def files(state):
    return sorted(path.name for path in (state / "journal").glob("*.json"))


def test_facts_are_changed_and_gone_when_done(state):
    journal = Journal.open("vm-1", "backup", Facts(1))
    journal.record(step=2, text="ä")
    assert journal.facts == Facts(2, "ä")
    assert (journal.head.key, journal.head.operation, journal.head.holder.pid) == ("vm-1", "backup", os.getpid())
    journal.done()
    journal.close()
    assert files(state) == []


@pytest.mark.parametrize("facts", [Facts(), FULL])
def test_the_journal_gives_back_what_was_noted(facts):
    Journal.open("vm-1", "backup", facts).close()
    journal = Journal.open("vm-1", "backup", Facts())
    journal.record(**{each.name: getattr(facts, each.name) for each in fields(facts)})
    journal.close()
    assert peeked() == [facts, facts]
    taken = [found.journal(Facts) for found in Journal.left_behind(everything)]
    assert [each.facts for each in taken] == [facts, facts] and taken[0].head.holder.pid == os.getpid()
    for each in taken:
        each.done()


@pytest.mark.parametrize(
    "line", [b'{"weight": 3}\n', b'{"colour": "blue"}\n', b'{"step": "two"}\n', b'{"parts": [{"label": "a"}]}\n']
)
def test_what_this_release_does_not_know_is_an_error_with_a_way_out(line):
    journal = Journal.open("vm-1", "backup", Facts())
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(line)
    (found,) = Journal.left_behind(everything)
    with pytest.raises(JournalError, match=r"noted.*release that has left it.*remove") as caught:
        found.journal(Facts)
    assert journal.path in caught.value.what
    found.close()
    assert Journal.peek(everything)[0].head == journal.head


def test_a_fact_that_is_lacking_is_one_too():
    Journal.open("vm-1", "backup", Facts()).close()
    with pytest.raises(JournalError, match=r"unknown: .*step"):
        Journal.peek(everything)[0].facts(NewerFacts)


def test_a_living_journal_is_nobodys():
    journal = Journal.open("vm-1", "backup", Facts())
    assert Journal.left_behind(everything) == []
    assert Journal.peek(everything) == []
    journal.done()


def test_a_dead_one_is_taken_once():
    Journal.open("vm-1", "backup", Facts(1)).close()
    assert peeked() == [Facts(1)]
    (found,) = Journal.left_behind(everything)
    assert Journal.left_behind(everything) == []
    taken = found.journal(Facts)
    found.close()  # it is the journal's now
    assert Journal.left_behind(everything) == []
    taken.record(text="b")
    taken.close()
    assert peeked() == [Facts(1, "b")]


def test_only_what_matches_is_taken():
    Journal.open("vm-1", "backup", Facts()).close()
    Journal.open("vm-2", "backup", Facts()).close()
    taken = Journal.left_behind(lambda found: found.head.key == "vm-2")
    assert [each.head.key for each in taken] == ["vm-2"]
    assert [found.head.key for found in Journal.peek(everything)] == ["vm-1"]
    taken[0].journal(Facts).done()


def test_oldest_first():
    for number in range(5):
        Journal.open("vm-1", "backup", Facts(number)).close()
    journals = [found.journal(Facts) for found in Journal.left_behind(everything)]
    assert [each.facts.step for each in journals] == list(range(5))
    for each in journals:
        each.done()


def test_every_torn_length_gives_the_facts_of_whole_lines(state):
    journal = Journal.open("vm-1", "backup", Facts())
    first = os.path.getsize(journal.path)
    journal.record(step=1)
    journal.close()
    data = pathlib.Path(journal.path).read_bytes()
    for length in range(len(data) + 1):
        with open(journal.path, "wb") as file:
            file.write(data[:length])
        if length < first:
            assert peeked() == []
        else:
            assert peeked() == [Facts(1 if length == len(data) else 0)], length


def test_a_torn_line_is_written_over(state):
    journal = Journal.open("vm-1", "backup", Facts())
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(b'{"step": 1, "longer": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx')
    taken = Journal.left_behind(everything)[0].journal(Facts)
    taken.record(step=2)
    taken.close()
    assert peeked() == [Facts(2)]


@pytest.mark.parametrize("line", [b"5", b'"a"', b"[7]", b"[" * 100_000])
def test_a_line_that_is_no_set_of_facts_ends_it(state, line):
    journal = Journal.open("vm-1", "backup", Facts())
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(line + b"\n")
    assert peeked() == [Facts()]


def test_a_journal_without_a_fact_goes(state):
    Journal.open("vm-1", "backup", Facts()).close()
    path = state / "journal" / files(state)[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert Journal.left_behind(everything) == []
    assert files(state) == []


def test_a_journal_whose_first_line_nobody_understands_stays(state):
    Journal.open("vm-1", "backup", Facts()).close()
    path = state / "journal" / files(state)[0]
    path.write_bytes(b'{"schema": 7}\n')
    assert Journal.left_behind(everything) == Journal.peek(everything) == []
    assert path.read_bytes() == b'{"schema": 7}\n'


def test_a_failed_write_leaves_the_facts_as_they_were(monkeypatch):
    journal = Journal.open("vm-1", "backup", Facts())
    size = os.path.getsize(journal.path)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:10], offset))
    with pytest.raises(KvmopsError):
        journal.record(step=1)
    monkeypatch.undo()
    assert journal.facts.step == 0
    assert os.path.getsize(journal.path) == size
    journal.close()


def test_killed_while_recording(state):
    for _number in range(5):
        pid = os.fork()
        if pid == 0:
            journal = Journal.open("vm-1", "backup", Facts())
            step = 0
            while True:
                step += 1
                journal.record(step=step)
        while not files(state):
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for found in Journal.left_behind(everything):
            journal = found.journal(Facts)
            assert journal.facts.step >= 0
            journal.done()
        assert files(state) == []


def test_what_is_no_file_is_no_journal(state):
    """A directory of that name made every run of every module fail."""
    Journal.open("vm-1", "an operation", Facts()).close()
    directory = pathlib.Path(_paths.state_dir()) / "journal"
    (directory / "a.json").mkdir()
    (directory / "b.json").symlink_to("/etc/passwd")
    os.mkfifo(directory / "c.json")
    assert [found.head.key for found in Journal.peek(lambda _found: True)] == ["vm-1"]
    (taken,) = Journal.left_behind(lambda _found: True)
    taken.close()
