# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans of a restore: places, names, formats, clashes, what is lacking, what is left out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils._archive import config
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member, Role, Skipped
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._restore import host_requirements, mark, run
from ansible_collections.kvmops.backup.plugins.module_utils._restore.identity import Fresh
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import (
    BlockDevice,
    DiskState,
    ExistingVm,
    HostFile,
    Mark,
    RestorePlace,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.plan import plan
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import DiskFormat, RestoreRequest
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._restore.restore_values import (
    DISKS,
    MAC,
    MIB,
    ORIGINAL,
    OTHER_UUID,
    UUID,
    VDA,
    VDB,
    configuration,
    disk,
    domain_xml,
    host,
    planned,
    request,
    with_names,
)


def sources(xml: str) -> dict[str, str]:
    root = etree.fromstring(xml)
    found = {}
    for element in root.findall("devices/disk"):
        source = element.find("source")
        found[element.find("target").get("dev")] = (
            "" if source is None else source.get("file") or source.get("dev") or "?"
        )
    return found


def refusal(**arguments: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        planned(**arguments)
    return str(caught.value)


# --- places and names ---------------------------------------------------------------------------


def test_a_lost_vm_comes_back_to_its_former_places_in_its_former_formats() -> None:
    found = planned()
    assert (found.name, found.uuid) == ("web", UUID)
    assert [(d.target, d.path, d.format) for d in found.disks] == [
        ("vda", "/vms/web.qcow2", "qcow2"),
        ("vdb", "/data/web.raw", "raw"),
    ]
    assert sources(found.domain_xml) == {"vda": "/vms/web.qcow2", "vdb": "/data/web.raw"}
    root = etree.fromstring(found.domain_xml)
    assert root.find(".//backingStore") is None and "/etc/shadow" not in found.domain_xml
    assert root.get("id") is None and root.find(".//source[@portid]") is None
    assert root.find("devices/disk/driver").get("cache") == "none"
    assert root.find("devices/interface/mac").get("address") == MAC
    assert root.findtext("genid") != "43dc0cf8-809b-4adb-9bea-a9abb5f3d90e"
    assert found.refresh_pools == ("vms",) and found.estimated_bytes == 20 * MIB
    assert found.warnings == () and found.skipped == () and found.set_aside == ()


def test_disk_format_qcow2_changes_the_raw_disk_only() -> None:
    found = planned(disk_format=DiskFormat.QCOW2)
    assert [(d.path, d.format) for d in found.disks] == [("/vms/web.qcow2", "qcow2"), ("/data/web.qcow2", "qcow2")]
    assert 'type="raw"' not in found.domain_xml


def test_a_full_former_pool_sends_all_its_disks_to_the_archives_place_and_no_others() -> None:
    second = disk("vdc_0.qcow2", "vdc", "/vms/web-2.qcow2", pool="vms")
    first = DISKS.split("</disk>", maxsplit=1)[0] + "</disk>"
    xml = domain_xml(DISKS + first.replace("vda", "vdc").replace("web.qcow2", "web-2.qcow2"))
    facts = host(former={**host().former, "vms": RestorePlace("/vms", pool="vms", filesystem="1", free_bytes=20 * MIB - 1)})
    found = planned(facts, configuration(xml, (VDA, VDB, second)))
    assert sources(found.domain_xml) == {
        "vda": "/backup/web.qcow2",
        "vdb": "/data/web.raw",
        "vdc": "/backup/web-2.qcow2",
    }
    assert len(found.warnings) == 1 and "pool vms has" in found.warnings[0].text and "/backup" in found.warnings[0].text


def test_groups_on_one_file_system_share_its_room() -> None:
    former = {
        "vms": RestorePlace("/vms", pool="vms", filesystem="1", free_bytes=15 * MIB),
        "/data": RestorePlace("/data", filesystem="1", free_bytes=15 * MIB),
    }
    found = planned(host(former=former))
    assert sources(found.domain_xml) == {"vda": "/vms/web.qcow2", "vdb": "/backup/web.raw"}


def test_pool_gone_and_read_only_archive_place_needs_an_explicit_target() -> None:
    facts = host(former={}, archive_place=RestorePlace("/backup", problem="cannot be used: it is read-only"))
    text = refusal(facts=facts)
    assert "storage pool vms is not on this host" in text and "directory /data is not on this host" in text
    assert "read-only" in text and "'pool' or 'path'" in text
    target = RestorePlace("/new", pool="new", filesystem="9", free_bytes=20 * MIB)
    found = planned(replace(facts, target=target), pool="new")
    assert sources(found.domain_xml) == {"vda": "/new/web.qcow2", "vdb": "/new/web.raw"}
    assert found.warnings == ()
    assert "are needed" in refusal(facts=replace(facts, target=replace(target, free_bytes=20 * MIB - 1)), pool="new")


@pytest.mark.parametrize("directory", ["/etc/cron.d", "/usr/bin", "/root/.ssh", "/var/spool/cron"])
def test_an_archive_does_not_choose_a_system_directory(directory: str) -> None:
    evil = disk("vda_0.qcow2", "vda", f"{directory}/job", original_format="raw")
    facts = host(former={directory: RestorePlace(directory, filesystem="1", free_bytes=100 * MIB)})
    found = planned(facts, configuration(members=(evil,)))
    assert found.disks[0].path == "/backup/job" and directory in found.warnings[0].text


def test_a_new_name_derives_file_names_and_identity() -> None:
    found = planned(host(vms=(ORIGINAL,)), name="copy of web")
    assert sources(found.domain_xml) == {"vda": "/vms/copy_of_web-vda.qcow2", "vdb": "/data/copy_of_web-vdb.raw"}
    root = etree.fromstring(found.domain_xml)
    assert root.findtext("uuid") == found.uuid != UUID
    mac = root.find("devices/interface/mac").get("address")
    assert mac != MAC and re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", mac)


def test_same_file_name_in_two_former_directories_that_fall_together() -> None:
    other = replace(VDB, former_path="/data/web.qcow2", original_format="qcow2")
    xml = domain_xml(DISKS.replace("/data/web.raw", "/data/web.qcow2"))
    found = planned(host(former={}), configuration(xml, (VDA, other)))
    assert sources(found.domain_xml) == {"vda": "/backup/web.qcow2", "vdb": "/backup/web-vdb.qcow2"}


def test_a_chain_is_restored_layer_by_layer_and_what_no_snapshot_needs_stays_in_the_archive() -> None:
    base = replace(VDA, active=False, original_format="raw", former_path="/vms/web.img")
    top = disk("vda_1.snapshot", "vda", "/vms/web.snap", pool="vms", role=Role.LAYER, parent=base.name)
    branch = disk("vda_2.snapshot", "vda", "/vms/web.old", role=Role.LAYER, parent=base.name, active=False)
    point = configuration(
        domain_xml(DISKS.split("</disk>", maxsplit=1)[0].replace("web.qcow2", "web.snap") + "</disk>"),
        (base, top, branch),
    )
    found = planned(point=point)
    assert [(f.path, f.format, f.backing, f.backing_format) for f in found.files] == [
        ("/vms/web.img", "raw", "", ""),
        ("/vms/web.snap", "qcow2", "/vms/web.img", "raw"),
    ]
    assert [(d.target, d.path, d.format) for d in found.disks] == [("vda", "/vms/web.snap", "qcow2")]
    copy = planned(point=point, name="copy")
    assert [f.path for f in copy.files] == ["/vms/copy-vda.raw", "/vms/copy-vda-1.qcow2"]
    assert copy.files[1].backing == "/vms/copy-vda.raw"


@pytest.mark.parametrize("parent", ["template.qcow2", "vda_1.snapshot", ""])
def test_a_layer_without_its_base_is_refused(parent: str) -> None:
    top = disk("vda_1.snapshot", "vda", "/vms/web.qcow2", role=Role.LAYER, parent=parent)
    assert "vda_1.snapshot" in refusal(point=configuration(members=(top, VDB)))


@pytest.mark.parametrize(("image_format", "words"), [("vmdk", "vda_0.qcow2 is vmdk"), ("raw", "is no qcow2 image")])
def test_a_member_of_another_format_is_refused(image_format: str, words: str) -> None:
    odd = replace(VDA, image_format=image_format, original_format=image_format)
    assert words in refusal(point=configuration(members=(odd, VDB), format_version=0))


# --- existing VMs and files ---------------------------------------------------------------------


def test_an_existing_file_is_refused_and_replaced_with_force_only_where_nobody_uses_it() -> None:
    facts = with_names(host(), vms={"web.qcow2"})
    assert "/vms/web.qcow2 exists" in refusal(facts=facts)
    assert planned(facts, force=True).set_aside == ("/vms/web.qcow2",)
    user = ExistingVm("db", OTHER_UUID, files=frozenset({"/vms/web.qcow2"}))
    for force in (False, True):
        assert "belongs to the VM db" in refusal(facts=replace(facts, vms=(user,)), force=force)
    # /data is no pool: what lies there and is no file of the VM stays
    outside = with_names(host(), data={"web.raw"})
    assert "is in no pool" in refusal(facts=outside, force=True)
    # a file that another VM names but that is not there is not made for it
    assert "belongs to the VM db" in refusal(facts=host(vms=(user,)))


def test_a_symbolic_link_hides_neither_a_user_nor_a_system_directory() -> None:
    linked = RestorePlace("/vms", pool="vms", filesystem="1", free_bytes=100 * MIB, real_path="/big/vms")
    user = ExistingVm("db", OTHER_UUID, files=frozenset({"/big/vms/web.qcow2"}))
    assert "belongs to the VM db" in refusal(facts=host(vms=(user,), former={**host().former, "vms": linked}))
    system = RestorePlace("/data", filesystem="2", free_bytes=100 * MIB, real_path="/etc/cron.d")
    found = planned(host(former={**host().former, "/data": system}))
    assert found.disks[1].path == "/backup/web.raw"


def test_the_original_is_replaced_with_force_only_and_its_other_files_are_named() -> None:
    facts = with_names(
        host(vms=(replace(ORIGINAL, disk_files=ORIGINAL.files | {"/vms/web.overlay"}),)),
        vms={"web.qcow2", "web.overlay"},
        data={"web.raw"},
    )
    text = refusal(facts=facts)
    assert "a VM named web exists" in text and "/vms/web.qcow2 exists" in text
    found = planned(facts, force=True)
    assert found.replaced is not None and found.replaced.name == "web" and found.uuid == UUID
    assert found.set_aside == ("/vms/web.qcow2", "/data/web.raw")
    assert "/vms/web.overlay" in found.warnings[0].text and "stay" in found.warnings[0].text
    assert etree.fromstring(found.domain_xml).find("devices/interface/mac").get("address") == MAC


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"running": True}, "is running"),
        ({"managed_save": True}, "managed-save"),
        ({"locked_files": frozenset({"/vms/web.qcow2"})}, "a process holds /vms/web.qcow2"),
    ],
)
def test_a_vm_at_work_is_never_replaced(state: dict[str, Any], words: str) -> None:
    assert words in refusal(facts=host(vms=(replace(ORIGINAL, **state),)), force=True)


