# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Runs ``vm_thin_clone``: a restore of a point that is not in any archive, with empty overlays on the template's disks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Member,
    Role,
    TemplateDisk,
    TemplateRequirement,
)
from ansible_collections.kvmops.backup.plugins.module_utils._clones.template import require_fit
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import firmware_state, receivers, storage
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    by_name,
    connect_to_change,
    libvirt,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._recovery import recovery
from ansible_collections.kvmops.backup.plugins.module_utils._restore import facts
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import MadeFile, PlannedFile, RestorePlan
from ansible_collections.kvmops.backup.plugins.module_utils._restore.plan import plan as make_plan
from ansible_collections.kvmops.backup.plugins.module_utils._restore.recovery import locks
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import RestoreRequest
from ansible_collections.kvmops.backup.plugins.module_utils._restore.run import run as run_restore
from ansible_collections.kvmops.backup.plugins.module_utils._template import find
from ansible_collections.kvmops.backup.plugins.module_utils._template.find import Template
from ansible_collections.kvmops.backup.plugins.module_utils._template.match import Match
from ansible_collections.kvmops.backup.plugins.module_utils._units import duration_s

_EMPTY_OVERLAY_BYTES = 200 * 1024


@dataclass(frozen=True)
class CloneRequest:
    """One run of ``vm_thin_clone``. `pool` and `path` both "": beside the template's disks. `wait_timeout_s` as everywhere."""

    template: str
    name: str
    pool: str = ""
    path: str = ""
    start: bool = False
    uri: str = "qemu:///system"
    wait_timeout_s: int = 0
    check_mode: bool = False


def from_params(params: Mapping[str, Any]) -> CloneRequest:
    """The request behind the parameters of the module. Raises RefusedError."""
    return CloneRequest(
        template=params["template"],
        name=params["name"],
        pool=params["pool"] or "",
        path=params["path"] or "",
        start=params["start"],
        uri=params["uri"],
        wait_timeout_s=duration_s(params["wait_timeout"], "wait_timeout"),
        check_mode=params["check_mode"],
    )


def thin_clone(request: CloneRequest, context: Context) -> dict[str, Any]:
    """One run of ``vm_thin_clone``; the module's return values. Raises KvmopsError; nothing has changed then."""
    conn = connect_to_change(request.uri)
    if request.check_mode:
        for notice in recovery.pending(request.uri, everywhere=True):
            context.warn(notice)
        domain, _unsettled = recovery.foresee(conn, request.uri, request.template, context)
        return _clone(conn, domain, request, context)
    recovery.settle_host(conn, request.uri, context)
    with recovery.before_change(
        conn,
        request.uri,
        request.template,
        context,
        what=lambda name: f"making the thin clone {request.name} of {name}",
        timeout_s=request.wait_timeout_s,
    ) as (conn, domain):
        return _clone(conn, domain, request, context)


def _clone(conn: Connection, domain: Domain, request: CloneRequest, context: Context) -> dict[str, Any]:
    what = f"The thin clone {request.name} of {domain.name()}"
    receivers.refuse(conn, str(domain.UUIDString()), what, settled=not request.check_mode)
    template = find.of_domain(conn, domain)
    if not template.marked:
        raise RefusedError(
            what, f"{template.name} is not marked as a template", "Mark it with kvmops.backup.vm_template."
        )
    existing = by_name(conn, request.name)
    if existing is not None:
        if not find.stands_on(conn, existing, template):
            raise RefusedError(what, "there is a VM of that name that is no clone of it", "Choose another name.")
        return _there(conn, existing, request, context)
    require_fit(conn, domain)
    try:
        planned = _plan(conn, domain, template, request)
    except RefusedError as error:
        raise RefusedError(what, error.why, error.hint) from error
    for notice in (*planned.warnings, *planned.left_out):
        context.warn(notice)
    if not request.check_mode:
        with locks(planned.name, planned.uuid):
            run_restore(conn, None, planned, context.progress, request.uri, source=f"template {template.uuid}")
    return {
        "changed": True,
        "vm": {"name": planned.name, "uuid": planned.uuid},
        "disks": [asdict(disk) for disk in planned.disks],
    }


