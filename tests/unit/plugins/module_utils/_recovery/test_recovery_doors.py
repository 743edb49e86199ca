# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What dead runs left is settled before a change, by the operation whose journal it is; those who only look tell of it."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import enum
import json
import os
import subprocess
import sys
import textwrap
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _locks, _operations, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._archive.partials import PartialFacts
from ansible_collections.kvmops.backup.plugins.module_utils._archive.trash import TrashFacts
from ansible_collections.kvmops.backup.plugins.module_utils._errors import CancelledError, KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal, vm_key
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._recovery import operations, recovery
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.operations import (
    HostOperation,
    LastingOperation,
    VmOperation,
)
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.recovery import pending

URI = "qemu:///system"
PREFIX = "ansible_collections.kvmops.backup.plugins."
PLUGINS = Path(_operations.__file__).parents[1]


@dataclass(frozen=True)
class Move:
    """The journal of an operation on several VMs."""

    to: str
    uri: str


@dataclass(frozen=True)
class Paint:
    """The journal of an operation on one VM."""

    colour: str = "red"


class FakeDomain:
    """As much of a VM as the doors need."""

    def UUIDString(self) -> str:
        return "u"

    def name(self) -> str:
        return "web01"


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A state directory of its own, libvirt's part taken by one VM."""
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    monkeypatch.setattr(recovery, "renewed", lambda conn: conn)
    monkeypatch.setattr(recovery, "again", lambda conn, domain: (conn, domain))
    monkeypatch.setattr(recovery, "find_domain", lambda _conn, _vm: FakeDomain())
    monkeypatch.setattr(operations, "_sources", [])
    monkeypatch.setattr(operations, "_lasting", [])
    return tmp_path


@pytest.fixture
def acts() -> list[str]:
    """What was settled, by two operations that are registered for it; that of the VM "broken" fails."""
    done: list[str] = []

    def settle_move(_conn: Any, journal: Journal[Move], _progress: Progress) -> list[str]:
        assert _locks.holder(_locks.of_vm("u")) is None
        if journal.facts.to == "broken":
            raise KvmopsError("The move", "it cannot be undone")
        done.append(f"move to {journal.facts.to}")
        return ["moved"]

    def settle_paint(_conn: Any, uuid: str, _journal: Journal[Paint], _progress: Progress, _unmerged: Any) -> list[str]:
        assert _locks.holder(_locks.of_vm(uuid)) is not None
        done.append("paint")
        return ["painted"]

    both = (
        HostOperation(
            "move", Move, lambda facts, vm: facts.to == vm, settle_move, lambda facts, _head: f"a move to {facts.to}"
        ),
        VmOperation("paint", Paint, settle_paint, lambda facts, _head: f"paint {facts.colour}"),
    )
    operations.register(lambda: both)
    return done


def painting(uuid: str = "u") -> None:
    """The journal of a run on one VM that was killed."""
    Journal.open(vm_key(uuid), "paint", Paint()).close()


LEASE_OVER = Notice(Code.LEASE_OVER, "u is held long")


def moving(to: str, uri: str = URI) -> None:
    """The same of one on several VMs."""
    Journal.open("anything", "move", Move(to, uri)).close()


def journals(state: Path) -> list[str]:
    return sorted(os.listdir(state / "journal"))


def change(warned: list[Notice]) -> list[str]:
    """A change of the VM web01; what was put right before."""
    context = Context(Progress(), warned.append)
    with recovery.before_change(None, URI, "web01", context, what=lambda name: f"painting {name}"):
        assert _locks.holder(_locks.of_vm("u")).what == "painting web01"  # type: ignore[union-attr]
    return context.settled


def test_both_kinds_are_settled_before_a_change(acts: list[str], state: Path) -> None:
    painting()
    painting("other")
    moving("web01")
    moving("broken")
    moving("web01", "qemu:///session")
    warned: list[Notice] = []
    assert change(warned) == ["moved", "painted"] and acts == ["move to web01", "paint"]
    assert len(journals(state)) == 3 and Code.CANNOT_PUT_RIGHT not in [each.code for each in warned]
    assert change([]) == []


