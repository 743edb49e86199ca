# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a chain still stands, and the reason where it does not (SPEC B6)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Member,
    Role,
    SnapshotNode,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup import chain
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import describe
from ansible_collections.kvmops.backup.plugins.module_utils._vm_state import Evidence, VmState

UUID = "6f1a2b3c-0000-4000-8000-000000000001"
FULL, SECOND = 1000, 2000
MIB = 2**20


def layer(target, number, path, *, parent="", active=False, raw=False):
    return Member(
        f"{target}_{number}.{'snapshot' if parent else 'qcow2'}", Role.LAYER if parent else Role.DISK, 4096, f"d-{path}",
        target=target, virtual_size_bytes=64 * MIB, image_format="qcow2", original_format="raw" if raw else "qcow2",
        parent=parent, former_path=path, active=active,
    )  # fmt: skip


def state_xml(name, parent="", *, overlays=(), disks=(), created=5, memory="", internal=(), state="running"):
    above = f"<parent><name>{parent}</name></parent>" if parent else ""
    listed = "".join(f"<disk name='{t}' snapshot='external'><source file='{p}'/></disk>" for t, p in overlays)
    listed += "".join(f"<disk name='{t}' snapshot='internal'/>" for t in internal)
    kept = f"<memory snapshot='external' file='{memory}'/>" if memory else "<memory snapshot='no'/>"
    domain = "".join(f"<disk><source file='{p}'/><target dev='{t}'/></disk>" for t, p in disks)
    return (
        f"<domainsnapshot><name>{name}</name>{above}<creationTime>{created}</creationTime><state>{state}</state>{kept}"
        f"<disks>{listed}<disk name='sda' snapshot='no'/></disks>"
        f"<domain><devices>{domain}</devices></domain></domainsnapshot>"
    )


USER = state_xml("user", disks=[("vda", "/i/vda.qcow2"), ("vdb", "/i/vdb.raw")], internal=["vda"], created=1)
FIRST_XML = state_xml(
    "kvmops-1000", "user", overlays=[("vda", "/i/vda.k1"), ("vdb", "/i/vdb.k1")], created=2,
    disks=[("vda", "/i/vda.qcow2"), ("vdb", "/i/vdb.raw")],
)  # fmt: skip
SECOND_XML = state_xml(
    "kvmops-2000", "kvmops-1000", overlays=[("vda", "/i/vda.k2"), ("vdb", "/i/vdb.k2")], created=3,
    disks=[("vda", "/i/vda.k1"), ("vdb", "/i/vdb.k1")],
)  # fmt: skip


def point(timestamp, members, states, **more):
    return Configuration(
        timestamp=timestamp, domain_xml="<domain/>", vm_name="web", vm_uuid=UUID, members=tuple(members),
        incrementable=True, snapshots=tuple(states), **more,
    )  # fmt: skip


def tree(*xmls, current):
    """SnapshotNode tuples of these documents."""
    nodes = [describe(xml, current=False) for xml in xmls]
    return [SnapshotNode(each.name, each.xml, each.parent, each.name == current) for each in nodes]


def now_tree(*xmls, current):
    return tuple(replace(each, current=each.name == current) for each in (describe(x, current=False) for x in xmls))


POINTS = (
    point(
        FULL,
        [layer("vda", 0, "/i/vda.qcow2", active=True), layer("vdb", 0, "/i/vdb.raw", active=True, raw=True)],
        tree(USER, FIRST_XML, current="kvmops-1000"),
    ),
    point(
        SECOND,
        [
            layer("vda", 0, "/i/vda.qcow2"),
            layer("vdb", 0, "/i/vdb.raw", raw=True),
            layer("vda", 1, "/i/vda.k1", parent="vda_0.qcow2", active=True),
            layer("vdb", 1, "/i/vdb.k1", parent="vdb_0.qcow2", active=True),
        ],
        tree(USER, FIRST_XML, SECOND_XML, current="kvmops-2000"),
    ),
)


def disk(target, *paths, size=64 * MIB, qemu=None):
    return chain.DiskNow(target, paths, size, paths if qemu is None else qemu)


VDA = disk("vda", "/i/vda.k2", "/i/vda.k1", "/i/vda.qcow2")
VDB = disk("vdb", "/i/vdb.k2", "/i/vdb.k1", "/i/vdb.raw")
NOW = chain.VmNow("web", UUID, now_tree(USER, FIRST_XML, SECOND_XML, current="kvmops-2000"), (VDA, VDB))


