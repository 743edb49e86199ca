# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The weekly cycle on a VM that goes on writing (SPEC B5, B7, B14, B15, B20, B21, C2)."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from ansible_collections.kvmops.backup.tests.integration.targets.vm_increment import chains
from ansible_collections.kvmops.backup.tests.lab import fingerprint, markers, truth
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, make_iso

LIMIT = 7
XML_AND_HEADERS_BYTES = 64 * 2**10


def write_on(vm, count=2):
    vm.wait_for_marker(vm.last_marker().number + count)


@pytest.mark.parametrize("compress", [False, True])
def test_weeks(lab, run_module, compress):
    """Full, six increments, merge; twice. Every point is what was frozen; two of them, by chance, are restored and boot.

    At the end of the first week the guest is paused, so that the merged disks are still the frozen ones; at the end of the
    second it goes on writing, and its own digests of its files, taken while it was frozen, are the truth.
    """
    vm = lab.create_vm("weekly", [Disk(), Disk("raw")], freeze_mode="pause")
    vm.wait_for_marker(2)
    originals, target = vm.disks(), lab.path("backups")
    arguments = {"vm": "weekly", "path": str(target), "mode": "auto", "increment_limit": LIMIT, "compress": compress}
    archives: dict[str, dict[int, dict[str, str]]] = {}
    archive, in_guest = "", ""
    for day in range(2 * LIMIT):
        number = day % LIMIT
        old = Path(archive).read_bytes() if number else b""
        if number == 1:
            predicted = run_module("vm_backup", check_mode=True, **arguments)
            assert (predicted["mode"], predicted["archive"]["path"]) == ("incremental", archive)
            added = predicted["diff"]
        if day == LIMIT - 1:
            vm.domain.suspend()
        result = run_module("vm_backup", **arguments)
        archive = result["archive"]["path"]
        assert result["mode"] == ("incremental" if number else "full"), result["reason"]
        assert len(result["archive"]["points"]) == number + 1
        assert result["archive"]["incrementable"] is (number < LIMIT - 1)
        if number == 1:
            assert result["diff"] == added
        if number:
            assert_old_part_is_untouched(old, archive, compress)
            frozen = chains.layers_bytes(archive, result["point"])
            print("written", result["bytes_written"], "frozen layers", frozen, "seconds", result["duration"])
            assert compress or result["bytes_written"] <= frozen + XML_AND_HEADERS_BYTES
        if number < LIMIT - 1:
            assert result["merged_snapshots"] == []
            archives.setdefault(archive, {})[result["point"]] = chains.frozen_now(vm)
        else:
            assert len(result["merged_snapshots"]) == LIMIT
            assert vm.disks() == originals
            assert set(chains.chain_lengths(vm).values()) == {1}
            assert vm.domain.snapshotListNames() == []
            assert fingerprint.names(*{p.parent for p in originals.values()}) == sorted(map(str, originals.values()))
            if day == LIMIT - 1:
                archives[archive][result["point"]] = {
                    disk: truth.content_sha256(path, path.suffix[1:], in_use=True) for disk, path in originals.items()
                }
                vm.domain.resume()
            else:
                in_guest = vm.frozen_digests()
        write_on(vm)
    assert len(archives) == 2
    numbers = [each.number for each in markers.parse_log(vm.log())]
    assert numbers == list(range(1, len(numbers) + 1))  # the merges lost nothing
    vm.destroy()
    seed = random.randrange(2**32)
    print("seed", seed)
    for archive, known in archives.items():
        out = lab.path(f"out-{len(archive)}-{min(known)}")
        found = chains.digests_of_points(archive, out)
        assert {point: found[point] for point in known} == known
        assert len(found) == LIMIT
        if len(known) < LIMIT:
            assert chains.files_in_guest(out, archive) == in_guest
        point = random.Random(seed).choice(sorted(known))
        restored = run_module("vm_restore", source=archive, point=point, name="copy", path=str(lab.path("restored")))
        copy = lab.adopt("copy")
        assert restored["point"] == point
        assert chains.frozen_now(copy) == known[point]
        copy.start()
        copy.wait_for_marker(1)
        copy.remove()
        shutil.rmtree(lab.directory / "restored")


def assert_old_part_is_untouched(old, archive, compress):
    """But for the commit: what was behind the last member of a plain archive, eight bytes of a compressed one's end frame."""
    with open(archive, "rb") as stream:
        new = stream.read(len(old))
    if compress:
        assert 0 < sum(a != b for a, b in zip(old, new)) <= 8
    else:
        end = len(old.rstrip(b"\0")) + 511 & ~511
        assert len(old) - end <= 2 * 4096
        assert new[:end] == old[:end]


