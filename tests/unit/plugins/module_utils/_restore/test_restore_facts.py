# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a restore looks up on the host, with a libvirt that has nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._restore import facts
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import Capabilities, HostFacts, Place
from ansible_collections.kvmops.backup.plugins.module_utils._template import find
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._restore.restore_values import (
    DISKS,
    configuration,
    domain_xml,
    request,
)
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._restore.test_restore_tree import (
    definition,
    state,
)


def gathered(monkeypatch: pytest.MonkeyPatch, point: Any) -> HostFacts:
    conn = SimpleNamespace(
        listAllDomains=lambda _flags: [], listAllNetworks=lambda _flags: [], getURI=lambda: "test:///x"
    )
    monkeypatch.setattr(facts.storage, "pools", lambda _conn: [])
    monkeypatch.setattr(facts, "_capabilities", lambda *_arguments: Capabilities())
    monkeypatch.setattr(facts, "_place", lambda *_arguments, path="", pool="": Place(path, pool))
    return facts.gather(conn, point, request(), "/backup/web.tar", {})


@pytest.mark.parametrize("where", ["definition", "saved state"])
def test_luns_and_media_are_looked_up_wherever_they_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    lun, medium = tmp_path / "lun", tmp_path / "tools.iso"
    lun.touch()
    medium.touch()
    devices = (
        f"<disk type='block' device='lun'><source dev='{lun}'/><target dev='sdz' bus='scsi'/></disk>"
        f"<disk type='file' device='cdrom'><source file='{medium}'/><target dev='sda' bus='sata'/></disk>"
    )
    if where == "definition":
        point = configuration(domain_xml(DISKS + devices))
    else:
        taken = state("then", "/vms/web.qcow2", domain=definition("/vms/web.qcow2", devices))
        point = configuration(saved_states=(taken,))
    found = gathered(monkeypatch, point)
    assert found.block_devices[str(lun)].problem == "is not a block device"
    assert str(medium) in found.files and set(found.former) >= {"vms"}


@pytest.mark.parametrize(
    ("code", "goes_on"), [(42, True), (72, True), (38, False)]
)  # no such domain, saved state; system error
def test_a_vm_that_goes_away_while_all_are_looked_at_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, code: int, goes_on: bool
) -> None:
    """A restore test next door removes its VM."""
    libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed here")
    monkeypatch.setattr(facts.storage, "pools", lambda _conn: [])

    def gone(*_arguments: Any) -> Any:
        error = libvirt.libvirtError("gone")
        error.err = (code, 10, "gone", 1, "", None, None, -1, -1)
        raise error

    conn = SimpleNamespace(listAllDomains=lambda _flags: [SimpleNamespace(XMLDesc=gone)])
    monkeypatch.setattr(facts, "_existing_vm", gone)
    if goes_on:
        assert find.templates(conn) == ()
        with pytest.raises(AttributeError, match="listAllNetworks"):  # the next thing that is asked for
            facts.gather(conn, configuration(), request(), "/backup/web.tar", {})
    else:
        with pytest.raises(KvmopsError, match="gone"):
            find.templates(conn)
        with pytest.raises(KvmopsError, match="gone"):
            facts.gather(conn, configuration(), request(), "/backup/web.tar", {})
