# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Back to a snapshot. What the VM has been since is lost; no file that any snapshot needs is written to.

External: fresh overlays on the frozen files, the definition of that moment with these overlays, memory from its image.
This route works on every libvirt; libvirt's own (since 9.9) deletes the active overlay whatever stands on it.
Internal: libvirt's own revert, of a copy of the image where later snapshots stand on that image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _files, _ownership, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError, SplitViewError
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers as image_layers
from ansible_collections.kvmops.backup.plugins.module_utils._image import qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._journal import Journal
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import files, monitor, receivers, snapshots, views
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    is_connection_lost,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import target_of
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots import (
    bookkeeping,
    copying,
    original_disk,
    overlays,
    retained_layers,
)
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.layers import (
    LayeredSnapshot,
    Layers,
    SnapshotKind,
    require_free,
)

OPERATION = "a revert"


class RevertPhase(str, Enum):
    """How far a revert had come."""

    PREPARING = "preparing"  # new files are being made, the VM has not been touched
    COMMITTED = "committed"  # new files are there; from now on it goes forward
    STOPPED = "stopped"  # internal: the VM is off, and libvirt's own revert comes next
    ENDED = "ended"  # the VM is what it was, and may be changed by anybody; what is left are files


@dataclass(frozen=True)
class NewLayer:
    """A new file for one disk: an overlay on the frozen ``base_path`` or, of an internal snapshot, a copy of it."""

    target: str
    base_path: str
    base_format: str
    path: str


@dataclass(frozen=True)
class RevertPlan:
    """What it takes to bring the snapshot ``name`` back.

    ``definition`` is the <domain> to define (external), ``state_xml`` what libvirt shall know about the snapshot then;
    the ``former`` ones are those of now, ``former_current`` that of the snapshot that is the current one, "" for none.
    ``memory_path`` "": the VM is off afterwards, unless internal memory resumes it.
    ``discarded`` are the files that only the state of now lies in.
    """

    vm_uuid: str
    vm_name: str
    name: str
    internal: bool
    fresh: tuple[NewLayer, ...]
    actives: tuple[str, ...]  # the images that the VM writes to now
    definition: str
    former_definition: str
    state_xml: str
    former_xml: str
    former_current: str
    memory_path: str
    discarded: tuple[str, ...]
    notes: tuple[Notice, ...] = ()


@dataclass(frozen=True)
class RevertFacts:
    """What the journal of a revert says."""

    plan: RevertPlan
    phase: RevertPhase = RevertPhase.PREPARING


def plan_revert(layers: Layers, name: str, definition: str, stamp: int) -> RevertPlan:
    """How the VM gets back to that snapshot. Pure, but for a look at which names are taken.

    ``definition`` is the VM's persistent <domain>; ``stamp`` (unix time) goes into the names of new files.
    Raises RefusedError for a snapshot that is not there, or whose files are not what they were.
    """
    what = f"The snapshot {name} of {layers.vm_name}"
    state = layers.state(name)
    if state is None:
        raise RefusedError(what, "there is no such snapshot", f"virsh snapshot-list {layers.vm_name} shows them.")
    internal = any(disk.kind is SnapshotKind.INTERNAL for disk in state.disks) or state.info.memory == "internal"
    _require_whole(layers, state, what)
    frozen = [disk for disk in state.disks if disk.kind is not SnapshotKind.NONE]
    copied = [disk for disk in frozen if internal and _is_stood_on(layers, disk.path)]
    fresh = tuple(
        NewLayer(disk.target, disk.path, layers.files[disk.path].format, _free_name(layers, disk.path, stamp))
        for disk in (copied if internal else frozen)
    )
    discarded, notes = _discarded(layers, {disk.path for disk in frozen})
    require_free(layers, [*discarded, *(disk.path for disk in frozen if internal and disk not in copied)], what)
    # files of disks that were attached from other VMs have changed since
    root = _xml.parse(receivers.without_attached(state.info.xml), what)
    if internal:
        replaced = {each.base_path: (each.path, each.base_format) for each in fresh}
        state_xml, then = bookkeeping.replace_in_snapshot(state.info.xml, replaced), ""
    else:
        then = _definition(root, state, fresh, definition, layers, what)
        state_xml = _with_overlays(state.info.xml, fresh, discarded)
    return RevertPlan(
        vm_uuid=layers.vm_uuid,
        vm_name=layers.vm_name,
        name=name,
        internal=internal,
        fresh=fresh,
        actives=tuple(layers.active.values()),
        definition=then,
        former_definition=definition,
        state_xml=state_xml,
        former_xml=state.info.xml,
        former_current=next((each.info.xml for each in layers.states if each.info.current), ""),
        memory_path=state.info.memory_path if state.info.memory == "external" else "",
        discarded=discarded,
        notes=tuple(Notice(Code.LAYERS_STAY, text) for text in notes),
    )