def test_options_around_it(lab, run_module):
    """VM off: modes, refusals, max_age, one snapshot after the other, an ISO once, the next cycle clears the last one."""
    vm = lab.create_vm(
        "quiet", [Disk(size_mib=16)], isos=[make_iso(lab.path("isos") / "tools.iso", b"CD" * 5000)], start=False
    )
    first, second = lab.path("first"), lab.path("second")

    def backup(place=first, **more):
        return run_module("vm_backup", vm="quiet", path=str(place), **more)

    refused = backup(mode="incremental", fails=True)
    assert "no archive in" in refused.message
    assert vm.domain.snapshotListNames() == []
    plain = backup(digest="sha256")
    assert (plain["mode"], plain["archive"]["incrementable"]) == ("full", False)
    anchor = {"archive": plain["archive"]["path"], "expected_digest": plain["archive"]["digest"]}
    assert run_module("backup_verify", **anchor)["archives"][0]["ok"]
    predicted = backup(mode="auto", check_mode=True)
    assert (predicted["mode"], predicted["archive"]["incrementable"]) == ("full", True)
    full = backup(incrementable=True)
    assert any("migrated live" in text for text in full.warnings)
    archive = full["archive"]["path"]
    known = {full["point"]: chains.frozen_now(vm)}
    assert (plain["archive"]["digest_algorithm"], full["archive"]["digest_algorithm"]) == ("sha256", "xxh3-128")
    assert "its digests are xxh3-128" in backup(mode="incremental", digest="sha256", fails=True).message
    anew = backup(mode="auto", digest="sha256", check_mode=True)
    assert (anew["mode"], anew["archive"]["digest_algorithm"]) == ("full", "sha256")
    predicted = backup(mode="auto", check_mode=True)
    assert predicted["archive"]["path"] == archive
    assert 0 < predicted["estimated_bytes"] < full["estimated_bytes"]
    young = backup(mode="auto", max_age="1h")
    assert (young.changed, young["mode"], young["archive"]["incrementable"]) == (False, "none", True)
    more = backup(mode="incremental", consistency="crash")
    known[more["point"]] = chains.frozen_now(vm)
    again = run_module("vm_backup", vm="quiet", archive=archive, mode="auto")  # the archive tells the place
    known[again["point"]] = chains.frozen_now(vm)
    assert (more["mode"], again["mode"], again["archive"]["path"]) == ("incremental", "incremental", archive)
    listed = chains.run("tar", "-tf", archive).split()
    assert len([name for name in listed if name.endswith(".iso")]) == 1
    assert chains.digests_of_points(archive, lab.path("out")) == known
    states = vm.domain.listAllSnapshots()
    assert len(states) == 3
    assert all(archive in each.getXMLDesc() for each in states)
    predicted = backup(mode="auto", increment_limit=4, check_mode=True)
    assert {each.getName() for each in states} < set(predicted["merged_snapshots"])
    assert (len(predicted["merged_snapshots"]), predicted["archive"]["incrementable"]) == (4, False)

    found = {each["path"]: each for each in run_module("backup_info", path=str(first))["archives"]}
    assert found[archive]["incrementable"] is True
    assert found[plain["archive"]["path"]]["incrementable"] is False
    copied = lab.path("elsewhere") / "copy.tar"
    copied.write_bytes(Path(archive).read_bytes())
    assert run_module("backup_info", archive=str(copied))["archives"][0]["incrementable"] is True

    packed = run_module("backup_archive", archive=archive, compressed=True)["archive"]["path"]
    into = backup(mode="auto")
    assert (into["mode"], into["archive"]["path"]) == ("incremental", packed)
    archive = run_module("backup_archive", archive=packed, compressed=False)["archive"]["path"]
    other = backup(second, mode="auto")  # another place: a cycle of its own, beside the first
    assert (other["mode"], other["merged_snapshots"]) == ("full", [])
    assert backup(mode="auto")["mode"] == "incremental"
    assert backup(second, mode="auto")["mode"] == "incremental"
    assert run_module("backup_info", archive=other["archive"]["path"])["archives"][0]["incrementable"] is True
    fresh = backup(incrementable=True)
    assert len(fresh["merged_snapshots"]) == 7  # the other cycle stood on those of the first
    assert any(other["archive"]["path"] in text for text in fresh.warnings)
    assert len(vm.domain.snapshotListNames()) == 1
    assert set(chains.chain_lengths(vm).values()) == {2}
    assert backup(second, mode="incremental", fails=True).failed
    info = run_module("backup_info", archive=other["archive"]["path"])["archives"][0]
    assert info["incrementable"] is False
    assert any("a new archive was begun in" in text for text in info["warnings"])
    beside = backup(second, mode="auto")
    assert (beside["mode"], beside["merged_snapshots"]) == ("full", [])
    newer = backup(second, incrementable=True)  # begins anew there, and leaves the cycle below it alone
    assert newer["merged_snapshots"] == [f"kvmops-{beside['point']}"]
    assert backup(mode="auto")["mode"] == "incremental"
    run_module("backup_archive", archive=newer["archive"]["path"], state="absent")
    after = backup(second, mode="auto")
    assert after["mode"] == "full"
    assert f"kvmops-{newer['point']}" in after["merged_snapshots"]
    vm.remove()
    assert run_module("backup_info", archive=fresh["archive"]["path"])["archives"][0]["incrementable"] is None


