# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Templates and thin clones of VMs that are off: the mark, what is refused, and the three reasons."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import libvirt
import pytest
from lxml import etree

from ansible_collections.kvmops.backup.tests.integration.targets.vm_template import thin
from ansible_collections.kvmops.backup.tests.lab import truth
from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.modules import Ansible
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, make_image


def test_marking_twice_is_one_change_and_leaves_other_metadata_alone(lab: Lab, run_module: thin.Run) -> None:
    vm = lab.create_vm("base", start=False)
    vm.domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, "<x>1</x>", "other", "urn:other", 2)
    before = vm.xml(inactive=True)
    assert run_module("vm_template", vm="base", check_mode=True).changed
    assert vm.xml(inactive=True) == before
    first, second = run_module("vm_template", vm="base"), run_module("vm_template", vm="base")
    assert first.changed and not second.changed
    assert first["template"] == second["template"]
    assert first["template"] == {"uuid": vm.domain.UUIDString(), "name": "base", "digest": first["template"]["digest"]}
    assert len(first["template"]["digest"]) == 64
    gone = run_module("vm_template", vm="base", state="absent")
    assert gone.changed and vm.xml(inactive=True) == before
    assert not run_module("vm_template", vm="base", state="absent").changed


def test_a_clone_is_a_vm_of_its_own_on_the_disks_of_the_template(lab: Lab, run_module: thin.Run) -> None:
    nic = "<interface type='user'><mac address='52:54:00:11:22:33'/></interface>"
    base = lab.create_vm("base", [Disk(), Disk("raw")], extra_devices=nic, start=False)
    run_module("vm_template", vm="base")
    was = thin.contents(base)
    predicted = run_module("vm_thin_clone", template="base", name="web", check_mode=True)
    assert predicted.changed and [vm.name() for vm in lab.connection.listAllDomains()] == ["base"]
    done = run_module("vm_thin_clone", template="base", name="web")
    web = lab.adopt("web")
    assert done["disks"] == predicted["disks"]
    assert {disk["target"]: Path(disk["path"]) for disk in done["disks"]} == web.disks()
    assert all(path.parent == next(iter(base.disks().values())).parent for path in web.disks().values())
    assert [thin.chain(path)[1] for path in web.disks().values()] == [str(path) for path in base.disks().values()]
    assert thin.contents(web) == was
    mac = etree.fromstring(web.xml()).find("devices/interface/mac").get("address")
    assert mac != "52:54:00:11:22:33" and web.domain.UUIDString() != base.domain.UUIDString()
    assert "kvmops-template" not in web.xml()
    again = run_module("vm_thin_clone", template="base", name="web")
    assert not again.changed and (again["vm"], again["disks"]) == (done["vm"], done["disks"])
    data = make_image(lab.path("data") / "data.qcow2", Disk())
    more = f"<disk type='file'><driver name='qemu' type='qcow2'/><source file='{data}'/><target dev='vdx' bus='virtio'/></disk>"
    web.domain.attachDeviceFlags(more, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    assert not run_module("vm_thin_clone", template="base", name="web").changed
    elsewhere = lab.path("elsewhere")
    other = run_module("vm_thin_clone", template=base.domain.UUIDString(), name="db", path=str(elsewhere))
    lab.adopt("db")
    assert all(Path(disk["path"]).parent == elsewhere for disk in other["disks"])


def test_the_nvram_of_a_template_is_copied(lab: Lab, run_module: thin.Run) -> None:
    vm = lab.create_vm("base", start=False)
    loader = lab.path("firmware") / "code.fd"
    loader.write_bytes(bytes(1 << 20))
    loader.chmod(0o644)
    nvram = Path("/var/lib/libvirt/qemu/nvram")
    nvram.mkdir(parents=True, exist_ok=True)
    (nvram / "base_VARS.fd").write_bytes(b"variables" * 1024 + bytes(64 << 10))
    root = etree.fromstring(vm.xml(inactive=True))
    system = root.find("os")
    for tag in ("kernel", "initrd", "cmdline"):
        system.remove(system.find(tag))
    etree.SubElement(system, "loader", readonly="yes", type="pflash").text = str(loader)
    etree.SubElement(system, "nvram").text = str(nvram / "base_VARS.fd")
    lab.connection.defineXML(etree.tostring(root).decode())
    run_module("vm_template", vm="base")
    run_module("vm_thin_clone", template="base", name="web")
    web = lab.adopt("web")
    copied = Path(etree.fromstring(web.xml()).findtext("os/nvram"))
    assert copied == nvram / "web_VARS.fd"
    assert copied.read_bytes().rstrip(b"\0") == b"variables" * 1024
    left = nvram / "db_VARS.fd"
    left.write_bytes(b"of an earlier VM")
    try:
        for check_mode in (True, False):
            refused = run_module("vm_thin_clone", template="base", name="db", fails=True, check_mode=check_mode).message
            assert str(left) in refused and "Remove it" in refused
    finally:
        left.unlink()


def test_what_cannot_be_a_template_is_refused(lab: Lab, run_module: thin.Run) -> None:
    vm = lab.create_vm("running", agent=False, writer=False)
    assert "it is running" in run_module("vm_template", vm="running", fails=True).message
    vm.destroy()
    run_module("vm_snapshot", vm="running", snapshot="s")
    assert "1 snapshots" in run_module("vm_template", vm="running", fails=True).message
    run_module("vm_snapshot", vm="running", snapshot="all", state="absent")
    run_module("vm_template", vm="running")
    run_module("vm_thin_clone", template="running", name="web")
    lab.adopt("web")
    lab.create_vm("plain", start=False)
    text = run_module("vm_thin_clone", template="plain", name="x", fails=True).message
    assert "not marked as a template" in text
    text = run_module("vm_thin_clone", template="running", name="plain", fails=True).message
    assert "no clone of it" in text
    for wish in ("present", "reverted"):
        text = run_module("vm_snapshot", vm="running", snapshot="s", state=wish, fails=True).message
        assert "it is a template" in text


def test_a_template_that_clones_stand_on_stays_one(lab: Lab, run_module: thin.Run) -> None:
    base = thin.off_template(lab, run_module)
    archive = thin.backup(run_module, base, lab.path("backups"))
    web = thin.off_clone(lab, run_module, "web")
    text = run_module("vm_template", vm="base", state="absent", fails=True).message
    assert "web" in text and "stand on" in text
    thin.write(base.disks()["vda"], "qcow2", 9)
    text = run_module("vm_restore", source=archive, force=True, fails=True).message
    assert "cannot be replaced: web" in text
    thin.lose(web)
    assert run_module("vm_template", vm="base", state="absent").changed


def test_a_template_has_full_backups_only(lab: Lab, run_module: thin.Run) -> None:
    base = thin.off_template(lab, run_module)
    target = lab.path("backups")
    done = run_module("vm_backup", vm="base", path=str(target), mode="auto")
    assert (done["mode"], done["archive"]["incrementable"]) == ("full", False)
    assert "template" in done["reason"] and base.domain.snapshotNum(0) == 0
    text = run_module("vm_backup", vm="base", path=str(target), mode="incremental", fails=True).message
    assert "full backups only" in text
    (archive,) = run_module("backup_info", path=str(target))["archives"]
    assert archive["template"] is True and archive["requires"] is None
    text = run_module(
        "vm_restore", source=archive["path"], name="copy", start=True, path=str(lab.path("r")), fails=True
    )
    assert "is not started" in text.message
    run_module("vm_restore", source=archive["path"], name="copy", path=str(lab.directory / "r"))
    assert not run_module("vm_template", vm=lab.adopt("copy").name).changed
    assert thin.contents(lab.vm("copy")) == thin.contents(base)


def changed_by_one_byte(lab: Lab, run_module: thin.Run, base: thin.LabVm) -> None:
    path = base.disks()["vdb"]
    with open(path, "r+b") as file:
        file.seek(33 << 20)
        file.write(b"\x01")


def other_order(lab: Lab, run_module: thin.Run, base: thin.LabVm) -> None:
    xml = base.xml(inactive=True)
    one, two = (str(path) for path in base.disks().values())
    root = etree.fromstring(xml.replace(one, "@").replace(two, one).replace("@", two))
    drivers = root.findall("devices/disk/driver")
    drivers[0].set("type", "raw")
    drivers[1].set("type", "qcow2")
    lab.connection.defineXML(etree.tostring(root).decode())


def other_number(lab: Lab, run_module: thin.Run, base: thin.LabVm) -> None:
    base.domain.detachDeviceFlags(
        etree.tostring(etree.fromstring(base.xml()).findall("devices/disk")[1]).decode(),
        libvirt.VIR_DOMAIN_AFFECT_CONFIG,
    )


def gone(lab: Lab, run_module: thin.Run, base: thin.LabVm) -> None:
    thin.lose(base)


def unmarked(lab: Lab, run_module: thin.Run, base: thin.LabVm) -> None:
    run_module("vm_template", vm="base", state="absent")


def running(lab: Lab, run_module: thin.Run, base: thin.LabVm) -> None:
    base.domain.create()


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (gone, "no template"),
        (unmarked, "no template"),
        (changed_by_one_byte, "template differs"),
        (running, "template differs"),
        (other_order, "disks do not correspond"),
        (other_number, "disks do not correspond"),
    ],
)
def test_three_refusals_that_backup_info_names_before(lab: Lab, run_module: thin.Run, happens, reason: str) -> None:
    base = thin.off_template(lab, run_module)
    web = thin.off_clone(lab, run_module, "web")
    archive = thin.backup(run_module, web, lab.path("backups"))

    def told(refresh: bool = True) -> list[str]:
        (entry,) = run_module("backup_info", archive=archive, refresh=refresh)["archives"]
        return [text for text in entry["warnings"] if "template" in text or "disks do not" in text]

    assert told() == []
    thin.lose(web)
    happens(lab, run_module, base)
    if happens is changed_by_one_byte:
        assert "not checked here" in told(refresh=False)[0]
    (warning,) = told()
    assert warning.startswith(f"{reason}: ")
    here = sorted(str(path) for path in lab.directory.rglob("*"))
    for options in ({}, {"flatten": True}, {"path": str(lab.directory / "backups"), "name": "new"}):
        refused = run_module("vm_restore", source=archive, fails=True, **options)
        assert f"{reason}: " in refused.message and "Nothing has been touched" in refused.message
    assert sorted(str(path) for path in lab.directory.rglob("*")) == here
    assert "web" not in [vm.name() for vm in lab.connection.listAllDomains()]


