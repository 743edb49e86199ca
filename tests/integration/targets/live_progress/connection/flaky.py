# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The local connection, but every second look at a running operation is lost."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection.local import Connection as LocalConnection

DOCUMENTATION = r"""
name: flaky
short_description: loses every second poll
author: kvmops.backup contributors
description: For tests.
extends_documentation_fragment:
  - connection_pipelining
"""


class Connection(LocalConnection):
    """See the module's text."""

    transport = "flaky"
    polls = 0

    def exec_command(self, cmd: str, *arguments: Any, **named: Any) -> Any:
        """Runs the command, or not."""
        if "heartbeat" in cmd:
            self.polls += 1
            if self.polls % 2:
                raise AnsibleConnectionFailure("the network is away for a moment")
        return super().exec_command(cmd, *arguments, **named)
