# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The VM of the quickstart, from the command line: create, ask what its guest saw, remove."""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import libvirt

from . import daemons
from ._run import LabError
from .vm import Disk, Hypervisor, Lab


def _create(directory: Path, name: str) -> None:
    _remove(directory, name)
    vm = Lab(directory).create_vm(name, [Disk(size_mib=256)], freeze_mode="pause")
    vm.wait_for_marker(10)
    print(f"VM {name} runs; its guest has written {vm.last_marker().number} lines and goes on")


def _remove(directory: Path, *names: str) -> None:
    hypervisor = Hypervisor()
    for name in names:
        with suppress(libvirt.libvirtError):  # not there
            hypervisor.vm(name).remove()
    shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    """``demo create DIRECTORY NAME | frozen NAME | booted NAME | lines NAME | remove DIRECTORY NAME…``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("action", choices=["create", "frozen", "booted", "lines", "remove"])
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    try:
        daemons.start()
        _act(options.action, *options.arguments)
    except (LabError, libvirt.libvirtError) as error:
        sys.exit(f"The quickstart's VM: {error}")


def _act(action: str, first: str, *rest: str) -> None:
    vm = Hypervisor().vm(first)
    if action == "create":
        _create(Path(first), rest[0])
    elif action == "frozen":
        print(vm.frozen_digests(), end="")
    elif action == "booted":
        print(vm.wait_until_up().booted_digests(), end="")
    elif action == "lines":
        print(vm.last_marker().number)
    else:
        _remove(Path(first), *rest)


if __name__ == "__main__":
    main()