def test_a_renamed_original_keeps_its_identity() -> None:
    renamed = replace(ORIGINAL, name="web-old")
    found = planned(host(vms=(renamed,)))
    assert found.name == "web" and found.uuid != UUID
    assert sources(found.domain_xml)["vda"] == "/vms/web-vda.qcow2"
    text = refusal(facts=host(vms=(renamed,)), uuid="keep", mac="keep")
    assert f"uuid {UUID}" in text and MAC in text
    assert planned(host(vms=(renamed,)), uuid="keep", force=True).replaced == renamed


def test_an_explicit_uuid() -> None:
    assert planned(uuid=OTHER_UUID.upper()).uuid == OTHER_UUID
    assert "is not a UUID" in refusal(uuid="nonsense")
    taken = ExistingVm("db", OTHER_UUID)
    assert "that of the VM db" in refusal(facts=host(vms=(taken,)), uuid=OTHER_UUID)


def test_a_mac_clash_is_refused_and_mac_new_solves_it() -> None:
    other = ExistingVm("db", OTHER_UUID, macs=frozenset({MAC}))
    assert "mac: new" in refusal(facts=host(vms=(other,)))
    assert MAC not in planned(host(vms=(other,)), mac="new").domain_xml


@pytest.mark.parametrize("name", ["a/b", " ", "a\nb", "\x08", "\ufffe"])
def test_an_impossible_name(name: str) -> None:
    assert "is not a name" in refusal(name=name)


