# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What others do between two increments: `auto` continues where that is right, else makes a full that says why (SPEC B6).

One VM goes through all of it. Whatever is made of it, every point of every archive is what was frozen then.
"""

from __future__ import annotations

import os
import shutil

import libvirt
import pytest
from lxml import etree

from ansible_collections.kvmops.backup.tests.integration.targets.vm_increment import chains
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, make_image

EXTERNAL = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC


_PORTS = "<controller type='pci' model='pcie-root-port'/>" * 4  # for a disk that comes and goes


class Victim:
    """The VM, and the truth about every point made of it."""

    def __init__(self, lab, run_module):
        self.lab, self.run_module = lab, run_module
        self.target = lab.path("backups")
        self.vm = lab.create_vm("victim", [Disk(size_mib=32), Disk("raw", size_mib=32)], extra_devices=_PORTS)
        self.known: dict[str, dict[int, dict[str, str]]] = {}

    def backup(self, **more):
        result = self.run_module(
            "vm_backup", vm="victim", path=str(self.target), mode="auto", consistency="crash", **more
        )
        self.known.setdefault(result["archive"]["path"], {})[result["point"]] = chains.frozen_now(self.vm)
        return result

    def expect(self, reason):
        """`incremental` refuses with the reason, `auto` makes a full that has it; afterwards increments work again."""
        before = self.vm.domain.snapshotListNames()
        refused = self.run_module(
            "vm_backup", vm="victim", path=str(self.target), mode="incremental", consistency="crash", fails=True
        )
        assert reason in refused.message, refused.message
        assert self.vm.domain.snapshotListNames() == before
        result = self.backup()
        assert (result["mode"], reason in result["reason"]) == ("full", True), result["reason"]
        assert self.backup()["mode"] == "incremental"

    def expect_increment(self):
        result = self.backup()
        assert result["mode"] == "incremental", result["reason"]

    def write(self):
        """The guest (or, while it is off, somebody in its place) writes something new."""
        if self.vm.is_running():
            self.vm.wait_for_marker(self.vm.last_marker().number + 1)
        else:
            for path in self.vm.disks().values():
                run("qemu-io", "-f", path_format(path), "-c", f"write -P {os.urandom(1)[0]} 1M 256k", str(path))

    def off(self):
        if self.vm.is_running():
            self.vm.domain.destroy()

    def on(self):
        if not self.vm.is_running():
            self.vm.start()

    def own(self):
        """The newest snapshot of ours."""
        return sorted(n for n in self.vm.domain.snapshotListNames() if n.startswith("kvmops-"))[-1]

    def external(self, name, *, flags=0):
        disks = "".join(
            f"<disk name='{t}' snapshot='external'><source file='{p.parent}/{t}.{name}'/></disk>"
            for t, p in self.vm.disks().items()
        )
        xml = f"<domainsnapshot><name>{name}</name><disks>{disks}</disks></domainsnapshot>"
        return self.vm.domain.snapshotCreateXML(xml, EXTERNAL | flags)

    def base(self, target="vda"):
        """The file that a disk's lowest layer is."""
        top = self.vm.disks()[target]
        found = chains.json.loads(run("qemu-img", "info", "-U", "--backing-chain", "--output=json", str(top)))
        return found[-1]["filename"]


def path_format(path):
    return "raw" if str(path).endswith(".raw") else "qcow2"


@pytest.fixture(scope="module")
def victim(module_lab):
    from ansible_collections.kvmops.backup.tests.lab.modules import run_module

    value = Victim(module_lab, run_module)
    value.backup()
    yield value
    for archive, known in value.known.items():
        out = module_lab.path("out-" + os.path.basename(archive))
        found = chains.digests_of_points(archive, out)
        assert found == known, archive
        assert run_module("backup_verify", archive=archive)["archives"][0]["ok"]
        shutil.rmtree(out)
    for path in value.vm.disks().values():
        assert os.path.exists(path)


@pytest.fixture(autouse=True)
def standing(victim):
    """Every test begins on a chain that stands, whatever became of the one before."""
    victim.backup()


