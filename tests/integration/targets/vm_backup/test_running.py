# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Running VMs: with an agent, without, with one that does not do its work (SPEC B1, B3, B20)."""

from __future__ import annotations

import json
import os
import re
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import libvirt
import pytest

from ansible_collections.kvmops.backup.tests.lab import fingerprint, markers, truth
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, make_image


def members(archive):
    return run("tar", "-tf", archive).split()


def extract(archive, directory):
    run("tar", "-xf", archive, "-C", str(directory))
    return directory


SECRET = "pLanted7"


@pytest.fixture(scope="module")
def web(module_lab):
    """A writing VM with an agent, a qcow2 and a raw disk."""
    return module_lab.create_vm("web 01", [Disk(), Disk("raw")], freeze_mode="pause")


@pytest.fixture(scope="module")
def mute(module_lab):
    """A writing VM without an agent, and with a secret."""
    display = f"<graphics type='vnc' autoport='yes' passwd='{SECRET}'/>"
    vm = module_lab.create_vm("mute", [Disk()], agent=False, extra_devices=display)
    wait_for("its second marker", lambda: re.search(r"marker=([2-9]|\d\d)", vm.console_line("GUEST-UP")), 120)
    return vm


@pytest.mark.parametrize("compress", [False, True])
def test_agent(lab, web, run_module, compress):
    web.wait_for_marker(3)
    before, files = fingerprint.definition(web), fingerprint.names(*{path.parent for path in web.disks().values()})
    target = lab.path("backups")
    result = run_module("vm_backup", vm="web 01", path=str(target), compress=compress)
    assert fingerprint.definition(web) == before
    assert fingerprint.names(*{path.parent for path in web.disks().values()}) == files
    assert result["consistency"] == "agent"
    assert result.warnings == []
    archive = result["archive"]["path"]
    assert fingerprint.names(target) == [archive]
    assert archive.endswith(".tar.zst" if compress else ".tar")

    files = extract(archive, lab.path("extracted"))
    for name in ("vda_0.qcow2", "vdb_0.qcow2"):
        run("qemu-img", "check", "-f", "qcow2", str(files / name))
        truth.assert_clean_ext4(truth.to_raw(files / name, "qcow2", files / f"{name}.raw"))
    reader = lab.read_back("reader", [Disk("qcow2", path=files / name) for name in ("vda_0.qcow2", "vdb_0.qcow2")])
    assert reader.digests() == web.frozen_digests()
    last = markers.parse_log(truth.read_ext4_file(files / "vda_0.qcow2.raw", "/log"))[-1]
    assert last.number >= 3
    web.wait_for_marker(last.number + 2)  # the guest went on
    numbers = [each.number for each in markers.parse_log(web.log())]
    assert numbers == list(range(1, len(numbers) + 1))  # and nothing of what it wrote was lost


def test_guest_is_frozen_for_less_than_a_second(lab, run_module):
    """Or, on a machine that is busy, for no longer than twice the time that libvirt alone needs; at its best of three."""
    vm = lab.create_vm("brief", [Disk(), Disk("raw")])
    target = str(lab.path("backups"))
    frozen_ms = min(run_module("vm_backup", vm="brief", path=target)["frozen_ms"] for _dummy in range(3))
    overlays = "".join(
        f"<disk name='{d}' snapshot='external'><source file='{vm.disks()[d]}.peer'/></disk>" for d in vm.disks()
    )
    begin = time.monotonic()
    vm.domain.snapshotCreateXML(
        f"<domainsnapshot><disks>{overlays}</disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE,
    )
    alone_ms = (time.monotonic() - begin) * 1000
    assert 0 < frozen_ms < max(1000, 2 * alone_ms)


def test_memory_without_agent(lab, mute, run_module):
    before = fingerprint.definition(mute)
    result = run_module("vm_backup", vm="mute", path=str(lab.path("backups")))
    assert fingerprint.definition(mute) == before
    assert result["consistency"] == "memory"
    listed = members(result["archive"]["path"])
    memory = [name for name in listed if name.endswith(".memory")]
    assert len(memory) == 1
    with tarfile.open(result["archive"]["path"]) as archive:
        assert archive.extractfile(memory[0]).read(16) == b"LibvirtQemudSave"
    assert len(fingerprint.names(mute.disks()["vda"].parent)) == 1  # no overlay, no memory image left
    places = [lab.directory, *(Path(above, "kvmops-backup") for above in ("/var/lib", "/var/cache", "/run"))]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert Path(result["archive"]["path"]) in files
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == [] and SECRET not in result.output