class Repeating(Fresh):
    """Gives what is taken before what is free."""

    def __init__(self) -> None:
        self._uuids = iter([OTHER_UUID, OTHER_UUID, "22222222-2222-4333-8444-555555555555", UUID])
        self._macs = iter(["52:54:00:00:00:01", MAC, "52:54:00:00:00:02", "52:54:00:00:00:02", "52:54:00:00:00:03"])

    def uuid(self) -> str:
        return next(self._uuids)

    def mac(self) -> str:
        return next(self._macs)


def test_new_identifiers_are_nobodys() -> None:
    other = ExistingVm("db", OTHER_UUID, macs=frozenset({"52:54:00:00:00:01"}))
    xml = domain_xml(DISKS + f"<interface type='user'><mac address='{MAC}'/></interface>")
    found = plan(configuration(xml), host(vms=(other,)), request(name="copy"), fresh=Repeating())
    macs = [mac.get("address") for mac in etree.fromstring(found.domain_xml).iter("mac")]
    assert found.uuid == "22222222-2222-4333-8444-555555555555"
    assert macs == ["52:54:00:00:00:02", "52:54:00:00:00:03"]


# --- the same restore again ---------------------------------------------------------------------


def restored(**more: Any) -> ExistingVm:
    states = (DiskState("vda", "/vms/web.qcow2", "qcow2", 1, 2, 3), DiskState("vdb", "/data/web.raw", "raw", 4, 5, 6))
    point = configuration()
    return replace(ORIGINAL, mark=Mark(point.timestamp, point.digest, "t", states), **more)


def test_the_same_restore_again_is_no_change() -> None:
    facts = with_names(host(vms=(restored(),)), vms={"web.qcow2"}, data={"web.raw"})
    for wishes in ({}, {"force": True}, {"uuid": "keep"}, {"name": "web"}):
        found = planned(facts, **wishes)
        assert found.unchanged and found.files == () and found.set_aside == () and found.replaced is None
        assert found.uuid == UUID and [d.path for d in found.disks] == ["/vms/web.qcow2", "/data/web.raw"]
        assert found.warnings == ()
    running = with_names(host(vms=(restored(running=True),)), vms={"web.qcow2"}, data={"web.raw"})
    assert planned(running, force=True, start=True).unchanged and not planned(running, start=True).start
    assert planned(facts, start=True).start


@pytest.mark.parametrize(
    "wishes",
    [{"uuid": OTHER_UUID}, {"disk_format": DiskFormat.QCOW2}, {"path": "/elsewhere"}, {"configuration": "another"}],
    ids=lambda wishes: next(iter(wishes)),
)
def test_another_restore_is_not_taken_for_the_same(wishes: dict[str, Any]) -> None:
    facts = host(vms=(restored(),))
    point = configuration()
    if "path" in wishes:
        facts = replace(facts, target=RestorePlace("/elsewhere", filesystem="7", free_bytes=100 * MIB))
    if "configuration" in wishes:
        point = replace(point, digest="e" * 64)
    asked = {key: value for key, value in wishes.items() if key != "configuration"}
    assert "a VM named web exists" in refusal(facts=facts, point=point, **asked)