def _there(conn: Connection, domain: Domain, request: CloneRequest, context: Context) -> dict[str, Any]:
    """A clone that was made earlier."""
    view = domain_xml.parse(domain.XMLDesc(0))
    starts = request.start and not domain.isActive()
    if starts and not request.check_mode:
        context.progress.phase("start")
        try:
            domain.create()
        except libvirt.libvirtError as error:
            raise KvmopsError(f"The VM {view.name}", f"it does not start: {error}") from error
    disks = [disk for disk in view.disks if disk.device == "disk"]
    paths = {disk.target: storage.disk_path(conn, disk) for disk in disks}
    return {
        "changed": starts,
        "vm": {"name": view.name, "uuid": view.uuid},
        "disks": [{"target": each.target, "path": paths[each.target], "format": each.format} for each in disks],
    }


def _plan(conn: Connection, domain: Domain, template: Template, request: CloneRequest) -> RestorePlan:
    """The plan of a restore whose members are overlays that are still to be made."""
    wanted = RestoreRequest(
        source=template.name,
        pool=request.pool,
        path=request.path,
        name=request.name,
        uuid="new",
        mac="new",
        start=request.start,
        uri=request.uri,
        check_mode=request.check_mode,
    )
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    point = _point(conn, xml, template)
    host = facts.gather(conn, point, wanted, template.disks[0].path)
    planned = make_plan(point, replace(host, template=Match(template)), wanted)
    made = [_overlay(file) for file in planned.files]
    nvram = _nvram(conn, xml, planned)
    return replace(
        planned,
        files=(),
        made=(*made, *nvram),
        requires=None,  # the template is locked
        estimated_bytes=0,
        lacking=(),  # there is no archive that could lack the state of the firmware
    )


def _point(conn: Connection, xml: str, template: Template) -> Configuration:
    members = []
    for number, disk in enumerate(template.disks, 1):
        members.append(
            Member(
                name=f"{disk.target}_0.qcow2",
                role=Role.DISK,
                size_bytes=_EMPTY_OVERLAY_BYTES,
                target=disk.target,
                virtual_size_bytes=disk.virtual_size_bytes,
                image_format="qcow2",
                original_format="qcow2",
                former_path=disk.path,
                pool=storage.describe(conn, disk.path).pool,
                active=True,
                template_disk=number,
            )
        )
    content = tuple(TemplateDisk(disk.target, disk.virtual_size_bytes, "") for disk in template.disks)
    return Configuration(
        timestamp=0,
        domain_xml=xml,
        vm_name=template.name,
        vm_uuid=template.uuid,
        members=tuple(members),
        requires=TemplateRequirement(template.uuid, template.name, content),
        digest=hashlib.sha256(f"thin clone of {template.uuid}".encode()).hexdigest(),
    )


def _overlay(file: PlannedFile) -> MadeFile:
    return MadeFile(file.member.target, file.path, file.format, file.backing, file.backing_format, pool=file.pool)


def _nvram(conn: Connection, xml: str, planned: RestorePlan) -> list[MadeFile]:
    """A copy of the template's NVRAM under the clone's name; none where the template was never started. Raises RefusedError."""
    view = domain_xml.parse(planned.domain_xml)
    former = firmware_state.nvram_path(conn, domain_xml.parse(xml))
    if not former:
        return []
    kind = "qcow2" if former.endswith(".qcow2") else "raw"
    chosen = os.path.join(firmware_state.nvram_directory(conn), firmware_state.default_nvram(view.name, kind))
    path = view.nvram_path or chosen
    if os.path.lexists(path):
        hint = "Remove it if no VM needs it any more, or choose another name."
        raise RefusedError(f"The file {path}", f"the NVRAM of a VM of that name is still there: {path}", hint)
    return [MadeFile("", path, kind, former, kind, flat=True)]
