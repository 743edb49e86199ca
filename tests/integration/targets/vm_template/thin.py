# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Templates and clones as the tests of this target need them, and what is really on their disks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

from lxml import etree

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm

Run = Callable[..., ModuleResult]


def formats(vm: LabVm) -> dict[str, str]:
    """Format of each disk by target."""
    disks = etree.fromstring(vm.xml(inactive=True)).findall("devices/disk[@device='disk']")
    return {disk.find("target").get("dev"): disk.find("driver").get("type") for disk in disks}


def contents(vm: LabVm) -> dict[str, str]:
    """Digest of what the guest sees of each disk, all layers and the template included."""
    known = formats(vm)
    return {target: truth.content_sha256(path, known[target]) for target, path in vm.disks().items()}


def chain(path: Path, image_format: str = "qcow2") -> list[str]:
    """Files that an image stands on, itself first, as qemu-img has them."""
    layers = json.loads(
        run("qemu-img", "info", "-U", "-f", image_format, "--backing-chain", "--output=json", str(path))
    )
    return [layer["filename"] for layer in layers]


def write(path: Path, image_format: str, pattern: int, offset: int = 4096, length: int = 4096) -> None:
    """A guest's write, without a guest."""
    run("qemu-io", "-f", image_format, "-c", f"write -P {pattern} {offset} {length}", str(path))


def lose(vm: LabVm) -> None:
    """The VM and its disks are gone."""
    disks = vm.disks()
    vm.remove()
    for path in disks.values():
        path.unlink()


def off_template(
    lab: Lab, run_module: Run, name: str = "base", disks: tuple[Disk, ...] = (Disk(), Disk("raw"))
) -> LabVm:
    """A template that was never started, with something on its disks."""
    vm = lab.create_vm(name, disks, start=False)
    known = formats(vm)
    for number, (target, path) in enumerate(vm.disks().items(), 1):
        write(path, known[target], number, offset=32 << 20)
    run_module("vm_template", vm=name)
    return vm


def off_clone(lab: Lab, run_module: Run, name: str, template: str = "base", **options: Any) -> LabVm:
    """A thin clone with a write of its own on each disk."""
    run_module("vm_thin_clone", template=template, name=name, **options)
    vm = lab.adopt(name)
    for number, path in enumerate(vm.disks().values(), 1):
        write(path, "qcow2", 0x40 + number + len(name), offset=40 << 20)
    return vm


def backup(run_module: Run, vm: LabVm, target: Path, **options: Any) -> str:
    """Path of the archive."""
    return str(run_module("vm_backup", vm=vm.name, path=str(target), **options)["archive"]["path"])