@pytest.mark.parametrize(
    ("since", "word"),
    [
        ({"touched_files": frozenset({"/vms/web.qcow2"})}, "/vms/web.qcow2"),
        ({"snapshots": ("nightly",)}, "new snapshots: nightly"),  # what the restore left is frozen below it
    ],
)
def test_a_vm_that_has_gone_on_is_only_taken_back_with_force_and_when_it_is_off(
    since: dict[str, Any], word: str
) -> None:
    facts = with_names(host(vms=(restored(**since),)), vms={"web.qcow2"}, data={"web.raw"})
    stays = planned(facts)
    assert stays.unchanged and len(stays.warnings) == 1
    assert stays.warnings[0].code is Code.GONE_ON and word in stays.warnings[0].text and "force: true" in stays.warnings[0].text
    again = planned(facts, force=True)
    assert not again.unchanged and again.replaced is not None and len(again.set_aside) == 2
    facts = replace(facts, vms=(restored(running=True, **since),))
    stays = planned(facts, start=True)
    assert stays.unchanged and not stays.start and "once it is shut down" in stays.warnings[0].text
    assert planned(facts, force=True).warnings == stays.warnings


@pytest.mark.parametrize(
    ("vms", "wishes", "set_again"),
    [
        ((), {}, True),
        ((), {"uuid": "keep", "name": "web", "force": True, "path": "/data"}, True),
        ((), {"name": "copy"}, False),
        ((), {"uuid": "new"}, False),
        ((), {"uuid": OTHER_UUID}, False),
        ((ORIGINAL,), {"force": True}, False),  # that VM's own counts
        ((replace(ORIGINAL, name="web-old"),), {}, False),
        ((replace(ORIGINAL, name="web-old"),), {"uuid": "keep", "force": True}, False),
        ((replace(ORIGINAL, uuid=OTHER_UUID),), {"force": True}, False),
    ],
)
def test_autostart_only_where_the_original_is_gone(
    vms: tuple[ExistingVm, ...], wishes: dict[str, Any], set_again: bool
) -> None:
    facts = with_names(host(vms=vms), vms={"web.qcow2"} if vms else set(), data={"web.raw"} if vms else set())
    assert planned(facts, configuration(autostart=True), **wishes).autostart is set_again
    assert not planned(facts, configuration(), **wishes).autostart
    assert not planned(facts, configuration(autostart=True, template=True), **wishes).autostart


def test_a_configuration_without_its_archive_is_a_definition_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "1795309200_web.xml"
    file.write_bytes(config.encode(configuration(autostart=True, template=True, members=()))[0])
    found = run._bare(str(file))
    assert (found.vm_uuid, found.autostart, found.template, found.format_version) == (UUID, False, False, 0)


@pytest.mark.parametrize(
    ("source", "option", "value"),
    [
        ("/b/web.tar", "disks", False),
        ("/b/web.tar.zst", "system", "web"),
        ("/b/web.tar", "configuration", "small"),
        ("/b/web.xml", "system", "web"),
        ("/b/web.xml", "disk_images", {"vda": "a.qcow2"}),
    ],
)
def test_an_option_that_such_a_source_does_not_know_is_refused(source: str, option: str, value: Any) -> None:
    """Disks would be restored that nobody asked for, or another VM than the one that was named."""
    request = RestoreRequest(source=source, **{option: value})
    with pytest.raises(RefusedError, match=f"Option {option}"), run._source(request, cast("Any", None)):
        pass


def test_a_configuration_is_one_point(tmp_path: Path) -> None:
    file = tmp_path / "web.xml"
    file.write_text(domain_xml(), encoding="utf-8")
    with pytest.raises(ArchiveError, match="it is not point 5"), run._source(RestoreRequest(str(file), 5), cast("Any", None)):
        pass


def test_a_foreign_point_is_told_by_its_definition_and_members() -> None:
    one = configuration(digest="")
    others = [
        configuration(domain_xml(top="<title>t</title>"), digest=""),
        configuration(members=(VDA,), digest=""),
        configuration(members=(VDA, replace(VDB, size_bytes=1)), digest=""),
    ]
    digests = {mark.configuration_digest(each) for each in (one, *others)}
    assert len(digests) == 4 and mark.configuration_digest(configuration(digest="")) in digests


def test_a_mark_survives_its_way_through_the_definition() -> None:
    wanted = Mark(5, "ab", "token", (DiskState("vda", "/a & <b>", "raw", 1, 2, 3),))
    xml = mark.add(planned().domain_xml, wanted)
    root = etree.fromstring(xml)
    assert mark.read(root) == wanted
    mark.strip(root)
    assert mark.read(root) is None and root.find("metadata") is None


# --- what the host lacks ------------------------------------------------------------------------


def test_everything_that_is_lacking_is_named_at_once() -> None:
    xml = (
        domain_xml(
            DISKS,
            os_extra="<loader type='pflash'>/opt/fw.fd</loader><nvram>/x/web_VARS.fd</nvram><kernel>/boot/private</kernel>",
            top="<cpu mode='custom'><model>Future-CPU</model></cpu>",
            interface="<interface type='network'><source network='dmz'/></interface>"
            "<interface type='bridge'><source bridge='br7'/></interface>",
        )
        .replace("pc-q35-7.2", "pc-q35-99")
        .replace("/usr/bin/qemu-system-x86_64", "/opt/qemu")
    )
    text = refusal(
        facts=host(files={"/boot/private": HostFile(1, public=False, pool_iso=False)}), point=configuration(xml)
    )
    lacking = (
        "network dmz",
        "bridge br7",
        "type pc-q35-99",
        "Future-CPU",
        "firmware /opt/fw.fd",
        "/opt/qemu",
        "/boot/private",
    )
    assert [phrase for phrase in lacking if phrase not in text] == []


