# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A restore killed at any moment: the old VM byte by byte, or the new one; nothing half-defined; the next run clears up.

Every rename is tried, of the other system calls the first and the last; ``KVMOPS_SWEEP=all`` tries every one.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import libvirt
import pytest
from lxml import etree

from ansible_collections.kvmops.backup.tests.lab import daemons, kills, truth
from ansible_collections.kvmops.backup.tests.lab._run import run, wait_for
from ansible_collections.kvmops.backup.tests.lab.modules import ModuleResult, module_argv, module_result
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, LabVm

Run = Callable[..., ModuleResult]
SYSTEM_CALLS = ("renameat2", "fsync", "fdatasync", "unlink", "ftruncate")
SECURE = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE

CHECKPOINTS = ("monday", "tuesday")

#: Every call that changes something, in this order; the second definition is the commit.
CALLS = [
    ("virDomain.undefineFlags", 1),
    ("virConnect.defineXML", 1),
    ("virDomainSnapshot.delete", 1),
    ("virDomainSnapshot.delete", 2),
    ("virDomain.snapshotCreateXML", 1),
    ("virDomain.snapshotCreateXML", 2),
    ("virConnect.defineXML", 2),
    ("virStoragePool.refresh", 1),
]
SCENES = ["same-vm", "another-vm-of-that-name", "with-snapshots", "flattened"]
SWTPM = Path("/var/lib/libvirt/swtpm")
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def redefine(domain: libvirt.virDomain, states: list[str]) -> None:
    """Gives a VM snapshots, the last of them the current one."""
    for xml in states:
        current = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if xml is states[-1] else 0
        domain.snapshotCreateXML(xml, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | current)


def redefine_checkpoints(domain: libvirt.virDomain) -> None:
    """Gives a VM checkpoints, each the parent of the next."""
    parent = ""
    for number, name in enumerate(CHECKPOINTS):
        domain.checkpointCreateXML(
            f"<domaincheckpoint><name>{name}</name>{parent}<creationTime>{1700000000 + number}</creationTime>"
            f"<disks><disk name='vda' checkpoint='bitmap' bitmap='{name}'/><disk name='vdb' checkpoint='no'/></disks>"
            f"{domain.XMLDesc(SECURE)}</domaincheckpoint>",
            libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE,
        )
        parent = f"<parent><name>{name}</name></parent>"


@dataclass
class Scene:
    """An archive, and a VM that a restore of it with `force` replaces. `reset` makes that VM anew, exactly as it was."""

    lab: Lab
    archive: str
    name: str
    at_point: dict[str, str]
    old_xml: str
    old_files: dict[Path, bytes]
    states: list[str]
    new_states: list[str]
    options: dict[str, Any]
    tpm: Path | None = None  # the directory that holds the state of its TPM

    def reset(self) -> None:
        """The old VM as it was."""
        for domain in self.lab.connection.listAllDomains():
            LabVm(self.lab, domain.name()).remove()
        for path in next(iter(self.old_files)).parent.iterdir():
            path.unlink()
        for path, content in self.old_files.items():
            path.write_bytes(content)
        if self.tpm is not None:
            write_tpm(self.tpm, "old")
        domain = self.lab.connection.defineXML(self.old_xml)
        redefine(domain, self.states)
        redefine_checkpoints(domain)
        domain.setAutostart(1)
        self.lab.adopt(domain.name())

    def world(self) -> dict[str, Any]:
        """All definitions with their snapshots and checkpoints, all files, the journal."""
        vms = {}
        for domain in self.lab.connection.listAllDomains():
            states = {
                each.getName(): (
                    each.getXMLDesc(1),
                    each.isCurrent(),
                    [child.getName() for child in each.listAllChildren()],
                )
                for each in domain.listAllSnapshots()
            }
            checkpoints = {each.getName(): each.getXMLDesc(0) for each in domain.listAllCheckpoints()}
            vms[domain.UUIDString()] = (domain.XMLDesc(SECURE), domain.autostart(), states, checkpoints)
        files = {
            path: path.read_bytes()
            for path in (*self.lab.directory.rglob("*"), *SWTPM.rglob("*"))
            if path.is_file() and path != Path(self.archive)
        }
        return {"vms": vms, "files": files, "journal": os.listdir("/var/lib/kvmops-backup/journal")}

    def is_new(self) -> bool:
        """The restored VM stands, alone and whole."""
        vm = LabVm(self.lab, self.name)
        found = {
            target: truth.content_sha256(path, "raw" if path.suffix == ".raw" else "qcow2")
            for target, path in vm.disks().items()
        }
        left = [path for path in (*self.lab.directory.rglob("*"), *SWTPM.rglob("*")) if "kvmops" in path.name]
        if self.tpm is not None and (self.tpm / "tpm2" / "tpm2-00.permall").read_text() != "at the point":
            return False
        single = len(self.lab.connection.listAllDomains()) == 1
        known = sorted(vm.domain.snapshotListNames()), vm.domain.listAllCheckpoints()
        return found == self.at_point and not left and single and known == (self.new_states, [])


