# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a guest says instead of its agent ends in a state or in our error, never in a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import strategies as st

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import agent
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.agent import AgentState
from ansible_collections.kvmops.backup.tests.unit.fuzz import fuzz, json_values

libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed here")
XML = """<domain type='kvm'><name>web</name><uuid>6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11</uuid><memory>1</memory><devices>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel></devices></domain>"""
COMMANDS = [{"name": f"guest-fsfreeze-{verb}", "enabled": True} for verb in ("freeze", "thaw", "status")]
GOOD = {"guest-info": {"return": {"supported_commands": COMMANDS}}, "guest-fsfreeze-status": {"return": "thawed"}}
ANYTHING = json_values("return", "supported_commands", "name", "enabled", "frozen", "thawed")
ANSWERS = ANYTHING | ANYTHING.map(lambda value: {"return": value}) | ANYTHING.map(
    lambda value: {"return": {"supported_commands": value}}
)  # fmt: skip


class Vm:
    """A running VM whose agent gives these answers, its connection and its domain in one."""

    last: Vm

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def __getattr__(self, name: str) -> Any:
        known = {
            "isActive": True, "XMLDesc": XML, "name": "web", "UUIDString": "6f1a2b3c", "getURI": "qemu:///system",
            "connect": self, "lookupByUUIDString": self, "fsThaw": 1, "close": 0,
        }  # fmt: skip
        return lambda *_arguments: known[name]


@pytest.fixture(autouse=True)
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "connect", lambda _uri: Vm.last)
        patch.setattr(
            agent.libvirt_qemu, "qemuAgentCommand", lambda vm, text, *_more: vm.answers[json.loads(text)["execute"]]
        )
        yield


def vm(**answers: Any) -> Vm:
    """Good answers, but for these (by the last word of the command)."""
    told = {name: json.dumps(answer) for name, answer in GOOD.items()}
    told.update({name: answers[name.rpartition("-")[2]] for name in told if name.rpartition("-")[2] in answers})
    Vm.last = Vm(told)
    return Vm.last


def test_an_agent_as_it_should_be() -> None:
    assert agent.available(vm()) is AgentState.OK
    assert agent.available(vm(status='{"return": "frozen"}')) is AgentState.FROZEN
    few = json.dumps({"return": {"supported_commands": [{**each, "enabled": False} for each in COMMANDS]}})
    assert agent.available(vm(info=few)) is AgentState.CANNOT_FREEZE
    assert agent.freeze_status(vm()) is False
    agent.thaw(vm())


@pytest.mark.parametrize(
    "answer",
    ["", "5", "[" * 100_000, "{}", '{"return": 5}', '{"return": {}}', '{"return": {"supported_commands": [5]}}', "\x00"],
)
def test_nonsense_is_called_so(answer: str) -> None:
    assert agent.available(vm(info=answer)) is AgentState.NONSENSE
    assert agent.available(vm(status=answer)) is AgentState.NONSENSE
    assert agent.freeze_status(vm(status=answer)) is None
    with pytest.raises(KvmopsError, match="no agent gives"):
        agent.thaw(vm(status=answer))


@fuzz(0.04, st.tuples(*[st.text() | ANSWERS.map(json.dumps)] * 2))
def test_fuzz_answers(answers: tuple[str, str]) -> None:
    info, status = answers
    assert agent.available(vm(info=info, status=status)) in AgentState
    assert agent.freeze_status(vm(status=status)) in (True, False, None)
