# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of a dead run's revert, by how far it had come and by what the VM is then."""

from __future__ import annotations

from dataclasses import replace

import libvirt
import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import monitor, snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import revert
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.revert import NewLayer, RevertPhase, RevertPlan

RUNNING, PAUSED, OFF = libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_SHUTOFF
BOOTED, UNPAUSED = libvirt.VIR_DOMAIN_RUNNING_BOOTED, libvirt.VIR_DOMAIN_RUNNING_UNPAUSED
BY_USER, BY_MIGRATION = libvirt.VIR_DOMAIN_PAUSED_USER, libvirt.VIR_DOMAIN_PAUSED_MIGRATION
COPY = NewLayer("vda", "/p/a", "qcow2", "/p/a.reverted-7.qcow2")


def definition(path, title=""):
    return (
        f"<domain><name>web</name><title>{title}</title><devices><disk><source file='{path}'/><target dev='vda'/></disk>"
        "</devices></domain>"
    )


def state(path, ran="running"):
    inactive = definition(path, "then").replace("domain>", "inactiveDomain>").replace("web", "old")
    return f"<domainsnapshot><name>s</name><state>{ran}</state>{definition(path)}{inactive}</domainsnapshot>"


def plan(fresh=(COPY,), internal=True, **changes):
    path = fresh[0].path if fresh else "/p/a"
    made = RevertPlan(
        vm_uuid="u", vm_name="web", name="s", internal=internal, fresh=fresh, actives=("/p/a",),
        definition="" if internal else definition(path, "then"), former_definition=definition("/p/a", "now"),
        state_xml=state(path), former_xml=state("/p/a"), former_current="", memory_path="" if internal else "/p/memory",
        discarded=("/p/x",),
    )  # fmt: skip
    return replace(made, **changes)


def _file(xml):
    return _xml.parse(xml, "").find("devices/disk/source").get("file")


class FakeJournal:
    """Facts, as recorded."""

    def __init__(self, plan, phase):
        self.facts = revert.RevertFacts(plan, phase)

    def record(self, **facts):
        self.facts = replace(self.facts, **facts)


class FakeVm:
    """A VM and its libvirt; ``done`` is what was called of what changes it."""

    def __init__(self, monkeypatch, now, runs_on="/p/a", kept=None):
        self.now, self.runs_on, self.kept, self.done = now, runs_on, kept or definition("/p/a", "now"), []
        self.current, self.status = (), "running"
        monkeypatch.setattr(revert, "_active_images", self.images)
        monkeypatch.setattr(snapshots, "redefine", lambda _vm, _xml, *, current: self.done.append(f"current {current}"))
        monkeypatch.setattr(
            snapshots, "tree", lambda _vm: [snapshots.describe(each, current=True) for each in self.current]
        )
        monkeypatch.setattr(monitor, "execute", lambda _vm, _command: {"status": self.status})
        monkeypatch.setattr(revert._files, "remove", lambda path: self.done.append(f"remove {path}"))
        monkeypatch.setattr(revert.image_layers, "has_data", lambda _path: True)

    def images(self, _conn, _vm, *, live):
        return ({self.runs_on} if self.isActive() else set()) if live else {_file(self.kept)}

    def getURI(self):
        return "test:///default"

    def isActive(self):
        return self.now[0] != OFF

    def hasManagedSaveImage(self, _flags):
        return False

    def state(self):
        return list(self.now)

    def XMLDesc(self, _flags):
        return self.kept

    def resume(self):
        self.done.append("resume")

    def destroy(self):
        self.done.append("destroy")

    def defineXML(self, xml):
        self.kept = xml
        self.done.append("define")


def resumed(vm, phase, of):
    journal = FakeJournal(of, phase)
    return revert.resume(vm, vm, journal), vm.done, journal.facts.phase


@pytest.mark.parametrize("fresh", [(COPY,), ()])
@pytest.mark.parametrize(("status", "resumes"), [("prelaunch", ["resume"]), ("running", []), ("paused", [])])
def test_what_libvirt_did_not_come_to_is_done(monkeypatch, fresh, status, resumes):
    vm = FakeVm(monkeypatch, (PAUSED, BY_USER), runs_on=fresh[0].path if fresh else "/p/a")
    vm.status = status
    text, done, phase = resumed(vm, RevertPhase.STOPPED, plan(fresh))
    assert "was finished" in text and phase is RevertPhase.ENDED
    assert done == [*resumes, "current True", "define", "remove /p/x"]
    assert "<title>then" in vm.kept and "<name>web<" in vm.kept and vm.runs_on in vm.kept