def _require_whole(layers: Layers, state: LayeredSnapshot, what: str) -> None:
    for disk in state.disks:
        layer = layers.files.get(disk.path)
        if disk.kind is SnapshotKind.NONE:
            continue
        if layer is None:
            raise RefusedError(
                what, f"its file {disk.path} is not there", "Bring the file back, or remove the snapshot."
            )
        if disk.kind is SnapshotKind.EXTERNAL and disk.path.startswith("/dev/"):
            raise RefusedError(
                what, f"{disk.path} is a device: there is no place beside it for the overlay of a revert"
            )
        below = layers.files[layers.chain(disk.path)[-1]].backing
        if below:
            raise RefusedError(what, f"{below}, which it stands on, is not there", "Bring the file back.")
        if disk.kind is SnapshotKind.EXTERNAL and disk.path in layers.active.values():
            raise RefusedError(
                what,
                f"{disk.path}, which it had frozen, is what the VM writes to: the snapshot is damaged",
                "Remove the snapshot; it cannot be used any more.",
            )
        if disk.kind is SnapshotKind.INTERNAL and state.name not in layer.internal:
            raise RefusedError(what, f"it does not lie in {disk.path} any more", "Remove the snapshot.")
    memory = state.info.memory_path
    if state.info.memory == "external" and not _filenames.is_there(memory):
        raise RefusedError(what, f"its memory image {memory} is not there", "Bring the file back.")
    then = _xml.parse(state.info.xml, what).findtext("domain/name", "")
    if state.info.memory == "external" and then != layers.vm_name:
        hint = f"Rename the VM (virsh domrename), revert, and rename it again; its memory image names {then}."
        raise RefusedError(
            what, f"the VM was called {then} then, and libvirt resumes memory under that name only", hint
        )


def _is_stood_on(layers: Layers, path: str) -> bool:
    """Whether any snapshot needs the file as it is: one that has frozen it, or a layer upon it."""
    needed = {
        link
        for state in layers.states
        for disk in state.disks
        if disk.kind is SnapshotKind.EXTERNAL
        for link in layers.chain(disk.path)
    }
    needed |= {
        link
        for state in layers.states
        for disk in state.disks
        if disk.kind is SnapshotKind.INTERNAL
        for link in layers.chain(disk.path)[1:]
    }
    return path in needed


def _discarded(layers: Layers, wanted: set[str]) -> tuple[tuple[str, ...], list[str]]:
    """Active overlays that hold nothing but the state of now, and notes about other images that nothing will name then."""
    states = [disk.path for state in layers.states for disk in state.disks if disk.kind is not SnapshotKind.NONE]
    needed = {link for path in (*wanted, *states) for link in layers.chain(path)}
    gone, notes = [], []
    for target, path in layers.active.items():
        if path in needed or path not in layers.files:
            continue
        backing = layers.files[path].backing
        if not layers.files[path].internal and (layers.holders(backing) or backing in layers.left):
            gone.append(path)
        else:
            notes.append(f"{path}, which {target} is now, stays; the VM does not have it any more")
    return tuple(gone), notes


def _free_name(layers: Layers, path: str, stamp: int) -> str:
    """A name for a new file beside the VM's original one."""
    return _files.free_name(original_of(layers, path), f".reverted-{stamp}{overlays.EXTENSION}")


def original_of(layers: Layers, path: str) -> str:
    """The lowest file of a chain that is the VM's own: frozen by one of its snapshots, or the file itself."""
    own = [link for link in layers.chain(path) if layers.holders(link) or link in layers.left]
    return own[-1] if own else path