def test_crash_has_no_memory(lab, mute, run_module):
    result = run_module("vm_backup", vm="mute", path=str(lab.path("backups")), consistency="crash")
    assert result["consistency"] == "crash"
    assert not [name for name in members(result["archive"]["path"]) if name.endswith(".memory")]
    files = extract(result["archive"]["path"], lab.path("extracted"))
    raw = truth.to_raw(files / "vda_0.qcow2", "qcow2", files / "raw")
    run("e2fsck", "-f", "-y", str(raw), ok=(0, 1))  # 1: the journal was replayed
    assert markers.parse_crashed_log(truth.read_ext4_file(raw, "/log"))


def test_agent_wanted_but_not_there(lab, mute, run_module):
    target = lab.path("backups")
    before = fingerprint.definition(mute)
    result = run_module("vm_backup", vm="mute", path=str(target), consistency="agent", fails=True)
    assert "agent channel" in result.message
    assert "mute" in result.message
    assert fingerprint.definition(mute) == before
    assert fingerprint.names(target) == []


def test_hanging_agent_falls_back_to_memory(lab, run_module):
    vm = lab.create_vm("hung", [Disk()])
    vm.set_freeze_mode("hang")
    result = run_module("vm_backup", vm="hung", path=str(lab.path("backups")))
    assert result["consistency"] == "memory"
    assert any("agent" in warning for warning in result.warnings)
    assert vm.disks()["vda"].name == "vda.qcow2"


@pytest.fixture(scope="module")
def stiff(module_lab):
    """A writing VM whose agent cannot freeze."""
    return module_lab.create_vm("stiff", [Disk()], freeze_mode="fail")


def test_agent_that_cannot_freeze_falls_back_to_memory(lab, stiff, run_module):
    vm = stiff
    before = fingerprint.definition(vm)
    result = run_module("vm_backup", vm="stiff", path=str(lab.path("backups")))
    assert result["consistency"] == "memory"
    assert any("memory image" in warning for warning in result.warnings)
    assert fingerprint.definition(vm) == before
    refused = run_module("vm_backup", vm="stiff", path=str(lab.path("again")), consistency="agent", fails=True)
    assert "stiff" in refused.message
    assert fingerprint.definition(vm) == before
    vm.wait_until_thawed()


# What a guest may say instead of its agent, to each command but guest-sync, by mode (the host sets it with lab-mode).
_FREEZING = [
    {"name": f"guest-fsfreeze-{verb}", "enabled": True, "success-response": True}
    for verb in ("freeze", "thaw", "status")
]
_COMMANDS = json.dumps({"return": {"version": "9", "supported_commands": _FREEZING}})
_LIAR = f"""#!/bin/sh
sleep 1; kill $(cat /run/agent.pid)
until ! pidof qemu-ga; do usleep 50000; done
exec 3<>/dev/$(basename /sys/class/virtio-ports/*)
mode=number
long() {{ yes "$1" | head -c "$2" | tr -d '\\n'; }}
say() {{ printf '%s\\n' "$1" >&3; }}
error() {{ {{ printf '{{"error":{{"class":"GenericError","desc":"'; long "$@"; echo '"}}}}'; }} >&3; }}
while :; do
  read -r asked <&3 || {{ usleep 50000; continue; }}  # nobody is connected to the port
  case "$asked $mode" in
    *guest-sync*) say "{{\\"return\\":$(echo "$asked" | sed 's/.*"id": *//; s/[^0-9].*//')}}" ;;
    *lab-mode*) mode=$(echo "$asked" | sed 's/.*mode-\\([a-z]*\\).*/\\1/'); say '{{"return":{{}}}}' ;;
    *guest-info*number) say '{{"return":5}}' ;;
    *guest-info*huge) error x 9000000 ;;
    *guest-info*) say '{_COMMANDS}' ;;
    *guest-fsfreeze-status*) say '{{"return":"thawed"}}' ;;
    *freeze*long) error '\\u001b[2J\\u009b31m' 200000 ;;
    *freeze*monstrous) error x 9000000 ;;
    *) say '{{"return":"no number"}}' ;;
  esac
done
"""


