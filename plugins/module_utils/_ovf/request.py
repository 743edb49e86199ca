# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a user asks of a conversion: the options of ``ova_convert`` as typed values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._ovf.hardware import Options
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.opened import Choice


@dataclass(frozen=True)
class ConvertRequest:
    """One run of ``ova_convert``; `pool` and `path` both "": the place that holds the source. `compress` None: no matter."""

    source: str
    pool: str = ""
    path: str = ""
    compress: bool | None = None
    compress_level: int = 2
    threads: int = 0
    name: str = ""
    system: str = ""
    configuration: str = ""
    disk_bus: str = ""
    nic_model: str = ""
    networks: Mapping[str, str] = field(default_factory=dict)
    firmware: str = ""
    machine: str = ""
    uri: str = "qemu:///system"
    check_mode: bool = False
    diff: bool = False

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> ConvertRequest:
        """From the parameters of the module, with ``check_mode`` and ``diff`` (_argspec.run_module)."""
        texts = ("pool", "path", "name", "system", "configuration", "disk_bus", "nic_model", "firmware", "machine")
        return cls(
            source=params["src"],
            compress=params["compress"],
            compress_level=params["compress_level"],
            threads=params["threads"],
            networks={str(former): str(here) for former, here in (params["networks"] or {}).items()},
            uri=params["uri"],
            check_mode=params["check_mode"],
            diff=params["diff"],
            **{name: params[name] or "" for name in texts},
        )

    @property
    def choice(self) -> Choice:
        """What of the package is meant, and what becomes of it."""
        return Choice(
            self.system,
            self.configuration,
            Options(
                self.name,
                self.disk_bus,
                self.nic_model,
                self.networks,
                self.firmware,
                self.machine,
            ),
        )

    @property
    def told(self) -> str:
        """What of the request makes a difference for the VM, as one text."""
        facts = {
            "system": self.system, "configuration": self.configuration, "name": self.name, "disk_bus": self.disk_bus,
            "nic_model": self.nic_model, "networks": dict(sorted(self.networks.items())), "firmware": self.firmware,
            "machine": self.machine,
        }  # fmt: skip
        return json.dumps({key: value for key, value in facts.items() if value}, sort_keys=True)