def _definition(
    root: etree._Element, state: LayeredSnapshot, fresh: tuple[NewLayer, ...], definition: str, layers: Layers, what: str
) -> str:
    """The <domain> of that moment on the new overlays, under the name that the VM has now."""
    domain = _definition_then(root, layers.vm_name, what)
    now = {target_of(disk): disk for disk in _xml.parse(definition, what).iterfind("devices/disk")}
    news = {each.target: each for each in fresh}
    for disk in list(domain.iterfind("devices/disk")):
        target = target_of(disk)
        if target in news:
            stand_on(disk, news[target].path)
            continue
        kept = state.disk(target)
        # a disk that was left out of the snapshot goes on as it is
        if kept is not None and layers.holders(kept.path):
            if target not in now:
                raise RefusedError(what, f"{target} was left out of it, and {kept.path} is needed by another one now")
            _xml.parent_of(disk).replace(disk, now[target])
    return _xml.text(domain)


def _definition_then(root: etree._Element, vm_name: str, what: str) -> etree._Element:
    """The persistent <domain> in a snapshot, under that name."""
    then = root.find("inactiveDomain")
    then = root.find("domain") if then is None else then
    if then is None:
        raise RefusedError(what, "libvirt does not know the VM's definition of that moment")
    domain = _xml.parse(_xml.text(then), what)
    domain.tag = "domain"
    name = domain.find("name")
    if name is not None:
        name.text = vm_name
    return domain


def stand_on(disk: etree._Element, path: str) -> None:
    """A <disk> has this qcow2 as its image."""
    for backing in disk.findall("backingStore"):
        disk.remove(backing)
    disk.set("type", "file")
    driver, source = disk.find("driver"), disk.find("source")
    if driver is None:
        driver = etree.Element("driver", name="qemu")
        disk.insert(0, driver)
    driver.set("type", "qcow2")
    image = etree.Element("source", file=path)
    if source is None:
        driver.addnext(image)
    else:
        disk.replace(source, image)


def _list_chain(disk: etree._Element, below: Sequence[qemu_img.QemuImageInfo]) -> None:
    """A <disk> lists what its image stands on. AppArmor keeps libvirt's helper from finding that out by itself in most places, when
    memory is resumed, and QEMU from opening what the helper did not find."""
    above, after = disk, disk.find("source")
    for image in below:
        link = etree.Element("backingStore", type="file")
        etree.SubElement(link, "format", type=image.format)
        etree.SubElement(link, "source", file=views.real(image.path))
        if after is None:
            above.append(link)
        else:
            after.addnext(link)
        above, after = link, None
    end = etree.Element("backingStore")
    if after is None:
        above.append(end)
    else:
        after.addnext(end)


def _with_overlays(xml: str, fresh: tuple[NewLayer, ...], discarded: tuple[str, ...]) -> str:
    """The snapshot with the new overlays in place of its own ones that go."""
    root = _xml.parse(xml, "A snapshot")
    news = {each.target: each.path for each in fresh}
    for disk in root.iterfind("disks/disk"):
        source = disk.find("source")
        if source is not None and views.real(source.get("file", "")) in discarded and disk.get("name", "") in news:
            source.set("file", news[disk.get("name", "")])
    return _xml.text(root)


# --- running -------------------------------------------------------------------------------------------------------


def run(conn: Connection, domain: Domain, journal: Journal[RevertFacts], progress: Progress) -> None:
    """Carry the plan out. The caller has seen that nobody else is at work on the VM, and holds its lock.

    Raises KvmopsError: with everything as it was, though the VM may be off, and the journal done; or with the connection
    lost and the journal there for resume().
    """
    plan = journal.facts.plan
    try:
        progress.phase("prepare")
        for each in plan.fresh:
            _make(plan, each, progress)
        if plan.internal and plan.fresh:
            copies = {each.path: each.base_path for each in plan.fresh}
            copies = {**retained_layers.load(plan.vm_uuid, retained_layers.COPIES), **copies}
            retained_layers.save(plan.vm_uuid, copies, retained_layers.COPIES)
        journal.record(phase=RevertPhase.COMMITTED)
    except (KvmopsError, OSError):
        _take_back(conn, domain, plan)
        journal.done()
        raise
    _forward(conn, domain, plan, journal)


