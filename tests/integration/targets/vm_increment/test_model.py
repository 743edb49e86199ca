# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Random histories of a VM against a simple model: what its disks held is all that the model knows (reliability S33).

The VM is off, so that its content changes only by what the history says. Seed and steps are printed;
KVMOPS_MODEL_STEPS (30) and KVMOPS_MODEL_SEED change them.
"""

from __future__ import annotations

import os
import random
import re

import libvirt
from lxml import etree

from ansible_collections.kvmops.backup.tests.integration.targets.vm_increment import chains
from ansible_collections.kvmops.backup.tests.lab import kills, modules, truth
from ansible_collections.kvmops.backup.tests.lab._run import LabError, run
from ansible_collections.kvmops.backup.tests.lab.vm import Disk

STEPS = int(os.environ.get("KVMOPS_MODEL_STEPS", "30"))
SEED = int(os.environ.get("KVMOPS_MODEL_SEED", "0")) or random.randrange(1, 2**32)
KILLED_AT = {"pwrite64": 40, "fsync": 12, "fdatasync": 12, "unlink": 6}
Content = dict[str, str]


class Model:
    """The VM, what its disks hold, what each snapshot and each point has of it."""

    def __init__(self, lab, chance):
        self.lab, self.chance, self.count = lab, chance, 0
        self.target = lab.path("backups")
        self.vm = lab.create_vm("model", [Disk(size_mib=8), Disk(size_mib=8)], start=False)
        self.states: dict[str, Content] = {}
        self.points: dict[str, dict[int, Content]] = {}
        self.doubtful: list[Content] = []  # what a killed run may have made a point of
        self.settled = True  # no run has been killed since the last change by a module
        self.content = self.now()

    def now(self) -> Content:
        return {target: truth.content_sha256(path, "qcow2") for target, path in self.vm.disks().items()}

    def module(self, name, **arguments):
        result = modules.run_module(name, vm="model", **arguments)
        self.settled = True
        return result

    def write(self):
        path = self.chance.choice(list(self.vm.disks().values()))
        for _each in range(self.chance.randint(1, 4)):
            at, length, byte = self.chance.randrange(7 * 1024), self.chance.randint(1, 1024), self.chance.randrange(256)
            run("qemu-io", "-f", "qcow2", "-c", f"write -P {byte} {at}k {length}k", str(path))
        self.content = self.now()

    def resize(self):
        path = self.chance.choice(list(self.vm.disks().values()))
        print("   ", path)
        run("qemu-img", "resize", "-q", "-f", "qcow2", str(path), "+64K")
        self.content = self.now()

    def snapshot(self):
        self.count += 1
        name = f"user-{self.count}"
        external = self.chance.random() < 0.5
        print("   ", name, "external" if external else "internal")
        if external:
            self.module("vm_snapshot", snapshot=name)
        else:
            self.vm.domain.snapshotCreateXML(f"<domainsnapshot><name>{name}</name></domainsnapshot>")
        self.states[name] = self.content

    def delete(self):
        names = self.there()
        if names:
            name = self.chance.choice(names)
            print("   ", name, "of", names)
            self.module("vm_snapshot", snapshot=name, state="absent")

    def revert(self):
        names = [name for name in self.there() if name in self.states]
        if names:
            name = self.chance.choice(names)
            print("   ", name, "of", names)
            self.module("vm_snapshot", snapshot=name, state="reverted")
            self.content = self.states[name]

    def there(self):
        return sorted(self.vm.domain.snapshotListNames())

    def backup(self):
        arguments = {"path": str(self.target), "mode": "auto", "increment_limit": self.chance.choice([0, 0, 4])}
        kind = self.chance.random()
        if kind < 0.1:
            arguments["mode"] = "full"
        elif kind < 0.2:
            arguments["increment_limit_deletes"] = "own"
        if self.chance.random() < 0.3:
            arguments["compress"] = True
        result = self.module("vm_backup", **arguments)
        print("   ", result["mode"], result["reason"], result["merged_snapshots"])
        self.points.setdefault(result["archive"]["path"], {})[result["point"]] = self.content
        if result["archive"]["incrementable"]:
            self.states[f"kvmops-{result['point']}"] = self.content

    def remove_inside(self, names):
        """As a refusal says: virsh snapshot-delete of internal snapshots on an overlay that a dead run has left."""
        for name in names:
            self.vm.domain.snapshotLookupByName(name).delete()

    def killed(self):
        name = self.chance.choice(list(KILLED_AT))
        arguments = {"vm": "model", "path": str(self.target), "mode": "auto"}
        kills.kill_at_system_call("vm_backup", arguments, name, self.chance.randint(1, KILLED_AT[name]))
        self.doubtful.append(self.content)
        self.settled = False

    def verify(self):
        for archive in modules.run_module("backup_verify", path=str(self.target))["archives"]:
            assert archive["ok"], archive

    def restore(self):
        if not self.points:
            return
        archive = self.chance.choice(sorted(self.points))
        point = self.chance.choice(sorted(self.points[archive]))
        modules.run_module("vm_restore", source=archive, point=point, name="copy", path=str(self.lab.path("restored")))
        copy = self.lab.adopt("copy")
        found = {target: truth.content_sha256(path, "qcow2") for target, path in copy.disks().items()}
        assert found == self.points[archive][point]
        copy.remove()
        run("rm", "-r", str(self.lab.directory / "restored"))

    def check(self):
        """Nothing that is done to the VM changes what its disks hold, unless that is what was asked for."""
        assert self.now() == self.content
        for state in self.vm.domain.listAllSnapshots():
            if state.getName().startswith("kvmops-") and not self.settled:
                continue  # the killed run may have been merging it: its content is no longer of use, its name goes next
            known = self.states.get(state.getName())
            root = etree.fromstring(state.getXMLDesc().encode())
            external = {disk.get("name") for disk in root.findall("disks/disk[@snapshot='external']")}
            for disk in root.findall("domain/devices/disk"):
                target = disk.find("target").get("dev")
                if known and target in external:
                    found = truth.content_sha256(disk.find("source").get("file"), "qcow2")
                    assert found == known[target], (state.getName(), target)


def attempt(model, step):
    """One step of the history, and what must hold after it; False if it was refused, as it may be."""
    try:
        step()
    except (LabError, libvirt.libvirtError) as error:
        print("    refused:", str(error).splitlines()[0][:200])
        inside = re.search(r"merge would lose internal snapshots in its overlay: ([\w, -]+)\.", str(error))
        if inside:
            model.remove_inside(inside.group(1).split(", "))
            return False
        # a merge that would lose an internal snapshot is refused, or a limit's merge of such a one failed
        if step.__name__ not in ("delete", "backup") or "would be lost" not in str(error):
            raise
        model.doubtful.append(model.content)  # a point that was published before its merge was refused
    if step.__name__ != "killed":
        model.check()
    return True


def test_model(lab):
    print("seed", SEED, "steps", STEPS)
    chance = random.Random(SEED)
    model = Model(lab, chance)
    weights = {
        model.write: 6, model.backup: 8, model.snapshot: 3, model.delete: 2, model.revert: 2, model.resize: 1,
        model.killed: 3, model.verify: 1, model.restore: 2,
    }  # fmt: skip
    for number in range(STEPS):
        step = chance.choices(list(weights), list(weights.values()))[0]
        print(number, step.__name__)
        attempt(model, step)
    if not attempt(model, model.backup):
        model.backup()
    model.check()
    model.verify()
    for archive in modules.run_module("backup_info", path=str(model.target))["archives"]:
        found = chains.digests_of_points(archive["path"], lab.path(f"out-{os.path.basename(archive['path'])}"))
        known = model.points.get(archive["path"], {})
        assert {point: found[point] for point in known} == known
        assert all(content in model.doubtful for point, content in found.items() if point not in known)
