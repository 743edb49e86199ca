# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan of a backup, from made-up facts."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Consistency,
    Member,
    Role,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup.disks import Image
from ansible_collections.kvmops.backup.plugins.module_utils._backup.members import Base
from ansible_collections.kvmops.backup.plugins.module_utils._backup.model import TargetFacts, VmFacts
from ansible_collections.kvmops.backup.plugins.module_utils._backup.plan import plan
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import BackupRequest, ConsistencyWish, Mode
from ansible_collections.kvmops.backup.plugins.module_utils._capabilities import Capabilities
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError, TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.agent import AgentState
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.boot_files import KINDS, BootFile
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import PlaceKind
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import describe
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.standing import Standing
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code

UUID = "6f1a2b3c-0000-4000-8000-000000000001"
NOW = 1795309200
GIB = 2**30
DISK = "<disk type='file' device='disk'><driver name='qemu' type='{fmt}'/><source file='{path}'/><target dev='{dev}'/></disk>"


def xml(*disks, devices=""):
    return (
        f"<domain type='qemu'><name>web</name><uuid>{UUID}</uuid><memory unit='MiB'>256</memory><vcpu>1</vcpu>"
        f"<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>{''.join(disks)}{devices}</devices></domain>"
    )


def disk(dev="vda", path="/images/web.qcow2", fmt="qcow2"):
    return DISK.format(dev=dev, path=path, fmt=fmt)


def image(path="/images/web.qcow2", fmt="qcow2", size=GIB, **more):
    return Image(path, fmt, size, more.pop("allocated", size), 10 * GIB, device_id=1, **more)


def facts(*, running=True, definition=None, images=None, **more):
    text = definition or xml(disk())
    images = images or [image()]
    return VmFacts(
        name="web", uuid=UUID, running=running, persistent_xml=text, live_xml=text if running else "", view=domain.parse(text),
        images={each.path: each for each in images}, free_bytes={1: 100 * GIB}, **more,
    )  # fmt: skip


TARGET = TargetFacts("/backups", 100 * GIB, 2, "ext4")


def make(vm, target=TARGET, **request):
    return plan(vm, target, BackupRequest(vm="web", path="/backups", **request), now=NOW, tool_version="1")


@pytest.mark.parametrize("autostart", [True, False])
def test_whether_it_starts_with_the_host_is_kept(autostart):
    assert make(facts(autostart=autostart, agent=AgentState.OK)).configuration.autostart is autostart


def test_beside_checkpoints_an_off_vm_gets_a_full_that_stands_alone():
    vm = facts(running=False, checkpoints=("virtnbdbackup.0",))
    made = make(vm, mode=Mode.AUTO, incrementable=True)
    assert (made.stays, made.snapshot, made.configuration.incrementable) == (False, None, False)
    (warning,) = made.warnings
    assert warning.code is Code.NO_INCREMENT and "virsh checkpoint-delete web virtnbdbackup.0 --metadata" in warning.text
    assert make(vm).warnings == ()
    with pytest.raises(RefusedError, match=r"it has checkpoints \(virtnbdbackup\.0\)"):
        make(vm, incrementable=True)


def test_running_with_agent():
    made = make(facts(agent=AgentState.OK))
    assert made.consistency is Consistency.AGENT
    state = made.snapshot
    assert (state.name, state.quiesce, state.memory_path) == (f"kvmops-{NOW}", True, "")
    assert [(o.target, o.base_path, o.overlay_path) for o in state.overlays] == [
        ("vda", "/images/web.qcow2", f"/images/web.qcow2.kvmops-{NOW}.qcow2")
    ]
    assert made.archive_path == f"/backups/web_20261122T010000Z_{UUID[:8]}.tar"
    assert [(m.member.name, m.path, m.member.active) for m in made.members] == [
        ("vda_0.qcow2", "/images/web.qcow2", True)
    ]
    assert made.warnings == ()


