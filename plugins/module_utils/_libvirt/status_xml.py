# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""libvirt's own note about a running VM (its status file), where a libvirtd that died in a merge has left it wrong.

While it ends an active commit, libvirt before 10 writes ``<mirror job=''>``, which it cannot read itself: a libvirtd that dies
in that moment forgets a running VM. One that dies a little earlier believes in a job that QEMU has ended, and refuses every
other one. Of an inner commit it lets QEMU forget the job before it notes the shorter chain: one that dies in between never
learns of it. libvirt offers no call for any of them: the note is put right, and the daemon, restarted, reads it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from types import MappingProxyType

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import blockjobs, daemon, monitor
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import domain as domain_xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    connect,
    find_domain,
    libvirt,
    translate,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import target_of

_DIRECTORY = "/run/libvirt/qemu"
_SETTLED_S = 30.0
_NOTHING: Mapping[str, Collection[str]] = MappingProxyType({})


def path_of(vm_name: str) -> str:
    """Where libvirt keeps its note about a running VM."""
    return os.path.join(_DIRECTORY, f"{vm_name}.xml")


def is_unreadable(vm_name: str) -> bool:
    """Whether libvirt cannot read its own note about the VM."""
    with suppress(OSError), open(path_of(vm_name), encoding="utf-8") as file:
        return "job=''" in file.read()
    return False


def put_right(text: str, ghosts: Collection[str], merged: Mapping[str, Collection[str]]) -> str:
    """The note without the block jobs of ``ghosts``, those that libvirt cannot read, and the links to ``merged`` layers.

    The same text when there is none of them. See mend().
    """
    root = _xml.parse(text, "libvirt's note about a running VM")
    changed = False
    for disk in root.iterfind("domain/devices/disk"):
        name = target_of(disk)
        for mirror in disk.findall("mirror"):
            if not mirror.get("job") or name in ghosts:
                disk.remove(mirror)
                changed = True
        changed |= _drop_links(disk, merged.get(name, ()))
    return "<?xml version='1.0'?>\n" + _xml.text(root) + "\n" if changed else text


def _drop_links(disk: etree._Element, paths: Collection[str]) -> bool:
    """Whether there was one to drop. What each stood on takes its place, as libvirt itself has it after a merge."""
    changed = False
    above = disk
    link = above.find("backingStore")
    while link is not None:
        source, below = link.find("source"), link.find("backingStore")
        if source is not None and below is not None and os.path.realpath(source.get("file", "")) in paths:
            above.replace(link, below)
            changed = True
        else:
            above = link
        link = below
    return changed


def mend(
    conn: Connection, domain: Domain, ghosts: Collection[str] = (), merged: Mapping[str, Collection[str]] = _NOTHING
) -> tuple[Connection, Domain]:
    """Make libvirt find the running VM again, or forget what QEMU has ended; the two, opened anew.

    ``ghosts`` are targets with block jobs to forget, ``merged`` layers to forget (resolved paths) by target.

    Raises KvmopsError, with nothing changed, when that is not what is wrong, or when other VMs would suffer.
    """
    name, uuid, uri = str(domain.name()), str(domain.UUIDString()), str(conn.getURI())
    path = path_of(name)
    try:
        with open(path, encoding="utf-8") as file:
            before = file.read()
    except OSError as error:
        raise KvmopsError(path, f"cannot be read ({error.strerror})") from error
    after = put_right(before, ghosts, merged)
    if after == before:
        raise KvmopsError(path, "it is not what keeps libvirt from the VM")
    _require_qemu(_xml.parse(before, path), uuid, path)
    _require_others_idle(conn, uuid)
    running = daemon.find(uri)
    _write(path, after)
    running.restart()
    fresh = connect(uri)
    return fresh, _wait_for(find_domain(fresh, uuid))


def _require_qemu(root: etree._Element, uuid: str, path: str) -> None:
    """The note speaks of a process that lives and runs this very VM."""
    with suppress(OSError), open(f"/proc/{int(root.get('pid', '0'))}/cmdline", "rb") as file:
        if uuid.encode() in file.read().split(b"\0"):
            return
    raise KvmopsError(path, "the QEMU process it names does not run any more")


def _require_others_idle(conn: Connection, uuid: str) -> None:
    """A restart in the middle of a snapshot or a merge is what brought us here: not for another VM."""
    try:
        for domain in conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            if domain.UUIDString() == uuid:
                continue
            disks = [disk.target for disk in domain_xml.parse(domain.XMLDesc(0)).disks if disk.path or disk.volume]
            busy = blockjobs.domain_job(domain) or any(domain.blockJobInfo(target, 0) for target in disks)
            if busy:
                raise KvmopsError(
                    f"The VM {domain.name()}", "a job is at work on it, and libvirtd must not restart now"
                )
    except libvirt.libvirtError as error:
        raise translate(error, "The other VMs of this host") from error


def _write(path: str, text: str) -> None:
    """Replace the note; libvirt looks at names that end in .xml only."""
    fresh = f"{path}.kvmops"
    with suppress(FileNotFoundError):
        os.unlink(fresh)
    fd = _files.create(fresh)
    try:
        _files.write_all(fd, text.encode(), 0, fresh)
    finally:
        os.close(fd)
    os.replace(fresh, path)


def _wait_for(domain: Domain) -> Domain:
    """The VM, when the new daemon talks to its QEMU."""
    end = time.monotonic() + _SETTLED_S
    while True:
        try:
            monitor.execute(domain, "query-status")
            return domain
        except KvmopsError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)
