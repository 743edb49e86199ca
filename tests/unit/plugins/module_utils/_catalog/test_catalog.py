# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finding archives and describing them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._archive import reader, sidecars
from ansible_collections.kvmops.backup.plugins.module_utils._catalog import catalog
from ansible_collections.kvmops.backup.plugins.module_utils._errors import ArchiveError, HostileError
from ansible_collections.kvmops.backup.plugins.module_utils._restore import run as restore_run
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog.catalog_archives import (
    TIME,
    UUID,
    damage,
    domain_xml,
    write,
    write_foreign,
)


def test_find_takes_files_named_like_archives_only(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar.zst", ".c.tar.partial-1", ".hidden.tar", "d.tar.notes", "e.zst", "f.qcow2"):
        (tmp_path / name).touch()
    (tmp_path / "g.tar").mkdir()
    (tmp_path / "h.tar").symlink_to(tmp_path / "b.tar")
    other = tmp_path / "other"
    other.mkdir()
    (other / "i.tar").touch()
    found = catalog.find([str(tmp_path), str(other), str(tmp_path)])
    assert found == [str(tmp_path / "a.tar.zst"), str(tmp_path / "b.tar"), str(other / "i.tar")]


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_directory_that_cannot_be_listed_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArchiveError, match="cannot be listed"):
        catalog.find([str(tmp_path), str(tmp_path / name)])


@pytest.mark.parametrize("compressed", [False, True])
def test_describe(tmp_path: Path, compressed: bool) -> None:
    path = write(tmp_path, compressed=compressed)
    sidecars.set_notes(str(path), "before the upgrade")
    sidecars.set_protected(str(path), True)
    with reader.open_archive(str(path)) as archive:
        size = archive.point().members[0].size_bytes
    assert catalog.describe(str(path)) == {
        "path": str(path),
        "vm": {"name": "web01", "uuid": UUID},
        "size": path.stat().st_size,
        "compressed": compressed,
        "incrementable": False,
        "incrementable_reason": "",
        "template": False,
        "requires": None,
        "protected": True,
        "notes": "before the upgrade",
        "points": [
            {"point": TIME, "time": "2026-11-22T01:00:00Z", "mode": "full", "consistency": "agent", "size": size + 3000}
        ],
        "digest": catalog.look(str(path)).newest.digest,
        "digest_algorithm": "xxh3-128",
        "verified": None,
        "config": {
            "point": TIME,
            "name": "web01",
            "uuid": UUID,
            "memory": 128 * 2**20,
            "vcpus": 2,
            "machine": "pc-q35-7.2",
            "arch": "x86_64",
            "firmware": "efi",
            "disks": [
                {
                    "target": "vda", "path": "/images/web01.raw", "pool": "default", "format": "raw", "bus": "virtio",
                    "size": 2**20, "members": ["vda_0.qcow2"],
                }
            ],
            "cds": [{"target": "sda", "path": "/iso/debian.iso", "members": ["0_debian.iso"]}],
            "nics": [{"mac": "52:54:00:12:34:56", "type": "network", "source": "default", "model": "virtio"}],
            "boot_files": [],
            "hostdevs": [],
        },
        "snapshots": [
            {"name": "one", "parent": "", "current": False},
            {"name": "two", "parent": "one", "current": True},
        ],
        "not_ours": "",
        "conversion": None,
        "files": [],
        "warnings": ["the agent was slow", "sdb is not in the archive: LUN disks are passed through"],
    }  # fmt: skip


def test_what_was_made_incrementable_is_unknown_here(tmp_path: Path) -> None:
    assert catalog.describe(str(write(tmp_path, incrementable=True)))["incrementable"] is None


def test_missing_disks_and_host_devices_are_told(tmp_path: Path) -> None:
    extra = (
        "<disk type='file' device='disk'><source file='/images/data.raw'/><target dev='vdb'/></disk>"
        "<disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sdb'/></disk>"
        "<hostdev mode='subsystem' type='pci'><source><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>"
        "</source></hostdev>"
    )
    warnings = catalog.describe(str(write(tmp_path, extra_xml=extra)))["warnings"]
    assert warnings[2:] == [
        "vdb (/images/data.raw) is not in the archive",
        "host device pci bus=0x01 domain=0x0000 function=0x0 slot=0x00: not checked here whether this host has it",
    ]


def test_a_point_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = str(write(tmp_path))
    assert catalog.describe(path, point=TIME)["config"]["point"] == TIME
    with pytest.raises(ArchiveError, match=f"no point 5. It has {TIME}"):
        catalog.describe(path, point=5)


def test_a_moved_archive_is_the_same(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = catalog.describe(str(path))
    moved = tmp_path / "renamed by hand.tar"
    path.rename(moved)
    assert catalog.describe(str(moved)) == {**before, "path": str(moved)}


def test_bare_xml(tmp_path: Path) -> None:
    path = tmp_path / "web01.xml"
    path.write_text(domain_xml())
    found = catalog.describe(str(path))
    assert (found["vm"], found["compressed"], found["incrementable"]) == ({"name": "web01", "uuid": UUID}, False, False)
    assert found["points"][0]["consistency"] is None
    assert found["config"]["disks"][0]["members"] == []
    assert found["warnings"] == []


def test_a_definition_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "vm.xml")
    (tmp_path / "dir.xml").mkdir()
    for name in ("vm.xml", "dir.xml", "absent.xml"):
        for use in (catalog.look, restore_run._bare):
            with pytest.raises(ArchiveError, match=r"not a regular file|cannot be read \((?:No such|Is a dir)"):
                use(f"{tmp_path}/{name}")


def test_other_xml_and_packages_are_refused(tmp_path: Path) -> None:
    (tmp_path / "net.xml").write_text("<network/>")
    with pytest.raises(ArchiveError, match="not the definition of a VM"):
        catalog.describe(str(tmp_path / "net.xml"))
    (tmp_path / "evil.xml").write_text('<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><domain>&x;</domain>')
    with pytest.raises(HostileError):
        catalog.describe(str(tmp_path / "evil.xml"))
    for name in ("a.ova", "a.ovf"):
        with pytest.raises(ArchiveError, match="no such file"):
            catalog.describe(str(tmp_path / name))
    with pytest.raises(ArchiveError, match="cannot be read"):
        catalog.describe(str(tmp_path / "missing.xml"))


def test_foreign_archive(tmp_path: Path) -> None:
    found = catalog.describe(str(write_foreign(tmp_path)))
    assert found["vm"] == {"name": "web01", "uuid": UUID}
    assert [(p["point"], p["consistency"]) for p in found["points"]] == [(1700000000, None)]
    assert found["config"]["disks"][0]["members"] == ["web01.qcow2"]
    assert found["config"]["disks"][0]["size"] == 2**20
    assert found["incrementable"] is False


def test_a_damaged_configuration_is_no_point(tmp_path: Path) -> None:
    path = write(tmp_path)
    with reader.open_archive(str(path)) as archive:
        entry = next(entry for entry in archive.entries if entry.name.endswith(".xml"))
    damage(path, entry.offset + 200)
    with pytest.raises(ArchiveError, match="no point in it is whole"):
        catalog.look(str(path))


def test_an_archive_that_goes_while_it_is_read_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write(tmp_path))
    real = catalog.open_archive

    def opened(name: str) -> Any:
        found = real(name)
        os.unlink(name)
        return found

    monkeypatch.setattr(catalog, "open_archive", opened)
    with pytest.raises(ArchiveError, match="not there any more"):
        catalog.look(path)
