# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Runs ``vm_template``: gives a VM the mark of a template, or takes it away."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import TemplateDisk
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import receivers, views
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    connect_to_change,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._recovery import recovery
from ansible_collections.kvmops.backup.plugins.module_utils._template import find, mark, requirement
from ansible_collections.kvmops.backup.plugins.module_utils._template.find import Template
from ansible_collections.kvmops.backup.plugins.module_utils._units import duration_s


@dataclass(frozen=True)
class TemplateRequest:
    """One run of ``vm_template``. `present`: the VM shall be a template. `wait_timeout_s` as everywhere."""

    vm: str
    present: bool = True
    uri: str = "qemu:///system"
    wait_timeout_s: int = 0
    check_mode: bool = False


def from_params(params: Mapping[str, Any]) -> TemplateRequest:
    """The request behind the parameters of the module. Raises RefusedError."""
    return TemplateRequest(
        vm=params["vm"],
        present=params["state"] == "present",
        uri=params["uri"],
        wait_timeout_s=duration_s(params["wait_timeout"], "wait_timeout"),
        check_mode=params["check_mode"],
    )


def template(request: TemplateRequest, context: Context) -> dict[str, Any]:
    """One run of ``vm_template``; the module's return values. Raises KvmopsError."""
    conn = connect_to_change(request.uri)
    if request.check_mode:
        domain, _unsettled = recovery.foresee(conn, request.uri, request.vm, context)
        return _judge(conn, domain, request, context)
    doing = "marking" if request.present else "unmarking"
    with recovery.before_change(
        conn,
        request.uri,
        request.vm,
        context,
        what=lambda name: f"{doing} VM {name} as a template",
        timeout_s=request.wait_timeout_s,
    ) as (conn, domain):
        return _judge(conn, domain, request, context)


def require_fit(conn: Connection, domain: Domain) -> Template:
    """The VM as a template that clones can be made of. Raises RefusedError for one that cannot be, with the reason."""
    found = find.of_domain(conn, domain)
    what = f"The VM {found.name}"
    if found.running:
        raise RefusedError(what, "it is running, and clones cannot stand on disks that change", "Shut it down first.")
    if not domain.isPersistent():
        raise RefusedError(what, "it is transient", "Define it first (virsh define).")
    if found.snapshots:
        raise RefusedError(
            what,
            f"it has {found.snapshots} snapshots, whose removal would change the disks that clones stand on",
            "Remove them first: kvmops.backup.vm_snapshot with snapshot: all and state: absent.",
        )
    if not found.disks:
        raise RefusedError(what, "it has no disk that a clone could stand on")
    view = domain_xml.parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    for disk in view.disks:
        if disk.device == "disk" and (reason := _unfit(disk, found)):
            raise RefusedError(f"The disk {disk.name} of {found.name}", reason, "Nothing has been changed.")
    views.require_really_off(domain, [(disk.path, disk.format) for disk in found.disks])
    return found


def _unfit(disk: domain_xml.Disk, found: Template) -> str:
    base = next(each for each in found.disks if each.target == disk.target)
    if not _filenames.is_there(base.path) or not os.path.isfile(base.path):
        return "it is no file of this host; clones are made of disks in qcow2 and raw files"
    if not base.virtual_size_bytes:
        return f"its format is {base.format}, or it cannot be read; clones are made of disks in qcow2 and raw files"
    if disk.encrypted or disk.has_data_file or disk.has_slices:
        return "it is encrypted, has a data file or is a slice, and a clone would not know"
    if disk.transient or disk.shareable:
        return "it is transient or shareable: what it holds is not the template's alone"
    return ""


def _judge(conn: Connection, domain: Domain, request: TemplateRequest, context: Context) -> dict[str, Any]:
    doing = f"{'Marking' if request.present else 'Unmarking'} VM {domain.name()} as a template"
    receivers.refuse(conn, str(domain.UUIDString()), doing, settled=not request.check_mode)
    found = find.of_domain(conn, domain)
    if not request.present:
        clones = find.clones_of(conn, found) if found.marked else []
        if clones:
            raise RefusedError(
                f"The template {found.name}",
                f"thin clones stand on its disks: {', '.join(clones)}",
                "Restore them elsewhere with flatten: true, or remove them first.",
            )
        if found.marked and not request.check_mode:
            _write(domain, marked=False)
        known = requirement.known_disks(found)
        return {"changed": found.marked, "template": _value(found, known)}
    if found.marked and (found.running or found.suspended):
        state = "is running" if found.running else "has a managed-save image"
        text = f"the template {found.name} {state}: what it writes changes what its clones stand on"
        context.warn(Notice(Code.TEMPLATE_IN_USE, text))
        return {"changed": False, "template": _value(found, None)}
    found = require_fit(conn, domain)
    content = requirement.known_disks(found) if request.check_mode else requirement.disks(found, context.progress)
    if not found.marked and not request.check_mode:
        _write(domain, marked=True)
    return {"changed": not found.marked, "template": _value(found, content)}


def _value(found: Template, content: tuple[TemplateDisk, ...] | None) -> dict[str, Any]:
    digest = None
    if content is not None:
        lines = "".join(f"{disk.virtual_size_bytes} {disk.digest}\n" for disk in content)
        digest = hashlib.sha256(lines.encode()).hexdigest()
    return {"uuid": found.uuid, "name": found.name, "digest": digest}


def _write(domain: Domain, *, marked: bool) -> None:
    try:
        domain.setMetadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT,
            mark.ELEMENT if marked else None,
            mark.PREFIX,
            mark.NAMESPACE,
            libvirt.VIR_DOMAIN_AFFECT_CONFIG,
        )
        xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    except libvirt.libvirtError as error:
        raise translate(error, f"The mark of the VM {domain.name()}") from error
    if mark.is_marked_xml(xml) != marked:
        raise KvmopsError(f"The mark of the VM {domain.name()}", "libvirt did not keep it", "Please report this.")