def test_what_cannot_be_settled_stops_the_change_of_that_vm_only(acts: list[str], state: Path) -> None:
    moving("broken")
    moving("web01")
    with pytest.raises(KvmopsError, match="cannot be undone"):
        recovery.settle_host(None, URI, Context(Progress(), print), "broken")
    assert acts == [] and len(journals(state)) == 2
    told: list[Notice] = []
    recovery.settle_host(None, URI, Context(Progress(), told.append))
    assert acts == ["move to web01"] and len(journals(state)) == 1 and told[0].code is Code.CANNOT_PUT_RIGHT


def test_a_journal_that_nobody_knows_stops_the_change(acts: list[str], state: Path) -> None:
    Journal.open(vm_key("u"), "varnish", Paint()).close()
    with pytest.raises(RefusedError, match=r"unfinished run of varnish.*release that has left it") as caught:
        change([])
    (name,) = journals(state)
    assert name in caught.value.hint and acts == []
    assert "a run of varnish, whose journal" in pending(URI, "u")[0].text


def test_a_journal_of_another_release_stops_every_change_that_it_may_be_about(acts: list[str], state: Path) -> None:
    Journal.open("anything", "move", Paint()).close()
    with pytest.raises(KvmopsError, match="cannot read what a run of move has noted") as caught:
        change([])
    told: list[Notice] = []
    recovery.settle_host(None, URI, Context(Progress(), told.append))
    (name,) = journals(state)
    assert name in str(caught.value) and name in told[0].text and acts == []
    assert name in pending(URI, "web01")[0].text


def test_those_who_look_tell_each_their_own(acts: list[str], state: Path) -> None:
    painting()
    painting("other")
    moving("web01")
    before = {name: (state / "journal" / name).read_bytes() for name in journals(state)}
    paint, move = (
        Notice(Code.TO_PUT_RIGHT, f"The next run that changes the VM will put right: {what}")
        for what in ("paint red", "a move to web01")
    )
    assert pending(URI, "u") == pending(URI, "other") == [paint] and pending(URI, "web01") == [move]
    assert pending(URI, "web01", "u") == pending(URI, "u", everywhere=True) == [paint, move]
    assert pending(URI) == pending(URI, "nobody") == []
    assert pending(URI, everywhere=True) == [move] and pending("qemu:///session", everywhere=True) == []
    told: list[Notice] = []
    domain, unsettled = recovery.foresee(None, URI, "web01", Context(Progress(), told.append))
    assert unsettled and domain.name() == "web01" and {*told} == {paint, move} and len(told) == 2
    assert acts == [] and {name: (state / "journal" / name).read_bytes() for name in journals(state)} == before


def test_a_run_at_work_is_not_told_of(acts: list[str]) -> None:
    with_life = Journal.open(vm_key("u"), "paint", Paint())
    assert pending(URI, "u") == []
    with_life.close()
    assert pending(URI, "u")


def test_a_name_is_registered_once(acts: list[str]) -> None:
    other = VmOperation("paint", Paint, lambda *_arguments: [], lambda _facts, _head: "")
    operations.register(lambda: (other,))
    with pytest.raises(AssertionError, match="paint"):
        operations.known()


def test_the_facts_of_every_operation_can_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _operations.register()
    kinds: list[Any] = [operation.facts for operation in operations.known().values()]
    assert len(kinds) >= 5
    kinds += [TrashFacts, PartialFacts]
    while kinds:
        kind = kinds.pop()
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            kinds += typing.get_type_hints(kind).values()
        elif origin in (typing.Union, tuple, collections.abc.Mapping):
            assert origin is not typing.Union or (len(inner) == 2 and inner[1] is type(None)), kind
            kinds += [each for each in inner if each not in (..., type(None))]
        else:
            assert kind is Any or kind in (str, int, bool) or issubclass(kind, enum.Enum), kind


