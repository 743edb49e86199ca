# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Removal plans against a model of files that stand on each other: nobody who stays sees a change."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _journal
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import Snapshot
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import removal
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.layers import (
    Layer,
    LayeredSnapshot,
    Layers,
    SnapshotDisk,
    SnapshotKind,
)

TEMPLATE, ORIGINAL = "/t/template", "/p/a"


class Model:
    """A VM of one disk: what each file holds itself, what it stands on, and what each snapshot has frozen."""

    def __init__(self, thin=False):
        self.holds = {ORIGINAL: {0: "original"}}
        self.backing = {ORIGINAL: TEMPLATE if thin else ""}
        if thin:
            self.holds[TEMPLATE], self.backing[TEMPLATE] = {9: "template"}, ""
        self.left = {}
        self.inside = {}  # file: {internal snapshot: what it saw}
        self.active = ORIGINAL
        self.states = []  # name, kind, file, overlay, parent
        self.current = ""
        self.written = self.made = 0

    def seen(self, path):
        below = self.seen(self.backing[path]) if self.backing[path] else {}
        return {**below, **self.holds[path]}

    def write(self, chance):
        self.written += 1
        self.holds[self.active][chance.randrange(4)] = f"w{self.written}"

    def _new_file(self, backing):
        self.made += 1
        path = f"/p/f{self.made}"
        self.holds[path], self.backing[path] = {}, backing
        return path

    def external(self):
        name, frozen = f"s{len(self.states)}", self.active
        self.active = self._new_file(frozen)
        self.states.append((name, SnapshotKind.EXTERNAL, frozen, self.active, self.current))
        self.current = name

    def internal(self):
        name = f"s{len(self.states)}"
        self.inside.setdefault(self.active, {})[name] = self.seen(self.active)
        self.states.append((name, SnapshotKind.INTERNAL, self.active, "", self.current))
        self.current = name

    def revert(self, name):
        _name, kind, path, _overlay, _parent = next(state for state in self.states if state[0] == name)
        if kind is SnapshotKind.EXTERNAL:
            old, self.active, self.current = self.active, self._new_file(path), name
            if old not in {state[2] for state in self.states}:
                del self.holds[old], self.backing[old]

    def layers(self, running=True):
        files = {
            path: Layer(path, "qcow2", backing, 100, tuple(self.inside.get(path, {})), 0)
            for path, backing in self.backing.items()
        }
        states = tuple(
            LayeredSnapshot(
                Snapshot(name, "", parent, name == self.current, kind is SnapshotKind.EXTERNAL, "no", "", "", number),
                (SnapshotDisk("vda", kind, path, overlay, f"<disk><source file='{path}'/></disk>"),),
            )
            for number, (name, kind, path, overlay, parent) in enumerate(self.states)
        )
        return Layers("u", "web", running, False, states, {"vda": self.active}, files, {}, self.left)

    def stays(self, gone):
        """What the VM and every snapshot that stays see."""
        found = {"now": self.seen(self.active)}
        for name, kind, path, _overlay, _parent in self.states:
            if name not in gone:
                found[name] = self.seen(path) if kind is SnapshotKind.EXTERNAL else self.inside[path][name]
        return found

    def apply(self, plan):
        for merge in plan.merges:
            run = [merge.top_path, *merge.between, merge.base_path]
            for above, below in zip(run, run[1:]):
                assert self.backing[above] == below
            for path in reversed(run[:-1]):
                self.holds[merge.base_path].update(self.holds[path])
            for child in merge.children:
                self.backing[child] = merge.base_path
            if merge.active:
                assert self.active == merge.top_path
                self.active = merge.base_path
        replaced = plan.replaced
        self.states = [
            (name, kind, replaced.get(path, (path,))[0], overlay, parent)
            for name, kind, path, overlay, parent in self.states
            if name not in plan.names
        ]
        for state in plan.inner:
            del self.inside[state.path][state.name]
        self.left = plan.left
        for path in plan.files:
            assert path != TEMPLATE
            del self.holds[path], self.backing[path]
            self.inside.pop(path, None)


@pytest.mark.parametrize("seed", range(400))
def test_nobody_who_stays_sees_a_change(seed):
    chance = random.Random(seed)
    model = Model(thin=seed % 3 == 0)
    for _dummy in range(chance.randrange(1, 12)):
        model.write(chance)
        act = chance.choice(["external", "external", "external", "internal", "revert"])
        if act == "revert" and model.states and model.active not in model.inside:
            model.revert(chance.choice(model.states)[0])
        elif act == "external":
            model.external()
        elif act == "internal" and seed % 2:
            model.internal()
    template = dict(model.holds.get(TEMPLATE, {}))
    names = [state[0] for state in model.states]
    gone = [name for name in names if chance.random() < 0.5] if chance.random() < 0.8 else names
    before = model.stays(gone)
    try:
        plan = removal.plan_removal(model.layers(running=seed % 5 == 0), gone)
    except RefusedError as error:
        assert "internal" in str(error)
        return
    assert _journal._decoded(removal.RemovalPlan, json.loads(json.dumps(plan, default=asdict))) == plan
    model.apply(plan)
    assert model.stays(()) == before
    assert model.holds.get(TEMPLATE, {}) == template
    model.apply(removal.plan_removal(model.layers(running=False), removal.ALL))
    assert model.stays(()) == {"now": before["now"]}
    assert model.holds.get(TEMPLATE, {}) == template
    assert set(model.holds) - {TEMPLATE} == {ORIGINAL}
    assert model.active == ORIGINAL