def test_a_target_that_cannot_hold_the_archive():
    small = replace(TARGET, can=Capabilities(max_file_bytes=GIB // 2))
    with pytest.raises(TargetError, match=r"files of up to 512\.0 MiB, and web_.*\.tar has about 1\.0 GiB"):
        make(facts(running=False), small)
    assert make(facts(running=False), small, compress=True).archive_name.endswith(".zst")
    with pytest.raises(TargetError, match="file names of up to 20 bytes"):
        make(facts(running=False), replace(TARGET, can=Capabilities(max_name_bytes=20)), compress=True)


def test_what_a_target_lacks_is_told():
    holes = image(size=200 * GIB, allocated=GIB)
    lacking = replace(TARGET, can=Capabilities(keeps_holes=False, mode=0o644))
    told = make(facts(running=False, images=[holes]), lacking).warnings
    assert "mode 0644" in told[0].text and [each.code for each in told] == [Code.WEAK_FILE_SYSTEM, Code.SPACE]
    assert make(facts(running=False, images=[holes])).warnings == ()


def test_a_target_without_the_archive_that_the_snapshots_are_for():
    described = "Made by kvmops.backup for the archive /backups/web_1.tar\nDeleting"
    state = describe(
        f"<domainsnapshot><name>kvmops-{NOW - 60}</name><description>{described}</description></domainsnapshot>",
        current=True,
    )
    vm = facts(running=False, snapshots=(state,))
    for request in ({}, {"mode": Mode.AUTO, "incrementable": True}):
        with pytest.raises(TargetError, match=f"it seems not to be mounted. Mount it.* remove kvmops-{NOW - 60} first"):
            make(vm, **request)
    assert make(vm, replace(TARGET, file_names=frozenset({"other.tar.zst"})))
    assert make(vm, replace(TARGET, directory="/elsewhere"))
    assert make(replace(vm, unmerged=(state.name,)))  # of a run that never published its archive


WISHES = {
    # (wish, agent): what is reached, or the word in the refusal; None: refused
    (ConsistencyWish.AUTO, AgentState.OK): Consistency.AGENT,
    (ConsistencyWish.AGENT, AgentState.OK): Consistency.AGENT,
    (ConsistencyWish.MEMORY, AgentState.OK): Consistency.MEMORY,
    **{(ConsistencyWish.CRASH, state): Consistency.CRASH for state in AgentState},
    **{(ConsistencyWish.AUTO, state): Consistency.MEMORY for state in AgentState if state is not AgentState.OK},
    **{(ConsistencyWish.MEMORY, state): Consistency.MEMORY for state in AgentState if state is not AgentState.OK},
    **{(ConsistencyWish.AGENT, state): None for state in AgentState if state is not AgentState.OK},
}


@pytest.mark.parametrize(("wish", "agent"), list(itertools.product(ConsistencyWish, AgentState)))
def test_consistency(wish, agent):
    expected = WISHES[wish, agent]
    if expected is None:
        with pytest.raises(RefusedError, match=agent.value):
            make(facts(agent=agent), consistency=wish)
        return
    made = make(facts(agent=agent), consistency=wish)
    assert made.consistency is expected
    assert bool(made.snapshot.memory_path) == (expected is Consistency.MEMORY)
    told = wish is ConsistencyWish.AUTO and agent not in (AgentState.OK, AgentState.NO_CHANNEL)
    assert [each.code for each in made.warnings] == [Code.LOWER_CONSISTENCY] * told


@pytest.mark.parametrize("wish", ConsistencyWish)
def test_off(wish):
    made = make(facts(running=False), consistency=wish)
    assert made.consistency is Consistency.OFF
    assert made.snapshot is None


@pytest.mark.parametrize("standing", [Standing.PAUSED, Standing.IO_ERROR, Standing.CRASHED])
def test_a_vm_that_stands_still_has_no_memory_image(standing):
    vm = replace(facts(agent=AgentState.OFF), standing=standing)
    made = make(vm)
    assert made.consistency is Consistency.CRASH
    assert standing.value in made.warnings[0].text
    assert any(each.code is Code.GUEST_STOPPED for each in made.warnings) is (standing is Standing.IO_ERROR)
    for wish in (ConsistencyWish.MEMORY, ConsistencyWish.AGENT):
        with pytest.raises(RefusedError):
            make(vm, consistency=wish)


@pytest.mark.parametrize("wish", [ConsistencyWish.AUTO, ConsistencyWish.CRASH])
@pytest.mark.parametrize(
    ("standing", "way_out"), [(Standing.SUSPENDED, "virsh dompmwakeup web"), (Standing.ENDING, "virsh destroy web")]
)
def test_a_vm_that_cannot_be_frozen_is_refused(standing, way_out, wish):
    with pytest.raises(RefusedError, match=way_out):
        make(replace(facts(agent=AgentState.OFF), standing=standing), consistency=wish)


def test_what_qemu_cannot_migrate_is_not_in_a_memory_image():
    vm = replace(facts(agent=AgentState.NO_CHANNEL), memory_blockers=("Migration is disabled for ivshmem",))
    for wish in (ConsistencyWish.AUTO, ConsistencyWish.MEMORY):
        with pytest.raises(RefusedError, match=r"disabled for ivshmem.*consistency: crash"):
            make(vm, consistency=wish)
    assert make(vm, consistency=ConsistencyWish.CRASH).consistency is Consistency.CRASH
    assert make(replace(vm, agent=AgentState.OK)).consistency is Consistency.AGENT


def test_an_image_that_qemu_has_marked_as_corrupt():
    marked = [image(corrupt=True)]
    off = facts(running=False, images=marked)
    made = make(off, mode=Mode.AUTO, incrementable=True)
    assert (made.stays, made.snapshot) == (False, None)
    assert "repair: true" in made.warnings[0].text and "qemu-img check -r all /images/web.qcow2" in made.warnings[0].text
    for vm, wish in ((off, {"incrementable": True}), (facts(images=marked, agent=AgentState.OK), {})):
        with pytest.raises(RefusedError, match="qemu-img check -r all /images/web"):
            make(vm, **wish)
    base = [image(corrupt=True), image("/images/top.qcow2", backing_path="/images/web.qcow2")]
    on_top = facts(definition=xml(disk(path="/images/top.qcow2")), images=base, agent=AgentState.OK)
    assert "as corrupt" in make(on_top).warnings[0].text  # its temporary snapshot is merged into the top


def test_an_image_that_was_not_closed():
    (warning,) = make(facts(running=False, images=[image(dirty=True)])).warnings
    assert warning.code is Code.IMAGE_NOT_CLOSED and "/images/web.qcow2" in warning.text
    assert make(facts(images=[image(dirty=True)], agent=AgentState.OK)).warnings == ()  # it is open


@pytest.mark.parametrize("standing", [Standing.RUNS, Standing.IO_ERROR])
def test_no_room_for_an_overlay(standing):
    vm = replace(facts(agent=AgentState.OK), standing=standing, free_bytes={1: 4096})
    with pytest.raises(RefusedError, match="too little for the overlay") as caught:
        make(vm)
    assert ("virsh resume web" in caught.value.hint) is (standing is Standing.IO_ERROR)


def test_overlays_and_memory_lie_beside_the_disk_and_not_beside_a_link_to_it(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "disk.qcow2").touch()
    link = tmp_path / "web.qcow2"
    link.symlink_to(tmp_path / "large" / "disk.qcow2")
    vm = facts(definition=xml(disk(path=str(link))), images=[image(str(link))], agent=AgentState.NO_CHANNEL)
    taken = make(vm).snapshot
    (overlay,) = taken.overlays
    assert overlay.base_path == str(link)  # as the definition has it again afterwards
    assert overlay.overlay_path == f"{tmp_path}/large/disk.qcow2.{taken.name}.qcow2"
    assert os.path.dirname(taken.memory_path) == f"{tmp_path}/large"


HOSTDEV = "<hostdev mode='subsystem' type='{kind}'><source>{source}</source></hostdev>"
PCI = HOSTDEV.format(kind="pci", source="<address domain='0' bus='1' slot='0' function='0'/>")
MDEV = HOSTDEV.format(kind="mdev", source="<address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/>")


def test_pci_device_has_no_memory_image():
    vm = facts(definition=xml(disk(), devices=PCI))
    for wish in (ConsistencyWish.AUTO, ConsistencyWish.MEMORY):
        with pytest.raises(RefusedError, match="consistency: crash"):
            make(vm, consistency=wish)
    assert make(vm, consistency=ConsistencyWish.CRASH).consistency is Consistency.CRASH
    assert make(replace(vm, agent=AgentState.OK)).consistency is Consistency.AGENT


@pytest.mark.parametrize(
    ("device", "word"),
    [
        (HOSTDEV.format(kind="usb", source="<vendor id='0x1'/><product id='0x2'/>"), "usb host device"),
        (HOSTDEV.format(kind="scsi_host", source=""), "scsi_host host device"),
        (
            "<interface type='hostdev'><mac address='52:54:00:00:00:09'/></interface>",
            "type hostdev (52:54:00:00:00:09)",
        ),
        (
            "<filesystem type='mount'><driver type='virtiofs'/><source dir='/srv/x'/><target dir='x'/></filesystem>",
            "/srv/x (virtiofs)",
        ),
    ],
)
def test_devices_whose_state_is_no_part_of_a_memory_image(device, word):
    vm = facts(definition=xml(disk(), devices=device))
    with pytest.raises(RefusedError) as caught:
        make(vm)
    assert word in str(caught.value) and "consistency: crash" in str(caught.value)
    assert make(vm, consistency=ConsistencyWish.CRASH).consistency is Consistency.CRASH


def test_shared_directories_and_vsock_are_in_the_configuration_only():
    shared = "<filesystem type='mount'><source dir='/srv/x'/><target dir='tag'/></filesystem><vsock model='virtio'/>"
    made = make(facts(definition=xml(disk(), devices=shared)))
    assert made.consistency is Consistency.MEMORY
    assert [each.device for each in made.configuration.skipped] == ["filesystem tag"]
    assert "vsock" in made.configuration.domain_xml and "/srv/x" in made.configuration.domain_xml


def test_firmware_state_that_is_no_file_is_said_not_to_be_in_it():
    devices = "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"
    text = xml(disk(), devices=devices).replace(
        "<devices>", "<os><nvram type='block'><source dev='/dev/x'/></nvram></os><devices>", 1
    )
    skipped = make(facts(definition=text, running=False)).configuration.skipped
    assert [(each.device, each.reason.split()[0]) for each in skipped] == [("nvram", "NVRAM"), ("tpm", "the")]
    in_a_file = "<tpm><backend type='emulator'><source type='file' path='/var/lib/x.permall'/></backend></tpm>"
    skipped = make(facts(definition=xml(disk(), devices=in_a_file), running=False)).configuration.skipped
    assert [each.device for each in skipped] == ["tpm"] and "/var/lib/x.permall" in skipped[0].reason


def test_mediated_device_only_off():
    text = xml(disk(), devices=MDEV)
    with pytest.raises(RefusedError, match="mediated device"):
        make(facts(definition=text, agent=AgentState.OK))
    assert make(facts(definition=text, running=False)).consistency is Consistency.OFF


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"managed_save": True}, "managed-save"),
        ({"locked_images": ("/x",)}, "/x"),
        ({"foreign_jobs": ("a job",)}, "a job"),
    ],
)
def test_states_that_are_refused(state, word):
    with pytest.raises(RefusedError, match=word):
        make(facts(running=False, **state))