BOOTED = (
    "<kernel>/boot/vmlinuz</kernel><initrd>/boot/initrd</initrd><cmdline>ro</cmdline><loader type='rom'>/opt/fw.rom</loader>"
)
BOOT_FILES = tuple(
    Member(f"{n}_{name}.boot", Role.BOOT, MIB, digest="b" * 64, former_path=path)
    for n, (name, path) in enumerate([("vmlinuz", "/boot/vmlinuz"), ("initrd", "/boot/initrd"), ("fw.rom", "/opt/fw.rom")])
)


def test_a_kernel_is_the_one_of_the_archive() -> None:
    """The file of this host with its digest, else one beside the disks; never another file of this host."""
    files = {
        "/boot/vmlinuz": HostFile(MIB, public=False, pool_iso=False, matches=True),
        "/boot/initrd": HostFile(MIB, public=True, pool_iso=False, matches=False),
    }
    point = configuration(domain_xml(os_extra=BOOTED), (VDA, VDB, *BOOT_FILES))
    found = planned(host(files=files), point)
    booted = etree.fromstring(found.domain_xml).find("os")
    assert [(each.tag, each.text) for each in booted if each.tag != "type"] == [
        ("kernel", "/boot/vmlinuz"),
        ("initrd", "/vms/web-initrd"),
        ("cmdline", "ro"),
        ("loader", "/vms/web-fw.rom"),
    ]
    placed = {file.path: file.public for file in found.files if file.member.role is Role.BOOT}
    assert placed == {"/vms/web-initrd": False, "/vms/web-fw.rom": True}
    texts = [notice.text for notice in found.warnings]
    assert any("/boot/initrd" in text and "another file" in text and "/vms/web-initrd" in text for text in texts)
    assert any("/opt/fw.rom" in text and "is not on this host" in text for text in texts)
    assert not any("vmlinuz" in text for text in texts)


def test_a_kernel_in_no_archive_has_to_be_here_and_public() -> None:
    point = configuration(domain_xml(os_extra="<kernel>/boot/vmlinuz</kernel>"))
    assert "/boot/vmlinuz (booted by the VM, and not in the archive)" in refusal(point=point)
    here = {"/boot/vmlinuz": HostFile(MIB, public=True, pool_iso=False)}
    assert "<kernel>/boot/vmlinuz</kernel>" in planned(host(files=here), point).domain_xml


def test_a_copy_of_a_restored_vm_gets_a_kernel_of_its_own() -> None:
    kernel = replace(BOOT_FILES[0], former_path="/vms/web-vmlinuz")
    point = configuration(domain_xml(os_extra="<kernel>/vms/web-vmlinuz</kernel>"), (VDA, VDB, kernel))
    assert "<kernel>/vms/web-vmlinuz</kernel>" in planned(point=point).domain_xml
    assert "<kernel>/vms/b-web-vmlinuz</kernel>" in planned(point=point, name="b").domain_xml
    text = refusal(facts=with_names(host(), vms={"web-vmlinuz"}), point=point)
    assert "the file /vms/web-vmlinuz exists" in text


def test_devices_that_no_emulator_here_has_are_named() -> None:
    """virt-manager's VMs have SPICE and QXL, which are packages of their own on a server."""
    keys = {element: key for _kind, element, _attribute, key in host_requirements.DEVICES}
    wanted = "<graphics type='spice'/><graphics type='vnc'/><video><model type='qxl'/></video>" + TPM_XML
    point = configuration(domain_xml(DISKS + wanted))
    has = {
        keys["graphics"]: frozenset({"vnc"}),
        keys["video/model"]: frozenset({"vga"}),
        keys["tpm/backend"]: frozenset[str](),
    }
    text = refusal(facts=host(capabilities=replace(host().capabilities, devices=has)), point=point)
    assert (
        "the display of the type spice, the video card qxl, the TPM of the type emulator" in text and "vnc" not in text
    )
    more = {keys["graphics"]: frozenset({"vnc", "spice"}), keys["video/model"]: frozenset({"qxl"})}
    planned(host(capabilities=replace(host().capabilities, devices=more)), point)


def test_networks_are_mapped_also_from_a_bridge_to_a_network() -> None:
    xml = domain_xml(
        interface="<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br7'/></interface>"
        "<interface type='network'><source network='dmz' portid='1' bridge='virbr0'/></interface>"
    )
    found = planned(point=configuration(xml), networks={"br7": "isolated", "dmz": "br0"})
    interfaces = etree.fromstring(found.domain_xml).findall("devices/interface")
    assert [(i.get("type"), dict(i.find("source").attrib)) for i in interfaces] == [
        ("network", {"network": "isolated"}),
        ("bridge", {"bridge": "br0"}),
    ]
    assert interfaces[1].find("mac").get("address")  # one that was checked, not libvirt's guess
    refused = refusal(point=configuration(xml), networks={"br7": "nowhere", "dmz": "default"})
    assert "nowhere" in refused and "the option 'networks' maps" in refused


@pytest.mark.parametrize(
    ("cpu", "lacking"),
    [
        ("<cpu mode='host-passthrough'/>", "the CPU mode host-passthrough"),
        ("<cpu mode='host-model'/>", ""),
        ("<cpu><model>Skylake-Server</model></cpu>", "Skylake-Server"),
        ("<cpu><model>Skylake-Server</model><feature policy='disable' name='avx512f'/></cpu>", ""),
        ("<cpu check='none'><model>Skylake-Server</model></cpu>", ""),
        ("<cpu><topology sockets='1' cores='2' threads='1'/></cpu>", ""),
    ],
)
def test_cpu(cpu: str, lacking: str) -> None:
    point = configuration(domain_xml(top=cpu))
    if lacking:
        assert lacking in refusal(point=point)
    else:
        planned(point=point)