def test_a_template_in_another_place_layout_and_under_another_name_will_do(lab: Lab, run_module: thin.Run) -> None:
    base = thin.off_template(lab, run_module)
    web = thin.off_clone(lab, run_module, "web")
    was, target = thin.contents(web), lab.path("backups")
    of_base, of_web = thin.backup(run_module, base, target), thin.backup(run_module, web, target)
    thin.lose(web)
    thin.lose(base)
    place = lab.path("moved")
    run_module("vm_restore", source=of_base, name="golden", path=str(place), disk_format="qcow2")
    golden = lab.adopt("golden")
    run_module("vm_restore", source=of_web)
    assert thin.contents(lab.vm("web")) == was
    for target_name, path in lab.vm("web").disks().items():
        assert thin.chain(path)[-1] == str(golden.disks()[target_name])
    (checked,) = run_module("backup_verify", archive=of_web, deep=True)["archives"]
    assert checked["ok"] and checked["coverage"] == "full"
    run_module("vm_restore", source=of_web, name="whole", flatten=True, path=str(lab.path("flat")))
    whole = lab.adopt("whole")
    assert thin.contents(whole) == was
    assert all(len(thin.chain(path)) == 1 for path in whole.disks().values())


def test_a_full_after_the_template_has_changed_and_an_increment_while_it_has_not(
    lab: Lab, run_module: thin.Run
) -> None:
    base = thin.off_template(lab, run_module)
    web = thin.off_clone(lab, run_module, "web")
    target = str(lab.path("backups"))
    assert run_module("vm_backup", vm="web", path=target, mode="auto")["mode"] == "full"
    thin.write(web.disks()["vda"], "qcow2", 0x77, offset=50 << 20)
    step = run_module("vm_backup", vm="web", path=target, mode="auto")
    assert step["mode"] == "incremental"
    (entry,) = run_module("backup_info", vm="web", path=target, refresh=True)["archives"]
    assert entry["incrementable"] is True and entry["requires"]["name"] == "base"
    was = thin.contents(web)
    changed_by_one_byte(lab, run_module, base)
    last = run_module("vm_backup", vm="web", path=target, mode="auto")
    assert last["mode"] == "full" and "template base is not what it was" in last["reason"]
    with open(base.disks()["vdb"], "r+b") as file:
        file.seek(33 << 20)
        file.write(b"\x02")
    thin.write(base.disks()["vdb"], "raw", 2, offset=(33 << 20), length=512)
    thin.write(base.disks()["vdb"], "raw", 0, offset=(33 << 20), length=512)
    run_module("vm_restore", source=entry["path"], name="copy", path=str(lab.path("copy")))
    assert thin.contents(lab.adopt("copy")) == was