@pytest.mark.parametrize("fresh", [(COPY,), ()])
@pytest.mark.parametrize("status", ["prelaunch", "paused"])
def test_what_was_changed_since_stays(monkeypatch, fresh, status):
    """libvirt 9 writes the definition last, libvirt 11 before it starts the CPUs."""
    path = fresh[0].path if fresh else "/p/a"
    vm = FakeVm(monkeypatch, (PAUSED, BY_USER), runs_on=path, kept=definition(path, "changed since"))
    vm.status, vm.current = status, ["<domainsnapshot><name>since</name></domainsnapshot>"]
    assert resumed(vm, RevertPhase.STOPPED, plan(fresh))[1] == [*["resume"][: status == "prelaunch"], "remove /p/x"]


def test_the_snapshot_is_the_current_one_in_place_of_the_former(monkeypatch):
    vm = FakeVm(monkeypatch, (RUNNING, UNPAUSED), runs_on=COPY.path, kept=definition(COPY.path, "then"))
    before = "<domainsnapshot><name>before</name></domainsnapshot>"
    vm.current = [before]
    assert resumed(vm, RevertPhase.STOPPED, plan(former_current=before))[1] == ["current True", "remove /p/x"]


def test_a_guest_that_was_paused_then_stays_paused(monkeypatch):
    vm = FakeVm(monkeypatch, (PAUSED, BY_USER), runs_on=COPY.path)
    vm.status = "prelaunch"
    assert "resume" not in resumed(vm, RevertPhase.STOPPED, plan(state_xml=state(COPY.path, "paused")))[1]


@pytest.mark.parametrize(("now", "resumes"), [((PAUSED, BY_MIGRATION), True), ((PAUSED, BY_USER), False)])
def test_memory_that_was_loaded_runs(monkeypatch, now, resumes):
    of = plan(internal=False)
    vm = FakeVm(monkeypatch, now, runs_on=COPY.path, kept=of.definition)
    text, done, _phase = resumed(vm, RevertPhase.COMMITTED, of)
    assert "was finished" in text and ("resume" in done) == resumes and "define" not in done


def test_a_definition_on_the_former_images_is_not_kept_for_a_change_since(monkeypatch):
    vm = FakeVm(monkeypatch, (RUNNING, UNPAUSED), runs_on=COPY.path, kept=definition("/p/a", "changed since"))
    assert "define" in resumed(vm, RevertPhase.STOPPED, plan())[1] and vm.kept.count(COPY.path) == 1


@pytest.mark.parametrize("runs_on", ["/p/a", "/p/plugged"])
def test_a_vm_that_was_never_stopped_is_what_it_was(monkeypatch, runs_on):
    vm = FakeVm(monkeypatch, (RUNNING, UNPAUSED), runs_on=runs_on)
    text, done, _phase = resumed(vm, RevertPhase.COMMITTED, plan(()))
    assert "was taken back" in text and done == []


def test_a_vm_that_somebody_has_started_since_is_not_said_to_be_reverted(monkeypatch):
    vm = FakeVm(monkeypatch, (RUNNING, BOOTED))
    text, done, _phase = resumed(vm, RevertPhase.STOPPED, plan(()))
    assert "was cut off" in text and done == ["remove /p/x"]


@pytest.mark.parametrize("of", [plan(), plan(()), plan(internal=False)])
@pytest.mark.parametrize("now", [(OFF, 0), (PAUSED, BY_USER), (PAUSED, BY_MIGRATION), (RUNNING, BOOTED)])
def test_a_revert_that_had_ended_touches_no_vm(monkeypatch, of, now):
    vm = FakeVm(monkeypatch, now, runs_on=COPY.path)
    assert resumed(vm, RevertPhase.ENDED, of)[1] == ["remove /p/x"]
    assert revert.resume(vm, None, FakeJournal(of, RevertPhase.ENDED)) and vm.done == ["remove /p/x"]


def test_one_that_is_off_is_reverted_and_then_nobodys_business(monkeypatch):
    vm, journal = FakeVm(monkeypatch, (OFF, 0)), FakeJournal(plan(()), RevertPhase.COMMITTED)
    monkeypatch.setattr(snapshots, "revert_internal", lambda _vm, _name: vm.done.append(journal.facts.phase))
    assert "was finished" in revert.resume(vm, vm, journal)
    assert vm.done == [RevertPhase.STOPPED, "remove /p/x"] and journal.facts.phase is RevertPhase.ENDED
