# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""``vdisk_cross_attach_info``: what is attached to whom, as original disks that can be passed back. Changes nothing."""

from __future__ import annotations

import os
import time
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments
from ansible_collections.kvmops.backup.plugins.module_utils._attachments import Attachment, Record
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach import plan, settle
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach.request import AttachInfoRequest
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import receivers
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import connect
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context


def info(request: AttachInfoRequest, context: Context) -> dict[str, Any]:
    """The result of ``vdisk_cross_attach_info``; warns of what the next run would put right, and of leases that are over."""
    conn = connect(request.uri)
    receiver = receivers.names_of(conn, request.receiver)
    source = receivers.names_of(conn, request.source_vm)
    for notice in settle.unknown(conn, request.receiver, request.source_vm):
        context.warn(notice)
    found = []
    for record in _attachments.everything(strict=True):
        if source and not source & {record.source_name, record.source_uuid}:
            continue
        seen = settle.seen_of(conn, record)
        held = [
            each for each in record.attachments if not receiver or receiver & {each.receiver_name, each.receiver_uuid}
        ]
        if held or not record.attachments:
            for text in plan.pending(record, seen):
                context.warn(Notice(Code.TO_PUT_RIGHT, f"The next run that changes the VM will put right: {text}"))
            for notice in plan.about_leases(record, time.time()):
                context.warn(notice)
        found += [describe(record, each, plan.status(each, seen[each.serial])) for each in held]
    return {"vdisks": found}


def describe(record: Record, attachment: Attachment, status: str) -> dict[str, Any]:
    """One attached disk as the modules return it."""
    return {
        "id": attachment.disk_id,
        "name": os.path.basename(attachment.path),
        "path": attachment.path,
        "target": attachment.target,
        "size": attachment.size_bytes,
        "pool": attachment.pool,
        "status": status,
        "shareable": False,
        "thin_clone": record.source_name if attachment.template else "",
        "domain": {"id": record.source_uuid, "name": record.source_name},
        "receiver": {"id": attachment.receiver_uuid, "name": attachment.receiver_name},
        "attached_as": {
            "target": attachment.receiver_target,
            "path": attachment.attached_path,
            "serial": attachment.serial,
            "by_id": f"/dev/disk/by-id/virtio-{attachment.serial}",
        },
        "moment": attachment.moment,
        "consistency": attachment.consistency,
        "lease": _iso(attachment.lease_until),
    }


def _iso(timestamp: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp)) if timestamp else ""
