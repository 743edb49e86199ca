# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What removing snapshots comes to: which layers are merged into which, which files go. Pure.

The files of a disk form a tree. A layer stays where the VM or a snapshot that stays needs it by itself. A layer that
a removed snapshot had frozen, and that only one needed layer stands on, takes that one's data (base and top are
always named: a template below a thin clone was frozen by none of the clone's snapshots, so it is never a base).
Layers that nobody needs any more, on dead branches, go without a merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Union

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.layers import (
    LayeredSnapshot,
    Layers,
    SnapshotKind,
    require_free,
)


class All:
    """Every snapshot of the VM."""


ALL = All()
Names = Union[Sequence[str], All]


@dataclass(frozen=True)
class Merge:
    """``top_path`` and what lies ``between`` (top first) become part of ``base_path``; ``children`` stand on the base then.

    ``attached``: it is part of what the VM stands on; ``active``: its top is what the guest writes to.
    ``disk_xml`` is the <disk> as it was when the base was active, "" where that is not known.
    """

    target: str
    base_path: str
    base_format: str
    top_path: str
    between: tuple[str, ...]
    children: tuple[str, ...]
    attached: bool
    active: bool
    disk_xml: str

    @property
    def gone(self) -> tuple[str, ...]:
        """The files that are not needed afterwards."""
        return (self.top_path, *self.between)


@dataclass(frozen=True)
class InnerState:
    """An internal snapshot to delete from a file; ``live``: from the image that the running VM then writes to."""

    name: str
    path: str
    live: bool


@dataclass(frozen=True)
class RemovalPlan:
    """Snapshots to remove (children first), and all that it takes; ``notes`` is what a person should know."""

    vm_uuid: str
    vm_name: str
    names: tuple[str, ...]
    kept: tuple[str, ...]
    merges: tuple[Merge, ...]
    inner: tuple[InnerState, ...]
    files: tuple[str, ...]  # to unlink in the end: merged layers, dead branches, memory images
    left: Mapping[str, str] = field(default_factory=dict)  # layers that stay though nothing names them: see retained_layers.py
    notes: tuple[Notice, ...] = ()

    @property
    def replaced(self) -> dict[str, tuple[str, str]]:
        """Path and format that stand for each merged layer from then on."""
        return {path: (merge.base_path, merge.base_format) for merge in self.merges for path in merge.gone}


def plan_removal(layers: Layers, names: Names) -> RemovalPlan:
    """How these snapshots are removed. Raises RefusedError for what cannot be done without losing what shall stay."""
    wanted = {state.name for state in layers.states} if isinstance(names, All) else set(names)
    removed = [state for state in layers.states if state.name in wanted]
    unknown = wanted - {state.name for state in removed}
    what = f"Snapshots of {layers.vm_name}"
    if unknown:
        raise RefusedError(what, f"there is no {', '.join(sorted(unknown))}")
    for target, path in layers.active.items():
        chain = layers.chain(path)
        missing = layers.files[chain[-1]].backing if chain else path
        if removed and missing:
            raise RefusedError(what, f"{missing}, which {target} stands on, is not there", "Bring the file back.")
    for state in removed:
        elsewhere = [disk.target for disk in state.disks if disk.kind is SnapshotKind.EXTERNAL and not disk.path]
        if elsewhere:
            raise RefusedError(what, f"{state.name} has {', '.join(elsewhere)}, which is no file of this host")
    kept = [state for state in layers.states if state.name not in wanted]
    work = _Work(layers, removed, kept)
    targets = dict.fromkeys([*layers.active, *(disk.target for state in removed for disk in state.disks)])
    for target in targets:
        _plan_disk(work, target)
    starts = [*layers.active.values(), *(disk.path for state in kept for disk in state.disks)]
    needed = {path for start in starts for path in layers.chain(start)}
    work.dead += [path for path in layers.copies if path in layers.files and path not in {*needed, *work.dead}]
    _require_nothing_lost(work, what)
    memories = [state.info.memory_path for state in removed if state.info.memory == "external"]
    still = {state.info.memory_path for state in kept}
    gone = [path for merge in work.merges for path in merge.gone]
    inner = tuple(dict.fromkeys(_inner(work, gone, what)))
    touched = [merge.base_path for merge in work.merges] + [child for merge in work.merges for child in merge.children]
    require_free(layers, [*touched, *gone, *work.dead, *(each.path for each in inner)], what)
    return RemovalPlan(
        vm_uuid=layers.vm_uuid,
        vm_name=layers.vm_name,
        names=tuple(state.name for state in reversed(removed)),
        kept=tuple(state.name for state in kept),
        merges=tuple(work.merges),
        inner=inner,
        files=tuple(dict.fromkeys([*gone, *work.dead, *(path for path in memories if path and path not in still)])),
        left=work.left,
        notes=tuple(Notice(Code.LAYERS_STAY, text) for text in work.notes),
    )