def test_name_is_the_next_free_second():
    first = make(facts(running=False)).archive_name
    taken = frozenset({first, make(facts(running=False), compress=True).archive_name})
    assert {name.split(".", 1)[0] for name in taken} == {first.split(".", 1)[0]}
    second = make(facts(running=False), replace(TARGET, file_names=frozenset({first + ".zst"})))
    assert second.timestamp == NOW + 1
    assert (
        make(facts(running=False), replace(TARGET, file_names=frozenset({first, second.archive_name}))).timestamp
        == NOW + 2
    )


@pytest.mark.parametrize("consistency", ["crash", "memory"])
def test_name_meets_no_file_of_a_snapshot_that_nobody_knows_any_more(consistency):
    """A VM whose definition was made anew within the second of its last backup still has that one's overlay beside it."""
    first = make(facts(), consistency=consistency)
    left = first.snapshot.memory_path or first.snapshot.overlays[0].overlay_path
    again = make(replace(facts(), snapshot_files=frozenset({left, f"{left}.of-another-vm"})), consistency=consistency)
    assert (first.timestamp, again.timestamp) == (NOW, NOW + 1)


def test_layers_of_all_branches():
    """base <- a <- web, and base <- b of another branch: each once, parents first."""
    images = [
        image("/images/base.raw", "raw"),
        image("/images/a.qcow2", backing_path="/images/base.raw"),
        image("/images/b.qcow2", backing_path="/images/base.raw"),
        image(backing_path="/images/a.qcow2"),
    ]
    tree = [
        describe(
            f"<domainsnapshot><name>{name}</name><creationTime>{number}</creationTime></domainsnapshot>", current=False
        )
        for number, name in enumerate(("one", "two"))
    ]
    disks = {
        "one": domain.parse(xml(disk(path="/images/base.raw", fmt="raw"))).disks,
        "two": domain.parse(xml(disk(path="/images/b.qcow2"))).disks,
    }
    made = make(facts(agent=AgentState.OK, images=images, snapshots=tuple(tree), snapshot_disks=disks))
    rows = [(m.member.name, m.member.role, m.path, m.member.parent, m.member.active, m.from_raw) for m in made.members]
    assert rows == [
        ("vda_0.qcow2", Role.DISK, "/images/base.raw", "", False, True),
        ("vda_1.snapshot", Role.LAYER, "/images/b.qcow2", "vda_0.qcow2", False, False),
        ("vda_2.snapshot", Role.LAYER, "/images/a.qcow2", "vda_0.qcow2", False, False),
        ("vda_3.snapshot", Role.LAYER, "/images/web.qcow2", "vda_2.snapshot", True, False),
    ]


