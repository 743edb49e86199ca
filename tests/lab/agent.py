# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Commands and files inside a guest, through its guest agent."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import libvirt
import libvirt_qemu

from ._run import LabError, wait_for


@dataclass(frozen=True)
class Done:
    """A command that ended inside the guest."""

    exit_code: int
    stdout: str
    stderr: str


class GuestAgent:
    """Talks to the agent of one running domain."""

    def __init__(self, domain: libvirt.virDomain) -> None:
        self._domain = domain

    def command(self, execute: str, timeout_s: int = 60, **arguments: Any) -> Any:
        """One agent command's ``return``; libvirtError when the agent does not answer or refuses."""
        text = json.dumps({"execute": execute, "arguments": arguments} if arguments else {"execute": execute})
        return json.loads(libvirt_qemu.qemuAgentCommand(self._domain, text, timeout_s, 0))["return"]

    def answers(self) -> bool:
        """Whether a ping comes back within two seconds."""
        try:
            self.command("guest-ping", timeout_s=2)
        except libvirt.libvirtError:
            return False
        return True

    def run(self, *argv: str, check: bool = True, timeout_s: float = 180) -> Done:
        """Runs a command in the guest and waits for it. With ``check`` an exit code other than 0 is a LabError."""
        started = self.command("guest-exec", path=argv[0], arg=list(argv[1:]), **{"capture-output": True})

        def ended() -> Any:
            status = self.command("guest-exec-status", pid=started["pid"])
            return status if status["exited"] else None

        status = wait_for(f"{' '.join(argv)} in the guest", ended, timeout_s)
        done = Done(
            status.get("exitcode", -status.get("signal", 1)),
            base64.b64decode(status.get("out-data", "")).decode(),
            base64.b64decode(status.get("err-data", "")).decode(),
        )
        if check and done.exit_code != 0:
            raise LabError(f"{' '.join(argv)} in the guest: exit code {done.exit_code}\n{done.stdout}{done.stderr}")
        return done

    def shell(self, script: str, timeout_s: float = 180) -> str:
        """Standard output of a shell script run in the guest; LabError when it fails."""
        return self.run("/bin/sh", "-c", script, timeout_s=timeout_s).stdout

    def freeze_status(self, timeout_s: int = 60) -> str:
        """``frozen`` or ``thawed``."""
        return str(self.command("guest-fsfreeze-status", timeout_s=timeout_s))