def imported_by(path: Path) -> Iterator[str]:
    """The collection's modules that a file names in its imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PREFIX):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def all_imported_by(path: Path) -> set[str]:
    """The same, and what those import."""
    found: set[str] = set()
    waiting = list(imported_by(path))
    while waiting:
        name = waiting.pop()
        file = PLUGINS.joinpath(*name.removeprefix(PREFIX).split(".")).with_suffix(".py")
        if name not in found and file.exists():
            found.add(name)
            waiting += imported_by(file)
    return found


def test_every_module_that_comes_to_the_doors_knows_all_operations() -> None:
    doors = f"{PREFIX}module_utils._recovery.recovery"
    found = [path for path in sorted(PLUGINS.glob("modules/*.py")) if doors in all_imported_by(path)]
    assert {"vm_backup", "vm_restore", "vm_snapshot", "vm_info"} <= {path.stem for path in found}
    for path in found:
        functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
        main = next(node for node in functions if node.name == "main")
        assert ast.unparse(main.body[0]) == "_operations.register()", path


#: A module that waits for the VM's lock, in a process of its own: it is ended by a signal.
WAITS = """
import sys
from ansible.module_utils import basic
from ansible_collections.kvmops.backup.plugins.module_utils import _argspec, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._recovery import recovery

class Domain:
    def UUIDString(self):
        return "u"

    def name(self):
        return "web01"

_paths.state_dir = _paths.run_dir = lambda: sys.argv[1]
recovery.settle_vm = lambda *arguments: sys.exit("settled")
recovery.find_domain = lambda conn, vm: Domain()
recovery.renewed = lambda conn: conn

def operation(params, context):
    with recovery.before_change(None, "", "web01", context, what=lambda name: "second", timeout_s=4 * 3600):
        sys.exit("held")

basic._ANSIBLE_ARGS, basic._ANSIBLE_PROFILE = b'{"ANSIBLE_MODULE_ARGS": {}}', "legacy"
_argspec.run_module({}, operation, libraries=[])
"""


def test_waiting_for_a_vm_is_told_and_ended_by_a_signal(monkeypatch, tmp_path):
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    with (
        _locks.hold("vm-u", of="The VM web01", what="backup of VM web01"),
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WAITS), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        status = tmp_path / "status" / f"operation-{process.pid}.json"
        deadline = time.monotonic() + 60
        while not status.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        told = status.exists() and json.loads(status.read_text())["phase"]
        process.terminate()
        began = time.monotonic()
        try:
            stdout, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    assert told == f"wait for backup of VM web01 (process {os.getpid()} on {os.uname().nodename})"
    assert time.monotonic() - began < 10
    result = json.loads(stdout)
    assert result["cancelled"] and "SIGTERM" in result["msg"], stderr


def test_a_cancelled_wait_touches_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    settled = []
    monkeypatch.setattr(recovery, "settle_vm", lambda *_arguments: settled.append(1))
    cancel = tmp_path / "cancel"
    cancel.touch()
    for progress in (Progress(cancel_path=str(cancel)), Progress()):
        progress.cancel("asked to")
        with (
            pytest.raises(CancelledError),
            recovery.before_change(None, URI, "web01", Context(progress, print), what=lambda name: name),
        ):
            pass
    assert settled == []


def test_what_outlives_its_run_is_looked_at_before_every_change(acts: list[str]) -> None:
    def settle(_conn: Any, uuid: str, _progress: Progress) -> list[str]:
        assert _locks.holder(_locks.of_vm(uuid)) is not None
        acts.append("lasting")
        return ["freed"]

    lasting = LastingOperation(
        "lasting", settle, lambda _uri, vm: [f"{vm} is not held"], lambda _vm: [LEASE_OVER]
    )
    known = [lasting]
    operations.register_lasting(known.copy)
    operations.register_lasting(known.copy)
    painting()
    told: list[Notice] = []
    context = Context(Progress(), told.append)
    with recovery.before_change(None, URI, "web01", context, what=str):
        pass
    assert acts == ["paint", "lasting"] and context.settled == ["painted", "freed"]
    assert told[-1] == LEASE_OVER
    assert [each.text for each in pending(URI, "u")] == ["The next run that changes the VM will put right: u is not held"]
    assert recovery.foresee(None, URI, "web01", context)[1] and told[-1] == LEASE_OVER
    known[:] = [LastingOperation("lasting", settle, lambda _uri, _vm: [], lambda _vm: [LEASE_OVER])]
    assert not recovery.foresee(None, URI, "web01", context)[1]  # a reminder is nothing to settle
