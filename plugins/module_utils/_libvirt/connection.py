# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The way to the libvirt binding, and from its errors to ours.

The binding has no type stubs: ``Connection``, ``Domain`` and ``Snapshot`` stand for its objects everywhere in the collection.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.kvmops.backup.plugins.module_utils._errors import BusyError, KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import libvirt, libvirt_qemu

__all__ = [
    "Connection", "Domain", "Snapshot", "connect", "connect_to_change", "find_domain", "is_connection_lost", "libvirt",
    "libvirt_qemu", "translate", "unless_gone",
]  # fmt: skip
Connection = Any
Domain = Any
Snapshot = Any
_THIS_HOST = ("localhost", "127.0.0.1", "::1")


def connect(uri: str = "qemu:///system") -> Connection:
    """A read-write connection. Raises KvmopsError when the binding is missing or the daemon does not answer, RefusedError for
    another host's: paths of its VMs would be looked up on this one."""
    if libvirt is None:
        raise KvmopsError(
            f"The connection to {uri}",
            "the Python binding of libvirt is not installed",
            "Install the package python3-libvirt (libvirt-python) for the Python that runs the module.",
        )
    libvirt.registerErrorHandler(_quiet, None)  # the binding prints every error to stderr otherwise
    _require_local(uri)
    try:
        conn = libvirt.open(uri)
        _require_local(str(conn.getURI()))  # it may have been an alias
        return conn
    except libvirt.libvirtError as error:
        failed = translate(error, f"The connection to {uri}")
        if os.geteuid() and not failed.hint:  # polkit has many ways to say no
            raise KvmopsError(failed.what, failed.why, "Run as root (become: true), or as a user that may.") from error
        raise failed from error


def connect_to_change(uri: str) -> Connection:
    """A connection for changing VMs. Raises RefusedError for a user whose locks and journals root's runs would not see.

    Who may use qemu:///system without being root (by its socket's group, by polkit) keeps them below the own home directory,
    and may as a rule neither read images nor remove overlays.
    """
    conn = connect(uri)
    if os.geteuid() and urlsplit(str(conn.getURI())).path == "/system":
        raise RefusedError(
            f"The connection to {uri}",
            "its VMs are changed by root only: every run must find the locks and journals of the others",
            "Run as root (become: true).",
        )
    return conn


def _require_local(uri: str) -> None:
    host = urlsplit(uri).hostname
    if host and host not in _THIS_HOST:
        raise RefusedError(
            f"The connection to {uri}",
            "it leads to another host, and the files of its VMs are not here",
            f"Run the task on that host (delegate_to: {host}) with uri: qemu:///system.",
        )


def find_domain(conn: Connection, name_or_uuid: str) -> Domain:
    """The domain of that name, else of that uuid. Raises RefusedError when there is none."""
    for lookup in (conn.lookupByName, conn.lookupByUUIDString):
        try:
            return lookup(name_or_uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG):
                raise translate(error, f"The VM {name_or_uuid}") from error
    raise RefusedError(
        f"The VM {name_or_uuid}",
        "there is no VM of that name or uuid on this host",
        "virsh list --all shows what there is.",
    )


def by_uuid(conn: Connection, uuid: str) -> Domain | None:
    """The domain of that uuid, None if there is none."""
    return _unless_missing(conn.lookupByUUIDString, uuid)


def by_name(conn: Connection, name: str) -> Domain | None:
    """The domain of that name, None if there is none."""
    return _unless_missing(conn.lookupByName, name)


def _unless_missing(lookup: Callable[[str], Domain], name_or_uuid: str) -> Domain | None:
    try:
        return lookup(name_or_uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise translate(error, f"The VM {name_or_uuid}") from error


def lives(conn: Connection) -> bool:
    """Whether libvirtd still answers on this connection."""
    try:
        conn.getLibVersion()
    except libvirt.libvirtError:
        return False
    return True


def renewed(conn: Connection) -> Connection:
    """The same connection, opened anew if libvirtd has been restarted since. Raises KvmopsError when it does not answer."""
    try:
        conn.getLibVersion()
    except libvirt.libvirtError as error:
        if not is_connection_lost(error):
            raise translate(error, f"The connection to {conn.getURI()}") from error
        return connect(conn.getURI())
    return conn


def again(conn: Connection, domain: Domain) -> tuple[Connection, Domain]:
    """The same two on a connection that lives, see renewed()."""
    fresh = renewed(conn)
    return fresh, domain if fresh is conn and domain.connect() is conn else find_domain(fresh, domain.UUIDString())


def translate(error: Exception, what: str) -> KvmopsError:
    """Our error for one of libvirt's: ``what`` names the object and stays the first part of the text."""
    code = error.get_error_code() if isinstance(error, libvirt.libvirtError) else None
    why = str(error)
    if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        return BusyError(what, why, "Another job is at work on the VM: virsh domjobinfo shows it.")
    if code in (libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_SYSTEM_ERROR) or is_connection_lost(error):
        return KvmopsError(
            what, why, "Check that libvirtd (or virtqemud) runs on this host and that this user may use it."
        )
    if os.strerror(errno.ENOSPC) in why:
        return KvmopsError(what, why, "Free space where the VM's disks are, and run the task again.")
    return KvmopsError(what, why)


@contextlib.contextmanager
def unless_gone() -> Iterator[None]:
    """For looking through all VMs: a VM, or a snapshot, that is no longer there when its turn comes is passed over."""
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT):
            raise


def is_connection_lost(error: Exception) -> bool:
    """Whether a libvirt error says that the daemon went away, so that nothing is known about the call's effect."""
    if not isinstance(error, libvirt.libvirtError):
        return False
    return error.get_error_domain() == libvirt.VIR_FROM_RPC or (
        error.get_error_code() in (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_SYSTEM_ERROR)
        and error.get_error_domain() == libvirt.VIR_FROM_REMOTE
    )


def _quiet(_context: object, _error: object) -> None:
    return None
