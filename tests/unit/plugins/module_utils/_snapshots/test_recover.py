# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pure parts of recovery: definitions, journals' facts, files that may be removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _locks, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._errors import CancelledError
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import former, overlays, recover, way_back
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.situation import Seen

OVERLAY = overlays.Overlay("vda", "/p/a.raw", "raw", "/p/a.ov")
AFTER = (
    "<domain><devices><disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='/p/a.ov'/>"
    "<backingStore type='file'><format type='raw'/><source file='/p/a.raw'/></backingStore><target dev='vda' bus='virtio'/></disk>"
    "<disk type='file' device='disk'><source file='/p/b.ov'/><target dev='vdb'/></disk></devices></domain>"
)


def plan(**changes):
    values = {
        "vm_uuid": "u", "vm_name": "web", "name": "s", "description": "d", "overlays": (OVERLAY,),
        "excluded_targets": ("sda",), "memory_path": "", "quiesce": True, **changes,
    }  # fmt: skip
    return overlays.SnapshotPlan(**values)


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        (
            "<disk type='volume' device='disk'><source pool='p' volume='a.raw'/><target dev='vda'/></disk>",
            "<disk type='volume' device='disk'><driver name='qemu' type='raw' cache='none'/><source pool='p' volume='a.raw'/>",
        ),
        (
            "<disk type='file'><source file='/p/a.raw'/><backingStore/><target dev='vda'/></disk>",
            "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='/p/a.raw'/><backingStore/>",
        ),
        (
            "",
            "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='/p/a.raw'/>",
        ),
    ],
)
def test_former_source(disk, expected):
    rest = "<target dev='vda' bus='virtio'/></disk><disk type='file' device='disk'><source file='/p/b.ov'/>"
    rest += "<target dev='vdb'/></disk></devices></domain>"
    found = former.with_former_source(AFTER, OVERLAY, disk)
    assert found.replace('"', "'") == f"<domain><devices>{expected}{rest}"


def test_former_source_twice_is_the_same():
    disk = "<disk type='file'><source file='/p/a.raw'/><target dev='vda'/></disk>"
    once = former.with_former_source(AFTER, OVERLAY, disk)
    assert former.with_former_source(once, OVERLAY, disk) == once


def test_facts_survive_the_journal():
    owner = overlays.Owner(64055, 64055, 0o600, (("trusted.libvirt.security.dac", "+0:+0"),))
    formers = {"vda": overlays.Former("<disk/>", owner)}
    facts = json.loads(json.dumps(overlays.to_facts(plan(), formers)))
    assert overlays.plan_of(facts) == plan()
    assert overlays.formers_of(facts) == formers


def test_pending_names_the_dead_run_and_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    journal = Journal.open(overlays.journal_key("u"), "backup", {})
    journal.record(snapshot=overlays.to_facts(plan(), {}))
    assert recover.pending("u") == []  # it is alive
    journal.close()
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "journal").iterdir())
    (text,) = recover.pending("u")
    assert f"process {os.getpid()}" in text and "snapshot s of web" in text
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "journal").iterdir()) == before
    assert recover.pending("other") == []


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (("/p/c", "/p/b", "/p/a", "/p/template"), Seen.OVERLAY),
        (("/p/c", "/p/b"), Seen.OVERLAY),
        (("/p/c",), Seen.OVERLAY),
        (("/p/c", "/p/a"), Seen.OVERLAY),  # what REJOIN makes
        (("/p/c", "/p/other", "/p/a"), Seen.OTHER),
        (("/p/b", "/p/a"), Seen.OTHER),
        (("/p/a", "/p/template"), Seen.BASE),
        ((), Seen.NONE),
    ],
)
def test_what_a_view_has_of_several_layers(chain, expected):
    assert way_back._seen(chain, overlays.Overlay("vda", "/p/a", "qcow2", "/p/c", ("/p/b",))) is expected


def test_layers_in_between_survive_the_journal():
    several = plan(overlays=(overlays.Overlay("vda", "/p/a", "qcow2", "/p/c", ("/p/b",)),), expendable=("i",))
    assert overlays.plan_of(json.loads(json.dumps(overlays.to_facts(several, {})))) == several
    old = overlays.to_facts(plan(), {})
    del old["expendable"], old["overlays"][0]["between"]
    assert overlays.plan_of(old) == plan()


class FakeDomain:
    """As much of a VM as the lock needs."""

    def UUIDString(self):
        return "u"

    def name(self):
        return "web01"


#: A module that waits for the VM's lock, in a process of its own: it is ended by a signal.
WAITS = """
import sys
from ansible.module_utils import basic
from ansible_collections.kvmops.backup.plugins.module_utils import _argspec, _paths
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import recover

class Domain:
    def UUIDString(self):
        return "u"

    def name(self):
        return "web01"

_paths.state_dir = _paths.run_dir = lambda: sys.argv[1]
recover.settle = lambda *arguments: sys.exit("settled")

def operation(params, context):
    with recover.held(None, Domain(), what="second", timeout_s=4 * 3600, context=context):
        sys.exit("held")

basic._ANSIBLE_ARGS, basic._ANSIBLE_PROFILE = b'{"ANSIBLE_MODULE_ARGS": {}}', "legacy"
_argspec.run_module({}, operation, libraries=[])
"""


def test_waiting_for_a_vm_is_told_and_ended_by_a_signal(monkeypatch, tmp_path):
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    with (
        _locks.hold("vm-u", of="The VM web01", what="backup of VM web01"),
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WAITS), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        status = tmp_path / "status" / f"operation-{process.pid}.json"
        deadline = time.monotonic() + 60
        while not status.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        told = status.exists() and json.loads(status.read_text())["phase"]
        process.terminate()
        began = time.monotonic()
        try:
            stdout, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    assert told == f"wait for backup of VM web01 (process {os.getpid()} on {os.uname().nodename})"
    assert time.monotonic() - began < 10
    result = json.loads(stdout)
    assert result["cancelled"] and "SIGTERM" in result["msg"], stderr


def test_a_cancelled_wait_touches_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(_paths, "state_dir", lambda: str(tmp_path))
    settled = []
    monkeypatch.setattr(recover, "settle", lambda *_arguments: settled.append(1) or [])
    cancel = tmp_path / "cancel"
    cancel.touch()
    for progress in (Progress(cancel_path=str(cancel)), Progress()):
        progress.cancel("asked to")
        with (
            pytest.raises(CancelledError),
            recover.held(None, FakeDomain(), what="x", timeout_s=0, context=Context(progress, print)),
        ):
            pass
    assert settled == []