def scene(lab: Lab, run_module: Run, kind: str) -> Scene:
    images = [Disk("qcow2", 16, ext4=False), Disk("raw", 16, ext4=False)]
    vm = lab.create_vm("old", images, extra_devices=TPM if kind == "with-tpm" else "", start=False)
    tpm = SWTPM / vm.domain.UUIDString() if kind == "with-tpm" else None
    if tpm is not None:
        write_tpm(tpm, "at the point")
    disks = vm.disks()
    lab.create_pool("killed-pool", disks["vda"].parent)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 1M", str(disks["vda"]))
    run("qemu-io", "-f", "raw", "-c", "write -P 2 1M 1M", str(disks["vdb"]))
    at_point = {target: truth.content_sha256(path, path.suffix[1:]) for target, path in disks.items()}
    # no memory of the libvirt kind: bookkeeping only, the disks are raw too
    states = []
    for name in ("first", "second"):
        target = disks["vda"].parent / f"{name}.none"
        states.append(
            f"<domainsnapshot><name>{name}</name><state>shutoff</state><creationTime>{1700000000 + len(states)}</creationTime>"
            + (f"<parent><name>{states and 'first'}</name></parent>" if states else "")
            + f"<memory snapshot='no'/><disks><disk name='vda' snapshot='external'><source file='{target}'/></disk>"
            f"<disk name='vdb' snapshot='no'/></disks>{LabVm(lab, 'old').xml(inactive=True)}</domainsnapshot>"
        )
    if kind in ("with-snapshots", "flattened"):
        redefine(vm.domain, states)
    new_states = ["first", "second"] if kind == "with-snapshots" else []
    options = {"flatten": True} if kind == "flattened" else {}
    archive = str(run_module("vm_backup", vm="old", path=str(lab.path("backups")))["archive"]["path"])
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 2M 1M", str(disks["vda"]))
    run("qemu-io", "-f", "raw", "-c", "write -P 4 2M 1M", str(disks["vdb"]))
    xml, uuid = vm.xml(inactive=True), vm.domain.UUIDString()
    if kind == "another-vm-of-that-name":
        vm.remove()
        xml = xml.replace(uuid, "11111111-2222-4333-8444-555555555555")
        lab.connection.defineXML(xml)
    states = [state.replace(uuid, domain_uuid(xml)) for state in states]
    files = {path: path.read_bytes() for path in disks.values()}
    found = Scene(lab, archive, "old", at_point, xml, files, states, new_states, options, tpm)
    found.reset()
    return found


def write_tpm(directory: Path, content: str) -> None:
    """The state of a TPM, as swtpm would have left it."""
    (directory / "tpm2").mkdir(parents=True, exist_ok=True)
    (directory / "tpm2" / "tpm2-00.permall").write_text(content)


def domain_uuid(xml: str) -> str:
    """The uuid in a definition."""
    return str(etree.fromstring(xml).findtext("uuid"))


def arguments(place: Scene) -> dict[str, Any]:
    """Those of the restore that is killed."""
    return {"source": place.archive, "force": True, **place.options}


