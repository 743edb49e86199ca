# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a receiver sees of an attached disk, and what its own VM looks like."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lxml import etree

from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for

SNAPSHOT = "vdisks_attached_to_another_domains"
PORTS = "<controller type='pci' model='pcie-root-port'/>" * 6  # a hot-plugged disk takes one


def device(vm, serial):
    """The device in the guest with that serial, as udev would find it; waits for it."""
    script = f'for d in /sys/block/vd*; do [ "$(cat $d/serial)" = {serial} ] && echo /dev/${{d##*/}}; done; true'
    return wait_for(f"{serial} in {vm.name}", lambda: vm.agent.shell(script).strip(), 60)


def digest(vm, path):
    """SHA-256 of all that the guest reads there, past its own cache."""
    return vm.agent.shell(f"echo 3 >/proc/sys/vm/drop_caches; sha256sum <{path}").split()[0]


def is_read_only(vm, path):
    """What the guest's kernel says of a device."""
    return vm.agent.shell(f"blockdev --getro {path}").strip() == "1"


def writes(vm, path):
    """Whether a guest's write to a device gets there."""
    return vm.agent.run("sh", "-c", f"dd if=/dev/zero of={path} bs=4096 count=1 conv=fsync", check=False).exit_code == 0


def files(vm, path, options="ro"):
    """``sha256sum`` lines of the files in the file system of a device, by their names there."""
    script = f"mkdir -p /run/m && mount -t ext4 -o {options} {path} /run/m && cd /run/m && find . -type f | sort | xargs sha256sum"
    return vm.agent.shell(f"{script}; cd /; umount /run/m")


def log(vm, path, options="ro"):
    """The markers in the file system of a device."""
    return vm.agent.shell(
        f"mkdir -p /run/m && mount -t ext4 -o {options} {path} /run/m && cat /run/m/log; umount /run/m"
    )


def held(vm):
    """Serials of the disks of others in the live and in the persistent definition."""

    def serials(inactive):
        root = etree.fromstring(vm.xml(inactive=inactive).encode())
        return [each for each in root.xpath("devices/disk/serial/text()") if each.startswith("kvmops")]

    return serials(False) if vm.is_running() else [], serials(True)


def snapshots(vm):
    """Names."""
    return sorted(vm.domain.snapshotListNames(0))


def chain(path, image_format="qcow2"):
    """How many images a disk consists of."""
    return len(
        json.loads(run("qemu-img", "info", "-U", "-f", image_format, "--backing-chain", "--output=json", str(path)))
    )


def standing(vm):
    """All that has to be as before: paths, formats and layers of the disks in both definitions, owners and labels of the files."""
    found = {}
    directory = Path(next(iter(vm.disks().values()))).parent
    for inactive in (False, True):
        for disk in etree.fromstring(vm.xml(inactive=inactive).encode()).iterfind("devices/disk"):
            path = disk.find("source").get("file") or str(directory / disk.find("source").get("volume"))
            image_format = disk.find("driver").get("type")
            found[inactive, disk.find("target").get("dev")] = path, image_format, chain(path, image_format)
    for path in sorted(directory.iterdir()):
        status = path.stat()
        # libvirt's timestamp is the time of the host's boot, reckoned anew each time: a second more or less
        labels = {name: os.getxattr(path, name) for name in os.listxattr(path) if "libvirt.security.timestamp" not in name}
        found[path.name] = status.st_uid, status.st_gid, oct(status.st_mode), labels
    return found, snapshots(vm)


def content(vm, target="vda"):
    """Digest of what a disk of a VM that is off holds."""
    disk = next(
        each
        for each in etree.fromstring(vm.xml(inactive=True).encode()).iterfind("devices/disk")
        if each.find("target").get("dev") == target
    )
    return truth.content_sha256(Path(disk.find("source").get("file")), disk.find("driver").get("type"))
