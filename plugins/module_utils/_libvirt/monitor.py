# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""QEMU's own monitor (QMP), through libvirt. Reading is harmless; libvirt notes in the VM's messages that it was used."""

from __future__ import annotations

import json
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _json
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Domain,
    libvirt,
    libvirt_qemu,
    translate,
)


def execute(domain: Domain, command: str, **arguments: Any) -> Any:
    """The "return" of one QMP command; ``_`` in argument names stands for ``-``. Raises KvmopsError with QEMU's words."""
    request: dict[str, Any] = {"execute": command}
    if arguments:
        request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
    what = f"QEMU of {domain.name()}, {command}"
    try:
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, json.dumps(request), 0))
    except libvirt.libvirtError as error:
        raise translate(error, what) from error
    if "error" in answer:
        raise KvmopsError(what, answer["error"].get("desc", "unknown error"))
    return answer["return"]


def file_of(filename: str) -> str:
    """The local path in a file name as QEMU prints it ("json:{…}" for images opened with options); "" if it is none."""
    if not filename.startswith("json:"):
        return filename if filename.startswith("/") else ""
    try:
        options = _json.parse(filename[len("json:") :])
    except ValueError:  # QEMU cuts long ones
        return ""
    while isinstance(options, dict) and isinstance(options.get("file"), dict):
        options = options["file"]
    path = options.get("filename") if isinstance(options, dict) else ""
    return path if isinstance(path, str) and path.startswith("/") else ""