def test_the_archive_of_a_template_that_clones_need_is_not_simply_deleted(lab: Lab, run_module: thin.Run) -> None:
    base = thin.off_template(lab, run_module)
    web = thin.off_clone(lab, run_module, "web")
    target = lab.path("backups")
    first, of_web = thin.backup(run_module, base, target), thin.backup(run_module, web, target)
    second = thin.backup(run_module, base, target)
    run_module("backup_archive", archive=first, state="absent")
    text = run_module("backup_archive", archive=second, state="absent", fails=True).message
    assert of_web in text and "need" in text
    run_module("backup_archive", archive=second, state="absent", force=True)


def test_a_vm_on_the_disk_of_one_that_is_no_template_is_stored_whole(lab: Lab, run_module: thin.Run) -> None:
    base = lab.create_vm("base", start=False)
    path = lab.path("own") / "web.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base.disks()["vda"]), str(path))
    web = lab.create_vm("web", [Disk(path=path)], start=False)
    thin.write(path, "qcow2", 5)
    was = thin.contents(web)
    done = run_module("vm_backup", vm="web", path=str(lab.path("backups")))
    assert any("no template" in text for text in done.warnings)
    thin.lose(web)
    thin.lose(base)
    run_module("vm_restore", source=done["archive"]["path"])
    assert thin.contents(lab.vm("web")) == was