def test_nothing(victim):
    victim.write()
    victim.expect_increment()


def test_a_full_that_stands_alone(victim):
    result = victim.run_module("vm_backup", vm="victim", path=str(victim.lab.path("alone")))
    assert (result["mode"], result["archive"]["incrementable"]) == ("full", False)
    victim.write()
    victim.expect_increment()


def test_users_state_added(victim):
    victim.external("mine")
    victim.write()
    victim.expect_increment()


def test_users_state_came_and_went(victim):
    state = victim.external("short")
    victim.write()
    state.delete()
    victim.expect_increment()
    victim.vm.domain.snapshotLookupByName("mine").delete()  # that one is in the last point
    victim.expect("snapshot mine is gone")


def test_power_off_and_on(victim):
    victim.off()
    victim.on()
    victim.write()
    victim.expect_increment()


def test_internal_state_on_our_layer(victim):
    victim.vm.domain.snapshotCreateXML("<domainsnapshot><name>inside</name></domainsnapshot>")
    victim.write()
    victim.expect_increment()
    victim.run_module("vm_snapshot", vm="victim", snapshot="all", state="absent")
    victim.expect("snapshots of the VM were removed")


def test_our_state_deleted(victim):
    name = victim.own()
    victim.vm.domain.snapshotLookupByName(name).delete()
    victim.expect(f"snapshot {name} is gone")


def test_metadata_of_our_state_deleted(victim):
    name = victim.own()
    victim.vm.domain.snapshotLookupByName(name).delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    victim.expect(f"snapshot {name} is gone")