def test_an_agent_may_answer_what_it_likes(lab, stiff, run_module):
    """No traceback, no flood, no control characters, no broken run, whatever the guest says (SPEC B3)."""
    shell = f"cat >/bin/liar <<'END'\n{_LIAR}\nEND\nchmod 755 /bin/liar; setsid liar </dev/null >/dev/null 2>&1 &"
    stiff.agent.shell(shell)
    before = fingerprint.definition(stiff)

    def lies(mode):
        with suppress(libvirt.libvirtError):
            return stiff.agent.command("lab-mode", timeout_s=2, mode=f"mode-{mode}") == {}
        return False

    for mode in ("number", "huge", "table", "long", "monstrous"):
        wait_for("the liar to answer", lambda mode=mode: lies(mode), 60)
        target = lab.path(f"backups-{mode}")
        result = run_module("vm_backup", vm="stiff", path=str(target), consistency="agent", fails=True)
        assert "stiff" in result.message and "agent" in result.message, mode
        assert len(result.output) < 30000 and result.message.isprintable(), mode
        assert fingerprint.definition(stiff) == before and fingerprint.names(target) == [], mode
        assert not list(Path("/var/lib/kvmops-backup/journal").glob("*")), mode
    result = run_module("vm_backup", vm="stiff", path=str(target))
    assert result["consistency"] == "memory" and any("too long" in text for text in result.warnings)
    assert fingerprint.definition(stiff) == before
    assert not list(Path("/var/lib/kvmops-backup/journal").glob("*"))


SHMEM = "<shmem name='shared'><model type='ivshmem-plain'/><size unit='M'>4</size></shmem>"


def test_a_vm_that_stands_still_or_cannot_save_its_memory(lab, run_module):
    """Check mode says what a run does, and a refusal leaves nothing on the VM nor in the journal."""
    vm = lab.create_vm("asleep", [Disk()], extra_devices=SHMEM, start=False)
    sleeps = "<pm><suspend-to-mem enabled='yes'/></pm>"
    lab.connection.defineXML(vm.xml(inactive=True).replace("</features>", f"</features>{sleeps}"))
    vm.start().wait_for_marker(1)
    target = lab.path("backups")

    def refused(words, module="vm_backup", **arguments):
        before = fingerprint.definition(vm)
        place = {"path": str(target)} if module == "vm_backup" else {"snapshot": "mine"}
        for check_mode in (True, False):
            result = run_module(module, check_mode=check_mode, fails=True, vm="asleep", **place, **arguments)
            assert all(word in result.message for word in words), result.message
        assert os.listdir("/var/lib/kvmops-backup/journal") == [] and vm.domain.snapshotListNames() == []
        assert fingerprint.definition(vm) == before

    refused(["ivshmem", "consistency: crash"], consistency="memory")
    refused(["ivshmem", "without memory"], "vm_snapshot", memory=True)

    vm.domain.suspend()
    refused(["paused", "virsh resume asleep"], consistency="memory")
    before = fingerprint.definition(vm)
    result = run_module("vm_backup", vm="asleep", path=str(target))
    assert fingerprint.definition(vm) == before
    assert result["consistency"] == "crash"
    assert any("paused" in warning for warning in result.warnings)
    assert vm.domain.info()[0] == libvirt.VIR_DOMAIN_PAUSED
    vm.domain.resume()
    vm.wait_for_marker(vm.last_marker().number + 1)

    vm.agent.run("sh", "-c", "(sleep 1; echo mem >/sys/power/state) >/dev/null 2>&1 &")
    wait_for("the guest to sleep", lambda: vm.domain.info()[0] == libvirt.VIR_DOMAIN_PMSUSPENDED, 120)
    for consistency in ("auto", "crash"):
        refused(["suspended to RAM", "virsh dompmwakeup asleep"], consistency=consistency)
    refused(["suspended to RAM", "virsh dompmwakeup asleep"], "vm_snapshot")


def test_a_vm_that_is_paused_because_its_file_system_is_full(lab, loop_fs, run_module):
    place = loop_fs("ext4", 100)
    vm = lab.create_vm("full", [Disk(path=make_image(place.path / "vda.qcow2", Disk()))])
    vm.wait_for_marker(1)
    filler = place.fill(0)
    vm.agent.run("sh", "-c", "dd if=/dev/urandom of=/disk/vda/much bs=1M count=40 >/dev/null 2>&1 &")
    wait_for("an I/O error", lambda: vm.domain.state() == [3, libvirt.VIR_DOMAIN_PAUSED_IOERROR], 120)
    for check_mode in (True, False):
        refused = run_module(
            "vm_backup", check_mode=check_mode, fails=True, vm="full", path=str(lab.path(f"t{check_mode}"))
        )
        assert str(place.path) in refused.message and "virsh resume full" in refused.message
    filler.unlink()
    result = run_module("vm_backup", vm="full", path=str(lab.path("backups")))
    assert result["consistency"] == "crash"
    assert any("I/O error" in warning and "virsh resume full" in warning for warning in result.warnings)
    assert vm.domain.state() == [3, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
    vm.domain.resume()
    vm.wait_for_marker(vm.last_marker().number + 1)
    assert vm.domain.snapshotListNames() == [] and os.listdir("/var/lib/kvmops-backup/journal") == []
    vm.remove()  # before its file system goes
