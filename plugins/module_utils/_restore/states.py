# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The snapshots of a restored VM: which layers and memory images they need, and how they look in their new places. Pure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import memory_image
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._restore import (
    definition,
    disks,
    host_exposure,
    rewrite,
    tree,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.layout import Layout
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import (
    ExistingVm,
    HostFacts,
    MadeFile,
    PlannedFile,
    PlannedState,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.tree import TreeDisk, TreeState

_MAX_HEADS_BYTES = 32 * 2**20  # libvirt leaves 64 KiB for each
_MAX_HEADS_NODES = 300_000
Heads = Mapping[str, memory_image.MemoryHead]  # of external memory images, by member


@dataclass(frozen=True)
class _Definition:
    """A definition to be rewritten, with the fates of its disks."""

    root: etree._Element
    fates: Mapping[str, disks.Fate]

    @property
    def chains(self) -> dict[str, tuple[Member, ...]]:
        """Layers of each of its disks that is in the archive, by target."""
        return {target: fate.chain for target, fate in self.fates.items() if isinstance(fate, disks.Restored)}


@dataclass(frozen=True)
class RestoredSnapshot:
    """A snapshot with all that belongs to it. ``image``: its external memory image; ``memory``: the definition in that."""

    tree: TreeState
    definitions: tuple[_Definition, ...]
    image: Member | None = None
    memory: _Definition | None = None
    warnings: tuple[Notice, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name."""
        return self.tree.name

    @property
    def all_definitions(self) -> tuple[_Definition, ...]:
        """Those of the snapshot and the one in its memory image."""
        return self.definitions if self.memory is None else (*self.definitions, self.memory)


_MEMORY_MAY_NOT_FIT = Notice(
    Code.CHANGED, "A memory image may not fit the VM without that; the disks can be taken back all the same."
)


@dataclass(frozen=True)
class PlannedTree:
    """The snapshots to define, memory images with their new heads, and what there is to say."""

    states: tuple[PlannedState, ...]
    files: tuple[PlannedFile, ...]
    warnings: tuple[Notice, ...]
    problems: tuple[str, ...]


def memory_heads(read: Callable[[str, int, int], bytes], configuration: Configuration) -> Heads:
    """Heads of the memory images that snapshots have; ``read``: bytes of a member from an offset. Raises HostileError."""
    heads: dict[str, memory_image.MemoryHead] = {}
    total = nodes = 0
    for state in tree.read(configuration):
        image = _image(state, configuration)
        if image is not None and image.name not in heads:
            what = f"The memory image {image.name} of the snapshot {state.name}"
            length = memory_image.head_bytes(read(image.name, 0, memory_image.HEADER_BYTES), what)
            total += length
            if total > _MAX_HEADS_BYTES:
                raise HostileError(what, f"the heads of all images have more than {_MAX_HEADS_BYTES} bytes")
            heads[image.name] = memory_image.parse(read(image.name, 0, length), what)
            nodes += sum(map(heads[image.name].xml.count, "<="))  # at least as many as it has
            if nodes > _MAX_HEADS_NODES:
                raise HostileError(
                    what, f"the heads of all images have more than {_MAX_HEADS_NODES} elements and attributes"
                )
    return heads


def definitions(configuration: Configuration, heads: Heads) -> list[etree._Element]:
    """Every definition in the snapshots and memory images of a point, as they are in the archive."""
    found = [root for state in tree.read(configuration) for root in state.definitions]
    return found + [_memory_root(name, head) for name, head in heads.items()]


def gather(
    configuration: Configuration, host: HostFacts, others: Sequence[ExistingVm], heads: Heads, *, trusted: bool
) -> tuple[RestoredSnapshot, ...]:
    """The snapshots of a point and what becomes of every disk in them, parents first. Raises HostileError."""
    found = []
    for state in tree.read(configuration):
        image = _image(state, configuration)
        roots = [*state.definitions]
        problems = []
        if image is not None and image.name in heads:
            roots.append(_memory_root(image.name, heads[image.name]))
        elif state.memory == "external":
            problems.append("its memory image is not in the archive")
        problems += [
            f"it is a VM of type {root.get('type')!r}" for root in roots if root.get("type") not in rewrite.VM_TYPES
        ]
        decisions = [disks.decide(configuration, root, host, others, trusted=trusted, then=True) for root in roots]
        problems += [problem for decision in decisions for problem in decision.problems]
        judged = [_Definition(root, decision.fates) for root, decision in zip(roots, decisions)]
        count = len(state.definitions)
        found.append(
            RestoredSnapshot(
                tree=state,
                definitions=tuple(judged[:count]),
                image=image,
                memory=judged[count] if len(judged) > count else None,
                warnings=tuple(notice for decision in decisions for notice in decision.warnings),
                problems=tuple(dict.fromkeys(problems)),
            )
        )
    return tuple(found)


def _image(state: TreeState, configuration: Configuration) -> Member | None:
    images = (member for member in configuration.members if member.role is Role.MEMORY and state.memory_path)
    return next((member for member in images if member.former_path == state.memory_path), None)


def _memory_root(name: str, head: memory_image.MemoryHead) -> etree._Element:
    root = _xml.parse(head.xml, f"The configuration in the memory image {name}")
    if root.tag != "domain":
        raise HostileError(f"The memory image {name}", f"it holds a <{root.tag}>")
    return root


def chains(found: Iterable[RestoredSnapshot]) -> list[tuple[Member, ...]]:
    """The layers that snapshots stand on, disk by disk, lowest first."""
    return [chain for state in found for each in state.all_definitions for chain in each.chains.values()]


def memories(found: Iterable[RestoredSnapshot]) -> list[tuple[Member, str]]:
    """Memory images, each once, with the name of their snapshot."""
    images = {state.image.name: (state.image, state.name) for state in found if state.image is not None}
    return list(images.values())


def frozen(found: Iterable[RestoredSnapshot]) -> frozenset[str]:
    """Members whose content is a snapshot's: nothing may be written to them."""
    return frozenset(
        state.definitions[0].chains[disk.target][-1].name
        for state in found
        for disk in state.tree.disks
        if disk.mode == "external" and disk.target in state.definitions[0].chains
    )


def overlays(found: Iterable[RestoredSnapshot]) -> dict[str, str]:
    """By target, the file that took the writes after the current snapshot."""
    current = [state.tree for state in found if state.tree.current]
    return {
        disk.target: disk.overlay for state in current for disk in (*state.disks, *state.revert_disks) if disk.overlay
    }


def other_macs(configuration: Configuration, heads: Heads, known: Sequence[str]) -> list[str]:
    """All addresses in them that are not known yet, in lower case, each once."""
    found = (mac for root in definitions(configuration, heads) for mac in definition.mac_addresses(root))
    return list(dict.fromkeys(mac for mac in found if mac and mac not in known))


def plan(found: Sequence[RestoredSnapshot], layout: Layout, now: rewrite.Circumstances, heads: Heads) -> PlannedTree:
    """Rewrites everything in the snapshots for the new identity and the new places."""
    notes: dict[Notice, list[str]] = {}
    problems: list[str] = []
    planned = []
    new_heads: dict[str, PlannedFile] = {}
    paths = {file.member.former_path: file.path for file in layout.files if file.member.former_path}
    for state in found:
        judged = () if state.problems else state.all_definitions  # what was not decided cannot be written down
        outcomes = [rewrite.rewrite(each.root, each.fates, _tops(each, layout), now) for each in judged]
        lacking = dict.fromkeys(item for outcome in outcomes for item in outcome.lacking)
        texts = [*state.problems, *([f"this host does not have {', '.join(lacking)}"] if lacking else [])]
        skipped = dict.fromkeys(item for outcome in outcomes for item in outcome.skipped)
        for notice in (*state.warnings, *(notice for outcome in outcomes for notice in outcome.warnings)):
            notes.setdefault(notice, []).append(state.name)
        for item in skipped:
            left_out = Notice(Code.LEFT_OUT, f"{item.device} is left out: {item.reason}.")
            notes.setdefault(left_out, []).append(state.name)
        if skipped and state.tree.memory != "no":
            notes.setdefault(_MEMORY_MAY_NOT_FIT, []).append(state.name)
        if state.tree.cookie is not None and not now.trusted:
            host_exposure.only_allowed(state.tree.cookie)
        memory_path = ""
        if state.image is not None and state.memory is not None:
            file = layout.of_member(state.image.name)
            memory_path = file.path
            try:
                new_heads[file.path] = _with_head(file, state.memory, heads[state.image.name], now, bool(skipped))
            except RefusedError as error:
                texts.append(error.why)
        problems += [f"the snapshot {state.name}: {text}" for text in dict.fromkeys(texts)]
        planned.append(_planned(state, memory_path, paths, layout, now))
    warnings = [notice.about(f"In the snapshot {', '.join(dict.fromkeys(who))}") for notice, who in notes.items()]
    resuming = [state.name for state in found if state.tree.memory != "no"]
    if resuming and any(former != new for former, new in now.macs.items()):
        text = f"A guest that is resumed from the memory in {', '.join(resuming)} goes on with its former MAC addresses"
        warnings.append(Notice(Code.SAME_NETWORK, f"{text}: keep it off the original's network."))
    files = tuple(new_heads.get(file.path, file) for file in layout.files)
    return PlannedTree(tuple(planned), files, tuple(warnings), tuple(problems))


def _tops(each: _Definition, layout: Layout) -> dict[str, PlannedFile | MadeFile]:
    return {target: layout.of_member(chain[-1].name) for target, chain in each.chains.items()}


def _with_head(
    file: PlannedFile, memory: _Definition, head: memory_image.MemoryHead, now: rewrite.Circumstances, lost: bool
) -> PlannedFile:
    """The memory image for the new identity. One with a codec that is not known stays as it is where everything else does."""
    what = f"The memory image {file.member.name}"
    if head.renamable:
        return replace(file, head=memory_image.with_xml(head, memory.root, what), former_head=head.raw)
    former = _xml.parse(head.xml, what)
    same = (former.findtext("name"), former.findtext("uuid")) == (now.who.name, now.who.uuid)
    if not same or lost or _sources(former) != _sources(memory.root):
        raise RefusedError(
            what,
            "its memory image is of a codec that is not known, so it fits only the former name, uuid and places "
            "(no 'name', 'uuid: keep')",
        )
    return replace(file, head=head.raw, former_head=head.raw)


def _sources(root: etree._Element) -> dict[str, str]:
    return {disk.target: disk.source for disk in disks.elements(root)}


def _planned(
    state: RestoredSnapshot, memory_path: str, paths: Mapping[str, str], layout: Layout, now: rewrite.Circumstances
) -> PlannedState:
    here = {disk.target for disk in disks.elements(state.tree.domain)}

    def placed(listed: Sequence[TreeDisk]) -> list[TreeDisk]:
        return [
            replace(disk, overlay=_overlay(state, disk, paths, layout, now)) for disk in listed if disk.target in here
        ]

    listed = placed(state.tree.disks)
    listed += [TreeDisk(target, "no") for target in sorted(here - {disk.target for disk in listed})]
    xml = tree.document(state.tree, memory_path, listed, placed(state.tree.revert_disks))
    return PlannedState(state.name, xml, state.tree.parent, state.tree.current)


def _overlay(
    state: RestoredSnapshot, disk: TreeDisk, paths: Mapping[str, str], layout: Layout, now: rewrite.Circumstances
) -> str:
    """Where the file is now that took the writes after a snapshot."""
    if disk.mode != "external":
        return ""
    if disk.overlay in paths:
        return paths[disk.overlay]
    top = layout.tops.get(disk.target)
    chain = state.definitions[0].chains.get(disk.target)
    if state.tree.current and isinstance(top, MadeFile):
        return top.path
    # of a branch that nobody went on with: libvirt wants a name, but there is no such file, and never one of somebody else's
    absent = f".{names.stem(now.who.name)}-{names.stem(disk.target)}.{names.stem(state.name)}-{now.who.uuid}.absent"
    directory = os.path.dirname(layout.of_member(chain[-1].name).path) if chain else now.host.archive_place.path
    return os.path.join(directory, absent)