def chain(length, thin=False):
    model = Model(thin)
    for _dummy in range(length):
        model.write(random.Random(1))
        model.external()
    return model


def test_a_chain_is_one_merge_with_base_and_top():
    plan = removal.plan_removal(chain(4, thin=True).layers(), removal.ALL)
    (merge,) = plan.merges
    assert (merge.base_path, merge.active, len(merge.between)) == (ORIGINAL, True, 3)
    assert TEMPLATE not in plan.files and ORIGINAL not in plan.files
    assert plan.names == ("s3", "s2", "s1", "s0")


def test_an_internal_one_on_top_is_not_lost():
    model = chain(1)
    model.internal()
    with pytest.raises(RefusedError) as caught:
        removal.plan_removal(model.layers(), ["s0"])
    assert "s1" in str(caught.value) and "would be lost" in str(caught.value)
    assert removal.plan_removal(model.layers(), removal.ALL).inner == ()


def test_an_internal_one_in_the_base_stays():
    model = Model()
    model.internal()
    model.write(random.Random(1))
    model.external()
    plan = removal.plan_removal(model.layers(), ["s1"])
    assert [merge.base_path for merge in plan.merges] == [ORIGINAL]
    assert plan.inner == () and plan.kept == ("s0",)


def test_one_that_libvirt_does_not_list_is_not_lost_either():
    model = chain(1)
    model.inside[model.active] = {"mine": {}}
    with pytest.raises(RefusedError) as caught:
        removal.plan_removal(model.layers(), removal.ALL)
    assert "mine" in str(caught.value)


def test_a_file_of_another_vm():
    layers = chain(2).layers()
    with pytest.raises(RefusedError) as caught:
        removal.plan_removal(replace(layers, other_vms={ORIGINAL: "db01"}), ["s0"])
    assert "db01" in str(caught.value)
    removal.plan_removal(replace(layers, other_vms={ORIGINAL: "db01"}), ["s1"])


def test_a_layer_that_was_left_is_forgotten_with_its_record():
    """Without the record nothing tells it from a template: it stays, and the VM is right all the same."""
    model = chain(2)
    model.revert("s0")
    model.external()
    before = model.stays(["s0"])
    model.apply(removal.plan_removal(model.layers(), ["s0"]))
    assert model.left == {ORIGINAL: f"<disk><source file='{ORIGINAL}'/></disk>"}
    assert model.stays(()) == before
    model.left = {}
    model.apply(removal.plan_removal(model.layers(), removal.ALL))
    assert model.stays(()) == {"now": before["now"]} and model.backing[model.active] == ORIGINAL


def test_a_disk_that_became_smaller():
    layers = chain(1).layers()
    files = {**layers.files, ORIGINAL: replace(layers.files[ORIGINAL], virtual_size_bytes=200)}
    with pytest.raises(RefusedError) as caught:
        removal.plan_removal(replace(layers, files=files), removal.ALL)
    assert "smaller" in str(caught.value)


def test_a_disk_that_is_another_one_now():
    layers = chain(2).layers()
    other = Layer("/p/other", "qcow2", "", 100)
    layers = replace(layers, active={"vda": other.path}, files={**layers.files, other.path: other})
    plan = removal.plan_removal(layers, removal.ALL)
    assert (plan.merges, plan.files) == ((), ())
    assert "vda is another disk" in plan.notes[0].text and "former files stay:" in plan.notes[0].text


def test_disks_that_were_swapped():
    """Nobody shall take for left over what another disk of the VM stands on."""
    layers = chain(2).layers()
    other = Layer("/p/other", "qcow2", "", 100)
    active = {"vda": other.path, "vdb": layers.active["vda"]}
    plan = removal.plan_removal(replace(layers, active=active, files={**layers.files, other.path: other}), removal.ALL)
    assert (plan.merges, plan.files) == ((), ())
    (note,) = plan.notes
    assert "are in use as vdb now" in note.text and ORIGINAL in note.text


def test_a_branch_that_may_be_newer_than_the_disk():
    """Somebody has put the VM back on the image that an overlay stands on."""
    layers = chain(1).layers()
    overlay = layers.active["vda"]
    layers = replace(layers, active={"vda": ORIGINAL})
    assert removal.plan_removal(layers, removal.ALL).files == ()
    files = {**layers.files, ORIGINAL: replace(layers.files[ORIGINAL], modified_ns=5)}
    assert removal.plan_removal(replace(layers, files=files), removal.ALL).files == (overlay,)


def test_a_missing_file():
    layers = chain(2).layers()
    files = {path: layer for path, layer in layers.files.items() if path != ORIGINAL}
    with pytest.raises(RefusedError) as caught:
        removal.plan_removal(replace(layers, files=files), removal.ALL)
    assert ORIGINAL in str(caught.value)


def test_unknown_name():
    with pytest.raises(RefusedError) as caught:
        removal.plan_removal(chain(1).layers(), ["s7"])
    assert "s7" in str(caught.value)
