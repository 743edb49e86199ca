# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots: the document for a new one, the tree of the old ones."""

from __future__ import annotations

import itertools
import random

import libvirt

from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import files, snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._xml import parse


def node(name, parent="", created=0):
    return snapshots.Snapshot(name, "", parent, False, True, "no", "", "running", created)


def test_every_disk_is_in_the_document():
    root = parse(snapshots.document("a & b", "said <so>", [("vda", "/p/a b.ov")], ["sda", "sdb"]))
    assert (root.findtext("name"), root.findtext("description")) == ("a & b", "said <so>")
    assert root.find("memory").get("snapshot") == "no"
    disks = {disk.get("name"): disk for disk in root.iterfind("disks/disk")}
    assert {name: disk.get("snapshot") for name, disk in disks.items()} == {"vda": "external", "sda": "no", "sdb": "no"}
    assert (disks["vda"].find("driver").get("type"), disks["vda"].find("source").get("file")) == ("qcow2", "/p/a b.ov")


def test_memory_image():
    memory = parse(snapshots.document("a", "", [], [], "/p/m")).find("memory")
    assert (memory.get("snapshot"), memory.get("file")) == ("external", "/p/m")


def test_describe():
    found = snapshots.describe(
        "<domainsnapshot><name>s2</name><state>running</state><parent><name>s1</name></parent><creationTime>17</creationTime>"
        "<memory snapshot='external' file='/m'/><disks><disk name='vda' snapshot='external'/></disks></domainsnapshot>",
        current=True,
    )
    assert (found.name, found.parent, found.created, found.current, found.external) == ("s2", "s1", 17, True, True)
    assert (found.memory, found.memory_path, found.state) == ("external", "/m", "running")


def test_parents_first_in_any_order():
    nodes = [
        node("root", created=1),
        node("b", "root", 3),
        node("a", "root", 2),
        node("a1", "a", 9),
        node("b1", "b", 4),
    ]
    for shuffled in itertools.permutations(nodes):
        assert [each.name for each in snapshots.order(shuffled)] == ["root", "a", "a1", "b", "b1"]


def test_deep_trees_and_lost_parents():
    nodes = [node("s0")] + [node(f"s{number}", f"s{number - 1}", number) for number in range(1, 5000)]
    random.Random(1).shuffle(nodes)
    assert [each.name for each in snapshots.order(nodes)] == [f"s{number}" for number in range(5000)]
    assert [each.name for each in snapshots.order([node("x", "gone")])] == ["x"]


class Forgetful:
    """A domain with snapshots a and b, the current one named (or "")."""

    def __init__(self, current):
        self.current, self.redefined = current, []

    def name(self):
        return "vm"

    def listAllSnapshots(self, _flags):
        return [Listed(name, name == self.current) for name in ("a", "b")]

    def snapshotCreateXML(self, xml, flags):
        self.redefined.append((snapshots.describe(xml, current=True).name, flags))


class Listed:
    """One of them."""

    def __init__(self, name, current):
        self.name, self.current = name, current

    def listAllChildren(self, _flags):
        return []

    def getXMLDesc(self, _flags):
        return f"<domainsnapshot><name>{self.name}</name></domainsnapshot>"

    def isCurrent(self):
        return self.current


def test_the_current_one_is_told_again_only_where_none_is():
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    for current, name, redefined in (("", "b", [("b", flags)]), ("a", "b", []), ("", "gone", [])):
        domain = Forgetful(current)
        assert snapshots.stand_on(domain, name) is bool(redefined)
        assert domain.redefined == redefined


def test_what_a_killed_libvirtd_was_writing_is_written_again(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "_SNAPSHOTS", str(tmp_path))
    (tmp_path / "vm").mkdir()
    for name in ("a.xml", "b.xml", "b.xml.new", "unknown.xml.new"):
        (tmp_path / "vm" / name).touch()
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    for current, expected in (("a", flags), ("b", flags | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT)):
        domain = Forgetful(current)
        assert snapshots.finish_writes(domain) == []
        assert domain.redefined == [("b", expected)]


def test_what_libvirt_does_not_write_again_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "_SNAPSHOTS", str(tmp_path))
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "b.xml.new").touch()

    def refuse(_xml, _flags):
        raise libvirt.libvirtError("parent gone for snapshot b not found")

    domain = Forgetful("a")
    domain.snapshotCreateXML = refuse
    (refused,) = snapshots.finish_writes(domain)
    assert refused.startswith(f"{tmp_path}/vm/b.xml.new stays behind") and "parent gone" in refused
