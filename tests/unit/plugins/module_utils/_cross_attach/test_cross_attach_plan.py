# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an attach comes to, what is refused, and what of the attached disks is still there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _attachments
from ansible_collections.kvmops.backup.plugins.module_utils._attachments import Attachment, Record
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach import choose, devices, plan
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach.choose import Candidate
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach.plan import (
    Frozen,
    ReceiverFacts,
    SourceFacts,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import PlaceKind
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.receivers import SeenAtReceiver
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.disk_ids import VmDisk, lowest_own

WEB, APPLIANCE = "6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11", "0a0d3f3c-19f4-4d4a-8a6b-7a4e4c1f5b0e"
NOW_NS = 1_795_309_200 * 10**9


def disk(target: str = "vda", path: str = "/vm/web.qcow2", serial: str = "", **changes: Any) -> VmDisk:
    xml = (
        "<domain><devices><disk type='file' device='disk'><driver type='qcow2'/>"
        f"<source file='{path}'/><target dev='{target}' bus='virtio'/><serial>{serial}</serial></disk></devices></domain>"
    )
    [found] = domain_xml.parse(xml).disks
    return VmDisk(_attachments.disk_id(WEB, path), path, path, replace(found, **changes))


def source(**changes: Any) -> SourceFacts:
    facts = SourceFacts(WEB, "web", running=True, marked=False, disk=disk(), size_bytes=2**30, pool="vms")
    return replace(facts, **changes)


def receiver(**changes: Any) -> ReceiverFacts:
    seen = SeenAtReceiver(True, running=True, persistent=True)
    facts = ReceiverFacts(
        APPLIANCE, "appliance", running=True, marked=False, saved=False, targets=frozenset({"vda", "vdc"}), seen=seen
    )
    return replace(facts, **changes)


def record(*attachments: Attachment, snapshot: str = _attachments.SNAPSHOT) -> Record:
    return Record(WEB, "web", snapshot, 1_795_300_000, "agent", attachments)


def make(
    source_facts: SourceFacts | None = None,
    receiver_facts: ReceiverFacts | None = None,
    known: Record | None = None,
    lease_s: int = 0,
) -> plan.AttachPlan:
    return plan.plan_attach(
        source_facts or source(), receiver_facts or receiver(), known, lease_s=lease_s, now_ns=NOW_NS
    )


def attached(**changes: Any) -> Attachment:
    return replace(make().attachment, **changes)


def test_the_first_attach_takes_the_snapshot() -> None:
    planned = make(lease_s=3600)
    found = planned.attachment
    assert planned.freeze and planned.changes
    assert (found.receiver_target, found.format, found.attached_path) == ("vdb", "qcow2", "/vm/web.qcow2")
    assert (
        found.lease_until == 1_795_309_200 + 3600 and not found.expired(1_795_309_201) and found.expired(1_795_312_801)
    )
    assert len(found.serial) == 20 and _attachments.is_serial(found.serial)


def test_later_ones_are_attached_from_the_same_snapshot() -> None:
    frozen = Frozen("/vm/data.raw", "raw", 2**20)
    second = source(disk=disk("vdb", "/vm/data.overlay.qcow2"), frozen=frozen,
                    snapshots=frozenset({_attachments.SNAPSHOT}))  # fmt: skip
    planned = make(second, known=record(attached()))
    found = planned.attachment
    assert not planned.freeze and (found.attached_path, found.format, found.moment) == (
        "/vm/data.raw",
        "raw",
        1_795_300_000,
    )
    assert found.consistency == "agent"


def test_a_disk_that_the_snapshot_does_not_have_would_show_another_moment() -> None:
    with pytest.raises(RefusedError, match="another moment"):
        make(source(disk=disk("vdb", "/vm/new.qcow2")), known=record(attached()))


def test_a_snapshot_of_that_name_that_is_not_ours_is_not_used() -> None:
    with pytest.raises(RefusedError, match="was not made by this module"):
        make(source(snapshots=frozenset({_attachments.SNAPSHOT})))
    with pytest.raises(RefusedError, match=r"appliance \(vdb\) reads from it. Take the disk from there.* Remove the"):
        make(source(snapshots=frozenset({_attachments.SNAPSHOT}), unrecorded=("appliance (vdb)",)))


def test_of_a_template_there_is_no_snapshot() -> None:
    planned = make(source(marked=True, running=False))
    assert not planned.freeze and planned.attachment.attached_path == "/vm/web.qcow2"
    with pytest.raises(RefusedError, match="is running"):
        make(source(marked=True))


def test_the_same_again_is_no_change_unless_something_of_it_is_missing() -> None:
    there, complete = record(attached()), SeenAtReceiver(True, True, True, live=True, config=True)
    again = make(receiver_facts=receiver(seen=complete), known=there)
    assert not again.changes and again.attachment == there.attachments[0]
    assert make(receiver_facts=receiver(seen=replace(complete, config=False)), known=there).changes
    begun = make(receiver_facts=receiver(seen=complete), known=there, lease_s=60)
    assert begun.changes and begun.changed
    restarted = make(receiver_facts=receiver(seen=complete), known=record(replace(begun.attachment, lease_until=5)), lease_s=60)
    assert restarted.changes and not restarted.changed and restarted.attachment == begun.attachment
    leaving = make(receiver_facts=receiver(seen=complete), known=record(attached(leaving=True)))
    assert leaving.changes and not leaving.attachment.leaving


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (source(uuid=APPLIANCE), "the disk is its own"),
        (source(disk=disk(device="lun")), "it is a lun"),
        (source(disk=disk(device="cdrom")), "it is a cdrom"),
        (source(disk=disk(shareable=True)), "shareable"),
        (source(disk=disk(readonly=True)), "read-only"),
        (source(disk=disk(encrypted=True)), "encrypted"),
        (source(disk=disk(format="vmdk")), "its format is vmdk"),
        (source(kind=PlaceKind.LVM), "it is on LVM"),
        (source(kind=PlaceKind.BLOCK), "it is on a block device: only disks in files.* or move the disk to a qcow2"),
        (source(kind=PlaceKind.ZVOL), "it is a ZFS volume.* zfs clone"),
        (source(disk=replace(disk(), path="")), "no file of this host"),
        (source(disk=replace(disk(pool="p", volume="v"), path="")), "its pool is not active.*virsh pool-start p"),
        (source(read_only="/vm is mounted read-only"), "has no place beside it: /vm is mounted read-only"),
    ],
)
def test_refused_disks(facts: SourceFacts, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        make(facts)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (receiver(marked=True), "it is a template"),
        (receiver(saved=True), "managed-save image"),
        (receiver(port=False), "no free PCI port.*pcie-root-port"),
    ],
)
def test_refused_receivers(facts: ReceiverFacts, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        make(receiver_facts=facts)


GONE = SeenAtReceiver(defined=False)
AT = {"live": SeenAtReceiver(True, True, True, live=True), "config": SeenAtReceiver(True, False, True, config=True),
      "saved": SeenAtReceiver(True, False, True, saved=True)}  # fmt: skip
NOT = {"gone": GONE, "taken out": SeenAtReceiver(True, True, True), "off": SeenAtReceiver(True, False, True)}


@pytest.mark.parametrize("seen", AT.values(), ids=AT)
def test_what_a_receiver_may_still_have_is_kept(seen: SeenAtReceiver) -> None:
    for here in (attached(), attached(leaving=True)):
        found = plan.reconcile(record(here), {here.serial: seen})
        assert found.kept == (here,) and not found.freed and not found.ends


@pytest.mark.parametrize("seen", NOT.values(), ids=NOT)
def test_what_it_does_not_have_is_freed_and_the_snapshot_goes_after_the_last(seen: SeenAtReceiver) -> None:
    other = attached(serial="kvmops00000000000000", disk_id="other")
    both = record(attached(), other)
    found = plan.reconcile(both, {attached().serial: seen, other.serial: AT["live"]})
    assert [each.attachment for each in found.freed] == [attached()] and not found.ends
    assert "snapshot" not in " ".join(plan.pending(both, {attached().serial: seen, other.serial: AT["live"]}))
    assert plan.reconcile(both, {attached().serial: seen, other.serial: seen}).ends
    assert "not needed any more" in plan.pending(both, {attached().serial: seen, other.serial: seen})[-1]


def test_a_record_without_attachments_ends() -> None:
    assert plan.reconcile(record(), {}).ends and plan.pending(record(), {})


def test_targets() -> None:
    assert devices.free_target(()) == "vda"
    assert devices.free_target({f"vd{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"}) == "vdaa"


def test_a_receiver_that_is_off_or_has_the_disk_needs_no_port() -> None:
    assert make(receiver_facts=receiver(port=False, running=False)).changes
    assert not make(receiver_facts=receiver(port=False, seen=AT["live"]), known=record(attached())).freeze


PORT = "<controller type='pci' index='{0}' model='{1}'/>"
ROOT = PORT.format(0, "pcie-root") + PORT.format(1, "pcie-root-port")
DEVICE = "<disk><address type='pci' bus='0x0{0}'/></disk>"


@pytest.mark.parametrize(
    ("devices_xml", "has"),
    [
        (ROOT + DEVICE.format(1), False),
        (ROOT + DEVICE.format(0), True),
        (ROOT + PORT.format(2, "pcie-root-port") + DEVICE.format(1), True),
        (PORT.format(0, "pcie-root") + PORT.format(1, "pcie-to-pci-bridge") + DEVICE.format(1), True),  # libvirt knows
        (PORT.format(0, "pci-root") + DEVICE.format(0), True),
        ("", True),  # s390x
    ],
)
def test_free_ports(devices_xml: str, has: bool) -> None:
    assert devices.has_port(f"<domain><devices>{devices_xml}</devices></domain>") is has


def test_the_disk_as_a_receiver_gets_it() -> None:
    xml = devices.document(attached(attached_path="/vm/a&b.qcow2"))
    [found] = domain_xml.parse(f"<domain><devices>{xml}</devices></domain>").disks
    assert (found.path, found.bus, found.readonly, found.target) == ("/vm/a&b.qcow2", "virtio", True, "vdb")
    assert 'cache="none"' in xml and found.serial == attached().serial


def test_ids_and_serials() -> None:
    assert _attachments.disk_id(WEB, "/vm/web.qcow2") == _attachments.disk_id(WEB.upper(), "/vm/web.qcow2")
    assert _attachments.disk_id(WEB, "/vm/web.qcow2") != _attachments.disk_id(APPLIANCE, "/vm/web.qcow2")
    numbers = {_attachments.serial("id", vm, at) for vm in (WEB, APPLIANCE) for at in (1, 2)}
    assert len(numbers) == 4


@pytest.mark.parametrize(
    ("chain", "frozen", "lowest"),
    [
        (["/c", "/b", "/a"], ["/b", "/a"], "/a"),
        (["/c", "/template"], [], "/c"),  # a thin clone
        (["/c", "/b", "/template"], ["/b"], "/b"),
        (["/a"], ["/elsewhere"], "/a"),
    ],
)
def test_the_lowest_image_that_is_the_vms_own(chain: list[str], frozen: list[str], lowest: str) -> None:
    assert lowest_own(chain, frozen, {}) == lowest


def test_which_disk_is_meant() -> None:
    web = [Candidate(WEB, "web", disk()), Candidate(WEB, "web", disk("vdb", "/vm/data.qcow2", "SN1"))]
    twin = Candidate(APPLIANCE, "twin", disk("vdb", "/vm/twin.qcow2", "SN1"))
    assert choose.pick(web, "/vm/data.qcow2") == web[1]
    assert choose.pick(web, web[0].disk.id.upper()) == web[0]
    assert choose.pick(web, "vda", "web") == web[0]
    assert choose.pick(web, "SN1") == web[1]
    with pytest.raises(RefusedError, match=r"more than one is meant: vdb .* of web, id .* of twin"):
        choose.pick([*web, twin], "SN1")
    with pytest.raises(RefusedError, match=r"no VM of this host has such a disk.*needs source_vm"):
        choose.pick(web, "vda")
    with pytest.raises(RefusedError, match="no VM of this host"):
        choose.pick(web, "")
    with pytest.raises(RefusedError, match=r"the VM web has no such disk.*vda \(/vm/web.qcow2\), vdb \(/vm/data.qcow2\)"):
        choose.pick(web, "vdc", "web")
    with pytest.raises(RefusedError, match="It has no disk of its own"):
        choose.pick([], "vda", "web")


@pytest.mark.parametrize(
    ("texts", "options", "count"),
    [
        (["/vm/web.qcow2"], {}, 1),
        (["vda"], {}, 0),
        (["vda"], {"source": "web"}, 1),
        (["vda"], {"source": WEB}, 1),
        (["vda"], {"source": "db"}, 0),
        (["/vm/template.qcow2"], {}, 0),
        (["/vm/template.qcow2"], {"clone": "web"}, 1),
        (["/vm/template.qcow2"], {"clone": "db"}, 0),
    ],
)
def test_which_attached_disk_is_meant(texts: list[str], options: dict[str, str], count: int) -> None:
    here = record(attached(template="template", template_names=("id", "/vm/template.qcow2")))
    options = {"source": "", "clone": "", **options}
    assert len(plan.named([here], ("appliance", "appliance"), texts, **options)) == count
    assert not plan.named([here], ("other", "other"), texts, **options)
