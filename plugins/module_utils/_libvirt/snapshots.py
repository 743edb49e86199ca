# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Snapshots of a VM: the tree, a new one, its bookkeeping."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import files
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Domain, libvirt, translate


@dataclass(frozen=True)
class Snapshot:
    """One node of the tree. ``xml`` is libvirt's whole <domainsnapshot>."""

    name: str
    xml: str
    parent: str  # "" for a root
    current: bool
    external: bool  # some disk's state is frozen in a file of its own (else inside the qcow2)
    memory: str  # "no", "internal" or "external"
    memory_path: str  # of an external memory image, else ""
    state: str  # of the VM then: running, paused, shutoff, disk-snapshot
    created: int  # unix time


def tree(domain: Domain, *, secrets: bool = True) -> tuple[Snapshot, ...]:
    """All snapshots, parents before children, siblings by time; without `secrets` their XML has no passwords.

    One that libvirt is still at work on is not among them.
    """
    try:
        # all at once, in topological order, libvirt fails while it is at work on one: that one has no parent yet
        roots = domain.listAllSnapshots(libvirt.VIR_DOMAIN_SNAPSHOT_LIST_ROOTS)
        below = libvirt.VIR_DOMAIN_SNAPSHOT_LIST_DESCENDANTS
        nodes = [
            describe(
                each.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE if secrets else 0),
                current=bool(each.isCurrent()),
            )
            for root in roots
            for each in (root, *root.listAllChildren(below))
        ]
    except libvirt.libvirtError as error:
        raise translate(error, f"The snapshots of {domain.name()}") from error
    return order(nodes)


def describe(xml: str, *, current: bool) -> Snapshot:
    """The node that a <domainsnapshot> stands for. Pure."""
    root = _xml.parse(xml, "A snapshot")
    memory = root.find("memory")
    return Snapshot(
        name=root.findtext("name", ""),
        xml=xml,
        parent=root.findtext("parent/name", ""),
        current=current,
        external=any(disk.get("snapshot") == "external" for disk in root.iterfind("disks/disk")),
        memory="no" if memory is None else memory.get("snapshot", "no"),
        memory_path="" if memory is None else memory.get("file", ""),
        state=root.findtext("state", ""),
        created=int(root.findtext("creationTime", "0") or 0),
    )


def order(nodes: Sequence[Snapshot]) -> tuple[Snapshot, ...]:
    """Parents before children, siblings by time and name; nodes whose parent is missing come as roots. Pure."""
    names = {node.name for node in nodes}
    children: dict[str, list[Snapshot]] = {}
    for node in sorted(nodes, key=lambda each: (each.created, each.name)):
        children.setdefault(node.parent if node.parent in names else "", []).append(node)
    result: list[Snapshot] = []
    pending = list(reversed(children.get("", [])))
    while pending:
        node = pending.pop()
        result.append(node)
        pending.extend(reversed(children.get(node.name, [])))
    return tuple(result)


def document(
    name: str, description: str, overlays: Sequence[tuple[str, str]], excluded: Sequence[str], memory_path: str = ""
) -> str:
    """The <domainsnapshot> to create: every disk listed, overlays as (target, qcow2 file), the others with snapshot='no'. Pure."""
    root = etree.Element("domainsnapshot")
    etree.SubElement(root, "name").text = name
    etree.SubElement(root, "description").text = description
    if memory_path:
        etree.SubElement(root, "memory", snapshot="external", file=memory_path)
    else:
        etree.SubElement(root, "memory", snapshot="no")
    disks = etree.SubElement(root, "disks")
    for target, path in overlays:
        disk = etree.SubElement(disks, "disk", name=target, snapshot="external", type="file")
        etree.SubElement(disk, "driver", type="qcow2")
        etree.SubElement(disk, "source", file=path)
    for target in excluded:
        etree.SubElement(disks, "disk", name=target, snapshot="no")
    return _xml.text(root)