@dataclass
class _Work:
    layers: Layers
    removed: list[LayeredSnapshot]
    kept: list[LayeredSnapshot]
    merges: list[Merge] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _plan_disk(work: _Work, target: str) -> None:
    """What becomes of the layers of one disk: merged, kept for now, or of no use any more."""
    layers = work.layers
    active = layers.active.get(target, "")
    left = {path: xml for path, xml in layers.left.items() if _is_of(layers, path, target)}
    frozen = {**left, **_frozen(work.removed, target)}
    own = _own_layers(work, target, frozen)
    frozen = {path: definition for path, definition in frozen.items() if path in own}
    needed = {
        path: None
        for start in (active, *_pinned(work.kept, target), *_elsewhere(work, target))
        for path in reversed(layers.chain(start))
    }
    # an internal snapshot does not mind what becomes of its file's active state
    pinned = {active, *_frozen(work.kept, target), *_elsewhere(work, target)}
    standing = {path: [above for above in needed if layers.files[above].backing == path] for path in needed}
    free = {path for path in frozen if path in needed and path not in pinned and len(standing[path]) == 1}
    for path in needed:
        if path in free and layers.files[path].backing not in free:
            work.merges.append(_merge(work, target, (path, frozen[path]), free, standing, active))
    bases = {merge.top_path: merge.base_path for merge in work.merges}
    for path in needed:
        if path in frozen and path not in pinned and len(standing[path]) > 1:
            stays = bases.get(path, path)
            work.left[stays] = frozen[stays]
            if path not in left:
                work.notes.append(f"{stays} stays for now: {len(standing[path])} branches stand on it")
    _give_up(work, target, [path for path in own if path not in needed])


def _own_layers(work: _Work, target: str, frozen: Iterable[str]) -> list[str]:
    """The disk's layers that the removed snapshots had frozen or made; a note about those of another disk of that target then."""
    layers = work.layers
    made = [
        path
        for state in work.removed
        for disk in state.disks
        if disk.target == target
        for path in (disk.overlay_path, disk.path if disk.kind is SnapshotKind.INTERNAL else "")
    ]
    own = [path for path in dict.fromkeys([*frozen, *made]) if path in layers.files]
    roots = layers.roots(layers.active.get(target, ""))
    strange = [path for path in own if not roots & set(layers.chain(path)[-1:])]
    for user, paths in _by_user(layers, strange).items():
        of_now = f"are in use as {user} now, stay, and are not merged" if user else "stay"
        work.notes.append(f"{target} is another disk than it was then; its former files {of_now}: {', '.join(paths)}")
    return [path for path in own if path not in strange]


def _give_up(work: _Work, target: str, paths: Iterable[str]) -> None:
    """Layers on dead branches go, unless nothing else has their data."""
    layers, active = work.layers, work.layers.active.get(target, "")
    for path in paths:
        if not layers.files[path].backing:
            if path not in layers.copies:
                work.notes.append(f"{path} stays, though nothing names it any more: {target} is a copy of it now")
        elif active in layers.chain(path) and layers.files[active].modified_ns <= layers.files[path].modified_ns:
            work.notes.append(f"{path} stays: it stands on {active}, and may be newer than what the VM has")
        else:
            work.dead.append(path)


def _by_user(layers: Layers, paths: Iterable[str]) -> dict[str, list[str]]:
    """The files by the disk of the VM that stands on them now, "" for none."""
    found: dict[str, list[str]] = {}
    for path in paths:
        user = next((target for target, active in layers.active.items() if path in layers.chain(active)), "")
        found.setdefault(user, []).append(path)
    return found


def _is_of(layers: Layers, path: str, target: str) -> bool:
    """Whether a layer belongs to that disk: the VM's image, or one of its snapshots', stands on it."""
    starts = [layers.active.get(target, "")]
    starts += [disk.path for state in layers.states for disk in state.disks if disk.target == target]
    return any(path in layers.chain(start) for start in starts)