def resume(conn: Connection, domain: Domain | None, journal: Journal[RevertFacts]) -> str:
    """Finish or undo what a dead run began; one sentence about it."""
    plan = journal.facts.plan
    what = f"{plan.vm_name}: the revert to {plan.name}"
    phase = journal.facts.phase
    if phase == RevertPhase.ENDED:
        if domain is not None:
            _discard(conn, domain, plan)
        return f"{what} was finished"
    if domain is None:
        _take_back(conn, None, plan)
        return f"{what} was given up: the VM is not defined any more"
    if phase not in (RevertPhase.COMMITTED, RevertPhase.STOPPED):
        _take_back(conn, domain, plan)
        return f"{what} was taken back"
    if not domain.isActive():
        if domain.hasManagedSaveImage(0):
            hint = f"Start the VM (virsh start {plan.vm_name}) and try again."
            raise RefusedError(what, "it has a managed-save image", hint)
        _forward(conn, domain, plan, journal)
        return f"{what} was finished"
    runs_on = _active_images(conn, domain, live=True)
    if plan.internal and not plan.fresh and phase == RevertPhase.STOPPED:
        # the images are the same ones, loaded or not
        if domain.state()[:2] == [libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED]:
            _discard(conn, domain, plan)
            return f"{what} was cut off, and the VM was started since: revert again, its disks may be of two moments"
        _finish_loaded(conn, domain, plan, journal)
        return f"{what} was finished"
    if plan.fresh and {each.path for each in plan.fresh} <= runs_on:
        if plan.internal:
            _finish_loaded(conn, domain, plan, journal)
        else:
            _forward(conn, domain, plan, journal)
        return f"{what} was finished"
    if not plan.fresh or runs_on <= set(plan.actives):
        _take_back(conn, domain, plan)
        return f"{what} was taken back: the VM runs as it did before"
    raise SplitViewError(what, f"the VM runs on {', '.join(sorted(runs_on))}", "Look at its disks by hand.")


def _make(plan: RevertPlan, fresh: NewLayer, progress: Progress) -> None:
    if plan.internal:
        copying.copy(fresh.base_path, fresh.path, progress)
        for name in qemu_img.info(fresh.path, "qcow2").internal_snapshots:
            if name != plan.name:
                qemu_img.delete_internal(fresh.path, name)
    else:
        qemu_img.create_overlay(fresh.path, fresh.base_path, fresh.base_format)
    _ownership.give(fresh.path, _ownership.of(fresh.base_path))
    copying.sync(fresh.path)


def _forward(conn: Connection, domain: Domain, plan: RevertPlan, journal: Journal[RevertFacts]) -> None:
    """From the new files to the end; every step sees by itself whether it has been done."""
    try:
        if plan.internal:
            _forward_internal(domain, plan, journal)
        else:
            _forward_external(conn, domain, plan)
    except (KvmopsError, libvirt.libvirtError) as error:
        if any(is_connection_lost(each) for each in (error, error.__cause__) if isinstance(each, Exception)):
            raise
        _take_back(conn, domain, plan)
        journal.done()
        hint = "Nothing of the VM is lost, but it may be off now: start it."
        raise KvmopsError(f"Reverting {plan.vm_name} to {plan.name}", str(error), hint) from error
    _end(conn, domain, plan, journal)


def _forward_external(conn: Connection, domain: Domain, plan: RevertPlan) -> None:
    news = {each.target: each.path for each in plan.fresh}
    # a definition that libvirt does not take is found out while the VM still runs
    if not set(news.values()) <= _active_images(conn, domain, live=False):
        conn.defineXML(plan.definition)
    if domain.isActive() and not set(news.values()) <= _active_images(conn, domain, live=True):
        domain.destroy()
    snapshots.redefine(domain, plan.state_xml, current=True)
    untouched = not any(image_layers.has_data(path) for path in news.values())
    if plan.memory_path and not domain.isActive() and untouched:
        flags = libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE
        head = _xml.parse(conn.saveImageGetXMLDesc(plan.memory_path, flags), f"The memory image {plan.memory_path}")
        for disk in head.iterfind("devices/disk"):
            if target_of(disk) in news:
                stand_on(disk, news[target_of(disk)])
                _list_chain(disk, qemu_img.backing_chain(news[target_of(disk)], "qcow2")[1:])
        conn.restoreFlags(plan.memory_path, _xml.text(head), 0)
    if plan.memory_path:
        loaded = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION]
        _let_run(domain, plan, waits=domain.state()[:2] == loaded)


