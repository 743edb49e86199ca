# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the journal of a restore says, and when it is better not to act on it. Killed restores: integration target vm_restore."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import libvirt
from ansible_collections.kvmops.backup.plugins.module_utils._restore import recovery
from ansible_collections.kvmops.backup.plugins.module_utils._restore.recovery import (
    FileStep,
    OldVm,
    RestoreFacts,
    StateRecord,
)


def operation(directory: Path) -> RestoreFacts:
    return RestoreFacts(
        uri="qemu:///system",
        uuid="u",
        name="web",
        token="t",
        source="/backup/web.tar",
        files=(
            FileStep(f"{directory}/.a.partial", f"{directory}/a", f"{directory}/.a.old", f"{directory}/.a.scratch"),
        ),
        directories={str(directory): directory.stat().st_ino},
        old=OldVm(
            "v",
            "web",
            "<domain/>",
            True,
            (StateRecord("s", "<domainsnapshot/>", True),),
            (("c", "<domaincheckpoint/>"),),
        ),
        pools=("vms",),
        states=(StateRecord("n", "<domainsnapshot/>", False),),
    )


@pytest.mark.parametrize("gone", [False, True], ids=["another directory", "no directory"])
def test_a_missing_mount_is_not_taken_for_missing_files(tmp_path: Path, gone: bool) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    wanted = operation(place)
    place.rename(tmp_path / "elsewhere")
    if not gone:
        place.mkdir()
    with pytest.raises(KvmopsError, match="Mount what belongs there"):
        recovery.conclude(None, wanted)


def test_the_directory_of_a_tpm_is_taken_back_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one was in place already, the old one waits aside; a second run finds nothing more to do."""
    monkeypatch.setattr(recovery, "by_uuid", lambda _conn, _uuid: None)
    monkeypatch.setattr(recovery, "refresh", lambda _conn, _pools: None)
    for name in ("u", ".old", ".partial"):
        (tmp_path / name / "tpm2").mkdir(parents=True)
        (tmp_path / name / "tpm2" / "state").write_text(name)
    (tmp_path / ".scratch").write_text("tar")
    step = FileStep(*(str(tmp_path / name) for name in (".partial", "u", ".old", ".scratch")))
    wanted = replace(operation(tmp_path), files=(step,), old=None, stamps=stamps(step))
    for _run in range(2):
        recovery.roll_back(None, wanted)
        assert [path.name for path in tmp_path.iterdir()] == ["u"]
        assert (tmp_path / "u" / "tpm2" / "state").read_text() == ".old"


@pytest.fixture(name="half_way")
def restored_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RestoreFacts:
    """The new file has its name, the former one waits aside."""
    monkeypatch.setattr(recovery, "by_uuid", lambda _conn, _uuid: None)
    monkeypatch.setattr(recovery, "refresh", lambda _conn, _pools: None)
    step = FileStep(f"{tmp_path}/.a.partial", f"{tmp_path}/a", f"{tmp_path}/.a.old")
    Path(step.path).write_text("new")
    Path(step.aside).write_text("former")
    return replace(operation(tmp_path), files=(step,), old=None, stamps=stamps(step))


def stamps(step: FileStep) -> dict[str, tuple[int, int]]:
    """Of the new file, which has its name already."""
    found = os.stat(step.path)
    return {step.path: (found.st_size, found.st_mtime_ns)}


def left(wanted: RestoreFacts) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(wanted.files[0].path).parent.iterdir()}


def test_the_new_file_goes_and_the_former_one_is_back(half_way: RestoreFacts) -> None:
    recovery.roll_back(None, half_way)
    assert left(half_way) == {"a": "former"}


def test_a_file_that_has_got_the_inode_of_the_new_one_stays(half_way: RestoreFacts) -> None:
    step = half_way.files[0]
    Path(step.path).write_text("of somebody else")
    with pytest.raises(KvmopsError, match=f"at {step.path} is a file .* what was {step.path} is kept as {step.aside}"):
        recovery.roll_back(None, half_way)
    assert left(half_way) == {"a": "of somebody else", ".a.old": "former"}
    os.unlink(step.path)
    recovery.roll_back(None, half_way)
    assert left(half_way) == {"a": "former"}


@pytest.mark.parametrize("killed", ["aside", "in place", "back"])
def test_a_rename_by_hard_link_that_was_killed_between_its_two_steps(half_way: RestoreFacts, killed: str) -> None:
    step = half_way.files[0]
    if killed == "in place":
        os.link(step.path, step.partial)
    else:
        os.replace(step.path, step.partial)
        os.link(step.aside, step.path)
    recovery.roll_back(None, half_way if killed != "back" else replace(half_way, files=(replace(step, partial=""),)))
    assert {name: text for name, text in left(half_way).items() if name != ".a.partial"} == {"a": "former"}
    recovery.roll_back(None, half_way)
    assert left(half_way) == {"a": "former"}


def test_the_new_file_is_not_taken_away_when_the_former_one_is_gone(half_way: RestoreFacts) -> None:
    os.unlink(half_way.files[0].aside)
    recovery.roll_back(None, half_way)
    assert left(half_way) == {"a": "new"}


def test_a_vm_is_concerned_by_name_and_uuid_be_it_the_old_or_the_new_one(tmp_path: Path) -> None:
    found = replace(operation(tmp_path), name="web-2")
    assert all(found.concerns(each) for each in ("web-2", "u", "web", "v"))
    assert not any(found.concerns(each) for each in ("", "w", "web-3"))
    assert not replace(found, old=None).concerns("web")
    assert found.pending_token != found.token


@pytest.fixture(name="conn")
def libvirts_test_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A libvirt without a daemon, with VMs that only are definitions."""
    pytest.importorskip("libvirt", reason="libvirt-python is not installed here")
    monkeypatch.setattr(recovery, "KEEP_FILES", 0)  # its VMs have none
    conn = libvirt.open("test:///default")
    for domain in conn.listAllDomains():
        if domain.isActive():
            domain.destroy()
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
    yield conn
    conn.close()


