# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The guest agent: is it there, are the guest's file systems frozen, thaw them.

Whatever answers is the guest's, and may say what it likes: answers are checked by type, and asked for on a connection of
their own, as libvirtd ends one when an answer is longer than its protocol can hand on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _json
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Domain,
    connect,
    is_connection_lost,
    libvirt,
    libvirt_qemu,
    translate,
)

PING_TIMEOUT_S = 5
# libvirt waits for ever by default; a guest under load may well take some seconds to freeze
FREEZE_TIMEOUT_S = 30
_FREEZING = frozenset({"guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"})
# libvirt has no code for most of what an agent can do wrong
_OF_THE_AGENT = re.compile(
    r"guest-fsfreeze|\bguest agent\b|\bQEMU agent\b|malformed return value|JSON reply", re.IGNORECASE
)


class _AnswerError(Exception):
    """An answer that no agent gives."""


class AgentState(str, Enum):
    """What can be expected of a VM's guest agent."""

    OFF = "the guest is not running"
    NO_CHANNEL = "the VM has no guest agent channel"
    DISCONNECTED = "no guest agent is connected"
    HANGING = "the guest agent does not answer"
    NONSENSE = "the guest agent gives answers that no agent gives"
    CANNOT_FREEZE = "the guest agent cannot freeze file systems"
    FROZEN = "the guest's file systems are already frozen"
    OK = "the guest agent answers and can freeze"


def available(domain: Domain, timeout_s: int = PING_TIMEOUT_S) -> AgentState:
    """Whether a quiesced snapshot can be had now; asks the agent itself, in at most about twice ``timeout_s``."""
    if not domain.isActive():
        return AgentState.OFF
    view = domain_xml.parse(domain.XMLDesc(0))
    if not view.agent_channel:
        return AgentState.NO_CHANNEL
    if not view.agent_connected:
        return AgentState.DISCONNECTED
    try:
        with apart(domain) as asked:
            enabled = _enabled_commands(_command(asked, "guest-info", timeout_s))
            if _frozen(asked, timeout_s):
                return AgentState.FROZEN
    except (libvirt.libvirtError, _AnswerError) as error:
        return _judge(error)
    return AgentState.OK if enabled >= _FREEZING else AgentState.CANNOT_FREEZE


def freeze_status(domain: Domain, timeout_s: int = PING_TIMEOUT_S) -> bool | None:
    """Whether the guest's file systems are frozen; None when no agent answers, or none that could be understood."""
    try:
        with apart(domain) as asked:
            return _frozen(asked, timeout_s)
    except (libvirt.libvirtError, _AnswerError) as error:
        if _judge(error) in (
            AgentState.DISCONNECTED, AgentState.HANGING, AgentState.CANNOT_FREEZE, AgentState.OFF, AgentState.NONSENSE,
        ):  # fmt: skip
            return None
        raise translate(error, f"The guest agent of {domain.name()}") from error


@contextmanager
def apart(domain: Domain) -> Iterator[Domain]:
    """The domain on a connection of its own, for whatever ends with an answer of the agent."""
    conn = connect(str(domain.connect().getURI()))
    try:
        yield conn.lookupByUUIDString(domain.UUIDString())
    finally:
        with suppress(libvirt.libvirtError):
            conn.close()


@contextmanager
def bounded(domain: Domain, timeout_s: int = FREEZE_TIMEOUT_S) -> Iterator[None]:
    """Agent commands that libvirt itself sends (a quiesced snapshot's) fail after this time instead of never."""
    domain.agentSetResponseTimeout(timeout_s, 0)
    try:
        yield
    finally:
        with suppress(libvirt.libvirtError):  # the guest or libvirtd may be gone by now
            domain.agentSetResponseTimeout(libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK, 0)


def is_agent_failure(error: Exception) -> bool:
    """Whether a libvirt error of a quiesced snapshot says that the agent did not do what it was asked for.

    On a connection of its own a lost one is the agent's failure too, as long as libvirtd lives.
    """
    return isinstance(error, libvirt.libvirtError) and (
        error.get_error_code() in (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED)
        or _is_command_timeout(error)
        or is_connection_lost(error)
        or bool(_OF_THE_AGENT.search(str(error)))
    )


def thaw(domain: Domain) -> None:
    """Thaw the guest's file systems; raises KvmopsError when they stay frozen or nobody answers."""
    what, hint = f"Thawing the file systems of {domain.name()}", f"Run: virsh domfsthaw {domain.name()}"
    try:
        with apart(domain) as asked:
            asked.fsThaw()
            if not _frozen(asked, PING_TIMEOUT_S):
                return
    except libvirt.libvirtError as error:
        raise translate(error, what) from error
    except _AnswerError:
        raise KvmopsError(what, AgentState.NONSENSE.value, hint) from None
    raise KvmopsError(what, "the guest agent still says frozen", hint)


def _frozen(domain: Domain, timeout_s: int) -> bool:
    status = _command(domain, "guest-fsfreeze-status", timeout_s)
    if status not in ("frozen", "thawed"):
        raise _AnswerError
    return bool(status == "frozen")


def _enabled_commands(info: Any) -> frozenset[str]:
    try:
        return frozenset(str(each["name"]) for each in info["supported_commands"] if each["enabled"] is True)
    except (TypeError, KeyError):
        raise _AnswerError from None


def _command(domain: Domain, name: str, timeout_s: int) -> Any:
    answer = libvirt_qemu.qemuAgentCommand(domain, json.dumps({"execute": name}), timeout_s, 0)
    try:
        return _json.parse(answer)["return"]
    except (ValueError, TypeError, KeyError):
        raise _AnswerError from None


def _judge(error: Any) -> AgentState:
    if isinstance(error, _AnswerError) or is_connection_lost(error):
        return AgentState.NONSENSE
    code = error.get_error_code()
    if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
        return AgentState.DISCONNECTED if "not connected" in str(error) else AgentState.HANGING
    if code == libvirt.VIR_ERR_OPERATION_INVALID:
        return AgentState.OFF  # or paused
    if code == libvirt.VIR_ERR_OPERATION_TIMEOUT or _is_command_timeout(error):
        return AgentState.HANGING
    return AgentState.CANNOT_FREEZE


def _is_command_timeout(error: Any) -> bool:
    """The code of its own came with libvirt 9.1."""
    return bool(error.get_error_code() == getattr(libvirt, "VIR_ERR_AGENT_COMMAND_TIMEOUT", None))