def create(domain: Domain, xml: str, *, memory: bool, quiesce: bool) -> str:
    """Create an external snapshot; returns its whole XML. The VM runs on. Raises libvirtError."""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    # LIVE keeps the guest running while its memory is written; memory and DISK_ONLY exclude each other
    flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE if memory else libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    if quiesce:
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE
    snapshot = domain.snapshotCreateXML(xml, flags)
    return str(snapshot.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE))


def checkpoints(domain: Domain) -> tuple[str, ...]:
    """Names of the VM's checkpoints, which other backup tools make."""
    try:
        return tuple(str(each.getName()) for each in domain.listAllCheckpoints(0))
    except libvirt.libvirtError as error:
        raise translate(error, f"The checkpoints of {domain.name()}") from error


def why_not_beside(names: Sequence[str]) -> str:
    """Why an off VM with these checkpoints gets no snapshot. Pure. Source: libvirt 9 refuses all of it, 11 external ones."""
    return f"it has checkpoints ({', '.join(names)}), beside which libvirt makes and notes no snapshot while a VM is off"


def way_out_of_checkpoints(vm_name: str, names: Sequence[str]) -> str:
    """What a person can do about it. Pure."""
    each = "; ".join(f"virsh checkpoint-delete {vm_name} {name} --metadata" for name in names)
    return f"Let libvirt forget them, which ends the increments of the tool that made them: {each}"


def require_no_checkpoints(domain: Domain) -> None:
    """For what changes snapshots while the VM is off. Raises RefusedError."""
    names = checkpoints(domain)
    if names:
        name = str(domain.name())
        raise RefusedError(f"The VM {name}", why_not_beside(names), way_out_of_checkpoints(name, names))


def exists(domain: Domain, name: str) -> bool:
    """Whether the VM has a snapshot of that name."""
    return name in domain.snapshotListNames(0)


def redefine(domain: Domain, xml: str, *, current: bool) -> None:
    """Replace what libvirt knows about a snapshot of that name; ``current``: the VM stands on it from now on."""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | (libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if current else 0)
    try:
        domain.snapshotCreateXML(xml, flags)
    except libvirt.libvirtError as error:
        raise translate(error, f"A snapshot of {domain.name()}") from error


def finish_writes(domain: Domain) -> list[str]:
    """Write again what a libvirtd was killed in writing: it leaves NAME.xml.new, which every later one reads beside NAME.xml.

    Without, a snapshot that is deleted comes back at a restart of libvirtd, and may claim to be the current one. Returns
    what libvirt refuses, one sentence each.
    """
    refused = []
    for node in tree(domain):
        unfinished = os.path.join(files.of_snapshots(domain.name()), f"{node.name}.xml.new")
        if os.path.lexists(unfinished):
            try:
                redefine(domain, node.xml, current=node.current)
            except KvmopsError as error:
                refused.append(f"{unfinished} stays behind, which a libvirtd that was killed has left: {error}")
    return refused


def stand_on(domain: Domain, name: str) -> bool:
    """Make a snapshot the current one again where none is: a libvirtd that dies in taking one forgets which; False if not so."""
    nodes = tree(domain)
    lost = next((node for node in nodes if node.name == name), None)
    if lost is None or any(node.current for node in nodes):
        return False
    redefine(domain, lost.xml, current=True)
    return True


def forget(domain: Domain, name: str) -> None:
    """Remove the bookkeeping of one snapshot, not its files; none of that name is fine."""
    try:
        domain.snapshotLookupByName(name, 0).delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
            raise translate(error, f"The snapshot {name} of {domain.name()}") from error


def delete_internal(domain: Domain, name: str) -> None:
    """Delete an internal snapshot from the images that the running VM writes to, and forget it; none is fine."""
    try:
        domain.snapshotLookupByName(name, 0).delete(0)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
            raise translate(error, f"The snapshot {name} of {domain.name()}") from error


def revert_internal(domain: Domain, name: str) -> None:
    """Let libvirt bring back an internal snapshot: disks, memory if it has one, and definition."""
    try:
        domain.revertToSnapshot(domain.snapshotLookupByName(name, 0), libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE)
    except libvirt.libvirtError as error:
        raise translate(error, f"The snapshot {name} of {domain.name()}") from error
