# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs on OVAs: a conversion beside unpacking and converting with qemu-img, and what it takes to compress that."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

from ansible_collections.kvmops.backup.benchmarks import data
from ansible_collections.kvmops.backup.benchmarks.file_jobs import Source
from ansible_collections.kvmops.backup.benchmarks.measure import Contender, Goal, Job, Jobs

_NAMESPACES = (
    'xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" '
    'xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"'
)
_DESCRIPTOR = (
    f'<Envelope {_NAMESPACES}><References><File ovf:id="f" ovf:href="disk.vmdk"/></References><DiskSection><Info/>'
    '<Disk ovf:diskId="d" ovf:fileRef="f" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>'
    '</DiskSection><VirtualSystem ovf:id="benchmark"><Info/><VirtualHardwareSection><Info/><Item>'
    "<rasd:InstanceID>1</rasd:InstanceID>"
    "<rasd:HostResource>ovf:/disk/d</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item></VirtualHardwareSection>"
    "</VirtualSystem></Envelope>"
)
_CONVERT = (
    'tar -xf "$1" -C "$0" && qemu-img convert -W -m 16 -f vmdk -O qcow2 "$0/disk.vmdk" "$0/disk.qcow2" && rm "$0/disk.vmdk"'
)


def conversions(source: Source, work: Path) -> Jobs:
    """The disk as a streamOptimized VMDK in an OVA: to a plain and to a compressed archive."""
    ova = _make(source, work)
    ours, peer = work / "converted", work / "peer"
    convert = (*data.driver(), "convert", str(ova), str(ours))

    def equal() -> None:
        (archive,) = ours.glob("*.tar")
        subprocess.run(["tar", "-xf", archive, "-C", ours, "sda_0.qcow2"], check=True)
        subprocess.run(["qemu-img", "compare", "-q", ours / "sda_0.qcow2", peer / "disk.qcow2"], check=True)

    yield Job(
        "OVA to plain",
        (
            Contender("kvmops.backup", (convert,), ours, output_is_directory=True, durable=True),
            Contender(
                "tar -x, qemu-img convert -W -m 16",
                (("sh", "-c", _CONVERT, str(peer), str(ova)),),
                peer,
                output_is_directory=True,
            ),
        ),
        (Goal(1, 1.0),),
        (ova,),
        check=equal,
    )
    compress = f'{_CONVERT} && zstd -q -3 -T0 --rm "$0/disk.qcow2"'
    yield Job(
        "OVA to compressed",
        (
            Contender("kvmops.backup", ((*convert, "2"),), ours, output_is_directory=True, durable=True),
            Contender(
                "tar -x, qemu-img convert, zstd -3 -T0",
                (("sh", "-c", compress, str(peer), str(ova)),),
                peer,
                output_is_directory=True,
            ),
        ),
        (Goal(1, 1.5),),
        (ova,),
    )
    ova.unlink()


def _make(source: Source, work: Path) -> Path:
    directory = work / "ova"
    directory.mkdir()
    (directory / "vm.ovf").write_text(_DESCRIPTOR)
    disk = directory / "disk.vmdk"
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]
    subprocess.run([*convert, source.raw, disk], check=True)
    ova = work / "benchmark.ova"
    with tarfile.open(ova, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("vm.ovf", "disk.vmdk"):
            archive.add(directory / name, name)
    disk.unlink()
    return ova
