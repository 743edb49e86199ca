# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The snapshot tree of a point: read without trusting it, and written anew for libvirt. Pure.

A <domainsnapshot> from an archive is never passed on: what is understood is taken out of it, checked and rewritten, and a new
document is made of that. Its definitions go through the same rules as the VM's own (plan.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, SnapshotNode
from ansible_collections.kvmops.backup.plugins.module_utils._errors import HostileError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree

_POWER = (
    "nostate", "running", "blocked", "paused", "shutdown", "shutoff", "crashed", "pmsuspended", "disk-snapshot",
)  # fmt: skip
_MODES = ("no", "internal", "external")
_COOKIE_PARTS = ("cpu", "slirpHelper")
_MAX_STATES = 1000
_MAX_NODES = 400_000  # elements and attributes of all together; a configuration of 8 MiB that libvirt wrote has fewer
_MAX_NAME = 200


@dataclass(frozen=True)
class TreeDisk:
    """What a snapshot says about one disk. ``overlay``: the file that took the writes from then on ("" if none is named)."""

    target: str
    mode: str
    overlay: str = ""


@dataclass(frozen=True)
class TreeState:
    """One snapshot. ``domain`` and ``inactive`` are definitions of the VM then, each a tree of its own to be rewritten.

    ``memory``: no, internal or external; ``memory_path``: the former place of an external image.
    ``revert_disks``: as ``disks``, for the overlays that libvirt made when the VM was last reverted to it.
    """

    name: str
    parent: str
    current: bool
    description: str
    power: str
    created: int
    memory: str
    memory_path: str
    disks: tuple[TreeDisk, ...]
    revert_disks: tuple[TreeDisk, ...]
    domain: etree._Element
    inactive: etree._Element | None
    cookie: etree._Element | None

    @property
    def definitions(self) -> tuple[etree._Element, ...]:
        """All definitions in it."""
        return (self.domain,) if self.inactive is None else (self.domain, self.inactive)


def read(configuration: Configuration) -> tuple[TreeState, ...]:
    """The tree, parents before children. Raises HostileError for what libvirt would never have written."""
    what = f"The snapshots of {configuration.vm_name}"
    if len(configuration.snapshots) > _MAX_STATES:
        raise HostileError(what, f"there are {len(configuration.snapshots)} of them")
    found: dict[str, TreeState] = {}
    nodes = 0
    for saved in configuration.snapshots:
        state = _state(saved)
        nodes += sum(
            1 + len(each.attrib)
            for root in (*state.definitions, state.cookie)
            if root is not None
            for each in root.iter()
        )
        if nodes > _MAX_NODES:
            raise HostileError(what, f"they have more than {_MAX_NODES} elements and attributes")
        found[state.name] = state
    if len(found) != len(configuration.snapshots):
        raise HostileError(what, "two of them have the same name")
    if sum(state.current for state in found.values()) > 1:
        raise HostileError(what, "more than one of them is the current one")
    ordered: dict[str, TreeState] = {}
    while len(ordered) < len(found):
        ready = [s for s in found.values() if s.name not in ordered and (not s.parent or s.parent in ordered)]
        if not ready:
            raise HostileError(what, "the parent of one is missing, or they run in a circle")
        ordered.update({state.name: state for state in ready})
    return tuple(ordered.values())


def _state(saved: SnapshotNode) -> TreeState:
    what = f"The snapshot {saved.name[:_MAX_NAME]!r}"
    root = _xml.parse(saved.xml, what)
    name, parent = root.findtext("name") or "", root.findtext("parent/name") or ""
    domain, inactive, cookie = root.find("domain"), root.find("inactiveDomain"), root.find("cookie")
    memory = root.find("memory")
    if root.tag != "domainsnapshot" or domain is None:
        raise HostileError(what, "it is no whole <domainsnapshot>")
    if (name, parent) != (saved.name, saved.parent):
        raise HostileError(what, "its XML is that of another one")
    # libvirt makes a file name of it
    if not name or len(name) > _MAX_NAME or name.startswith(".") or "/" in name or any(ord(each) < 32 for each in name):
        raise HostileError(what, "that is no name for a snapshot")
    power, created = root.findtext("state") or "", (root.findtext("creationTime") or "").strip()
    if power not in _POWER or not (created.isascii() and created.isdigit() and len(created) < 12):
        raise HostileError(what, "its state or the time of its creation make no sense")
    mode = "no" if memory is None else memory.get("snapshot") or "no"
    disks = tuple(_disk(element, what) for element in root.iterfind("disks/disk"))
    revert_disks = tuple(_disk(element, what) for element in root.iterfind("revertDisks/disk"))
    if mode not in _MODES or len({disk.target for disk in disks}) != len(disks):
        raise HostileError(what, "its list of disks makes no sense")
    return TreeState(
        name=name,
        parent=parent,
        current=saved.current,
        description=root.findtext("description") or "",
        power=power,
        created=int(created),
        memory=mode,
        memory_path=(memory.get("file") or "") if memory is not None and mode == "external" else "",
        disks=disks,
        revert_disks=revert_disks,
        domain=_own(domain),
        inactive=None if inactive is None else _own(inactive),
        cookie=None if cookie is None else _own(cookie),
    )


def _own(element: etree._Element) -> etree._Element:
    """A tree of its own."""
    copy = deepcopy(element)
    copy.tail = None
    return copy


def _disk(element: etree._Element, what: str) -> TreeDisk:
    source = element.find("source")
    mode = element.get("snapshot") or "no"
    if mode not in _MODES or not element.get("name"):
        raise HostileError(what, "its list of disks makes no sense")
    return TreeDisk(element.get("name") or "", mode, (source.get("file") or "") if source is not None else "")


def document(state: TreeState, memory_path: str, disks: Sequence[TreeDisk], revert_disks: Sequence[TreeDisk]) -> str:
    """The <domainsnapshot> for libvirt. The state's definitions have been rewritten; all paths are the new ones."""
    root = etree.Element("domainsnapshot")
    etree.SubElement(root, "name").text = state.name
    if state.description:
        etree.SubElement(root, "description").text = state.description
    etree.SubElement(root, "state").text = state.power
    if state.parent:
        etree.SubElement(etree.SubElement(root, "parent"), "name").text = state.parent
    etree.SubElement(root, "creationTime").text = str(state.created)
    memory = etree.SubElement(root, "memory", snapshot=state.memory)
    if memory_path:
        memory.set("file", memory_path)
    _disk_list(root, "disks", disks)
    if revert_disks:
        _disk_list(root, "revertDisks", revert_disks)
    for definition in state.definitions:
        root.append(definition)
    if state.cookie is not None:
        for part in list(state.cookie):
            if part.tag not in _COOKIE_PARTS:
                state.cookie.remove(part)
        root.append(state.cookie)
    return _xml.text(root)


def _disk_list(root: etree._Element, tag: str, disks: Sequence[TreeDisk]) -> None:
    parent = etree.SubElement(root, tag)
    for disk in disks:
        element = etree.SubElement(parent, "disk", name=disk.target, snapshot=disk.mode)
        if disk.mode == "external":
            element.set("type", "file")
            etree.SubElement(element, "driver", type="qcow2")
            etree.SubElement(element, "source", file=disk.overlay)
