# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots in plans: which layers they need, where everything goes, and what a hostile archive does not get."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Member,
    Role,
    SnapshotNode,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError, KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import memory_image
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import PlaceKind
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import RestorePlace, RestorePlan
from ansible_collections.kvmops.backup.plugins.module_utils._restore.plan import plan
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import DiskFormat
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._restore.restore_values import (
    MAC,
    MIB,
    UUID,
    VDA,
    disk,
    domain_xml,
    host,
    request,
)


def definition(path: str, devices: str = "", **more: Any) -> str:
    """The VM while its disk was ``path``."""
    return domain_xml(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>"
        f"<backingStore type='file'><source file='/etc/shadow'/></backingStore><target dev='vda' bus='virtio'/></disk>{devices}",
        **more,
    )


def state(
    name: str,
    path: str,
    *,
    parent: str = "",
    overlay: str = "",
    memory: str = "<memory snapshot='no'/>",
    current: bool = False,
    power: str = "shutoff",
    extra: str = "",
    domain: str = "",
) -> SnapshotNode:
    """A snapshot while the disk was ``path``; external with ``overlay``, else internal."""
    mode = f"external' type='file'><driver type='qcow2'/><source file='{overlay}'/>" if overlay else "internal'>"
    xml = (
        f"<domainsnapshot><name>{name}</name><state>{power}</state>"
        + (f"<parent><name>{parent}</name></parent>" if parent else "")
        + f"<creationTime>1700000000</creationTime>{memory}<disks><disk name='vda' snapshot='{mode}</disk></disks>"
        f"{domain or definition(path)}{extra}</domainsnapshot>"
    )
    return SnapshotNode(name, xml, parent, current)


def layer(number: int, path: str, parent: str, **more: Any) -> Member:
    values = {"pool": "vms", "role": Role.LAYER, "parent": parent, "active": False, **more}
    return disk(f"vda_{number}.snapshot", "vda", path, **values)


BASE = replace(VDA, active=False, former_path="/vms/web.qcow2")
FIRST = layer(1, "/vms/web.first", BASE.name)
BRANCH = layer(2, "/vms/web.branch", BASE.name)
UNUSED = layer(3, "/vms/web.unused", BASE.name)
IMAGE = Member("5_1.memory", Role.MEMORY, 5 * MIB, former_path="/vms/second.memory", pool="vms")
MEMORY = "<memory snapshot='external' file='/vms/second.memory'/>"
STATES = (
    state("root", "/vms/web.qcow2", overlay="/vms/web.first"),
    state("inside", "/vms/web.first", parent="root"),
    state("second", "/vms/web.first", parent="inside", overlay="/vms/web.second", memory=MEMORY, current=True, power="running"),
    state("side", "/vms/web.branch", parent="root", overlay="/vms/web.gone"),
)  # fmt: skip


def head(xml: str = "", codec: int = 0) -> dict[str, memory_image.MemoryHead]:
    data = (xml or definition("/vms/web.first")).encode() + b"\0"
    raw = b"LibvirtQemudSave" + struct.pack("<19I", 2, 8192, 1, codec, 0, *[0] * 14) + data.ljust(8192, b"\0")
    return {IMAGE.name: memory_image.parse(raw, "image")}


def point(**more: Any) -> Configuration:
    """The newest point of a VM whose disk /vms/web.first is frozen by the current snapshot."""
    values: dict[str, Any] = {
        "timestamp": 5, "domain_xml": definition("/vms/web.first"), "vm_name": "web", "vm_uuid": UUID, "digest": "c" * 64,
        "members": (BASE, replace(FIRST, active=True), BRANCH, UNUSED, IMAGE), "snapshots": STATES,
    }  # fmt: skip
    return Configuration(**{**values, **more})


def planned(configuration: Configuration | None = None, heads: Any = None, **wishes: Any) -> RestorePlan:
    facts = wishes.pop("facts", None) or host()
    return plan(configuration or point(), facts, request(**wishes), heads=head() if heads is None else heads)


