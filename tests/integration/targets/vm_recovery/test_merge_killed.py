# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirtd SIGKILLed inside the removal of snapshots of a two-disk VM with a chain, once and twice in a row (S4b, S26)."""

from __future__ import annotations

import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import libvirt
import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, SplitViewError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import (
    blockjobs,
    connection,
    domain,
    monitor,
    snapshots,
    status_xml,
    views,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import merge, removal
from ansible_collections.kvmops.backup.tests.integration.targets.vm_recovery import cycle
from ansible_collections.kvmops.backup.tests.integration.targets.vm_recovery.cycle import Before
from ansible_collections.kvmops.backup.tests.lab import daemons
from ansible_collections.kvmops.backup.tests.lab._run import wait_for
from ansible_collections.kvmops.backup.tests.lab.qmp import Monitor
from ansible_collections.kvmops.backup.tests.lab.vm import Disk

STATES = ("s1", "s2", "s3")
PLACES = {
    "pivot": (blockjobs, "pivot", removal.ALL, 0.04),
    "ready": (blockjobs, "start_commit", removal.ALL, 0.1),
    "inner": (blockjobs, "start_inner_commit", ["s1", "s2"], 0.1),
    "metadata": (snapshots, "forget", ["s1", "s2"], 0.02),
}


class Removal:
    """As much of a Cycle as killed_libvirtd() needs."""

    def __init__(self, vm, names):
        self.conn = connection.connect(daemons.URI)
        self.domain = connection.find_domain(self.conn, vm.name)
        self.names = names

    def whole(self):
        merge.remove_snapshots(self.conn, self.domain, self.names, Context(Progress(), lambda text: None))

    def die(self):
        """Its journal is closed already."""


def build(vm):
    """A chain of snapshots, each with something that the guest wrote in between."""
    directory = Path(cycle.plan_for(vm).overlays[0].base_path).parent
    targets = list(vm.disks())
    for name in STATES:
        overlays = [(target, f"{directory}/{target}.{name}") for target in targets]
        snapshots.create(vm.domain, snapshots.document(name, "", overlays, []), memory=False, quiesce=False)
    vm.wait_for_marker(cycle.patiently(vm, vm.last_marker).number + 1)


def settle_and_kill(vm, delay_s):
    """The first settling is interrupted by another death of libvirtd."""
    errors = []

    def run():
        try:
            cycle.settle(vm)
        except (KvmopsError, libvirt.libvirtError) as error:
            errors.append(error)

    worker = threading.Thread(target=run)
    worker.start()
    time.sleep(delay_s)
    wait_for("libvirtd", daemons.libvirtd_pid, 60)  # the worker may be restarting it
    daemons.kill()
    worker.join(300)
    assert not worker.is_alive()
    daemons.start()
    return errors


@pytest.mark.parametrize("place", list(PLACES))
def test_inside_the_removal(two, moments, place):
    module, function, names, limit_s = PLACES[place]
    before = Before(two)
    for number, delay_s in enumerate(moments(limit_s)[::4]):  # four places: as many moments in all
        build(two)
        run = Removal(two, names)
        error = cycle.killed_libvirtd(run, run.whole, (module, function), delay_s)
        daemons.start()
        if number % 2:
            print(f"killed again: {settle_and_kill(two, 0.2 + 5 * delay_s)}")
        done = cycle.settle(two)
        print(f"{place}: killed after {delay_s:.3f} s: {error}; settled: {done}")
        cycle.assert_writing(two)
        left = [node.name for node in snapshots.tree(two.domain)]
        assert left in ([], ["s3"], list(STATES)), left
        Removal(two, removal.ALL).whole()
        before.same()
        cycle.assert_writing(two)


def unknown_to_its_disk(text):
    """It died between starting the job and noting it at the disk; QEMU goes on until the job is ready, and waits."""
    return re.sub("<mirror .*?</mirror>", "", text, flags=re.DOTALL)


def unreadable(text):
    """libvirt 9 cannot read this itself, and takes the running VM for shut off."""
    return re.sub("(<mirror .*?job=)'active-commit'", r"\1''", text)


def without_the_job(text):
    """The disk has a job that nobody has."""
    return re.sub("<blockjobs.*?</blockjobs>", "<blockjobs active='no'/>", text, flags=re.DOTALL)


def died_in_the_pivot(vm, monkeypatch, note, ended):
    """What libvirt noted about the running VM then, and whether QEMU has ended the job meanwhile."""

    def stop(*_arguments):
        raise KvmopsError("The test", "it stops here")

    build(vm)
    with monkeypatch.context() as patched, pytest.raises(KvmopsError, match="stops here"):
        patched.setattr(blockjobs, "pivot", stop)
        Removal(vm, removal.ALL).whole()
    number = vm.domain.ID()
    daemons.kill()
    status = Path(f"/run/libvirt/qemu/{vm.name}.xml")
    text = status.read_text()
    status.write_text(note(text))
    assert status.read_text() != text
    if ended:
        with Monitor.of_domain(number) as monitor:
            monitor.complete_jobs()
    daemons.start()


@pytest.mark.parametrize(
    ("note", "ended", "restarted"),
    [
        (unknown_to_its_disk, False, False),
        (unreadable, False, True),
        (unreadable, True, True),
        (without_the_job, True, True),
    ],
)
def test_a_libvirtd_that_died_in_the_pivot(two, monkeypatch, note, ended, restarted):
    before = Before(two)
    died_in_the_pivot(two, monkeypatch, note, ended)
    pid = daemons.libvirtd_pid()
    done = cycle.settle(two)
    print(f"settled: {done}")
    assert (daemons.libvirtd_pid() != pid) == restarted == any("restarted libvirtd" in text for text in done)
    before.same()
    cycle.assert_writing(two)


@pytest.fixture(scope="module")
def busy(module_lab):
    """A VM with a snapshot, for jobs."""
    vm = module_lab.create_vm("busy", [Disk()])
    overlay = vm.disks()["vda"].with_suffix(".overlay")
    snapshots.create(vm.domain, snapshots.document("b", "", [("vda", str(overlay))], []), memory=False, quiesce=False)
    return vm


@contextmanager
def at_work(busy):
    """A job on another VM, during which libvirtd is not to be restarted."""
    disk = domain.parse(busy.xml()).disk("vda")
    blockjobs.start_commit(busy.domain, "vda", disk.chain[0].path, disk.path)
    yield
    busy.domain.blockJobAbort("vda", 0)


def test_not_while_another_vm_is_at_work(two, busy, monkeypatch):
    """libvirtd is not restarted in the middle of somebody else's job; the refusal says that, and what to do."""
    before = Before(two)
    with at_work(busy):
        died_in_the_pivot(two, monkeypatch, unreadable, ended=False)
        with pytest.raises(
            SplitViewError, match=r"The VM busy: a job is at work on it.*[Ss]top libvirtd, delete the <mirror>"
        ):
            cycle.settle(two)
    assert any("restarted libvirtd" in text for text in cycle.settle(two))
    before.same()
    cycle.assert_writing(two)


def job_has_ended(text, target, _path):
    """libvirt's note: QEMU has forgotten the job, and still has the layer open."""
    return re.search(f"<blockjob name='commit-{target}-[^>]*newstate='completed'", text)


def layer_is_gone(text, target, path):
    """libvirt's note: QEMU has closed the layer too."""
    return "</domstatus>" in text and f"'commit-{target}-" not in text and path not in text


def died_at_the_end_of_an_inner_merge(vm, target, names, says):
    """QEMU's chain is shorter and it has forgotten the job; libvirt died before it had noted what ``says`` names."""
    build(vm)
    path = next(path for path in chain(vm, target).live if path.endswith(f".{names[-1]}"))
    note = status_xml.path_of(vm.name)
    killed = daemons.killed_in_rename_of(note, lambda text: bool(says(text, target, path)))
    with killed, pytest.raises(KvmopsError):
        Removal(vm, names).whole()
    daemons.start()
    found = chain(vm, target)
    assert path in found.live and path not in found.qemu, found


def chain(vm, target):
    """One disk in all views."""
    return views.gather(connection.connect(daemons.URI), vm.domain).disk(target)


def nodes_of_qemu(vm):
    nodes = monitor.execute(vm.domain, "query-named-block-nodes", flat=True)
    return sorted(node["node-name"] for node in nodes if node["node-name"].startswith("libvirt-"))


def nodes_of_note(vm):
    return sorted(re.findall("<nodename [^>]*name='([^']*)'", Path(status_xml.path_of(vm.name)).read_text()))


@pytest.mark.parametrize(
    ("target", "names", "says", "restarted"),
    [
        ("vdb", ["s1"], job_has_ended, True),
        ("vda", ["s1", "s2"], layer_is_gone, False),  # a layer right below the active one needs no restart
    ],
)
def test_a_libvirtd_that_missed_the_end_of_an_inner_merge(two, busy, target, names, says, restarted):
    """One death is enough; no restart tells libvirt of it."""
    before = Before(two)
    with at_work(busy):
        died_at_the_end_of_an_inner_merge(two, target, names, says)
        if restarted:
            with pytest.raises(
                SplitViewError, match=r"The VM busy: a job is at work on it.*See to that and run the task again"
            ):
                cycle.settle(two)
    pid = daemons.libvirtd_pid()
    done = cycle.settle(two)
    print(f"settled: {done}")
    assert (daemons.libvirtd_pid() != pid) == restarted == any("restarted libvirtd" in text for text in done)
    assert [node.name for node in snapshots.tree(two.domain)] == [name for name in STATES if name not in names]
    for each in two.disks():
        seen = chain(two, each)
        assert seen.qemu == seen.live == seen.persistent
        assert len(seen.qemu) == len(STATES) + 1 - len(names)
    assert not [path for path in before.directory.iterdir() if path.suffix[1:] in names]
    assert nodes_of_qemu(two) == nodes_of_note(two)
    Removal(two, removal.ALL).whole()
    before.same()
    cycle.assert_writing(two)


def test_disks_are_clean_after_all_that(two, lab):
    cycle.assert_clean_after_shutdown(two, lab.path("raw"))