def test_resized(victim):
    victim.vm.domain.blockResize("vda", 48 * 2**20, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    victim.expect("disk vda was resized")


def test_hot_added_and_removed(victim):
    extra = make_image(victim.lab.path("extra") / "vdc.qcow2", Disk(size_mib=16))
    shutil.chown(extra, "libvirt-qemu")
    xml = (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{extra}'/>"
        "<target dev='vdc' bus='virtio'/></disk>"
    )
    both = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG

    def attach():
        victim.vm.domain.attachDeviceFlags(xml, both)
        wait_for("the guest to see vdc", lambda: "vdc" in victim.vm.agent.shell("ls /sys/block"), 60)

    def detach():
        victim.vm.domain.detachDeviceFlags(xml, both)
        wait_for("vdc to be gone", lambda: "vdc" not in victim.vm.disks(), 120)

    attach()
    detach()
    victim.expect_increment()
    attach()
    victim.expect("disk vdc was added")
    victim.run_module("vm_snapshot", vm="victim", snapshot="all", state="absent")
    detach()
    victim.backup()


def test_blockcommit(victim):
    victim.write()
    domain = victim.vm.domain
    for target in victim.vm.disks():
        domain.blockCommit(target, None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)

        def ready(target=target):
            return f"<target dev='{target}'" in victim.vm.xml() and "ready='yes'" in victim.vm.xml()

        wait_for(f"{target} to be ready", ready, 60)
        domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    victim.expect("no longer stands on the files")


def test_blockpull(victim):
    victim.vm.domain.blockPull("vda")
    wait_for("the pull to end", lambda: not victim.vm.domain.blockJobInfo("vda", 0), 60)
    victim.expect("disk vda no longer stands on the files")


def test_reverted(victim):
    """To the snapshot of the point before, by our own module; what happened since is lost, and it says so."""
    victim.write()
    victim.expect_increment()
    older = sorted(n for n in victim.vm.domain.snapshotListNames() if n.startswith("kvmops-"))[-2]
    victim.run_module("vm_snapshot", vm="victim", snapshot=older, state="reverted")
    victim.write()
    victim.expect("revert")


def test_reverted_below_our_layers(victim):
    """An internal snapshot from before the cycle: libvirt reverts to it and leaves the layers over a changed base."""
    victim.off()
    victim.run_module("vm_snapshot", vm="victim", snapshot="all", state="absent")
    xml = etree.fromstring(victim.vm.xml(inactive=True).encode())
    for disk in xml.findall("devices/disk"):
        if disk.find("target").get("dev") == "vdb":  # internal snapshots need qcow2
            raw = disk.find("source").get("file")
            qcow2 = f"{raw}.qcow2"
            run("qemu-img", "convert", "-O", "qcow2", "-f", disk.find("driver").get("type"), raw, qcow2)
            disk.find("source").set("file", qcow2)
            disk.find("driver").set("type", "qcow2")
    victim.lab.connection.defineXML(etree.tostring(xml).decode())
    victim.vm.domain.snapshotCreateXML("<domainsnapshot><name>below</name></domainsnapshot>")
    victim.backup()
    victim.write()
    victim.expect_increment()
    victim.vm.domain.revertToSnapshot(victim.vm.domain.snapshotLookupByName("below"))
    victim.write()
    victim.expect("reverted to snapshot below")


def test_written_behind_our_back(victim):
    """Into a frozen layer, and the time set back: only ctime and the bytes tell."""
    victim.off()
    base = victim.base()
    times = os.stat(base)
    run("qemu-io", "-f", path_format(base), "-c", "write -P 9 8M 64k", base)
    os.utime(base, ns=(times.st_atime_ns, times.st_mtime_ns))
    victim.expect(f"{base} was written to or replaced")


def test_replaced_by_an_older_copy(victim):
    victim.off()
    copy = victim.lab.path("copy") / "yesterday"
    first = victim.base("vda")
    shutil.copy2(first, copy)
    victim.run_module("vm_snapshot", vm="victim", snapshot="all", state="absent")
    victim.backup()
    victim.write()
    shutil.copy2(copy, victim.base("vda"))
    victim.expect("was written to or replaced")


def test_replaced_by_the_same_bytes(victim):
    """Another inode, the same content: nothing is lost by going on."""
    victim.off()
    base = victim.base("vda")
    shutil.copy2(base, f"{base}.same")
    os.replace(f"{base}.same", base)
    victim.expect_increment()


def test_taken_into_another_vm(victim):
    """Another VM writes to the frozen file."""
    victim.off()
    base = victim.base("vda")
    other = victim.lab.create_vm("thief", [Disk(path=base)], writer=False)
    other.agent.shell("echo stolen >/disk/vda/thief; sync")
    other.remove()
    victim.expect("was written to or replaced")


def test_swapped(victim):
    victim.off()
    xml = etree.fromstring(victim.vm.xml(inactive=True).encode())
    disks = {d.find("target").get("dev"): d for d in xml.findall("devices/disk[@device='disk']")}
    sources = {name: (disk.find("source").get("file"), disk.find("driver").get("type")) for name, disk in disks.items()}
    for name, other in (("vda", "vdb"), ("vdb", "vda")):
        for backing in disks[name].findall("backingStore"):
            disks[name].remove(backing)
        disks[name].find("source").set("file", sources[other][0])
        disks[name].find("driver").set("type", sources[other][1])
    victim.lab.connection.defineXML(etree.tostring(xml).decode())
    victim.expect("has what was disk")


def test_made_anew_under_the_same_name(victim):
    victim.off()
    xml = victim.vm.xml(inactive=True)
    uuid = victim.vm.domain.UUIDString()
    victim.vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
    victim.lab.connection.defineXML(xml)
    victim.expect("is gone")  # the same uuid, but not the same VM
    xml = victim.vm.xml(inactive=True)
    victim.vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
    victim.lab.connection.defineXML(xml.replace(uuid, uuid[:-4] + "0000"))
    victim.expect("was made incrementable for this VM")


def test_renamed(victim):
    victim.off()
    victim.vm.domain.rename("other")
    try:
        refused = victim.run_module("vm_backup", vm="other", path=str(victim.target), mode="incremental", fails=True)
        assert "renamed from victim to other" in refused.message
    finally:
        victim.lab.connection.lookupByName("other").rename("victim")
    victim.expect_increment()


def test_restored_in_place(victim):
    victim.off()
    newest = max(victim.known.items(), key=lambda each: max(each[1]))[0]
    victim.run_module("vm_restore", source=newest, force=True)
    victim.write()
    victim.expect("the VM was restored in place")
