# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU's monitor without libvirt, while libvirtd is dead: its socket takes one client at a time."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from ._run import LabError, wait_for


class Monitor:
    """The monitor of one VM; a context manager."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self._lines.readline()  # the greeting
        self.execute("qmp_capabilities")

    @classmethod
    def of_domain(cls, domain_id: int) -> Monitor:
        """The monitor of one of libvirt's VMs."""
        (path,) = Path("/var/lib/libvirt/qemu").glob(f"domain-{domain_id}-*/monitor.sock")
        return cls(path)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """The "return" of a command; LabError with QEMU's words."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise LabError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def complete_jobs(self) -> None:
        """End every job that is ready, as a pivot does, and wait until they have ended."""
        for job in self.execute("query-jobs"):
            self.execute("job-complete", id=job["id"])
        wait_for("the jobs to end", lambda: self._ended(self.execute("query-jobs")), 60)
        for job in self.execute("query-jobs"):
            self.execute("job-dismiss", id=job["id"])

    @staticmethod
    def _ended(jobs: list[dict[str, Any]]) -> bool:
        return all(job["status"] == "concluded" for job in jobs)
