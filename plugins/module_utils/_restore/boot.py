# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Kernel, firmware and the like: which come from the archive, and how definitions get them. Pure.

A definition is only ever pointed to a file that this restore writes, or to one of this host that has the digest in the archive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import boot_files
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import HostFacts


@dataclass(frozen=True)
class BootDecision:
    """`here`: paths that this host has as the archive does. `restored`: members that become files; `public`: names of those that
    everybody must be able to read."""

    here: frozenset[str] = frozenset()
    restored: tuple[Member, ...] = ()
    public: frozenset[str] = frozenset()


def decide(
    configuration: Configuration, roots: Iterable[etree._Element], host: HostFacts, *, trusted: bool
) -> BootDecision:
    """``roots``: the definitions that will be defined, as they are in the archive. One that is not ``trusted`` gets no file of
    this host, which libvirt would give to QEMU's user."""
    members = {m.former_path: m for m in configuration.members if m.role is Role.BOOT}
    wanted = [each for root in roots for each in boot_files.named(root) if each.path in members]
    here = {path for path in members if trusted and path in host.files and host.files[path].matches is True}
    restored = {each.path: members[each.path] for each in wanted if each.path not in here}
    public = {members[each.path].name for each in wanted if each.kind.public}
    return BootDecision(frozenset(here), tuple(restored.values()), frozenset(public))


def warnings(decision: BootDecision, paths: Mapping[str, str], host: HostFacts) -> list[Notice]:
    """``paths``: where each member goes, by its name."""
    return [
        Notice(
            Code.FROM_HOST,
            f"{member.former_path}, which QEMU loads for the VM, "
            f"{'is another file' if member.former_path in host.files else 'is not'} "
            f"on this host: the one in the archive goes to {paths[member.name]}.",
        )
        for member in decision.restored
    ]


@dataclass(frozen=True)
class Detached:
    """An element that was taken out of a definition, and where it was."""

    element: etree._Element
    parent: etree._Element
    position: int


def detach(root: etree._Element, places: Mapping[str, str]) -> list[Detached]:
    """Takes out what names a file in ``places`` (where it is now, by the former path), already pointed to it: no rule about
    files of the host applies to it. The kernel's command line goes with the kernel."""
    found = [each for each in boot_files.named(root) if each.path in places]
    elements = [each.element for each in found]
    for each in found:
        each.point_to(places[each.path])
    if root.find("os/kernel") in elements:
        elements += root.findall("os/cmdline")
    detached = []
    for element in elements:
        parent = _xml.parent_of(element)
        detached.append(Detached(element, parent, parent.index(element)))
        parent.remove(element)
    return detached


def attach(detached: list[Detached]) -> None:
    """Puts them back."""
    for each in reversed(detached):
        each.parent.insert(each.position, each.element)