def test_a_foreign_hypervisor_is_refused() -> None:
    assert "no QEMU VM" in refusal(point=configuration(domain_xml().replace("type='qemu' id", "type='xen' id")))


# --- disks that do not come from the archive ----------------------------------------------------

LUN = "<disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sda' bus='scsi'/></disk>"
CD = "<disk type='file' device='cdrom'><source file='/iso/os.iso'/><target dev='sdc' bus='sata'/><readonly/></disk>"
ISO = disk("1_os.iso", "sdc", "/iso/os.iso", role=Role.ISO, size_bytes=4096, image_format="raw", original_format="raw")


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ({}, "is not on this host"),
        ({"/dev/sdx": BlockDevice("/dev/sdx", "is in use (busy)")}, "busy"),
        ({"/dev/sdx": BlockDevice("/dev/sdx")}, ""),
    ],
)
def test_lun(devices: dict[str, BlockDevice], reason: str) -> None:
    found = planned(host(block_devices=devices), configuration(domain_xml(DISKS + LUN)))
    if reason:
        assert "sda" not in sources(found.domain_xml)
        assert found.skipped[0].device == "sda" and reason in found.skipped[0].reason
    else:
        assert sources(found.domain_xml)["sda"] == "/dev/sdx" and found.skipped == ()


def test_a_lun_belongs_to_one_vm() -> None:
    point = configuration(domain_xml(DISKS + LUN))
    facts = host(block_devices={"/dev/sdx": BlockDevice("/dev/dm-7")})
    for path in ("/dev/sdx", "/dev/dm-7"):
        found = planned(replace(facts, vms=(ExistingVm("db", OTHER_UUID, files=frozenset({path})),)), point)
        assert found.skipped[0].reason.endswith("belongs to the VM db")
    replaced = replace(ORIGINAL, files=ORIGINAL.files | {"/dev/sdx"}, disk_files=ORIGINAL.disk_files | {"/dev/sdx"})
    found = planned(replace(facts, vms=(replaced,)), point, force=True)
    assert found.skipped == () and sources(found.domain_xml)["sda"] == "/dev/sdx"
    about = [notice.text for notice in found.warnings if "/dev/sdx" in notice.text]
    assert about == ["The VM gets a block device of this host: /dev/sdx (sda)."]


@pytest.mark.parametrize(
    ("here", "path", "warned"),
    [
        (None, "/backup/os.iso", True),
        (HostFile(4096, public=True, pool_iso=False, matches=True), "/iso/os.iso", False),
        (HostFile(4096, public=False, pool_iso=False, matches=True), "/iso/os.iso", False),
        (HostFile(4096, public=True, pool_iso=False, matches=False), "/iso/os.iso", True),
        (HostFile(4096, public=False, pool_iso=True, matches=False), "/iso/os.iso", True),
        (HostFile(4096, public=False, pool_iso=False, matches=False), "/backup/os.iso", True),
    ],
)
def test_a_cd_image_at_its_former_path_is_used_as_it_is(here: HostFile | None, path: str, warned: bool) -> None:
    files = {} if here is None else {"/iso/os.iso": here}
    found = planned(host(files=files), configuration(domain_xml(DISKS + CD), (VDA, VDB, ISO)))
    assert sources(found.domain_xml)["sdc"] == path
    assert bool(found.warnings) == warned
    assert etree.fromstring(found.domain_xml).find("devices/disk[3]/driver").get("type") == "raw"


def test_a_cd_image_in_two_drives_comes_back_once_for_both() -> None:
    both = CD + CD.replace("sdc", "sdd")
    found = planned(host(), configuration(domain_xml(DISKS + both), (VDA, VDB, ISO)))
    shown = sources(found.domain_xml)
    assert shown["sdc"] == shown["sdd"] == "/backup/os.iso" and found.skipped == ()
    assert [file.path for file in found.files].count("/backup/os.iso") == 1


def test_a_cd_image_that_is_a_volume_is_used_where_its_pool_still_has_it() -> None:
    volume = CD.replace("type='file'", "type='volume'").replace("file='/iso/os.iso'", "pool='isos' volume='os.iso'")
    point = configuration(domain_xml(DISKS + volume), (VDA, VDB, replace(ISO, pool="isos")))
    here = RestorePlace("/iso", pool="isos", filesystem="9", free_bytes=100 * MIB, names=frozenset({"os.iso"}))
    facts = host(
        files={"/iso/os.iso": HostFile(4096, public=False, pool_iso=True, matches=True)},
        former={**host().former, "isos": here},
        pools={"isos": "/iso"},
    )
    for archived in (point, replace(point, members=(VDA, VDB))):
        found = planned(facts, archived)
        cd = etree.fromstring(found.domain_xml).findall("devices/disk")[2]
        assert (cd.get("type"), dict(cd.find("source").attrib)) == ("volume", {"pool": "isos", "volume": "os.iso"})
        assert found.skipped == () and found.warnings == () and len(found.files) == 2
    moved = replace(
        facts, pools={"isos": "/elsewhere"}, former={**facts.former, "isos": replace(here, path="/elsewhere")}
    )
    found = planned(moved, replace(point, members=(VDA, VDB)))
    assert sources(found.domain_xml)["sdc"] == "" and found.skipped[0].device == "sdc"


