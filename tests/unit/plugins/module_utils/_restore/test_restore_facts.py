# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a restore looks up on the host, with a libvirt that has nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._restore import facts
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import (
    DiskState,
    HostCapabilities,
    HostFacts,
    Mark,
    RestorePlace,
)
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
    monkeypatch.setattr(facts, "_capabilities", lambda *_arguments: HostCapabilities())
    monkeypatch.setattr(facts, "_place", lambda *_arguments, path="", pool="": RestorePlace(path, pool))
    return facts.gather(conn, point, request(), "/backup/web.tar", {})


@pytest.mark.parametrize("where", ["definition", "snapshot"])
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
        point = configuration(snapshots=(taken,))
    found = gathered(monkeypatch, point)
    assert found.block_devices[str(lun)].problem == "is not a block device"
    assert str(medium) in found.files and set(found.former) >= {"vms"}


@pytest.mark.parametrize(
    ("code", "goes_on"), [(42, True), (72, True), (38, False)]
)  # no such domain, snapshot; system error
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

    conn = SimpleNamespace(listAllDomains=lambda flags: [] if flags else [SimpleNamespace(XMLDesc=gone)])
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


CD = "<disk type='file' device='cdrom'>{}<target dev='sda' bus='sata'/></disk>"


@pytest.mark.parametrize(
    ("devices", "strayed"),
    [
        (DISKS + CD.format("<source file='/iso/os.iso'/>"), set()),
        (DISKS + CD.format(""), set()),  # ejected
        (DISKS.replace("web.qcow2", "web.nightly") + CD.format(""), {"/vms/web.qcow2", "/vms/web.nightly"}),
        (DISKS.split("</disk>", maxsplit=1)[0] + "</disk>", {"/data/web.raw", "/iso/os.iso"}),
        (
            DISKS + "<disk type='network'><source protocol='rbd' name='p/i'/><target dev='vdc'/></disk>",
            {"p/i", "/iso/os.iso"},
        ),
        (
            DISKS.replace("dev='vda'", "dev='x'").replace("dev='vdb'", "dev='vda'").replace("dev='x'", "dev='vdb'")
            + CD.format(""),
            {"/vms/web.qcow2", "/data/web.raw"},
        ),
        (
            DISKS.replace("type='file' device", "type='volume' device", 1).replace(
                "file='/vms/web.qcow2'", "pool='vms' volume='web.qcow2'"
            )
            + CD.format(""),
            set(),
        ),
    ],
    ids=["as restored", "ejected", "an overlay", "one is gone", "one is new", "swapped", "as a volume"],
)
@pytest.mark.parametrize("pools", [{"vms": "/vms"}, {}], ids=["pool", "no pool"])
def test_disks_that_show_other_files_than_the_restore_gave_them(
    devices: str, strayed: set[str], pools: dict[str, str]
) -> None:
    """A snapshot freezes what the restore left: its files are as they were, and yet the VM is not at the point."""
    states = (
        DiskState("vda", "/vms/web.base", "qcow2", 1, 2, 3, top=False),
        DiskState("vda", "/vms/web.qcow2", "qcow2", 1, 2, 3),
        DiskState("vdb", "/data/web.raw", "raw", 4, 5, 6),
        DiskState("sda", "/iso/os.iso", "raw", 7, 8, 9),
    )
    root = etree.fromstring(domain_xml(devices))
    assert facts._strayed(Mark(5, "c", "t", states), [root], pools) == strayed
    as_restored = etree.fromstring(domain_xml(DISKS + CD.format("")))
    assert facts._strayed(Mark(5, "c", "t", states), [as_restored, root], pools) == strayed  # running: two definitions