@pytest.mark.parametrize(
    "spelled",
    ["{}", "file:{}", 'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}}}}'],
    ids=lambda s: s[:4],
)
def test_a_clone_made_by_hand_is_thin_too(lab: Lab, run_module: thin.Run, spelled: str) -> None:
    base = thin.off_template(lab, run_module, disks=(Disk(),))
    path = lab.path("own") / "web.qcow2"
    run(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"),
        *("-b", spelled.format(base.disks()["vda"]), str(path)),
    )
    web = lab.create_vm("web", [Disk(path=path), Disk()], start=False)
    thin.write(path, "qcow2", 5)
    was = thin.contents(web)
    done = run_module("vm_backup", vm="web", path=str(lab.path("backups")))
    (entry,) = run_module("backup_info", archive=done["archive"]["path"])["archives"]
    assert entry["requires"] == {"uuid": base.domain.UUIDString(), "name": "base"}
    thin.lose(web)
    run_module("vm_restore", source=done["archive"]["path"])
    assert thin.contents(lab.vm("web")) == was
    assert thin.chain(path)[-1] == str(base.disks()["vda"])


def test_the_way_back_after_a_template_was_changed(lab: Lab, run_module: thin.Run, ansible: Ansible) -> None:
    base = thin.off_template(lab, run_module)
    clones = [thin.off_clone(lab, run_module, name) for name in ("web", "db")]
    target = lab.path("backups")
    archives = [thin.backup(run_module, vm, target) for vm in (base, *clones)]
    was = {vm.name: thin.contents(vm) for vm in (base, *clones)}
    changed_by_one_byte(lab, run_module, base)
    thin.lose(clones[1])  # one is gone, one still stands on the changed template
    damaged = thin.contents(base)
    assert damaged != was["base"]

    ansible.playbook(
        "kvmops.backup.template_way_back",
        template_way_back_template="base",
        template_way_back_archive=archives[0],
        template_way_back_clones=archives[1:],
        template_way_back_become=False,
    )

    assert {name: thin.contents(lab.vm(name)) for name in was} == was
    assert not run_module("vm_template", vm="base").changed
    for name in ("web", "db"):
        assert [thin.chain(path)[-1] for path in lab.vm(name).disks().values()] == list(map(str, base.disks().values()))
    kept = {target: Path(f"{path}.changed") for target, path in base.disks().items()}
    assert {t: truth.content_sha256(p, thin.formats(base)[t]) for t, p in kept.items()} == damaged

    # what was kept must not be in the way of a second time after the template is removed, nor an archive of another VM
    run_module("vm_template", vm="web")
    other = thin.backup(run_module, clones[0], target)
    for archive, says in (
        (archives[0], "Disks that an earlier run has kept"),
        (other, "is the archive of web, not of base"),
    ):
        again = ansible.playbook(
            "kvmops.backup.template_way_back",
            template_way_back_template="base",
            template_way_back_archive=archive,
            template_way_back_become=False,
            fails=True,
        )
        assert says in again.output
    assert {name: thin.contents(lab.vm(name)) for name in was} == was