def judge(now=NOW, state=VmState(), points=POINTS):  # noqa: B008
    return chain.judge(points, now, state)


def states(*xmls, current="kvmops-2000"):
    return replace(NOW, snapshots=now_tree(*xmls, current=current))


def disks(*found):
    return replace(NOW, disks=found)


def test_untouched():
    assert judge() == ""
    assert judge(disks(replace(VDA, qemu=()), replace(VDB, qemu=()))) == ""  # off
    first = replace(
        states(USER, FIRST_XML, current="kvmops-1000"),
        disks=(disk("vda", "/i/vda.k1", "/i/vda.qcow2"), disk("vdb", "/i/vdb.k1", "/i/vdb.raw")),
    )
    assert judge(first, points=POINTS[:1]) == ""


ADDED = state_xml("later", "kvmops-2000", overlays=[("vda", "/i/vda.l"), ("vdb", "/i/vdb.l")], created=9)
INSIDE = state_xml("inside", "kvmops-2000", internal=["vda", "vdb"], created=9)
SIBLING = state_xml("side", "user", created=9, internal=["vda"])
GROWN = disks(disk("vda", "/i/vda.l", *VDA.headers), disk("vdb", "/i/vdb.l", *VDB.headers))


def test_what_was_added_since_changes_nothing():
    assert (
        judge(replace(GROWN, snapshots=states(USER, FIRST_XML, SECOND_XML, ADDED, current="later").snapshots))
        == ""
    )
    assert judge(states(USER, FIRST_XML, SECOND_XML, INSIDE, current="inside")) == ""
    # one that was added and reverted to: the VM has gone on from it in another file
    assert (
        judge(
            replace(
                disks(disk("vda", "/i/x", "/i/vda.l", *VDA.headers), disk("vdb", "/i/y", "/i/vdb.l", *VDB.headers)),
                snapshots=states(USER, FIRST_XML, SECOND_XML, ADDED, current="later").snapshots,
            )
        )
        == ""
    )


