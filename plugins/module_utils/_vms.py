# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What ``vm_info`` does: the virtual machines of a host, their facts, and which of them are meant."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import jmespath
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    connect,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.recovery import pending, reminders
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import disk_ids
from ansible_collections.kvmops.backup.plugins.module_utils._template import mark

_STATES = ("no state", "running", "blocked", "paused", "in shutdown", "shut off", "crashed", "suspended")
_GLOB = "*?["
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class VmsRequest:
    """One run of ``vm_info``. `vms`: names, UUIDs and globs, None for all; `select`: JMESPath over one VM's facts, "" for none."""

    vms: tuple[str, ...] | None = None
    select: str = ""
    uri: str = "qemu:///system"

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> VmsRequest:
        """From the parameters of the module."""
        return cls(None if params["vms"] is None else tuple(params["vms"]), params["select"] or "", params["uri"])


def info(request: VmsRequest, context: Context) -> dict[str, Any]:
    """The result of ``vm_info``; warns of what dead runs left on the VMs.

    Raises RefusedError for an expression that is none, KvmopsError where libvirt does not answer.
    """
    conn = connect(request.uri)
    known = [facts for facts in (_facts(conn, domain, context) for domain in conn.listAllDomains()) if facts]
    named, unmatched = choose(known, request.vms)
    chosen = select(named, request.select) if request.select else named
    for notice in pending(request.uri, *(facts["uuid"] for facts in chosen), everywhere=True):
        context.warn(notice)
    for notice in reminders(*(facts["uuid"] for facts in chosen)):
        context.warn(notice)
    return {"vms": sorted(chosen, key=lambda facts: str(facts["name"])), "unmatched": unmatched}


def choose(known: Sequence[dict[str, Any]], wanted: Sequence[str] | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Those VMs that a name, UUID or glob means (None: all), each once, and what of `wanted` means none. Pure."""
    if wanted is None:
        return list(known), []

    def means(text: str, facts: Mapping[str, Any]) -> bool:
        return text in (facts["name"], facts["uuid"]) or (is_glob(text) and fnmatch.fnmatchcase(facts["name"], text))

    chosen = [facts for facts in known if any(means(text, facts) for text in wanted)]
    return chosen, [text for text in wanted if not any(means(text, facts) for facts in known)]


def is_glob(text: str) -> bool:
    """Whether it has characters that a glob gives a meaning to."""
    return any(character in text for character in _GLOB)


def select(known: Iterable[dict[str, Any]], expression: str) -> list[dict[str, Any]]:
    """Those VMs for which a JMESPath expression is true, in the sense of JMESPath. Pure. Raises RefusedError."""
    try:
        compiled = jmespath.compile(expression)
        results = [(facts, compiled.search(facts)) for facts in known]
    except jmespath.exceptions.JMESPathError as error:
        raise RefusedError("Option select", str(error), "See https://jmespath.org for the language.") from error
    return [facts for facts, result in results if result not in (None, "", [], {}) and result is not False]


def _facts(conn: Connection, domain: Domain, context: Context) -> dict[str, Any] | None:
    """A VM as ``vm_info`` returns it; None if it is gone meanwhile."""
    try:
        return _gather(conn, domain, context)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise translate(error, f"The VM {domain.name()}") from error


def _readable(what: str, read: Callable[[], _Read], context: Context) -> _Read | None:
    """What is read; None, with a warning, where a file is damaged: one VM must not hide all the others."""
    try:
        return read()
    except (KvmopsError, OSError) as error:
        context.warn(Notice(Code.NOT_LOOKED_AT, f"{what} is not known: {error}"))
        return None


def _gather(conn: Connection, domain: Domain, context: Context) -> dict[str, Any]:
    xml = domain.XMLDesc(0)
    view = domain_xml.parse(xml)
    state = domain.state()[0]
    persistent = bool(domain.isPersistent())
    record = _readable(f"what of VM {view.name} is attached", lambda: _attachments.load(view.uuid), context)
    disks = _readable(f"the ids of disks of VM {view.name}", lambda: disk_ids.of_vm(conn, domain, view), context)
    ids = {each.disk.target: each.id for each in disks or ()}
    return {
        "name": view.name,
        "uuid": view.uuid,
        "title": view.title,
        "state": _STATES[state] if state < len(_STATES) else "no state",
        "persistent": persistent,
        "autostart": persistent and bool(domain.autostart()),
        "template": mark.is_marked_xml(xml),
        "managed_save": bool(domain.hasManagedSaveImage(0)),
        "memory": view.memory_bytes,
        "vcpus": view.vcpus,
        "arch": view.arch,
        "machine": view.machine,
        "agent": view.agent_channel,
        "disks": [
            {
                "id": ids.get(disk.target, ""),
                "target": disk.target,
                "device": disk.device,
                "type": disk.type,
                "path": disk.path or disk.network,
                "format": disk.format,
                "bus": disk.bus,
                "serial": disk.serial,
            }
            for disk in view.disks
        ],
        "attached": [
            {"target": each.target, "receiver": each.receiver_name, "expired": each.expired(time.time())}
            for each in (record.attachments if record else ())
        ],
        "nics": [{"mac": nic.mac, "type": nic.type, "source": nic.source, "model": nic.model} for nic in view.nics],
        "hostdevs": [f"{hostdev.kind} {hostdev.description}".strip() for hostdev in view.hostdevs],
        "snapshots": sorted(snapshot.getName() for snapshot in domain.listAllSnapshots(0)),
    }