def test_what_a_killed_run_leaves_of_a_clone_is_gone_after_the_next(lab: Lab, run_module: thin.Run) -> None:
    base = thin.off_template(lab, run_module)
    here = sorted(str(path) for path in lab.directory.rglob("*"))
    for step in ("_swap", "_define"):
        program = (
            "import os, sys, ansible_collections.kvmops.backup.plugins.module_utils._restore.transaction as t;"
            f"t.Transaction.{step} = lambda *a: os._exit(9);"
            "from ansible_collections.kvmops.backup.plugins.module_utils._clones.thin_clone import thin_clone, CloneRequest;"
            "from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress;"
            "thin_clone(CloneRequest('base', 'web'), Context(Progress(), print))"
        )
        died = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
        assert died.returncode == 9, died.stderr
        assert sorted(str(path) for path in lab.directory.rglob("*")) != here
        assert run_module("vm_thin_clone", template="base", name="other", path="/nowhere", fails=True)
        assert sorted(str(path) for path in lab.directory.rglob("*")) == here
    run_module("vm_thin_clone", template="base", name="web")
    assert thin.contents(lab.adopt("web")) == thin.contents(base)


def test_a_template_on_a_template_comes_back_with_its_clone(lab: Lab, run_module: thin.Run) -> None:
    base = thin.off_template(lab, run_module)
    above = thin.off_clone(lab, run_module, "above")
    run_module("vm_template", vm="above")
    web = thin.off_clone(lab, run_module, "web", template="above")
    was = {vm.name: thin.contents(vm) for vm in (base, above, web)}
    target = lab.path("backups")
    archives = [thin.backup(run_module, vm, target) for vm in (base, above, web)]
    entries = run_module("backup_info", path=str(target))["archives"]
    assert {e["vm"]["name"]: (e["template"], (e["requires"] or {}).get("name")) for e in entries} == {
        "base": (True, None), "above": (True, "base"), "web": (False, "above"),
    }  # fmt: skip
    for vm in (web, above, base):
        thin.lose(vm)
    assert "no template" in run_module("vm_restore", source=archives[2], fails=True).message
    for archive in archives:
        run_module("vm_restore", source=archive)
    assert {name: thin.contents(lab.vm(name)) for name in was} == was
    assert [len(thin.chain(path)) for path in lab.vm("web").disks().values()] == [3, 3]


