# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Beside virt-v2v: the same CPUs, memory, disks and networks where it reads a descriptor rightly, the right ones where not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code
from ansible_collections.kvmops.backup.plugins.module_utils._ovf import descriptor, hardware
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._ovf import packages
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._ovf.packages import (
    BASE,
    CPU,
    DISK,
    LSI,
    MEMORY,
    item,
)

CORPUS = packages.corpus()
EXHAUSTIVE = bool(os.environ.get("KVMOPS_BACKUP_EXHAUSTIVE"))
pytestmark = pytest.mark.skipif(not shutil.which("virt-v2v"), reason="the peer virt-v2v is not installed")


@dataclass(frozen=True)
class Seen:
    """What both say of a VM."""

    name: str
    memory_bytes: int
    vcpus: int
    efi: bool
    disks: int
    networks: tuple[str, ...]


def peer(data: bytes, work: Path) -> Seen | None:
    """What virt-v2v says of a package with this descriptor; None where it fails."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "vm.ovf").write_bytes(data)
    disk = packages.stream_vmdk(packages.content(1 << 20))
    for href in re.findall(rb'href="([^"/]+)"', data):
        (work / href.decode()).write_bytes(disk)
    done = subprocess.run(
        ["virt-v2v", "-i", "ova", str(work), "--print-source"],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "LIBGUESTFS_BACKEND": "direct"},
    )  # fmt: skip
    if done.returncode:
        return None
    text = done.stdout

    def value(key: str) -> str:
        found = re.search(rf"^\s*{key}: (.*)$", text, re.MULTILINE)
        return found.group(1).strip() if found else ""

    disks = text.partition("disks:")[2].partition("removable media:")[0]
    nics = text.partition("NICs:")[2]
    return Seen(
        value("source name"),
        int(value("memory").split()[0]),
        int(value("nr vCPUs")),
        value("firmware").startswith("uefi"),
        len(re.findall(r"^\t?\s*\d+ \[|^\t.*\[", disks, re.MULTILINE)),
        tuple(re.findall(r'(?:Network|Bridge) "([^"]*)"', nics)),
    )


def ours(data: bytes, system: str = "") -> Seen:
    described = descriptor.parse(data, "the descriptor", system=system)
    made = hardware.plan(described, data, "the descriptor", hardware.Options())
    root = etree.fromstring(made.domain_xml)
    return Seen(
        made.name,
        int(root.findtext("memory") or 0) * 1024,
        int(root.findtext("vcpu") or 0),
        made.efi,
        sum(drive.device == "disk" for drive in made.drives),
        tuple(source.get("network") or "" for source in root.iterfind("devices/interface/source")),
    )


#: What virt-v2v 2.2 does not read: its answer is no measure for a descriptor with one of these.
BEYOND = (
    b"VirtualSystemCollection", b"configuration=", b"GigaBytes", b"2^30", b"2 ^ 30", b"gzip", b"chunkSize", b"parentRef",
    b"sasd:", b"${", b"://", b"%20",
)  # fmt: skip
OTHER_NAMESPACES = (
    b"http://www.vmware.com/schema/ovf/1/envelope",
    b"dmtf.org/CIM_",
    b"ovf/envelope/2",
    b"ovf/envelope/1/",
)
_NAMESPACE = re.compile(
    rb"""xmlns(?::\w+)?=["'][^"']*["']|\w+:schemaLocation="[^"]*"|format="[^"]*"|<!--.*?-->""", re.DOTALL
)


def rightly_read() -> Iterator[Path]:
    """Descriptors with one system, memory in MiB, one configuration, and a whole VMDK for each disk."""
    for path in sorted((CORPUS or Path()).glob("*")):
        data = path.read_bytes()
        if any(word in _NAMESPACE.sub(b"", data) for word in BEYOND) or any(word in data for word in OTHER_NAMESPACES):
            continue
        try:
            found = descriptor.parse(data, "x")
            made = hardware.plan(found, data, "x", hardware.Options())
        except KvmopsError:
            continue
        whole = len(found.systems) == 1 and all(drive.file for drive in made.drives)
        if whole and Code.ODD_PACKAGE not in [each.code for each in made.report.warnings]:
            yield path


@pytest.mark.skipif(CORPUS is None, reason="the corpus of descriptors is not beside this checkout")
def test_the_same_where_it_is_right(tmp_path: Path) -> None:
    paths = list(rightly_read())
    assert len(paths) >= 29
    for path in paths if EXHAUSTIVE else paths[::6]:
        data = path.read_bytes()
        theirs, own = peer(data, tmp_path / "package"), ours(data)
        # without a name in the descriptor the peer takes that of the directory
        assert (
            theirs is not None and replace(theirs, name=own.name if theirs.name == "package" else theirs.name) == own
        ), path.name


def test_right_where_it_is_not(tmp_path: Path) -> None:
    """Both are shown: the peer's answer, so that a better release of it is noticed, and ours."""
    gib = packages.descriptor(CPU + item(2, 4, VirtualQuantity=2, AllocationUnits="byte * 2^30") + LSI + DISK)
    several = packages.descriptor(
        item(1, 3, VirtualQuantity=1, attributes="ovf:configuration='small'")
        + item(1, 3, VirtualQuantity=8, attributes="ovf:configuration='large'") + MEMORY + LSI + DISK,
        head="<DeploymentOptionSection><Info/><Configuration ovf:id='small'/><Configuration ovf:id='large' ovf:default='true'/>"
        "</DeploymentOptionSection>",
    )  # fmt: skip
    second = packages.descriptor().replace(b"ovf/envelope/1", b"ovf/envelope/2")
    empty = packages.descriptor(
        BASE + item(9, 17, Parent=3, AddressOnParent=1, HostResource="ovf:/disk/d2"),
        disks='<Disk ovf:diskId="d1" ovf:fileRef="file1"/><Disk ovf:diskId="d2" ovf:capacity="1048576"/>',
    )
    answers = {
        name: peer(data, tmp_path / "package")
        for name, data in (("gib", gib), ("several", several), ("second", second), ("empty", empty))
    }
    assert answers["gib"] and answers["gib"].memory_bytes == 2 << 20 and ours(gib).memory_bytes == 2 << 30
    assert answers["several"] and answers["several"].vcpus == 1 and ours(several).vcpus == 8
    assert answers["second"] and answers["second"].disks == 0 and ours(second).disks == 1
    assert answers["empty"] is None and ours(empty).disks == 2
    secure = packages.descriptor(hardware='<vmw:Config vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="true"/>')
    made = hardware.plan(descriptor.parse(secure, "x"), secure, "x", hardware.Options())
    assert (
        b"secure-boot" in made.domain_xml.encode()
        and etree.fromstring(made.domain_xml).find("features/smm") is not None
    )