def settle_and_judge(place: Scene, before: dict[str, Any], where: str) -> str:
    """What the next run (without force) finds and leaves: the old VM as it was, or the new one."""
    argv = module_argv("vm_restore", {"source": place.archive, **place.options})
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    result = module_result("vm_restore", done.stdout, done.stderr)
    if result.failed:
        assert "exists" in result.message, f"{where}: {result.message}"
        after = place.world()
        assert after["vms"] == before["vms"], (where, result.warnings)
        assert after["files"] == before["files"], (where, sorted(set(after["files"]) ^ set(before["files"])))
        assert after["journal"] == [], where
        return "old"
    settled = any("put right" in text for text in result.warnings)
    assert result.changed == settled and place.is_new() and os.listdir("/var/lib/kvmops-backup/journal") == [], where
    return "new"


@pytest.mark.parametrize("kind", [*SCENES, "with-tpm"])
def test_killed_at_system_calls(lab: Lab, run_module: Run, kind: str) -> None:
    place = scene(lab, run_module, kind)
    before = place.world()
    counted = kills.count_system_calls("vm_restore", arguments(place), SYSTEM_CALLS)
    assert place.is_new()
    outcomes = []
    for name, number in counted.items():
        assert number, name
        if name == "renameat2" or os.environ.get("KVMOPS_SWEEP") == "all":
            wanted = list(range(1, number + 1))
        else:
            wanted = [number] if kind != "same-vm" else sorted({1, number})
        for nth in wanted:
            place.reset()
            done = kills.kill_at_system_call("vm_restore", arguments(place), name, nth)
            assert done.returncode != 0, (name, nth)
            outcomes.append(settle_and_judge(place, before, f"{name} {nth}"))
    assert {"old", "new"} == set(outcomes), outcomes


@pytest.mark.parametrize("kind", SCENES)
def test_killed_around_libvirt_calls(lab: Lab, run_module: Run, kind: str) -> None:
    place = scene(lab, run_module, kind)
    before = place.world()
    outcomes = []
    for method, number in CALLS:
        if method == ("virDomainSnapshot.delete" if kind == "another-vm-of-that-name" else "virDomain.undefineFlags"):
            continue  # undefining takes the snapshots with it
        if method == "virDomain.snapshotCreateXML" and kind != "with-snapshots":
            continue
        for when in ("before", "after"):
            place.reset()
            done = kills.kill_around_libvirt_call("vm_restore", arguments(place), method, when, number)
            assert done.returncode == -9, (method, when, done.stdout, done.stderr)
            outcome = settle_and_judge(place, before, f"{when} {method} {number}")
            committed = method.endswith(".refresh") or (method, number, when) == ("virConnect.defineXML", 2, "after")
            assert outcome == ("new" if committed else "old"), (method, number, when)
            outcomes.append(outcome)
    assert outcomes


#: What takes a restore back, once the old VM's definition is there again; in place libvirt keeps autostart.
TAKES_BACK = [
    ("virConnect.defineXML", "after"),
    ("virDomain.snapshotCreateXML", "after"),
    ("virDomain.checkpointCreateXML", "before"),
    ("virDomain.setAutostart", "before"),
]


@pytest.mark.parametrize(
    ("kind", "dies", "takes_back"),
    [
        ("with-snapshots", ("virDomain.snapshotCreateXML", "after", 2), TAKES_BACK[:3]),
        ("another-vm-of-that-name", ("virConnect.defineXML", "before"), TAKES_BACK),
    ],
)
def test_killed_again_while_it_is_taken_back(
    lab: Lab, run_module: Run, kind: str, dies: Sequence[Any], takes_back: Sequence[Any]
) -> None:
    """The journal has the only copy of what the old VM was; whatever run ends it, nothing of that is lost."""
    place = scene(lab, run_module, kind)
    before = place.world()
    kills.kill_around_libvirt_call("vm_restore", arguments(place), *dies)
    for step in takes_back:
        assert place.world()["vms"] != before["vms"], step
        done = kills.kill_around_libvirt_call("vm_restore", {"source": place.archive}, *step)
        assert done.returncode == -9, (step, done.stdout, done.stderr)
    assert settle_and_judge(place, before, kind) == "old"