def test_a_medium_without_member_is_kept_only_where_a_guest_may_see_it() -> None:
    point = configuration(domain_xml(DISKS + CD))
    kept = planned(host(files={"/iso/os.iso": HostFile(1, public=True, pool_iso=False)}), point)
    assert sources(kept.domain_xml)["sdc"] == "/iso/os.iso"
    for facts in (host(), host(files={"/iso/os.iso": HostFile(1, public=False, pool_iso=False)})):
        found = planned(facts, point)
        assert sources(found.domain_xml)["sdc"] == "" and found.skipped[0].device == "sdc"


@pytest.mark.parametrize(
    "element",
    [
        "<disk type='file' device='disk'><source file='/etc/shadow'/><target dev='vdz'/></disk>",
        "<disk type='block' device='disk'><source dev='/dev/sda'/><target dev='vdz'/></disk>",
        "<disk type='network' device='disk'><source protocol='rbd' name='p/i'/><target dev='vdz'/></disk>",
        "<disk type='dir' device='floppy'><source dir='/etc'/><target dev='vdz'/></disk>",
        "<disk type='volume' device='disk'><source pool='vms' volume='db.qcow2'/><target dev='vdz'/></disk>",
    ],
)
def test_no_path_of_the_host_is_opened_because_an_archive_says_so(element: str) -> None:
    files = {"/etc/shadow": HostFile(1, public=False, pool_iso=False)}
    found = planned(host(files=files), configuration(domain_xml(DISKS + element)))
    assert sources(found.domain_xml).get("vdz", "") == ""
    assert found.skipped[0].device == "vdz"


def test_a_skipped_disk_says_why_and_a_former_device_becomes_a_file_of_the_vm() -> None:
    devices = (
        "<disk type='block' device='disk'><source dev='/dev/sdb'/><target dev='vda'/></disk>"
        "<disk type='file' device='disk'><source file='/vms/shared.raw'/><target dev='vdb'/></disk>"
    )
    member = disk("vda_0.qcow2", "vda", "/dev/sdb", original_format="raw")
    point = configuration(domain_xml(devices), (member,), skipped=(Skipped("vdb", "it is shareable"),))
    found = planned(point=point)
    assert found.disks[0].path == "/backup/web-vda.raw" and "/dev" in found.warnings[0].text
    assert etree.fromstring(found.domain_xml).find("devices/disk").get("type") == "file"
    assert found.skipped[0].device == "vdb" and "it is shareable" in found.skipped[0].reason


def test_a_bare_configuration_is_defined_without_any_disk() -> None:
    scsi = "<hostdev mode='subsystem' type='scsi'><source><adapter name='scsi_host0'/></source></hostdev>"
    files = {"/iso/os.iso": HostFile(1, public=True, pool_iso=True)}
    facts = host(block_devices={"/dev/sdx": BlockDevice("/dev/sdx")}, files=files)
    facts = with_names(facts, vms={"web.qcow2"})
    found = planned(facts, configuration(domain_xml(DISKS + LUN + CD + scsi), (), format_version=0), bare=True)
    root = etree.fromstring(found.domain_xml)
    assert root.find("devices/disk") is None and root.find("devices/hostdev") is None
    assert found.files == () and {s.device for s in found.skipped} >= {"vda", "vdb", "sda", "sdc"}


def test_a_volume_that_is_one_again_stays_one() -> None:
    xml = domain_xml(
        DISKS.replace("<disk type='file'", "<disk type='volume'", 1).replace(
            "<source file='/vms/web.qcow2' index='1'/>", "<source pool='vms' volume='web.qcow2'/>"
        )
    )
    element = etree.fromstring(planned(point=configuration(xml)).domain_xml).find("devices/disk")
    assert element.get("type") == "volume" and dict(element.find("source").attrib) == {
        "pool": "vms",
        "volume": "web.qcow2",
    }
    copy = etree.fromstring(planned(point=configuration(xml), name="copy").domain_xml).find("devices/disk")
    assert copy.get("type") == "file" and copy.find("source").get("file") == "/vms/copy-vda.qcow2"


# --- firmware -----------------------------------------------------------------------------------

EFI = (
    "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
    "<nvram template='/etc/shadow'>/root/secret</nvram>"
)
NVRAM = Member("1795309200.nvram", Role.NVRAM, 4096, digest="f" * 64)


@pytest.mark.parametrize(("name", "file"), [("", "secret"), ("copy", "copy_VARS.fd")])
def test_nvram_goes_to_libvirts_own_directory(name: str, file: str) -> None:
    found = planned(point=configuration(domain_xml(os_extra=EFI), (VDA, VDB, NVRAM)), name=name)
    nvram = etree.fromstring(found.domain_xml).find("os/nvram")
    assert nvram.text == f"/var/lib/libvirt/qemu/nvram/{file}" == found.files[-1].path
    assert nvram.get("template") is None
    assert "NVRAM" in planned(point=configuration(domain_xml(os_extra=EFI))).lacking[0].text


@pytest.mark.parametrize("members", [(VDA, VDB), (VDA, VDB, NVRAM)])
def test_nvram_of_another_vm_is_not_taken(members: tuple[Member, ...]) -> None:
    directory = "/var/lib/libvirt/qemu/nvram"
    theirs = EFI.replace("/root/secret", f"{directory}/db_VARS.fd")
    db = ExistingVm("db", OTHER_UUID, files=frozenset({f"{directory}/db_VARS.fd"}))
    for vms, name in (((), "db_VARS.fd"), ((db,), "web_VARS.fd")):
        found = planned(host(vms=vms), configuration(domain_xml(os_extra=theirs), members))
        assert etree.fromstring(found.domain_xml).findtext("os/nvram") == f"{directory}/{name}"


