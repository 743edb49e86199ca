# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line of a whole host, for those who want to try something on one."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from typing import Any

from ansible_collections.kvmops.backup.tests.lab._run import LabError

from .machine import PYTHON, Machine, scratch


def main() -> None:
    """Parses the command line and does it."""
    parser = argparse.ArgumentParser(prog="ctl", description=__doc__)
    parser.add_argument(
        "--name", default="host", help="several hosts may be up, each under a name of its own (default: host)"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    up = actions.add_parser("up", help="a fresh host with this checkout's collection on it")
    up.add_argument("--debian", default="trixie", metavar="RELEASE")
    actions.add_parser("copy", help="put this checkout's collection there again")
    for name, does in (("ssh", "a command as the user admin"), ("root", "a command with sudo")):
        actions.add_parser(name, help=f"run {does}, without one a shell").add_argument(
            "command", nargs=argparse.REMAINDER
        )
    module = actions.add_parser(
        "module", help="run a module there as root: ctl module vm_backup vm=web01 path=/srv/backup"
    )
    module.add_argument("module")
    module.add_argument("arguments", nargs="*", metavar="KEY=VALUE")
    python = actions.add_parser("python", help="run a Python program from standard input there as root")
    python.add_argument("arguments", nargs=argparse.REMAINDER)
    actions.add_parser("reset", help="pull the plug, switch on, wait for ssh")
    actions.add_parser("off", help="pull the plug")
    actions.add_parser("on", help="switch on, wait for ssh")
    actions.add_parser("down", help="end it and remove all of it")
    options = parser.parse_args()
    try:
        sys.exit(_do(Machine(scratch() / f"kvmops-host.{options.name}"), options))
    except LabError as error:
        sys.exit(str(error))


def _do(machine: Machine, options: argparse.Namespace) -> int:
    if options.action == "up":
        Machine.up(machine.directory, options.debian)
        print(shlex.join(machine.ssh_argv()))
    elif options.action == "ssh":
        return _run(machine, " ".join(options.command))
    elif options.action == "root":
        command = " ".join(options.command)
        return _run(machine, f"sudo sh -c {shlex.quote(command)}" if command else "sudo -i")
    elif options.action == "python":
        return _run(machine, f"sudo env {PYTHON} - {shlex.join(options.arguments)}")
    elif options.action == "module":
        arguments = dict(argument.split("=", 1) for argument in options.arguments)
        result = machine.module(options.module, fails=None, **{key: _value(text) for key, text in arguments.items()})
        print(json.dumps(result, indent=2))
        return int(bool(result.get("failed")))
    else:
        {
            "copy": machine.copy_collection,
            "reset": machine.reset,
            "off": machine.pull_the_plug,
            "on": machine.switch_on,
            "down": machine.down,
        }[options.action]()
    return 0


def _run(machine: Machine, command: str) -> int:
    terminal = ["-t"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    ssh, *arguments = machine.ssh_argv()
    return subprocess.run([ssh, *terminal, *arguments, *filter(None, [command])], check=False).returncode


def _value(text: str) -> Any:
    """JSON where it is some, so that lists and dictionaries can be given."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()