def test_libvirtd_killed_in_undefining_the_old_vm(lab: Lab, run_module: Run) -> None:
    """It forgets snapshots in no particular order, then checkpoints and autostart, and the definition last."""
    place = scene(lab, run_module, "another-vm-of-that-name")
    before = place.world()
    states = [f"/var/lib/libvirt/qemu/snapshot/old/{name}.xml" for name in ("first", "second")]
    for paths in (states, ["/etc/libvirt/qemu/old.xml"]):
        place.reset()
        with daemons.killed_in_unlink_of(paths):
            run_module("vm_restore", fails=True, **arguments(place))
            wait_for("libvirtd to die", lambda: daemons.libvirtd_pid() is None, 60)
        daemons.start()
        uuids = [domain.UUIDString() for domain in lab.connection.listAllDomains()]
        assert uuids == [domain_uuid(place.old_xml)] and place.world()["vms"] != before["vms"], paths
        assert settle_and_judge(place, before, str(paths)) == "old"


def test_check_mode_reports_a_killed_restore_and_leaves_it(lab: Lab, run_module: Run) -> None:
    place = scene(lab, run_module, "same-vm")
    kills.kill_around_libvirt_call("vm_restore", arguments(place), "virConnect.defineXML", "before")
    before = place.world()
    assert len(before["journal"]) == 1
    said = run_module("vm_restore", source=place.archive, name="copy", path=str(lab.path("x")), check_mode=True)
    assert any("interrupted" in warning for warning in said.warnings)
    assert place.world() == before
    done = run_module("vm_restore", source=place.archive, name="copy", path=str(lab.directory / "x"))
    lab.adopt("copy")
    assert any("was taken back" in warning for warning in done.warnings) and place.world()["journal"] == []


def test_what_an_interrupted_restore_wrote_to_is_missing(lab: Lab, run_module: Run) -> None:
    place = scene(lab, run_module, "same-vm")
    kills.kill_around_libvirt_call("vm_restore", arguments(place), "virConnect.defineXML", "before")
    before = place.world()
    disks = next(iter(place.old_files)).parent
    disks.rename(lab.directory / "unmounted")
    done = run_module("vm_restore", source=place.archive, name="copy", path=str(lab.path("x")))
    lab.adopt("copy")
    assert any(
        "could not be taken back" in warning and "Mount what belongs there" in warning for warning in done.warnings
    )
    (lab.directory / "unmounted").rename(disks)
    assert place.world()["journal"] == before["journal"]
    run_module("vm_restore", source=place.archive, fails=True)
    assert {path: path.read_bytes() for path in place.old_files} == place.old_files and place.world()["journal"] == []


@pytest.mark.parametrize(
    ("call", "error"),
    [("pwrite64", "ENOSPC"), ("fsync", "EIO"), ("renameat2", "EIO"), ("fdatasync", "ENOSPC"), ("unlink", "EIO")],
)
def test_a_failing_system_call_is_an_error_that_leaves_the_old_vm(
    lab: Lab, run_module: Run, call: str, error: str
) -> None:
    place = scene(lab, run_module, "same-vm")
    before = place.world()
    outcomes = []
    for nth in (1, 3, 5):
        place.reset()
        tracer = ["strace", "-f", "-o", "/dev/null", "-e", f"inject={call}:error={error}:when={nth}"]
        argv = [*tracer, *module_argv("vm_restore", arguments(place))]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        result = module_result("vm_restore", done.stdout, done.stderr)  # never a traceback
        if not result.failed:
            assert place.is_new(), (call, nth)  # an error that does not matter, as of a status file
            continue
        assert result.message, (call, nth)
        left = place.world()
        outcomes.append(settle_and_judge(place, before, f"{call} {nth}"))
        if outcomes[-1] == "old" and call != "unlink":
            assert left == before, (call, nth)  # at once, not only after the next run
    assert "old" in outcomes or call == "unlink"