def test_a_template_that_runs_is_said_and_nothing_is_backed_up(
    lab: Lab, run_module: thin.Run, ansible: Ansible
) -> None:
    base = lab.create_vm("base", start=False)
    assert ansible.module("vm_template", vm="base").changed
    made = ansible.module("vm_thin_clone", template="base", name="web")
    assert made.changed and made["vm"]["name"] == lab.adopt("web").name
    target = lab.path("backups")
    base.domain.create()
    for name, why in (("base", "is a template and is running"), ("web", "its template base is running")):
        assert why in run_module("vm_backup", vm=name, path=str(target), fails=True).message
    assert list(target.iterdir()) == []
    again = run_module("vm_template", vm="base")
    assert not again.changed and any("is running" in text for text in again.warnings)
    assert "it is running" in run_module("vm_thin_clone", template="base", name="db", fails=True).message
    base.destroy()
    run_module("vm_backup", vm="web", path=str(target))


def test_the_way_back_of_a_template_that_got_a_snapshot(lab: Lab, run_module: thin.Run, ansible: Ansible) -> None:
    """Its disk is a volume now, too: other files are in the way of the restore than the VM names."""
    base = thin.off_template(lab, run_module, disks=(Disk(),))
    web = thin.off_clone(lab, run_module, "web")
    target = lab.path("backups")
    archives = [thin.backup(run_module, vm, target) for vm in (base, web)]
    was, path = thin.contents(web), base.disks()["vda"]
    lab.create_pool("templates", path.parent)
    root = etree.fromstring(base.xml(inactive=True))
    disk = root.find("devices/disk")
    disk.set("type", "volume")
    disk.replace(disk.find("source"), etree.Element("source", pool="templates", volume=path.name))
    lab.connection.defineXML(etree.tostring(root).decode())
    thin.write(path, "qcow2", 9)
    overlay = path.with_name("vda.state")
    state = f"<domainsnapshot><name>state</name><disks><disk name='vda'><source file='{overlay}'/></disk></disks></domainsnapshot>"
    base.domain.snapshotCreateXML(state, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY)
    assert base.disks()["vda"] == overlay
    told = run_module("vm_backup", vm="web", path=str(target), check_mode=True).warnings
    assert any("belongs to the VM base" in text and "has snapshots" in text for text in told)
    variables = {
        "template_way_back_template": "base",
        "template_way_back_archive": archives[0],
        "template_way_back_clones": archives[1:],
        "template_way_back_become": False,
    }
    base.domain.create()
    stopped = ansible.playbook("kvmops.backup.template_way_back", fails=True, **variables)
    assert "shut it down first" in stopped.output and base.is_running()
    base.destroy()
    ansible.playbook("kvmops.backup.template_way_back", **variables)
    assert thin.contents(lab.vm("web")) == was and base.domain.snapshotNum() == 0
    assert thin.chain(web.disks()["vda"])[-1] == str(path)
    assert sorted(each.name for each in path.parent.glob("*.changed")) == ["vda.qcow2.changed", "vda.state.changed"]


def test_a_template_that_changes_while_its_clone_is_restored(lab: Lab, run_module: thin.Run) -> None:
    base = thin.off_template(lab, run_module, disks=(Disk(),))
    archive = thin.backup(run_module, thin.off_clone(lab, run_module, "web"), lab.path("backups"))
    place = lab.path("restored")
    program = (
        "import subprocess, ansible_collections.kvmops.backup.plugins.module_utils._restore.transaction as t\n"
        "finish = t.Transaction._finish_files\n"
        "def finish_and_change(self):\n"
        f"    subprocess.run(['qemu-io', '-f', 'qcow2', '-c', 'write -P 99 1M 64k', {str(base.disks()['vda'])!r}], check=True)\n"
        "    return finish(self)\n"
        "t.Transaction._finish_files = finish_and_change\n"
        "from ansible_collections.kvmops.backup.plugins.module_utils._restore import request, run\n"
        "from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress\n"
        f"run.restore(request.RestoreRequest({archive!r}, name='new', path={str(place)!r}), Context(Progress(), print))\n"
    )
    died = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert "The template base: it was changed during the restore (template differs" in died.stderr
    assert list(place.iterdir()) == [] and "new" not in [vm.name() for vm in lab.connection.listAllDomains()]