def refusal(kind: type[KvmopsError] = RefusedError, **arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        planned(**arguments)
    return str(caught.value)


def every_path(found: RestorePlan) -> set[str]:
    """All absolute paths in what libvirt is given, but those of programs and our own namespace."""
    texts = [found.domain_xml, *(each.xml for each in found.states)]
    texts += [memory_image.parse(file.head, "image").xml for file in found.files if file.head]
    nodes = [node for text in texts for node in etree.fromstring(text).iter()]
    values = {value for node in nodes for value in (*node.attrib.values(), (node.text or "").strip())}
    return {value for value in values if value.startswith("/")} - {"/usr/bin/qemu-system-x86_64"}


def snapshots(found: RestorePlan) -> dict[str, etree._Element]:
    return {each.name: etree.fromstring(each.xml) for each in found.states}


# --- layers and places ----------------------------------------------------------------------------


def test_a_copy_gets_all_layers_that_snapshots_need_and_a_fresh_overlay() -> None:
    found = planned(name="copy")
    assert {f.member.name: (f.path, f.backing) for f in found.files} == {
        "vda_0.qcow2": ("/vms/copy-vda.qcow2", ""),
        "vda_1.snapshot": ("/vms/copy-vda-1.qcow2", "/vms/copy-vda.qcow2"),
        "vda_2.snapshot": ("/vms/copy-vda-2.qcow2", "/vms/copy-vda.qcow2"),
        "5_1.memory": ("/vms/copy-second.memory", ""),
    }
    (overlay,) = found.made
    assert (overlay.path, overlay.backing, overlay.backing_format) == (
        "/vms/copy-vda-3.qcow2",
        "/vms/copy-vda-1.qcow2",
        "qcow2",
    )
    assert [d.path for d in found.disks] == [overlay.path]
    assert [each.name for each in found.states if each.current] == ["second"]
    assert [(each.name, each.parent) for each in found.states] == [
        ("root", ""), ("inside", "root"), ("side", "root"), ("second", "inside"),
    ]  # fmt: skip


def test_in_place_everything_has_its_former_name() -> None:
    found = planned()
    names = {f.path for f in found.files} | {f.path for f in found.made}
    assert names == {"/vms/web.qcow2", "/vms/web.first", "/vms/web.branch", "/vms/second.memory", "/vms/web.second"}
    assert [d.path for d in found.disks] == ["/vms/web.second"]


def test_a_layer_that_no_snapshot_holds_is_the_disk_itself() -> None:
    found = planned(point(snapshots=STATES[:2], members=(BASE, replace(FIRST, active=True))), name="copy")
    assert found.made == () and [d.path for d in found.disks] == ["/vms/copy-vda-1.qcow2"]
    # but not if another branch stands on it
    found = planned(
        point(
            domain_xml=definition("/vms/web.qcow2"),
            members=(replace(BASE, active=True), FIRST),
            snapshots=(state("inside", "/vms/web.first"),),
        ),
        name="copy",
    )
    assert [m.backing for m in found.made] == ["/vms/copy-vda.qcow2"]


def test_snapshots_are_rewritten_to_the_new_identity_and_places() -> None:
    found = planned(name="copy")
    trees = snapshots(found)
    allowed = {f.path for f in found.files} | {f.path for f in found.made}
    absent = {path for path in every_path(found) if path.endswith(".absent")}
    assert every_path(found) - absent <= allowed and len(absent) == 1
    for root in trees.values():
        assert root.findtext("domain/name") == "copy" and root.findtext("domain/uuid") == found.uuid != UUID
        assert root.find("domain/devices/interface/mac").get("address") not in ("", MAC)
        assert root.find(".//backingStore") is None

    def file(name: str, place: str) -> str:
        return trees[name].find(place).get("file")

    assert file("root", "domain/devices/disk/source") == "/vms/copy-vda.qcow2"
    assert file("root", "disks/disk/source") == "/vms/copy-vda-1.qcow2"
    assert file("second", "disks/disk/source") == found.made[0].path
    assert file("second", "memory") == "/vms/copy-second.memory"
    assert file("side", "domain/devices/disk/source") == "/vms/copy-vda-2.qcow2"
    assert "gone" not in file("side", "disks/disk/source")
    assert trees["inside"].find("disks/disk").get("snapshot") == "internal"
    macs = {root.find("domain/devices/interface/mac").get("address") for root in trees.values()}
    image = etree.fromstring(memory_image.parse(next(f.head for f in found.files if f.head), "image").xml)
    macs |= {image.find("devices/interface/mac").get("address")}
    macs |= {etree.fromstring(found.domain_xml).find("devices/interface/mac").get("address")}
    assert len(macs) == 1
    assert (image.findtext("name"), image.findtext("uuid")) == ("copy", found.uuid)
    genids = {root.findtext("domain/genid") for root in trees.values()} | {image.findtext("genid")}
    assert len(genids) == 1 and genids != {"43dc0cf8-809b-4adb-9bea-a9abb5f3d90e"}
    assert Code.SAME_NETWORK in [notice.code for notice in found.warnings]


def test_both_definitions_and_revert_overlays_are_rewritten_and_nothing_else_is_passed_on() -> None:
    extra = (
        definition("/vms/web.first").replace("<domain ", "<inactiveDomain ").replace("</domain>", "</inactiveDomain>")
        + "<revertDisks><disk name='vda' snapshot='external' type='file'><driver type='qcow2'/>"
        "<source file='/vms/web.again'/></disk></revertDisks>"
        "<cookie><cpu mode='custom'/><evil file='/etc/passwd'/></cookie><active>1</active><other path='/etc/group'/>"
    )
    now = state("now", "/vms/web.first", overlay="/vms/web.branch", current=True, extra=extra)
    other = state("side", "/vms/web.branch", overlay="/vms/web.gone")
    found = planned(point(snapshots=(now, other)), name="copy")
    root = snapshots(found)["now"]
    assert [child.tag for child in root] == [
        "name", "state", "creationTime", "memory", "disks", "revertDisks", "domain", "inactiveDomain", "cookie",
    ]  # fmt: skip
    assert root.findtext("inactiveDomain/uuid") == found.uuid
    assert root.find("disks/disk/source").get("file") == "/vms/copy-vda-2.qcow2"
    assert root.find("revertDisks/disk/source").get("file") == found.made[0].path
    assert [part.tag for part in root.find("cookie")] == ["cpu"]
    assert "/etc" not in "".join(each.xml for each in found.states)


def test_disk_format_qcow2_goes_through_the_chain_and_the_snapshots() -> None:
    raw = replace(BASE, original_format="raw", former_path="/vms/web.raw")
    states = (state("root", "/vms/web.raw", overlay="/vms/web.first", current=True),)
    configuration = point(
        members=(raw, replace(FIRST, active=True)), snapshots=states, domain_xml=definition("/vms/web.first")
    )
    keep, qcow2 = planned(configuration), planned(configuration, disk_format=DiskFormat.QCOW2)
    assert [(f.path, f.format, f.backing_format) for f in keep.files] == [
        ("/vms/web.raw", "raw", ""), ("/vms/web.first", "qcow2", "raw"),
    ]  # fmt: skip
    assert [(f.path, f.format, f.backing_format) for f in qcow2.files] == [
        ("/vms/web.qcow2", "qcow2", ""), ("/vms/web.first", "qcow2", "qcow2"),
    ]  # fmt: skip
    for found, image_format in ((keep, "raw"), (qcow2, "qcow2")):
        driver = snapshots(found)["root"].find("domain/devices/disk/driver")
        assert driver.get("type") == image_format


def test_snapshots_on_zfs_are_said_to_be_in_the_way_of_the_next_backup() -> None:
    zfs = {key: replace(place, kind=PlaceKind.ZFS) for key, place in host().former.items()}
    (told,) = [each.text for each in planned(point(), facts=host(former=zfs)).warnings if each.code is Code.NO_BACKUP]
    assert "/vms" in told and "'flatten: true'" in told and "state: absent" in told
    flat = planned(point(), facts=host(former=zfs), flatten=True)
    assert Code.NO_BACKUP not in [each.code for each in (*flat.warnings, *planned(point()).warnings)]


def test_flatten_makes_one_image_per_disk_with_the_lowest_layers_name_and_format() -> None:
    raw = replace(BASE, original_format="raw", former_path="/vms/web.raw")
    configuration = point(members=(raw, replace(FIRST, active=True), BRANCH, IMAGE))
    found = planned(configuration, heads={}, flatten=True)
    assert found.states == () and found.flat and [d.path for d in found.disks] == ["/vms/web.raw"]
    assert [(m.path, m.format, m.flat, m.backing_format) for m in found.made] == [
        ("/vms/web.raw", "raw", True, "qcow2")
    ]
    assert [(f.member.name, f.temporary) for f in found.files] == [("vda_0.qcow2", True), ("vda_1.snapshot", True)]
    assert found.made[0].backing == found.files[1].path and found.files[1].backing == found.files[0].path
    assert found.estimated_bytes == 40 * MIB and found.refresh_pools == ("vms",)
    assert (
        planned(configuration, heads={}, flatten=True, disk_format=DiskFormat.QCOW2).disks[0].path == "/vms/web.qcow2"
    )
    # without snapshots and layers it changes nothing
    plain = point(snapshots=(), members=(replace(BASE, active=True),), domain_xml=definition("/vms/web.qcow2"))
    assert not planned(plain, flatten=True).flat and planned(plain, flatten=True).made == ()


def test_a_full_pool_counts_layers_memory_and_what_is_made_of_them() -> None:
    small = host(former={"vms": replace(host().former["vms"], free_bytes=34 * MIB)})
    assert planned(facts=small).files[0].path.startswith("/backup/")
    fitting = host(former={"vms": replace(host().former["vms"], free_bytes=35 * MIB)})
    assert planned(facts=fitting).files[0].path.startswith("/vms/")
    assert planned(facts=fitting, flatten=True).disks[0].path.startswith("/backup/")


@pytest.mark.parametrize("directory", ["/var/lib/libvirt/qemu/snapshot", "/gone"])
def test_a_memory_image_from_libvirts_own_directory_goes_beside_the_disks(directory: str) -> None:
    file = f"{directory}/second.memory"
    taken = replace(STATES[2], xml=STATES[2].xml.replace("/vms/second.memory", file))
    image = replace(IMAGE, former_path=file, pool="")
    members = (*point().members[:-1], image)
    found = planned(
        point(members=members, snapshots=(*STATES[:2], taken, STATES[3])),
        facts=host(former={**host().former, "/var/lib/libvirt/qemu/snapshot": RestorePlace("/var/lib/libvirt/qemu/snapshot")}),
    )
    assert next(f.path for f in found.files if f.member.role is Role.MEMORY) == "/vms/second.memory"
    assert Code.OTHER_PLACE not in [notice.code for notice in found.warnings]


def test_files_in_use_are_refused_also_for_overlays_and_memory() -> None:
    from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import ExistingVm

    for path in ("/vms/web.second", "/vms/second.memory"):
        user = ExistingVm("db", "11111111-2222-4333-8444-555555555555", files=frozenset({path}))
        assert f"{path} belongs to the VM db" in refusal(facts=host(vms=(user,)), force=True)


# --- memory images --------------------------------------------------------------------------------


def test_a_codec_that_is_not_known_is_left_as_it_is_or_refused() -> None:
    kept = planned(heads=head(codec=6))
    image = next(f for f in kept.files if f.member.role is Role.MEMORY)
    assert image.head == image.former_head
    text = refusal(heads=head(codec=6), name="copy")
    assert "snapshot second" in text and "uuid: keep" in text and "flatten" in text
    assert "codec" in refusal(heads=head(definition("/elsewhere/web.first"), codec=6))


def test_a_missing_memory_image_is_refused_with_the_way_out() -> None:
    text = refusal(configuration=point(members=(BASE, replace(FIRST, active=True), BRANCH)), heads={})
    assert "snapshot second: its memory image is not in the archive" in text and "flatten" in text


@pytest.mark.parametrize(
    "xml",
    [
        definition("/vms/web.first").replace("dev='vda'", ""),
        definition("/vms/web.first").replace("dev='vda'", "dev='../x'"),
        definition("/vms/web.first", "<disk type='file'><source file='/vms/b'/><target dev='vda'/></disk>"),
    ],
    ids=["none", "a path", "twice the same"],
)
def test_disks_without_a_target_of_their_own_in_a_snapshot_are_refused(xml: str) -> None:
    taken = replace(STATES[0], xml=STATES[0].xml.replace(definition("/vms/web.qcow2"), xml))
    assert taken.xml != STATES[0].xml
    for text in (refusal(heads=head(xml)), refusal(configuration=point(snapshots=(taken,)), heads={})):
        assert "disks without a target of their own" in text


def test_a_memory_image_that_loses_a_device_is_warned_about() -> None:
    devices = "<filesystem type='mount'><source dir='/etc'/><target dir='t'/></filesystem>"
    configuration = point(format_version=0, digest="")
    found = planned(configuration, heads=head(definition("/vms/web.first", devices)))
    assert any("second: A memory image may not fit" in notice.text for notice in found.warnings)


# --- hostile --------------------------------------------------------------------------------------

GRABS = [
    "<disk type='file' device='disk'><source file='/etc/shadow'/><target dev='vdz' bus='virtio'/></disk>",
    "<disk type='block' device='disk'><source dev='/dev/sda'/><target dev='vdz' bus='virtio'/></disk>",
    "<disk type='file' device='cdrom'><source file='/root/secret.iso'/><target dev='sdz' bus='sata'/></disk>",
    "<hostdev mode='subsystem' type='pci'><source><address domain='0' bus='1' slot='0' function='0'/></source></hostdev>",
    "<filesystem type='mount'><source dir='/etc'/><target dir='t'/></filesystem>",
    "<serial type='file'><source path='/root/.bashrc'/><target port='0'/></serial>",
    "<rng model='virtio'><backend model='random'>/dev/sda</backend></rng>",
    "<interface type='ethernet'><script path='/tmp/evil'/></interface>",
    "<shmem name='x'><server path='/run/evil'/></shmem>",
    "<disk type='file' device='floppy'><source file='/etc/passwd'/><target dev='fda'/></disk>",
    "<disk type='volume' device='cdrom'><source file='/etc/passwd' pool='vms' volume='/etc/passwd'/><target dev='sdz'/></disk>",
    "<redirdev bus='usb' type='spicevmc'><log file='/root/evil' append='off'/></redirdev>",
    "<graphics type='egl-headless'><gl rendernode='/dev/dri/renderD128'/></graphics>",
    "<audio id='1' type='pulseaudio' serverName='/run/evil'/>",
]


@pytest.mark.parametrize("where", ["domain", "inactiveDomain", "memory"])
@pytest.mark.parametrize("grab", GRABS)
def test_no_definition_in_a_snapshot_reaches_further_than_the_vms_own(grab: str, where: str) -> None:
    evil = definition("/vms/web.first", grab)
    inactive = evil.replace("<domain ", "<inactiveDomain ").replace("</domain>", "</inactiveDomain>")
    taken = state(
        "second", "/vms/web.first", overlay="/vms/web.second", memory=MEMORY, current=True, power="running",
        domain=evil if where == "domain" else "", extra=inactive if where == "inactiveDomain" else "",
    )  # fmt: skip
    foreign = point(snapshots=(taken,), format_version=0, digest="")
    found = planned(foreign, heads=head(evil if where == "memory" else ""))
    allowed = {f.path for f in found.files} | {f.path for f in found.made}
    assert every_path(found) <= allowed | {"/dev/urandom"}
    assert any("snapshot second" in notice.text for notice in found.warnings)


def test_qemu_options_and_emulators_of_snapshots_are_judged_too() -> None:
    option = "<qemu:commandline><qemu:arg value='-chardev'/></qemu:commandline>"
    evil = state("root", "/vms/web.first", overlay="/vms/o", domain=definition("/vms/web.first", top=option))
    found = planned(point(snapshots=(evil,), format_version=0, digest=""))
    assert "-chardev" not in found.states[0].xml
    program = definition("/vms/web.first").replace("/usr/bin/qemu-system-x86_64", "/tmp/evil")
    for where, heads in ((program, None), ("", head(program))):
        taken = state("second", "/vms/web.first", overlay="/vms/o", memory=MEMORY, power="running", domain=where)
        text = refusal(configuration=point(snapshots=(taken,)), heads=heads)
        assert "snapshot second: this host does not have the emulator /tmp/evil" in text


@pytest.mark.parametrize("file", ["/etc/shadow", "/vms/web.first"])
def test_a_memory_file_is_only_ever_one_from_the_archive(file: str) -> None:
    evil = state("x", "/vms/web.first", overlay="/vms/o", memory=f"<memory snapshot='external' file='{file}'/>")
    assert "not in the archive" in refusal(configuration=point(snapshots=(evil,)), heads={})


def test_an_overlay_is_never_a_file_of_the_host() -> None:
    evil = state("x", "/vms/web.first", overlay="/var/lib/libvirt/images/db.qcow2")
    found = planned(point(snapshots=(evil,)))
    assert "db.qcow2" not in found.states[0].xml
    allowed = {f.path for f in found.files} | {f.path for f in found.made}
    assert all(path in allowed or path.endswith(".absent") for path in every_path(found))


def huge(name: str) -> SnapshotNode:
    """As large as the XML of one snapshot may be; several of them would cost a gigabyte."""
    return SnapshotNode(
        name, state(name, "/vms/web.first").xml.replace("</devices>", "<a b='1'/>" * 49_000 + "</devices>")
    )


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ((state("a", "/vms/web.first"), state("a", "/vms/web.first")), "same name"),
        ((state("a", "/vms/web.first", parent="b"), state("b", "/vms/web.first", parent="a")), "circle"),
        ((state("a", "/vms/web.first", parent="nobody"),), "missing"),
        ((state("a", "/vms/web.first", current=True), state("b", "/vms/web.first", current=True)), "more than one"),
        ((state("../../evil", "/vms/web.first"),), "no name"),
        ((state(".evil", "/vms/web.first"),), "no name"),
        ((SnapshotNode("a", state("b", "/vms/web.first").xml),), "another one"),
        ((SnapshotNode("a", "<domainsnapshot><name>a</name></domainsnapshot>"),), "no whole"),
        ((state("a", "/vms/web.first", power="evil"),), "make no sense"),
        (tuple(huge(name) for name in "abcde"), "more than 400000 elements"),
        ((SnapshotNode("a", "<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><domainsnapshot/>"),), "no place"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tree_that_nobody_can_have_had_is_refused(states: tuple[SnapshotNode, ...], words: str) -> None:
    assert words in refusal(HostileError, configuration=point(snapshots=states), heads={})


PIECES = st.sampled_from(
    [
        "/vms/web.qcow2",
        "/vms/web.first",
        "/vms/web.branch",
        "/vms/web.unused",
        "/etc/shadow",
        "../x",
        "/vms/second.memory",
        "",
    ]
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(["", "copy"]), flatten=st.booleans())
def test_whatever_the_tree_no_other_path_is_named_and_no_frozen_layer_is_written_to(
    data: st.DataObject, name: str, flatten: bool
) -> None:
    names = data.draw(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=6))
    states = []
    for index, each in enumerate(names):
        parent = data.draw(st.sampled_from(["", *names[:index]]))
        states.append(state(each, data.draw(PIECES), parent=parent, overlay=data.draw(PIECES), current=index == 0))
    found = planned(point(snapshots=tuple(states)), heads={}, name=name, flatten=flatten)
    files = {f.path: f for f in found.files if not f.temporary}
    made = {f.path for f in found.made}
    assert not files.keys() & made and len(files) == len([f for f in found.files if not f.temporary])
    assert all(path in files or path in made or path.endswith(".absent") for path in every_path(found))
    backings = {f.backing for f in found.files} | {f.backing for f in found.made}
    frozen = {
        root.find("domain/devices/disk/source").get("file")
        for root in snapshots(found).values()
        if root.find("disks/disk[@snapshot='external']") is not None
    }
    assert all(each.path not in backings | frozen for each in found.disks)