def test_limit_and_the_user(lab, run_module):
    """The limit deletes all snapshots and lists them; with `own` the user's stay; one that would be lost stops it."""
    vm = lab.create_vm("limited", [Disk(size_mib=16)], start=False)
    target = lab.path("backups")

    def backup(**more):
        return run_module("vm_backup", vm="limited", path=str(target), mode="auto", **more)

    vm.domain.snapshotCreateXML("<domainsnapshot><name>mine</name></domainsnapshot>")
    backup()
    done = backup(increment_limit=2, increment_limit_deletes="own")
    assert "mine" not in done["merged_snapshots"]
    assert len(done["merged_snapshots"]) == 2
    assert vm.domain.snapshotListNames() == ["mine"]
    backup()
    vm.domain.snapshotCreateXML("<domainsnapshot><name>on top</name></domainsnapshot>")  # inside our overlay
    done = backup(increment_limit=2, increment_limit_deletes="own")
    assert any("still to be merged: kvmops-" in text and "on top" in text for text in done.warnings), done.warnings
    assert (len(done["archive"]["points"]), done["archive"]["incrementable"]) == (2, False)
    failed = backup(unmerged="fail", fails=True)
    assert "on top" in failed.message and f"Point {failed['point']} is in {failed['archive']['path']}" in failed.message
    assert len(failed["archive"]["points"]) == 1
    archive = run_module("backup_info", archive=done["archive"]["path"])["archives"][0]
    assert len(archive["points"]) == 2  # the point is safe
    assert archive["incrementable"] is False
    vm.domain.snapshotLookupByName("on top").delete()
    healed = backup()
    assert healed["mode"] == "full"
    assert "were merged" in healed["reason"]
    assert sorted(vm.domain.snapshotListNames()) == [f"kvmops-{healed['point']}", "mine"]
    everything = backup(increment_limit=2)
    assert sorted(everything["merged_snapshots"])[-1] == "mine"
    assert vm.domain.snapshotListNames() == []
    assert backup(increment_limit=1)["mode"] == "full"
    assert backup(increment_limit=1)["mode"] == "full"
    assert vm.domain.snapshotListNames() == []


def test_memory(lab, run_module):
    """A VM without an agent: every point has the memory of its moment, once; the merge takes the images away."""
    vm = lab.create_vm("mute", [Disk(size_mib=32)], agent=False)
    target = lab.path("backups")
    folder = vm.disks()["vda"].parent
    files = fingerprint.names(folder)
    known = {}
    for number in range(3):
        result = run_module("vm_backup", vm="mute", path=str(target), mode="auto")
        assert (result["mode"], result["consistency"]) == ("incremental" if number else "full", "memory"), result[
            "reason"
        ]
        known[result["point"]] = chains.frozen_now(vm)
        vm.console_line("GUEST-UP")
    archive = result["archive"]["path"]
    memories = [name for name in chains.run("tar", "-tf", archive).split() if name.endswith(".memory")]
    assert memories == [f"{point}_1.memory" for point in known]
    assert chains.digests_of_points(archive, lab.path("out")) == known
    assert run_module("backup_verify", archive=archive)["archives"][0]["ok"]
    done = run_module("vm_backup", vm="mute", path=str(target), mode="auto", increment_limit=4)
    assert len(done["merged_snapshots"]) == 4
    assert fingerprint.names(folder) == files
    vm.console_line("GUEST-UP")