UUID = "6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11"


def defined(name: str, token: str = "") -> str:
    mark = f"<metadata><k:restored xmlns:k='urn:kvmops:backup:1' token='{token}'/></metadata>" if token else ""
    return (
        f"<domain type='test'><name>{name}</name><uuid>{UUID}</uuid><memory>1024</memory><os><type>hvm</type></os>{mark}"
        "</domain>"
    )


def of_definitions(path: Path, old: OldVm | None) -> RestoreFacts:
    """A restore in the test driver, of a VM without pools and snapshots."""
    return replace(operation(path), uri="test:///default", uuid=UUID, old=old, pools=(), states=())


@pytest.mark.parametrize("former", ["", "web", "web-old"], ids=["gone", "replaced", "replaced under another name"])
@pytest.mark.parametrize("autostart", [True, False])
def test_a_restore_that_was_killed_after_its_commit_leaves_autostart_as_it_should_be(
    conn: Any, tmp_path: Path, former: str, autostart: bool
) -> None:
    old = OldVm(UUID, former, defined(former), autostart) if former else None
    wanted = replace(of_definitions(tmp_path, old), autostart=autostart and not old)
    domain = conn.defineXML(defined("web", "t"))
    domain.setAutostart(int(autostart and former == "web"))  # libvirt keeps it for a VM that was not undefined
    for _run in range(2):
        assert "was complete" in recovery.conclude(conn, wanted)
        assert domain.autostart() == int(autostart)


