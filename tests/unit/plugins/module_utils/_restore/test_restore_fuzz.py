# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Broken definitions, snapshots and heads of memory images: what is read of them, and the plan of a restore."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive import config, digests
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, SnapshotNode
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog, shown
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView, points_of
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import boot_files, domain, memory_image
from ansible_collections.kvmops.backup.plugins.module_utils._restore import (
    definition,
    facts,
    foreign_memory,
    run,
    states,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import RestorePlan
from ansible_collections.kvmops.backup.plugins.module_utils._restore.plan import plan
from ansible_collections.kvmops.backup.tests.unit.fuzz import broken_bytes, broken_xml, fuzz, only_our_errors
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._restore import (
    restore_values,
    test_restore_allowed,
    test_restore_tree,
)

FULL = """
<interface type='hostdev'><mac address='52:54:00:00:00:02'/><source><address type='pci' domain='0x0000' bus='0x01' slot='0x00'
 function='0x1'/></source></interface>
<hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/><product id='0xbeef'/></source></hostdev>
<hostdev mode='subsystem' type='mdev' model='vfio-pci'><source>
<address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source></hostdev>
<filesystem type='mount'><source dir='/srv'/><target dir='x'/></filesystem><memory model='dimm'><target><size unit='KiB'>1</size>
<node>0</node></target></memory><smartcard mode='passthrough' type='spicevmc'/><shmem name='x'/><watchdog model='i6300esb'/>
<interface type='network'><source network='default'/><rom file='/rom'/><backend tap='/dev/net/tun'/><script path='/x'/></interface>
"""
OS = (
    "<loader type='pflash' readonly='yes'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader><nvram template='/x'>/n</nvram>"
    "<kernel>/k</kernel><acpi><table type='slic'>/t</table></acpi><smbios mode='sysinfo'/>"
)
TOP = (
    "<sysinfo type='smbios'><system><entry name='uuid'>x</entry></system></sysinfo><cpu mode='custom'><model>qemu64</model></cpu>"
    "<metadata><a:b xmlns:a='urn:x'/></metadata><seclabel type='static' model='dac'><label>+0:+0</label></seclabel>"
    "<qemu:commandline><qemu:arg value='x'/></qemu:commandline><features><acpi/>"
    "<hyperv mode='custom'><relaxed state='on'/></hyperv></features><clock offset='utc'/>"
)
DEFINITIONS = (
    restore_values.domain_xml(),
    restore_values.domain_xml(
        restore_values.DISKS + test_restore_allowed.DEVICES + FULL, os_extra=OS, top=TOP
    ),
)  # fmt: skip
HOST = replace(
    test_restore_allowed.HERE,
    target=test_restore_allowed.HERE.former["vms"],
    hostdevs=frozenset({"usb:1234:beef", "pci:0000:01:00.1"}),
)


@fuzz(0.1, broken_xml(DEFINITIONS))
def test_fuzz_definitions(xml: str) -> None:
    """As a bare definition, in an archive of ours and in a foreign one."""
    member = "1700000000_web.xml"
    uses: list[Callable[[], Any]] = [
        lambda: domain.parse(xml),
        lambda: [each.path for each in boot_files.named(_xml.parse(xml))],
        lambda: run._without_secrets(xml),
        lambda: _of_the_host(xml),
        lambda: catalog.entry(_view(config.decode(xml.encode(), member))),
        lambda: planned(xml, bare=True),
    ]
    for format_version in (0, 1):
        for wishes in ({}, {"name": "copy"}, {"trust": True, "uuid": "keep"}, {"distrust": "it belongs to mallory"}):
            uses.append(lambda version=format_version, wishes=wishes: planned(xml, format_version=version, **wishes))
    for use in uses:
        with only_our_errors():
            use()


def _view(point: Configuration | None) -> ArchiveView:
    assert point is None or point.domain_xml
    known = point or restore_values.configuration()
    return ArchiveView("/none", 0, compressed=False, native=False, points=points_of((known,)), shown=shown.of_point(known))


def _of_the_host(xml: str) -> None:
    root = _xml.parse(xml)
    facts._host_files(definition.host_file_names(root, {"vms": "/vms"}), {}, (), {"vms": "/vms"}, digests.SHA256)
    facts._block_devices([root])


def planned(xml: str, *, format_version: int = 1, bare: bool = False, distrust: str = "", **wishes: Any) -> None:
    decoded = config.decode(xml.encode(), "1700000000_web.xml")
    point = restore_values.configuration(xml, format_version=format_version)
    if decoded is not None:
        point = replace(point, vm_name=decoded.vm_name, vm_uuid=decoded.vm_uuid)
    plan(point, HOST, restore_values.request(**wishes), bare=bare, distrust=distrust)


COOKIE = "<cookie><cpu mode='custom'><model>qemu64</model></cpu><slirpHelper/></cookie>"
INACTIVE = re.sub(r"<(/?)domain\b", r"<\1inactiveDomain", DEFINITIONS[1])
STATES = tuple(
    replace(state, xml=state.xml.replace("</domainsnapshot>", f"{extra}</domainsnapshot>"))
    for state, extra in zip(test_restore_tree.STATES, (COOKIE, INACTIVE, "", COOKIE))
)


def reaching_out(found: RestorePlan) -> list[str]:
    """What the VM, its snapshots and their memory images name of the host, and the restore has not made."""
    heads = [memory_image.parse(file.head, "image").xml for file in found.files if file.head]
    texts = [found.domain_xml, *(state.xml for state in found.states), *heads]
    return [item for text in texts for item in test_restore_allowed.reaching_out(text)]


@st.composite
def hostile_trees(draw: st.DrawFn) -> tuple[Configuration, states.Heads]:
    """A tree of snapshots and a memory image whose definitions name anything, where it may or may not belong."""

    def hostile(xml: str) -> str:
        root = etree.fromstring(xml)
        within = [each for domain in root.iter("domain", "inactiveDomain", "cookie") for each in domain.iter()]
        test_restore_allowed.mutate(root, random.Random(draw(st.integers(0, 2**32))), draw(st.integers(0, 4)), within)
        return etree.tostring(root, encoding="unicode")

    found = [replace(state, xml=hostile(state.xml)) for state in STATES]
    heads = test_restore_tree.head(hostile(test_restore_tree.definition("/vms/web.first")))
    return test_restore_tree.point(snapshots=tuple(found)), heads


@fuzz(0.05, hostile_trees())
def test_fuzz_what_snapshots_name(tree: tuple[Configuration, states.Heads]) -> None:
    point, heads = tree
    with only_our_errors():
        found = plan(point, HOST, restore_values.request(), heads=heads, distrust="it belongs to mallory")
        assert reaching_out(found) == []


@st.composite
def broken_trees(draw: st.DrawFn) -> Configuration:
    """A point with a tree of snapshots of which some are broken, and say about themselves what their XML says or something else."""
    found = []
    for state in STATES:
        xml = draw(st.just(state.xml) | broken_xml([state.xml], 3))
        root = _xml.parse(xml)
        name, parent = root.findtext("name") or "", root.findtext("parent/name") or ""
        if draw(st.integers(0, 9)) == 0:
            name, parent = draw(st.sampled_from(("", "root", "second", name))), draw(st.sampled_from(("", "root", parent)))
        found.append(SnapshotNode(name, xml, parent, draw(st.sampled_from((state.current, state.current, True)))))
    return test_restore_tree.point(snapshots=tuple(draw(st.permutations(found))))


@fuzz(0.05, broken_trees())
def test_fuzz_snapshots(point: Configuration) -> None:
    heads = test_restore_tree.head()
    for distrust in ("", "it belongs to mallory"):
        with only_our_errors():
            plan(point, HOST, restore_values.request(), heads=heads, distrust=distrust)


@st.composite
def broken_heads(draw: st.DrawFn) -> bytes:
    """The beginning of a memory image with another definition, other numbers or other bytes."""
    xml = draw(broken_xml([restore_values.domain_xml(), test_restore_tree.definition("/vms/web.first")], 4)).encode()
    room = draw(st.sampled_from((len(xml) + 40, 8192, 65536, 0, 2**20, 2**20 + 1, 2**32 - 1)))
    offset = draw(st.sampled_from((0, len(xml) + 1, 1, room - 1, 2**32 - 1))) & 0xFFFFFFFF
    numbers = (draw(st.sampled_from((2, 2, 2, 3))), room, 1, draw(st.sampled_from((0, 0, 4, 9))), offset)
    data = xml + b"\0<cookie/>\0"
    head = b"LibvirtQemudSave" + struct.pack("<19I", *numbers, *[0] * 14)
    return draw(broken_bytes(head + data.ljust(min(room, 70_000), b"\0"), 2))


@fuzz(0.04, broken_heads())
def test_fuzz_memory_images(data: bytes) -> None:
    """In an archive of ours, as a backup writes it, and in a foreign one."""

    def read(_name: str, offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    def without_secrets() -> None:
        head = memory_image.parse(data[: memory_image.head_bytes(data[:92], "image")], "image")
        kept = memory_image.without_secrets(head, "image")
        assert len(kept) == len(head.raw)

    point = test_restore_tree.point()
    foreign = restore_values.configuration(
        format_version=0, members=(*restore_values.configuration().members, test_restore_tree.IMAGE)
    )
    uses: list[Callable[[], Any]] = [
        without_secrets,
        lambda: plan(point, HOST, restore_values.request(), heads=states.memory_heads(read, point)),
        lambda: plan(point, HOST, restore_values.request(), heads=states.memory_heads(read, point), distrust="x"),
        lambda: _adopted(foreign_memory.adopt(foreign, read), read),
    ]
    for use in uses:
        with only_our_errors():
            use()


def _adopted(point: Configuration, read: foreign_memory.Read) -> None:
    plan(point, HOST, restore_values.request(), heads=states.memory_heads(read, point))