def _forward_internal(domain: Domain, plan: RevertPlan, journal: Journal[RevertFacts]) -> None:
    if plan.fresh:
        snapshots.redefine(domain, plan.state_xml, current=False)
    if domain.isActive():
        domain.destroy()  # libvirt would load the snapshot into the QEMU that runs, from the images that it has
    journal.record(phase=RevertPhase.STOPPED)
    snapshots.revert_internal(domain, plan.name)


def _finish_loaded(conn: Connection, domain: Domain, plan: RevertPlan, journal: Journal[RevertFacts]) -> None:
    """The VM runs with the snapshot loaded; libvirt may have died before the rest: what is as it was before is put right."""
    what = f"The VM {plan.vm_name}"
    # QEMU waits for its first start: whoever pauses a guest makes it "paused"
    _let_run(domain, plan, waits=monitor.execute(domain, "query-status")["status"] == "prelaunch")
    current = next((node.name for node in snapshots.tree(domain) if node.current), "")
    if current in ("", _former_current(plan)):
        snapshots.redefine(domain, plan.state_xml, current=True)
    try:
        kept = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        named = {each.path for each in plan.fresh} <= _active_images(conn, domain, live=False)
        if not named or original_disk.words(kept) == original_disk.words(plan.former_definition):
            root = _xml.parse(plan.state_xml, f"The snapshot {plan.name} of {plan.vm_name}")
            conn.defineXML(_xml.text(_definition_then(root, plan.vm_name, what)))
    except libvirt.libvirtError as error:
        raise translate(error, what) from error
    _end(conn, domain, plan, journal)


def _let_run(domain: Domain, plan: RevertPlan, *, waits: bool) -> None:
    """Start the CPUs of a guest that ran then, if libvirt died between QEMU's start and theirs."""
    if waits and snapshots.describe(plan.state_xml, current=True).state == "running":
        try:
            domain.resume()
        except libvirt.libvirtError as error:
            raise translate(error, f"The VM {plan.vm_name}") from error


def _end(conn: Connection, domain: Domain, plan: RevertPlan, journal: Journal[RevertFacts]) -> None:
    files.sync(conn.getURI(), plan.vm_name)
    journal.record(phase=RevertPhase.ENDED)
    _discard(conn, domain, plan)


def _discard(conn: Connection, domain: Domain, plan: RevertPlan) -> None:
    used = _active_images(conn, domain, live=True) | _active_images(conn, domain, live=False)
    for path in plan.discarded:
        if path not in used:
            _files.remove(path)


def _take_back(conn: Connection, domain: Domain | None, plan: RevertPlan) -> None:
    """The definition and what libvirt knows about snapshots are what they were; the new files go."""
    news = {each.path for each in plan.fresh}
    if domain is not None:
        if news & _active_images(conn, domain, live=True):
            raise SplitViewError(f"The VM {plan.vm_name}", "it runs on the new files already", "Look at it by hand.")
        try:
            if news & _active_images(conn, domain, live=False):
                conn.defineXML(plan.former_definition)
        except libvirt.libvirtError as error:
            raise translate(error, f"The definition of {plan.vm_name}") from error
        there = {state.name: state for state in snapshots.tree(domain)}
        if plan.name in there and original_disk.words(there[plan.name].xml) != original_disk.words(plan.former_xml):
            snapshots.redefine(domain, plan.former_xml, current=there[plan.name].current)
        current = _former_current(plan)
        if current in there and not there[current].current:
            snapshots.redefine(domain, plan.former_current, current=True)
    files.sync(conn.getURI(), plan.vm_name)
    for path in news:
        _files.remove(path)


def _former_current(plan: RevertPlan) -> str:
    return snapshots.describe(plan.former_current, current=True).name if plan.former_current else ""


def _active_images(conn: Connection, domain: Domain, *, live: bool) -> set[str]:
    """What the VM writes to now (live), or would after its next start."""
    disks = views.gather(conn, domain).disks
    chains = [chain for disk in disks for chain in ((disk.qemu, disk.live) if live else (disk.persistent,))]
    return {chain[0] for chain in chains if chain}