def _frozen(states: Iterable[LayeredSnapshot], target: str) -> dict[str, str]:
    """Files that external snapshots have frozen, with the <disk> of that moment."""
    return {
        disk.path: disk.definition
        for state in states
        for disk in state.disks
        if disk.target == target and disk.kind is SnapshotKind.EXTERNAL
    }


def _pinned(states: Iterable[LayeredSnapshot], target: str) -> list[str]:
    """Files whose very content snapshots need."""
    return [
        disk.path for state in states for disk in state.disks if disk.target == target and disk.kind is not SnapshotKind.NONE
    ]


def _elsewhere(work: _Work, target: str) -> list[str]:
    """Files that other disks, now or in a snapshot that stays, need too: disks may have been swapped."""
    return [path for other, path in work.layers.active.items() if other != target] + [
        disk.path for state in work.kept for disk in state.disks if disk.target != target and disk.kind is not SnapshotKind.NONE
    ]


def _merge(
    work: _Work,
    target: str,
    lowest: tuple[str, str],
    free: set[str],
    standing: Mapping[str, Sequence[str]],
    active: str,
) -> Merge:
    """The longest run of layers that all end in the `lowest` (path and <disk>)."""
    base, definition = lowest
    run = [standing[base][0]]
    while run[0] in free:
        run.insert(0, standing[run[0]][0])
    files = work.layers.files
    return Merge(
        target=target,
        base_path=base,
        base_format=files[base].format,
        top_path=run[0],
        between=tuple(run[1:]),
        children=tuple(standing[run[0]]),
        attached=run[0] in work.layers.chain(active),
        active=run[0] == active,
        disk_xml=definition if not files[base].backing else _without_chain(definition),
    )


def _without_chain(disk_xml: str) -> str:
    """The <disk> without what lay below it then: libvirt finds out itself what lies below it now."""
    if not disk_xml:
        return ""
    disk = _xml.parse(disk_xml, "A disk")
    for backing in disk.findall("backingStore"):
        disk.remove(backing)
    return _xml.text(disk)


def _require_nothing_lost(work: _Work, what: str) -> None:
    """No internal snapshot that shall stay, known to libvirt or not, goes with a layer; no disk changes its size."""
    names = {state.name for state in work.removed}
    files = work.layers.files
    for path in [*(path for merge in work.merges for path in merge.gone), *work.dead]:
        lost = [name for name in files[path].internal if name not in names and not _lies_elsewhere(work, name, path)]
        if lost:
            raise RefusedError(
                what,
                f"the internal snapshot {', '.join(lost)} lies in {path}, which would go: it would be lost",
                f"Remove it too, or first: vm_snapshot snapshot={lost[0]} state=absent.",
            )
    for merge in work.merges:
        top, base = files[merge.top_path], files[merge.base_path]
        if top.virtual_size_bytes < base.virtual_size_bytes:
            raise RefusedError(
                what,
                f"{merge.target} became smaller after its snapshot: a merge would give it the size of {base.path} again",
                "Resize the disk back, or copy it to a new image.",
            )
        if merge.active and merge.children:
            raise RefusedError(
                what,
                f"{', '.join(merge.children)} stand on {merge.top_path}, which the VM writes to",
                "Those snapshots are broken. Remove them first.",
            )


def _lies_elsewhere(work: _Work, name: str, path: str) -> bool:
    """Whether it is what a revert left in the original of a copy: the snapshot lies in the copy now."""
    state = work.layers.state(name)
    return state is not None and path not in {disk.path for disk in state.disks if disk.kind is SnapshotKind.INTERNAL}


def _inner(work: _Work, gone: Sequence[str], what: str) -> Iterable[InnerState]:
    """Internal snapshots to delete from files that stay."""
    layers = work.layers
    after = {merge.target: merge.base_path for merge in work.merges if merge.active}
    now = {target: after.get(target, path) for target, path in layers.active.items()}
    attached = {path for active in layers.active.values() for path in layers.chain(active)}
    inside = {state.name for state in work.removed if any(disk.kind is SnapshotKind.INTERNAL for disk in state.disks)}
    for path, layer in layers.files.items():
        # also in a file that a revert has made a copy of
        for name in layer.internal:
            if name not in inside or path in gone or path in work.dead:
                continue
            live = layers.running and path in now.values()
            if layers.running and path in attached and not live:
                if _lies_elsewhere(work, name, path):
                    continue
                raise RefusedError(
                    what,
                    f"the internal snapshot {name} lies in {path}, below what the running VM writes to",
                    "Shut the VM down and run the task again, or remove the snapshots above it too.",
                )
            yield InnerState(name, path, live)