def test_one_iso_in_two_drives_is_stored_once():
    cdrom = "<disk type='file' device='cdrom'><source file='/iso/a b.iso'/><target dev='{}'/><readonly/></disk>"
    vm = facts(
        running=False,
        definition=xml(disk(), cdrom.format("sda"), cdrom.format("sdb")),
        images=[image(), image("/iso/a b.iso", "raw", 2**20)],
    )
    assert [m.member.name for m in make(vm).members] == ["vda_0.qcow2", "0_a_b.iso"]
    skipped = make(vm, include_iso=False).configuration.skipped
    assert [each.device for each in skipped] == ["sda", "sdb"]


def test_full_target():
    with pytest.raises(TargetError, match=r"1\.0 GiB are needed and 512\.0 MiB are free"):
        make(facts(running=False), replace(TARGET, free_bytes=GIB // 2))
    compressed = make(facts(running=False), replace(TARGET, free_bytes=GIB // 2), compress=True)
    assert [each.code for each in compressed.warnings] == [Code.SPACE]


def test_reflinks_need_no_room():
    target = TargetFacts("/images", 2**21, 1, "xfs")
    assert make(facts(running=False), target).warnings == ()
    with pytest.raises(TargetError):
        make(facts(running=False, definition=xml(disk(fmt="raw")), images=[image(fmt="raw")]), target)
    with pytest.raises(TargetError):
        make(facts(running=False), replace(target, device_id=2))


def test_little_room_beside_the_disks():
    vm = replace(facts(agent=AgentState.OK), free_bytes={1: 2**20})
    assert any("beside /images/web.qcow2" in notice.text for notice in make(vm).warnings)
    assert not make(replace(vm, running=False, live_xml="")).warnings


def test_live_only_and_next_boot_disks():
    live = xml(disk(), disk("vdb", "/images/hot.qcow2"))
    vm = replace(
        facts(definition=live, images=[image(), image("/images/hot.qcow2")], agent=AgentState.OK),
        persistent_xml=xml(disk(), disk("vdc", "/images/later.qcow2")),
    )
    made = make(vm)
    assert [m.member.target for m in made.members] == ["vda", "vdb"]
    kept = domain.parse(made.configuration.domain_xml)
    assert [each.target for each in kept.disks] == ["vda", "vdc", "vdb"]
    assert any("vdb is attached to the running VM only" in notice.text for notice in made.warnings)
    assert [each.device for each in made.configuration.skipped] == ["vdc"]


def test_transient_vm():
    vm = replace(facts(agent=AgentState.OK), persistent_xml="")
    made = make(vm)
    assert domain.parse(made.configuration.domain_xml).name == "web"
    assert Code.NOT_AS_DEFINED in [each.code for each in made.warnings]


def base_of(*members, taken=(), same=()):
    point = Configuration(
        timestamp=NOW - 10,
        domain_xml="<domain/>",
        vm_name="web",
        vm_uuid=UUID,
        members=tuple(members),
        incrementable=True,
    )
    names = frozenset([*(member.name for member in members), *taken])
    return Base("/backups/old.tar", False, (point,), names, frozenset(same))


def archived(name, path, role=Role.DISK, target="vda", **more):
    return Member(name, role, 5, "d", target=target, former_path=path, **more)


CHAIN = {
    "definition": xml(disk(path="/images/web.qcow2.kvmops-1.qcow2")),
    "images": [image(), image("/images/web.qcow2.kvmops-1.qcow2", size=2**20, backing_path="/images/web.qcow2")],
}


def increment(vm, base, **request):
    return plan(
        vm, TARGET, BackupRequest(vm="web", path="/backups", mode=Mode.AUTO, incrementable=True, **request), now=NOW,
        tool_version="1", base=base, reason="it stands",
    )  # fmt: skip


def test_increment_adds_only_what_is_new():
    base = base_of(
        archived("vda_0.qcow2", "/images/web.qcow2", active=True), taken=["vda_3.snapshot", "vdb_9.snapshot"]
    )
    made = increment(facts(agent=AgentState.OK, **CHAIN), base)
    assert [(p.member.name, p.member.parent, p.member.active) for p in made.members] == [
        ("vda_4.snapshot", "vda_0.qcow2", True)
    ]
    assert made.kept == (replace(base.newest.members[0], active=False),)
    assert made.archive_path == "/backups/old.tar"
    assert (made.configuration.mode, made.configuration.incrementable, made.stays) == ("incremental", True, True)
    assert made.estimated_bytes < 3 * 2**20
    assert made.snapshot.overlays[0].overlay_path == f"/images/web.qcow2.kvmops-{NOW}.qcow2"
    assert "/backups/old.tar" in made.snapshot.description
    assert made.reason == "it stands"


def test_increment_is_later_than_its_archive_and_of_a_free_name():
    base = base_of(archived("vda_0.qcow2", "/images/web.qcow2", active=True))
    ahead = replace(base, points=(replace(base.newest, timestamp=NOW + 100),))
    assert increment(facts(**CHAIN), ahead).timestamp == NOW + 101
    taken = describe(f"<domainsnapshot><name>kvmops-{NOW}</name></domainsnapshot>", current=False)
    assert increment(facts(snapshots=(taken,), **CHAIN), base).timestamp == NOW + 1


def test_disks_are_told_apart_by_target():
    """Two disks on one template: each has its own copy of it in the archive."""
    vm = facts(
        definition=xml(disk("vda", "/i/a"), disk("vdb", "/i/b")),
        images=[image("/i/t"), image("/i/a", backing_path="/i/t"), image("/i/b", backing_path="/i/t")],
    )
    base = base_of(
        archived("vda_0.qcow2", "/i/t", active=True), archived("vdb_0.qcow2", "/i/t", target="vdb", active=True)
    )
    made = increment(vm, base)
    assert [(p.member.name, p.member.parent) for p in made.members] == [
        ("vda_1.snapshot", "vda_0.qcow2"),
        ("vdb_1.snapshot", "vdb_0.qcow2"),
    ]


def test_boot_files_are_stored_once_or_named():
    kernel, roms, secret = KINDS[0], KINDS[-2], KINDS[-1]
    vm = facts(
        boot_files=(
            BootFile("/boot/vmlinuz", kernel),
            BootFile("/boot/lost", roms, "it cannot be read (No such file or directory)"),
            BootFile("/etc/web.ign", secret, "it may be secret"),
        ),
        file_bytes={"/boot/vmlinuz": 10 * 2**20},
        **CHAIN,
    )
    old = [archived("vda_0.qcow2", "/images/web.qcow2", active=True), archived("0_vmlinuz.boot", "/boot/vmlinuz", Role.BOOT, "")]
    same, changed = increment(vm, base_of(*old, same=["/boot/vmlinuz"])), increment(vm, base_of(*old))
    assert [p.member.name for p in same.members] == ["vda_1.snapshot"]
    assert [m.name for m in same.kept] == ["vda_0.qcow2", "0_vmlinuz.boot"]
    assert [p.member.name for p in changed.members] == ["vda_1.snapshot", "1_vmlinuz.boot"]
    assert changed.estimated_bytes - same.estimated_bytes > 10 * 2**20
    first = make(replace(vm, snapshots=(), snapshot_disks={}))
    assert [p.member.name for p in first.members][-1] == "0_vmlinuz.boot"
    assert {each.device: each.reason for each in first.configuration.skipped} == {
        "option ROM /boot/lost": "it cannot be read (No such file or directory)",
        "firmware configuration /etc/web.ign": "it may be secret",
    }
    without = make(replace(vm, snapshots=(), snapshot_disks={}), include_boot_files=False)
    assert Role.BOOT not in [p.member.role for p in without.members]
    assert any("kernel /boot/vmlinuz is not in the backup" in notice.text for notice in without.warnings)


def test_cd_images_and_memory_are_stored_once():
    cd = "<disk type='file' device='cdrom'><source file='/isos/t.iso'/><target dev='sda' bus='sata'/><readonly/></disk>"
    vm = facts(
        definition=xml(disk(path="/images/web.qcow2.kvmops-1.qcow2"), cd),
        images=[*CHAIN["images"], image("/isos/t.iso", "raw", size=5)],
        snapshots=(
            describe("<domainsnapshot><name>a</name><memory snapshot='external' file='/i/a.m'/></domainsnapshot>", current=False),
            describe("<domainsnapshot><name>b</name><memory snapshot='external' file='/i/b.m'/></domainsnapshot>", current=True),
        ),
    )  # fmt: skip
    old = [
        archived("vda_0.qcow2", "/images/web.qcow2", active=True),
        archived("0_t.iso", "/isos/t.iso", Role.ISO, "sda", active=True),
        archived(f"{NOW - 10}_1.memory", "/i/a.m", Role.MEMORY, ""),
    ]
    same = increment(vm, base_of(*old, same=["/isos/t.iso"]))
    assert [p.member.name for p in same.members] == ["vda_1.snapshot", f"{NOW}_1.memory"]
    assert [m.name for m in same.kept] == ["vda_0.qcow2", "0_t.iso", f"{NOW - 10}_1.memory"]
    changed = increment(vm, base_of(*old))
    assert [p.member.name for p in changed.members] == ["vda_1.snapshot", "1_t.iso", f"{NOW}_1.memory"]
    assert "0_t.iso" not in [m.name for m in changed.kept]


def test_incrementable_full_keeps_its_snapshot_also_of_a_vm_that_is_off():
    for running in (True, False):
        made = make(facts(running=running), incrementable=True)
        assert (made.stays, made.configuration.mode, made.configuration.incrementable) == (True, "full", True)
        assert made.snapshot.overlays
        assert "Deleting or reverting it ends" in made.snapshot.description
    assert not make(facts()).stays


def test_what_cannot_be_incrementable():
    transient = replace(facts(), persistent_xml="")
    with pytest.raises(RefusedError, match="transient"):
        make(transient, incrementable=True)
    lun = "<disk type='block' device='lun'><source dev='/dev/x'/><target dev='sda'/></disk>"
    with pytest.raises(RefusedError, match="no disk that can be frozen"):
        make(facts(definition=xml(lun)), incrementable=True)
    for kind, more in {"ZFS": {"kind": PlaceKind.ZFS}, "block device": {"kind": PlaceKind.BLOCK}}.items():
        vm = facts(running=False, images=[image(fmt="raw", **more)], definition=xml(disk(fmt="raw")))
        make(vm)
        with pytest.raises(RefusedError, match=kind):
            make(vm, incrementable=True)


def test_room_for_the_merge():
    vm = facts(
        agent=AgentState.OK,
        definition=xml(disk(path="/i/top")),
        images=[image("/i/base"), image("/i/top", backing_path="/i/base", allocated=3 * GIB)],
    )
    assert make(replace(vm, free_bytes={1: 4 * GIB}), incrementable=True).warnings == ()
    tight = replace(vm, free_bytes={1: 2 * GIB})
    assert any("merging the layers beside /i/top" in notice.text for notice in make(tight, incrementable=True).warnings)
    assert make(tight).warnings == ()
