# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which libvirt a module may talk to."""

from __future__ import annotations

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection


class _Libvirt:
    """Answers as libvirt does, with aliases of its own."""

    libvirtError = RuntimeError

    @staticmethod
    def registerErrorHandler(*_arguments):
        pass

    @staticmethod
    def open(uri):
        class Conn:
            @staticmethod
            def getURI():
                return {"backup": "qemu+ssh://kvm02/system"}.get(uri, uri)

        return Conn()


@pytest.mark.parametrize(
    ("uri", "fine"),
    [
        ("qemu:///system", True),
        ("qemu:///session", True),
        ("qemu+unix:///system?socket=/run/other", True),
        ("qemu+tcp://127.0.0.1/system", True),
        ("qemu+ssh://root@kvm02/system", False),
        ("qemu+ssh://kvm02:2222/system", False),
        ("qemu://kvm02/system", False),
        ("backup", False),
    ],
)
def test_only_the_libvirt_of_this_host(monkeypatch, uri, fine):
    """A path of another host's VM would be looked up here, and may name another VM's disk."""
    monkeypatch.setattr(connection, "libvirt", _Libvirt)
    if fine:
        assert connection.connect(uri).getURI() == uri
        return
    with pytest.raises(RefusedError, match="another host"):
        connection.connect(uri)


@pytest.mark.parametrize(
    ("user", "uri", "fine"),
    [
        (0, "qemu:///system", True),
        (0, "qemu:///session", True),
        (1000, "qemu:///session", True),
        (1000, "qemu:///system", False),
        (1000, "qemu+unix:///system?socket=/run/other", False),
    ],
)
def test_only_root_changes_vms_of_the_system(monkeypatch, user, uri, fine):
    """Looking at them is for all whom libvirtd lets in."""
    monkeypatch.setattr(connection, "libvirt", _Libvirt)
    monkeypatch.setattr(connection.os, "geteuid", lambda: user)
    assert connection.connect(uri).getURI() == uri
    if fine:
        assert connection.connect_to_change(uri).getURI() == uri
        return
    with pytest.raises(RefusedError, match="root only") as refusal:
        connection.connect_to_change(uri)
    assert "become: true" in refusal.value.hint


@pytest.mark.parametrize(("user", "hinted"), [(0, False), (1000, True)])
def test_a_user_who_may_not_is_told_to_be_root(monkeypatch, user, hinted):
    """polkit's refusals have codes of their own: no agent to ask, no system bus, authentication failed."""
    libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed here")

    def refuse(_uri):
        raise libvirt.libvirtError("authentication unavailable: no polkit agent available")

    monkeypatch.setattr(libvirt, "open", refuse)
    monkeypatch.setattr(connection.os, "geteuid", lambda: user)
    with pytest.raises(KvmopsError, match="polkit") as refusal:
        connection.connect("qemu:///system")
    assert ("become: true" in refusal.value.hint) is hinted


def test_a_full_file_system_has_a_way_out():
    told = connection.translate(RuntimeError("failed to format image: No space left on device"), "The snapshot s")
    assert (told.what, told.hint[:10]) == ("The snapshot s", "Free space")
    assert not connection.translate(RuntimeError("failed"), "The snapshot s").hint