def test_nvram_of_a_firmware_that_libvirt_chooses_gets_libvirts_default_name() -> None:
    xml = domain_xml().replace("<os>", "<os firmware='efi'>")
    assert "firmware='efi'" in xml
    for name, file in (("", "web_VARS.fd"), ("copy", "copy_VARS.fd")):
        found = planned(point=configuration(xml, (VDA, VDB, NVRAM)), name=name)
        assert found.files[-1].path == f"/var/lib/libvirt/qemu/nvram/{file}"
        assert etree.fromstring(found.domain_xml).find("os/nvram") is None


TPM = Member("1795309200.tpm.tar", Role.TPM, 10240, digest="f" * 64)
TPM_XML = (
    "<tpm model='tpm-crb'><backend type='emulator' version='2.0'><source type='dir' path='/root/x'/></backend></tpm>"
)


@pytest.mark.parametrize("name", ["", "copy"])
def test_the_state_of_a_tpm_goes_to_libvirts_own_directory_of_the_new_uuid(name: str) -> None:
    found = planned(point=configuration(domain_xml(devices=TPM_XML), (VDA, VDB, TPM)), name=name)
    assert found.files[-1].path == f"/var/lib/libvirt/swtpm/{found.uuid}" and (found.uuid == UUID) is (not name)
    assert "/root/x" not in found.domain_xml and not found.lacking


def test_a_tpm_without_its_state_and_a_state_without_its_tpm() -> None:
    assert "no TPM state" in planned(point=configuration(domain_xml(devices=TPM_XML))).lacking[0].text
    assert Role.TPM not in [f.member.role for f in planned(point=configuration(members=(VDA, VDB, TPM))).files]


def test_the_state_of_a_tpm_is_only_replaced_with_force() -> None:
    point = configuration(domain_xml(devices=TPM_XML), (VDA, VDB, TPM))
    left = replace(host(), tpm_place=replace(host().tpm_place, names=frozenset({UUID})))
    with pytest.raises(RefusedError, match="'force: true' replaces it"):
        planned(left, point)
    path = f"/var/lib/libvirt/swtpm/{UUID}"
    assert path in planned(left, point, force=True).set_aside
    other = replace(left, vms=(ExistingVm("db", OTHER_UUID, files=frozenset({path})),))
    with pytest.raises(RefusedError, match="belongs to the VM db"):
        planned(other, point, force=True)


def test_what_firmware_and_tpm_of_a_replaced_vm_leave_is_named() -> None:
    """A VM of another uuid makes way: nothing removes the state of its TPM, which holds keys."""
    tpm, nvram = f"/var/lib/libvirt/swtpm/{OTHER_UUID}", "/var/lib/libvirt/qemu/nvram/web_VARS.fd"
    old = replace(ORIGINAL, uuid=OTHER_UUID, files=ORIGINAL.files | {tpm, nvram})
    facts = replace(
        host(vms=(old,)),
        tpm_place=replace(host().tpm_place, names=frozenset({OTHER_UUID, UUID})),
        nvram_place=replace(host().nvram_place, names=frozenset({"web_VARS.fd", "db_VARS.fd"})),
    )
    (left,) = [notice.text for notice in planned(facts, force=True).warnings if notice.code is Code.FILES_STAY]
    assert tpm in left and nvram in left and UUID not in left and "db_VARS" not in left
    efi = domain_xml().replace("<os>", "<os firmware='efi'>")  # the new VM goes on with the variables that are there
    told = planned(facts, configuration(efi), force=True).warnings
    (left,) = [notice.text for notice in told if notice.code is Code.FILES_STAY]
    assert tpm in left and nvram not in left


# --- properties ---------------------------------------------------------------------------------

file_names = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12)


@settings(deadline=None)  # a busy machine is no bug
@given(name=file_names, former=file_names, taken=st.sets(file_names, max_size=3), force=st.booleans())
def test_no_plan_leaves_its_places_or_takes_a_file_in_use(name: str, former: str, taken: set[str], force: bool) -> None:
    user = ExistingVm("db", OTHER_UUID, files=frozenset(f"/vms/{file}" for file in taken))
    member = replace(VDA, former_path=f"/vms/{former}")
    facts = with_names(host(vms=(user,)), vms=taken)
    try:
        found = planned(facts, configuration(members=(member, VDB)), name=name, force=force)
    except RefusedError:
        return
    for file in found.files:
        assert str(Path(file.path).parent) in ("/vms", "/data", "/backup")
        assert not Path(file.path).name.startswith(".") and Path(file.path).name not in ("", "..")
        assert file.path not in user.files
    assert etree.fromstring(found.domain_xml).findtext("name") == name


def test_a_vm_that_is_starting_is_said_to_be() -> None:
    """Not "define", which is what the restore did last."""
    done: list[str] = []

    class Libvirt(Progress):
        """A connection, a domain, and a progress that notes what comes after what."""

        def phase(self, name: str, disk: str = "", bytes_total: int = 0) -> None:
            done.append(name)

        def lookupByUUIDString(self, uuid: str) -> Progress:
            done.append(uuid)
            return self

        def create(self) -> None:
            done.append("create")

    libvirt = Libvirt()
    run.run(libvirt, None, replace(planned(), unchanged=True, start=True), libvirt)
    assert done == ["start", UUID, "create"]
