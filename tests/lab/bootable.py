# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks that the lab's guest boots from by itself, and OVAs of them as other products export them."""

from __future__ import annotations

import hashlib
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

from ._run import run
from .vm import build_guest

_START, _SIZE_MIB = 2048, 96
_LINE = "console=ttyS0 quiet panic=1 lab.writer=0"
_NAMESPACES = (
    'xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" '
    'xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" '
    'xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData" '
    'xmlns:vmw="http://www.vmware.com/schema/ovf"'
)


def _partitioned(disk: Path, partition: Path, kind: int, boot_code: bytes = b"") -> Path:
    """A disk with one active partition that has this file system."""
    sectors = partition.stat().st_size // 512
    head = bytearray(_START * 512)
    head[: len(boot_code[:440])] = boot_code[:440]
    head[446:462] = struct.pack("<BBBBBBBBII", 0x80, 0xFE, 0xFF, 0xFF, kind, 0xFE, 0xFF, 0xFF, _START, sectors)
    head[510:512] = b"\x55\xaa"
    with open(disk, "wb") as file:
        file.write(head)
        file.write(partition.read_bytes())
        file.truncate((_START + sectors + 2048) * 512)
    return disk


def bios_disk(work: Path) -> Path:
    """A raw disk from which a BIOS boots the guest."""
    guest, partition, config = build_guest(), work / "fat", work / "syslinux.cfg"
    with open(partition, "wb") as file:
        file.truncate(_SIZE_MIB << 20)
    run("mkfs.vfat", "-h", str(_START), "-F", "32", str(partition))
    config.write_text(f"DEFAULT lab\nLABEL lab\n KERNEL vmlinuz\n INITRD initrd.gz\n APPEND {_LINE}\n")
    run("mcopy", "-i", str(partition), str(guest / "vmlinuz"), str(guest / "initrd.gz"), str(config), "::/")
    run("syslinux", "--install", str(partition))
    return _partitioned(work / "bios.raw", partition, 0x0C, Path("/usr/lib/syslinux/mbr/mbr.bin").read_bytes())


def efi_disk(work: Path) -> Path:
    """A raw disk from which firmware without boot entries boots the guest: it has the fallback loader."""
    guest, partition, config, loader = build_guest(), work / "esp", work / "grub.cfg", work / "BOOTX64.EFI"
    with open(partition, "wb") as file:
        file.truncate(_SIZE_MIB << 20)
    run("mkfs.vfat", "-F", "32", str(partition))
    config.write_text(f"search --set=root --file /vmlinuz\nlinux /vmlinuz {_LINE}\ninitrd /initrd.gz\nboot\n")
    modules = "part_msdos fat linux search search_fs_file normal boot"
    run("grub-mkstandalone", "-O", "x86_64-efi", f"--modules={modules}", "-o", str(loader), f"boot/grub/grub.cfg={config}")
    run("mmd", "-i", str(partition), "::/EFI", "::/EFI/BOOT")
    run("mcopy", "-i", str(partition), str(loader), "::/EFI/BOOT/")
    run("mcopy", "-i", str(partition), str(guest / "vmlinuz"), str(guest / "initrd.gz"), "::/")
    return _partitioned(work / "efi.raw", partition, 0xEF)


def ova(path: Path, disks: Sequence[tuple[Path, int, int]], *, efi: bool = False) -> Path:
    """An OVA as VMware writes it, with the disks (raw file, controller number, address) in this order, and an e1000 card."""
    rows = {"files": "", "disks": "", "items": ""}
    members = []
    for number, (raw, controller, address) in enumerate(disks):
        vmdk = path.with_name(f"{path.stem}-disk{number}.vmdk")
        run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", str(raw), str(vmdk))
        members.append(vmdk)
        rows["files"] += f'<File ovf:href="{vmdk.name}" ovf:id="file{number}" ovf:size="{vmdk.stat().st_size}"/>'
        rows["disks"] += (
            f'<Disk ovf:capacity="{raw.stat().st_size}" ovf:diskId="disk{number}" ovf:fileRef="file{number}" '
            'ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>'
        )
        rows["items"] += _item(
            10 + number, 17, Parent=20 + controller, AddressOnParent=address, HostResource=f"ovf:/disk/disk{number}"
        )
    for controller in sorted({controller for _raw, controller, _address in disks}, reverse=True):
        rows["items"] += _item(20 + controller, 6, Address=controller, ResourceSubType="lsilogic")
    firmware = '<vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>' if efi else ""
    items = (
        _item(1, 3, VirtualQuantity=1)
        + _item(2, 4, VirtualQuantity=260, AllocationUnits="byte * 2^20")
        + rows["items"]
        + _item(5, 10, ResourceSubType="E1000", Connection="VM Network", AddressOnParent=7)
    )
    descriptor = path.with_suffix(".ovf")
    descriptor.write_text(
        f'<?xml version="1.0" encoding="UTF-8"?><Envelope {_NAMESPACES}><References>{rows["files"]}</References>'
        f'<DiskSection><Info/>{rows["disks"]}</DiskSection><NetworkSection><Info/><Network ovf:name="VM Network"/></NetworkSection>'
        f'<VirtualSystem ovf:id="{path.stem}"><Info/><Name>{path.stem}</Name><VirtualHardwareSection><Info/><System>'
        f"<vssd:VirtualSystemType>vmx-13</vssd:VirtualSystemType></System>{items}{firmware}</VirtualHardwareSection>"
        "</VirtualSystem></Envelope>"
    )
    manifest = path.with_suffix(".mf")
    digests = {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in (descriptor, *members)}
    manifest.write_text("".join(f"SHA256({name})= {digest}\n" for name, digest in digests.items()))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for each in (descriptor, manifest, *members):
            archive.add(each, each.name)
            each.unlink()
    return path


def _item(number: int, kind: int, **fields: object) -> str:
    values = {"InstanceID": number, "ResourceType": kind, **fields}
    return f"<Item>{''.join(f'<rasd:{key}>{value}</rasd:{key}>' for key, value in values.items())}</Item>"
