# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives of the right form, digests and all, whose snapshots ask for what no snapshot asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils._archive import reader, writer
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Role, SnapshotNode
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import FileSource
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import memory_image
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.tests.integration.targets.vm_restore_tree import snapshot_tree as trees
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab

Run = Callable[..., ModuleResult]


@dataclass(frozen=True)
class Trick:
    """Texts to replace in the snapshots, and in the domain XML of the memory image. ``words`` of the refusal, "" for none."""

    name: str
    in_states: tuple[tuple[str, str], ...] = ()
    in_memory: tuple[tuple[str, str], ...] = ()
    words: str = ""


SHADOW = "<disk type='file' device='disk'><source file='/etc/shadow'/><target dev='vdz' bus='virtio'/></disk></devices>"
TRICKS = [
    Trick("overlay", (("vda.off'", "../../../../etc/passwd'"),)),
    Trick("disk", (("</devices>", SHADOW),)),
    Trick("disk in memory", (), (("</devices>", SHADOW),)),
    Trick("memory", (("on.memory", "../../../../../etc/shadow"),), (), "memory image is not in the archive"),
    Trick("emulator", (("/usr/bin/qemu-system-x86_64", "/bin/true"),), (), "emulator /bin/true"),
    Trick("emulator in memory", (), (("/usr/bin/qemu-system-x86_64", "/bin/true"),), "emulator /bin/true"),
    Trick("name", (("<name>off<", "<name>../../../off<"),), (), "another one"),
    Trick("doctype", (("<domainsnapshot>", "<!DOCTYPE d [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><domainsnapshot>"),),
          (), "document type"),
]  # fmt: skip


def forged(lab: Lab, archive: str, trick: Trick) -> Path:
    """The archive once more, with other snapshots and another memory image; every digest fits."""
    folder = lab.path("members")
    run("tar", "-xf", archive, "-C", str(folder))
    with reader.open_archive(archive) as opened:
        point = opened.point()
    target = lab.path("forged")
    with writer.ArchiveWriter(
        str(target),
        "forged.tar",
        compression=None,
        timestamp=point.timestamp,
        progress=Progress(),
        on_partial=lambda _path: None,
    ) as archive_writer:
        members = []
        for member in point.members:
            path = folder / member.name
            if member.role is Role.MEMORY:
                rewrite_memory(path, trick)
            source = FileSource(str(path))
            members.append(archive_writer.add(replace(member, digest="", size_bytes=0), source))
            source.close()
        states = tuple(replace(state, xml=changed(state, trick)) for state in point.snapshots)
        archive_writer.publish(replace(point, members=tuple(members), snapshots=states))
    return target / "forged.tar"


def changed(state: SnapshotNode, trick: Trick) -> str:
    xml = state.xml
    for old, new in trick.in_states:
        xml = xml.replace(old, new)
    return xml


def rewrite_memory(path: Path, trick: Trick) -> None:
    data = path.read_bytes()
    head = memory_image.parse(data[: memory_image.head_bytes(data, "image")], "image")
    xml = head.xml
    for old, new in trick.in_memory:
        assert old in xml
        xml = xml.replace(old, new)
    path.write_bytes(memory_image.with_xml(head, etree.fromstring(xml), "image") + data[len(head.raw) :])


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.name)
def test_snapshots_reach_nothing_of_the_host(module_lab: Lab, source: str, run_module: Run, trick: Trick) -> None:
    lab = module_lab
    archive = forged(lab, source, trick)
    place = lab.path("restored")
    try:
        done = run_module("vm_restore", source=str(archive), name="copy", path=str(place), fails=bool(trick.words))
        if trick.words:
            assert trick.words in done.message and list(place.iterdir()) == []
            assert "copy" not in [domain.name() for domain in lab.connection.listAllDomains()]
            return
        copy = lab.adopt("copy")
        texts = [copy.xml(inactive=True), *(each.getXMLDesc(1) for each in copy.domain.listAllSnapshots())]
        texts.append(lab.connection.saveImageGetXMLDesc(str(place / "copy-on.memory")))
        for text in texts:
            assert "/etc/" not in text
            files = {source.get("file") for source in etree.fromstring(text).iter("source") if source.get("file")}
            assert all(Path(file).parent == place for file in files), files
        copy.remove()
    finally:
        for name in ("members", "forged", "restored"):
            run("rm", "-r", str(lab.directory / name))


@pytest.fixture(scope="module")
def source(module_lab: Lab) -> str:
    """An archive of a VM with an external snapshot, and one with memory."""
    from ansible_collections.kvmops.backup.tests.lab.modules import run_module

    vm = module_lab.create_vm("forged", [Disk(size_mib=32)], start=False)
    trees.take(vm, "off")
    vm.start()
    trees.take(vm, "on", memory=True)
    vm.destroy()
    done = run_module("vm_backup", vm="forged", path=str(module_lab.path("backups")))
    return str(done["archive"]["path"])
