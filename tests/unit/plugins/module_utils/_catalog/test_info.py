# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lists of archives: whose they are, and what becomes of those that cannot be read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._catalog import select
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.info import info
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import InfoRequest, Selection
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.view import ArchiveView, Point
from ansible_collections.kvmops.backup.plugins.module_utils._errors import (
    ArchiveError,
    HostileError,
    KvmopsError,
    RefusedError,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import connection
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.storage import Pool
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._catalog.catalog_archives import (
    OTHER_UUID,
    TIME,
    UUID,
    Told,
    damage,
    write,
)


def view(path: str, *points: tuple[int, str, str], native: bool = True) -> ArchiveView:
    made = tuple(Point(time, name, uuid, digest=f"{uuid}{time}") for time, name, uuid in points)
    return ArchiveView(path, 1, False, native, made)


OLD = view("/b/old.tar", (1, "old", UUID))
RENAMED = view("/b/new.tar", (2, "old", UUID), (3, "new", UUID))
STRANGER = view("/b/stranger.tar", (4, "old", OTHER_UUID))
NAMELESS = view("/b/foreign.tar", (5, "old", ""), native=False)
ALL = [OLD, RENAMED, STRANGER, NAMELESS]


@pytest.mark.parametrize(
    ("vm", "host_uuid", "expected"),
    [
        ("new", UUID, [OLD, RENAMED]),  # also those from before it was renamed
        ("new", "", [OLD, RENAMED]),
        ("old", OTHER_UUID, [STRANGER, NAMELESS]),  # the VM that has this name now
        ("old", "", ALL),  # no such VM here: all that ever had the name
        (UUID, UUID, [OLD, RENAMED]),
        ("other", "", []),
        ("", "", []),
    ],
)
def test_archives_belong_to_a_vm_by_uuid(vm: str, host_uuid: str, expected: list[ArchiveView]) -> None:
    assert select.of_vm(ALL, vm, host_uuid) == expected


def test_an_archive_and_its_compressed_form_count_once() -> None:
    points = ((1, "web", UUID), (2, "web", UUID))
    plain, packed = view("/b/x.tar", *points), view("/b/x.tar.zst", *points)
    longer, elsewhere = view("/b/x.tar.zst", *points[:1]), view("/c/x.tar.zst", *points)
    foreign = [view(f"/b/{name}", (1, "web", ""), native=False) for name in ("y.tar", "y.tar.zst")]
    assert select.without_twins([packed, plain]) == [plain]
    assert select.without_twins([plain, longer, elsewhere]) == [plain, longer, elsewhere]
    assert select.without_twins(foreign) == foreign


POOLS = [
    Pool("backups", "dir", True, "/srv/backups", ""),
    Pool("nfs", "netfs", True, "/srv/nfs", ""),
    Pool("off", "dir", False, "/srv/off", ""),
    Pool("vg0", "logical", True, "/dev/vg0", ""),
]


def test_pools() -> None:
    assert select.pool_directories(POOLS, "") == ["/srv/backups", "/srv/nfs"]
    assert select.pool_directories(POOLS, "nfs") == ["/srv/nfs"]
    for name, why in (("off", "not active"), ("vg0", "of type logical"), ("none", "no such pool")):
        with pytest.raises(ArchiveError, match=f"Pool {name}: .*{why}"):
            select.pool_directories(POOLS, name)


class Host:
    """A libvirt that knows one VM."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: list[KvmopsError] = []
        self.vms = {"web01": UUID}
        monkeypatch.setattr(connection, "connect", self.connect)
        monkeypatch.setattr(connection, "find_domain", self.find_domain)

    def connect(self, uri: str) -> Host:
        for error in self.errors:
            raise error
        return self

    def find_domain(self, conn: Host, name: str) -> Any:
        if name not in self.vms:
            raise RefusedError(f"The VM {name}", "there is none")
        return type("Domain", (), {"UUIDString": lambda _self: self.vms[name]})()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_whose_uuid_decides(host: Host, told: Told) -> None:
    assert select.vm_on_host(Selection(vm="web01"), told) == UUID
    assert select.vm_on_host(Selection(vm="gone"), told) == ""
    assert select.vm_on_host(Selection(vm=OTHER_UUID.upper()), told) == OTHER_UUID
    assert told.warnings == []
    host.errors.append(KvmopsError("The connection", "no answer"))
    assert select.vm_on_host(Selection(vm="web01"), told) == ""
    assert len(told.warnings) == 1 and "no answer" in told.warnings[0]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "backups"
    directory.mkdir()
    write(directory)
    write(directory, timestamp=TIME - 100, compressed=True)
    write(directory, name="db01", uuid=OTHER_UUID)
    return directory


def test_a_place_is_listed_by_vm_and_age(place: Path, told: Told) -> None:
    found = info(InfoRequest(Selection(path=str(place))), told)
    assert [(entry["vm"]["name"], entry["points"][0]["point"]) for entry in found["archives"]] == [
        ("db01", TIME), ("web01", TIME - 100), ("web01", TIME),
    ]  # fmt: skip
    assert "matches" not in found


def test_damaged_and_hostile_files_hide_no_others(place: Path, told: Told) -> None:
    (place / "empty.tar").touch()
    (place / "text.tar.zst").write_text("hello")
    half = place / "half.tar"
    half.write_bytes((place / f"web01_20261122T010000Z_{UUID[:8]}.tar").read_bytes()[:100_000])
    found = info(InfoRequest(Selection(path=str(place))), told)["archives"]
    assert [Path(entry["path"]).name for entry in found[3:]] == ["empty.tar", "half.tar", "text.tar.zst"]
    for entry in found[3:]:
        assert set(entry) == set(found[0])
        assert (entry["vm"], entry["points"], entry["config"]) == (None, [], None)
        assert entry["warnings"]
    assert [len(entry["points"]) for entry in found[:3]] == [1, 1, 1]


def test_of_one_vm(place: Path, host: Host, told: Told) -> None:
    (place / "empty.tar").touch()
    found = info(InfoRequest(Selection(path=str(place), vm="web01")), told)["archives"]
    assert [entry["vm"]["uuid"] for entry in found] == [UUID, UUID]
    assert len(told.warnings) == 1 and "empty.tar is not listed" in told.warnings[0]


def test_one_archive_that_cannot_be_read_is_an_error(place: Path, told: Told) -> None:
    (place / "empty.tar").touch()
    for name in ("empty.tar", "missing.tar"):
        with pytest.raises(ArchiveError):
            info(InfoRequest(Selection(archive=str(place / name))), told)


def test_a_place_that_is_not_there_is_an_error(tmp_path: Path, told: Told) -> None:
    with pytest.raises(ArchiveError, match="cannot be listed"):
        info(InfoRequest(Selection(path=str(tmp_path / "missing"))), told)


def test_point(place: Path, told: Told) -> None:
    found = info(InfoRequest(Selection(path=str(place)), point=TIME - 100), told)["archives"]
    assert [entry["config"]["point"] for entry in found] == [TIME - 100]
    with pytest.raises(ArchiveError, match="no point"):
        info(InfoRequest(Selection(archive=found[0]["path"]), point=TIME), told)


def test_query(place: Path, told: Told) -> None:
    query = "archives[?compressed].{vm: vm.name, disks: config.disks[].path}"
    found = info(InfoRequest(Selection(path=str(place)), query=query), told)
    assert found["matches"] == [{"vm": "web01", "disks": ["/images/web01.raw"]}]
    with pytest.raises(RefusedError, match="Option query"):
        info(InfoRequest(Selection(path=str(place)), query="archives[?"), told)
    with pytest.raises(RefusedError, match="Option query"):
        info(InfoRequest(Selection(path=str(place)), query="nofunction(@)"), told)


def test_nothing_is_changed(place: Path, told: Told) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in place.iterdir()}
    info(InfoRequest(Selection(path=str(place))), told)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in place.iterdir()} == before


def test_a_damaged_newest_point_is_told(place: Path, told: Told) -> None:
    path = next(path for path in place.iterdir() if path.name.startswith("db01"))
    shutil.copy(path, place / "copy.tar")
    data = path.read_bytes()
    damage(path, data.index(b"<domain") + 30)
    found = info(InfoRequest(Selection(path=str(place))), told)["archives"]
    assert [entry["vm"]["name"] if entry["vm"] else None for entry in found] == ["db01", "web01", "web01", None]
    assert issubclass(HostileError, ArchiveError)  # what `look` raises is caught as one family