BROKEN = {
    "own state deleted": (states(USER, FIRST_XML, current="kvmops-1000"), "snapshot kvmops-2000 is gone"),
    "older own state deleted": (states(USER, SECOND_XML), "snapshot kvmops-1000 is gone"),
    "user's state deleted": (states(FIRST_XML, SECOND_XML), "snapshot user is gone"),
    "all deleted": (states(current=""), "snapshot user, kvmops-1000, kvmops-2000 is gone"),
    "made anew under the same name": (
        states(USER, FIRST_XML, SECOND_XML.replace("<creationTime>3", "<creationTime>4")),
        "snapshot kvmops-2000 is not the one",
    ),
    "user's state made anew": (
        states(USER.replace("<creationTime>1", "<creationTime>8"), FIRST_XML, SECOND_XML),
        "snapshot user is not the one",
    ),
    "frozen file of a state exchanged": (
        states(USER, FIRST_XML, SECOND_XML.replace("'/i/vda.k1'", "'/i/other'")),
        "snapshot kvmops-2000 is not the one",
    ),
    "overlay of a state exchanged": (
        states(USER, FIRST_XML, SECOND_XML.replace("'/i/vda.k2'", "'/i/other'")),
        "snapshot kvmops-2000 is not the one",
    ),
    "memory image added": (
        states(USER, FIRST_XML, SECOND_XML.replace("<memory snapshot='no'/>", "<memory snapshot='external' file='/m'/>")),
        "snapshot kvmops-2000 is not the one",
    ),
    "moved in the tree": (
        states(USER, FIRST_XML, SECOND_XML.replace("<name>kvmops-1000</name></parent>", "<name>user</name></parent>")),
        "snapshot kvmops-2000 is not the one",
    ),
    "reverted to an older one of ours": (
        states(USER, FIRST_XML, SECOND_XML, current="kvmops-1000"),
        "reverted to snapshot kvmops-1000",
    ),
    "reverted to an internal one below": (
        states(USER, FIRST_XML, SECOND_XML, current="user"),
        "reverted to snapshot user",
    ),
    "reverted, and gone on beside": (
        states(USER, FIRST_XML, SECOND_XML, SIBLING, current="side"),
        "reverted to snapshot side",
    ),
    "current one not known": (states(USER, FIRST_XML, SECOND_XML, current=""), "no longer knows"),
    "reverted to the newest itself": (
        disks(disk("vda", "/i/fresh", "/i/vda.k1", "/i/vda.qcow2"), VDB),
        "has not gone on in /i/vda.k2",
    ),
    "disk added": (disks(VDA, VDB, disk("vdc", "/i/vdc.qcow2")), "disk vdc was added"),
    "disk removed": (disks(VDA), "disk vdb was removed"),
    "swapped": (
        disks(replace(VDB, target="vda"), replace(VDA, target="vdb")),
        "disk vda has what was disk vdb",
    ),
    "another file": (disks(disk("vda", "/i/new.qcow2"), VDB), "disk vda no longer stands on the files"),
    "overlay merged by blockcommit": (disks(disk("vda", "/i/vda.k1", "/i/vda.qcow2"), VDB), "has not gone on in /i/vda.k2"),
    "all merged by blockcommit": (disks(disk("vda", "/i/vda.qcow2"), VDB), "no longer stands on the files"),
    "middle merged by blockcommit": (disks(disk("vda", "/i/vda.k2", "/i/vda.qcow2"), VDB), "no longer stands on the files"),
    "pulled by blockpull": (disks(disk("vda", "/i/vda.k2"), VDB), "no longer stands on the files"),
    "rebased onto another base": (
        disks(disk("vda", "/i/vda.k2", "/i/vda.k1", "/i/copy.qcow2"), VDB),
        "no longer stands on the files",
    ),
    "QEMU and headers differ": (
        disks(replace(VDA, qemu=("/i/vda.qcow2",)), VDB),
        "QEMU has disk vda on /i/vda.qcow2, its definition and the images say",
    ),
    "grown": (disks(replace(VDA, virtual_size_bytes=96 * MIB), VDB), "disk vda was resized from 64.0 MiB to 96.0 MiB"),
    "shrunk": (disks(VDA, replace(VDB, virtual_size_bytes=32 * MIB)), "disk vdb was resized from 64.0 MiB to 32.0 MiB"),
    "renamed": (replace(NOW, name="db"), "renamed from web to db"),
    "made anew": (replace(NOW, uuid=UUID[:-1] + "2"), "another VM"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken(kind):
    now, reason = BROKEN[kind]
    assert reason in judge(now)


def test_made_to_stand_alone():
    assert "not made incrementable" in judge(points=(replace(POINTS[0], incrementable=False),))
    without_own = tuple(replace(each, current=False) for each in POINTS[0].snapshots)
    assert "not made incrementable" in judge(points=(replace(POINTS[0], snapshots=without_own),))


def test_ended_cycle():
    ended = VmState(ended="the VM was restored in place")
    assert judge(state=ended) == "the VM was restored in place"
    assert judge(state=replace(ended, begun=(FULL,))) == ""
    assert judge(state=replace(ended, begun=(SECOND,))) == "the VM was restored in place"


def test_read_only_disk_stands_as_it_is():
    plain = layer("vdc", 0, "/i/vdc.qcow2", active=True)
    points = (*POINTS[:1], replace(POINTS[1], members=(*POINTS[1].members, plain)))
    assert judge(disks(VDA, VDB, disk("vdc", "/i/vdc.qcow2")), points=points) == ""
    assert "disk vdc is /i/other now" in judge(disks(VDA, VDB, disk("vdc", "/i/other")), points=points)


def test_suspects():
    """Every frozen file is read again unless its digest and its whole evidence are known and the same."""
    newest = POINTS[1]
    found = {m.former_path: (1, n, 4096, 7, 8) for n, m in enumerate(newest.members)}
    known = VmState({m.former_path: Evidence(m.digest, found[m.former_path]) for m in newest.members})
    assert chain.suspects(newest, known, found) == ()
    assert chain.suspects(newest, VmState(), found) == newest.members
    assert [m.former_path for m in chain.suspects(newest, known, found, frozenset({"/i/vdb.raw"}))] == ["/i/vdb.raw"]
    for position in range(5):
        path = newest.members[0].former_path
        other = tuple(value + (n == position) for n, value in enumerate(found[path]))
        assert chain.suspects(newest, known, {**found, path: other}) == newest.members[:1]
    wrong = VmState({**known.frozen, "/i/vda.k1": replace(known.frozen["/i/vda.k1"], digest="other")})
    assert [m.former_path for m in chain.suspects(newest, wrong, found)] == ["/i/vda.k1"]


def test_memory_images_are_frozen_files_too():
    memory = Member("1000_1.memory", Role.MEMORY, 10, "d", former_path="/i/m")
    nvram = Member("1000.nvram", Role.NVRAM, 10, "d", former_path="/i/n")
    assert chain.frozen_files(replace(POINTS[0], members=(memory, nvram))) == (memory,)
