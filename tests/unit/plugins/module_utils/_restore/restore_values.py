# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Values that the unit tests of a restore start from: a VM with two disks in an archive, and a host that can run it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import (
    ExistingVm,
    HostCapabilities,
    HostFacts,
    RestorePlace,
    RestorePlan,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.plan import plan
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import RestoreRequest

UUID = "6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11"
OTHER_UUID = "11111111-2222-4333-8444-555555555555"
MAC = "52:54:00:aa:bb:cc"
MIB = 2**20

DISKS = """
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='/vms/web.qcow2' index='1'/>
  <backingStore type='file'><format type='raw'/><source file='/etc/shadow'/></backingStore><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/data/web.raw'/>
  <target dev='vdb' bus='virtio'/></disk>
"""


def domain_xml(
    devices: str = DISKS, *, os_extra: str = "", top: str = "", interface: str = "", name: str = "web"
) -> str:
    """A definition as libvirt prints it, more or less."""
    interface = (
        interface
        or f"<interface type='network'><mac address='{MAC}'/><source network='default' portid='x'/></interface>"
    )
    return f"""<domain type='qemu' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>{name}</name><uuid>{UUID}</uuid><genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid>
<memory unit='MiB'>192</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>{os_extra}</os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{devices}{interface}</devices>{top}</domain>"""


def disk(name: str, target: str, former_path: str, **more: Any) -> Member:
    """A disk of 10 MiB; `active` unless told otherwise."""
    values: dict[str, Any] = {
        "role": Role.DISK, "size_bytes": 10 * MIB, "digest": "d" * 64, "virtual_size_bytes": 64 * MIB,
        "image_format": "qcow2", "original_format": "qcow2", "active": True, **more,
    }  # fmt: skip
    return Member(name=name, target=target, former_path=former_path, **values)


VDA = disk("vda_0.qcow2", "vda", "/vms/web.qcow2", pool="vms")
VDB = disk("vdb_0.qcow2", "vdb", "/data/web.raw", original_format="raw")


def configuration(xml: str = "", members: tuple[Member, ...] = (VDA, VDB), **more: Any) -> Configuration:
    """A native point; ``format_version=0`` makes it foreign."""
    return Configuration(
        timestamp=1795309200, domain_xml=xml or domain_xml(), vm_name="web", vm_uuid=UUID, members=members,
        **{"digest": "c" * 64, **more},
    )  # fmt: skip


CAPABILITIES = HostCapabilities(
    emulator="/usr/bin/qemu-system-x86_64",
    emulators=frozenset({"/usr/bin/qemu-system-x86_64"}),
    machines=frozenset({"pc-q35-7.2", "q35"}),
    cpu_modes=frozenset({"custom", "host-model", "maximum"}),
    cpu_models={"qemu64": True, "Skylake-Server": False},
    firmware=frozenset({"/usr/share/OVMF/OVMF_CODE_4M.fd"}),
    firmware_auto=frozenset({"efi", "bios"}),
)


def host(**more: Any) -> HostFacts:
    """A host with the pool vms on one file system, and /data and the archive's directory on others."""
    values: dict[str, Any] = {
        "archive_place": RestorePlace("/backup", pool="backup", filesystem="3", free_bytes=100 * MIB),
        "nvram_place": RestorePlace("/var/lib/libvirt/qemu/nvram", filesystem="0", free_bytes=100 * MIB),
        "tpm_place": RestorePlace("/var/lib/libvirt/swtpm", filesystem="0", free_bytes=100 * MIB),
        "former": {
            "vms": RestorePlace("/vms", pool="vms", filesystem="1", free_bytes=100 * MIB),
            "/data": RestorePlace("/data", filesystem="2", free_bytes=100 * MIB),
        },
        "networks": frozenset({"default", "isolated"}),
        "interfaces": frozenset({"lo", "br0"}),
        "capabilities": CAPABILITIES,
    }  # fmt: skip
    return HostFacts(**{**values, **more})


def with_names(facts: HostFacts, **names: set[str]) -> HostFacts:
    """The host with files in its former places, keyed by the last part of the place's key."""
    former = {
        key: replace(place, names=frozenset(names.get(key.strip("/"), place.names)))
        for key, place in facts.former.items()
    }
    return replace(facts, former=former)


def request(**more: Any) -> RestoreRequest:
    """A request without any wish but the source."""
    return RestoreRequest(**{"source": "/backup/web.tar", **more})


ORIGINAL = ExistingVm(
    name="web", uuid=UUID, xml=domain_xml(), macs=frozenset({MAC}), files=frozenset({"/vms/web.qcow2", "/data/web.raw"}),
    disk_files=frozenset({"/vms/web.qcow2", "/data/web.raw"}),
)  # fmt: skip


def planned(facts: HostFacts | None = None, point: Configuration | None = None, **wishes: Any) -> RestorePlan:
    """The plan for the usual archive on the usual host, but for what is given."""
    bare, distrust = wishes.pop("bare", False), wishes.pop("distrust", "")
    point, facts = point or configuration(), facts or host()
    if (distrust or not point.format_version) and facts.target is None and not wishes.get("trust"):
        facts = replace(facts, target=facts.former["vms"])  # such an archive does not choose a directory
    return plan(point, facts, request(**wishes), bare=bare, distrust=distrust)