@pytest.mark.parametrize("former", ["", "web", "web-old"], ids=["gone", "replaced", "replaced under another name"])
def test_a_restore_that_was_killed_before_its_commit_gives_the_old_vm_back(
    conn: Any, tmp_path: Path, former: str
) -> None:
    old = OldVm(UUID, former, defined(former), True) if former else None
    wanted = replace(of_definitions(tmp_path, old), autostart=not old, defining=True)
    domain = conn.defineXML(defined("web", wanted.pending_token))
    domain.setAutostart(int(former == "web"))
    for _run in range(2):
        assert "was taken back" in recovery.conclude(conn, wanted)
        here = [(each.name(), each.autostart(), "token" in each.XMLDesc(2)) for each in conn.listAllDomains()]
        assert here == ([(former, 1, False)] if former else [])


def moment(kind: str, name: str, parent: str = "") -> str:
    """The XML of a snapshot or checkpoint of the VM."""
    above = f"<parent><name>{parent}</name></parent>" if parent else ""
    state = "<state>shutoff</state>" if kind == "snapshot" else ""
    return (
        f"<domain{kind}><name>{name}</name>{state}{above}<creationTime>{ord(name[0])}</creationTime>"
        f"{defined('web')}</domain{kind}>"
    )


def shown(domain: Any) -> dict[str, Any]:
    """Snapshots with their parents and children, the current one, autostart."""
    return {
        "states": {each.getName(): each.getXMLDesc() for each in domain.listAllSnapshots()},
        "children": {
            each.getName(): sorted(child.getName() for child in each.listAllChildren())
            for each in domain.listAllSnapshots()
        },
        "current": [each.getName() for each in domain.listAllSnapshots() if each.isCurrent()],
        "autostart": domain.autostart(),
    }


def with_snapshots(conn: Any, directory: Path) -> tuple[Any, RestoreFacts]:
    """A VM that stands on c of its snapshots a, b (on a), c and d (on b), and a restore that was about to replace it."""
    domain = conn.defineXML(defined("web"))
    for name, parent in (("a", ""), ("b", "a"), ("c", "b"), ("d", "b")):
        snapshots.redefine(domain, moment("snapshot", name, parent), current=name == "c")
    domain.setAutostart(1)
    states = tuple(StateRecord(each.name, each.xml, each.current) for each in snapshots.tree(domain))
    old = OldVm(UUID, "web", defined("web"), True, states)
    return domain, replace(of_definitions(directory, old), defining=True)


@pytest.mark.parametrize("lost", ["", "c", "d", "dc", "dcb", "dcba"])
@pytest.mark.parametrize("began", [True, False])
def test_the_old_vm_gets_back_what_it_lacks(conn: Any, tmp_path: Path, lost: str, began: bool) -> None:
    """Not before the restore has touched it: then somebody else took it away."""
    domain, wanted = with_snapshots(conn, tmp_path)
    whole = shown(domain)
    for name in lost:
        domain.snapshotLookupByName(name).delete()
    domain.setAutostart(0)
    found = shown(domain)
    for _run in range(2):
        recovery.conclude(conn, replace(wanted, defining=began))
        assert shown(domain) == (whole if began else found)


def test_what_the_old_vm_has_gained_since_stays(conn: Any, tmp_path: Path) -> None:
    domain, wanted = with_snapshots(conn, tmp_path)
    whole = shown(domain)
    for name in "dc":
        domain.snapshotLookupByName(name).delete()
    conn.defineXML(defined("web").replace("1024", "2048"))
    snapshots.redefine(domain, moment("snapshot", "new", "b"), current=True)
    definition = domain.XMLDesc()
    for _run in range(2):
        recovery.conclude(conn, wanted)
        found = shown(domain)
        assert found["current"] == ["new"] and domain.XMLDesc() == definition
        assert found["children"]["new"] == [] and found["children"]["b"] == ["c", "d", "new"]
        assert {name: xml for name, xml in found["states"].items() if name != "new"} == whole["states"]


def test_a_snapshot_that_the_vm_was_reverted_to_since_stays_the_current_one(conn: Any, tmp_path: Path) -> None:
    domain, wanted = with_snapshots(conn, tmp_path)
    snapshots.redefine(domain, moment("snapshot", "d", "b"), current=True)
    recovery.conclude(conn, wanted)
    assert shown(domain)["current"] == ["d"]
