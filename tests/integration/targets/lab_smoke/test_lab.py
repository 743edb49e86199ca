# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab itself: what the other tests believe about it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Callable

import libvirt
import pytest

from ansible_collections.kvmops.backup.tests.lab import daemons, truth
from ansible_collections.kvmops.backup.tests.lab._run import LabError, run, wait_for
from ansible_collections.kvmops.backup.tests.lab.loopfs import LoopFileSystem
from ansible_collections.kvmops.backup.tests.lab.markers import parse_crashed_log, parse_log
from ansible_collections.kvmops.backup.tests.lab.modules import Ansible
from ansible_collections.kvmops.backup.tests.lab.vm import Disk, Lab, make_image

ENTER = Path(__file__).parents[3] / "lab" / "enter"


def test_what_a_guest_wrote_at_the_freeze_is_what_a_second_guest_reads(lab: Lab) -> None:
    vm = lab.create_vm("two disks, 'odd' <näme> & ..", [Disk(), Disk("raw")], freeze_mode="pause")
    vm.wait_for_marker(5)
    frozen = vm.disks()
    vm.domain.snapshotCreateXML(
        "<domainsnapshot><name>s</name></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE,
    )
    assert vm.agent.freeze_status() == "thawed"
    at_freeze = vm.frozen_digests()
    vm.wait_for_marker(vm.last_marker().number + 1)

    reader = lab.read_back("reader", [Disk("qcow2", path=frozen["vda"]), Disk("raw", path=frozen["vdb"])])

    assert reader.digests() == at_freeze
    on_first, on_second = (len(parse_log(reader.log(disk))) for disk in ("vda", "vdb"))
    assert on_first >= 5
    assert on_first - on_second in (0, 1)  # the writer may be stopped between the two
    raw = truth.to_raw(frozen["vda"], "qcow2", lab.directory / "vda.raw", in_use=True)
    truth.assert_clean_ext4(raw)
    assert truth.read_ext4_file(raw, "/log") == reader.log("vda")
    vm.shutdown()


def test_a_round_of_markers_that_the_power_button_ended_is_completed(lab: Lab) -> None:
    vm = lab.create_vm("interrupted", [Disk(), Disk()])
    vm.wait_for_marker(2)
    vm.agent.shell("kill -KILL -$(cat /run/writer.pid); usleep 500000")
    first, second = (len(parse_log(vm.log(disk))) for disk in ("vda", "vdb"))
    if first == second:
        vm.agent.shell("sed -i '$d' /disk/vdb/log; sync")
    vm.shutdown()
    vm.start().wait_for_marker(first + 2)
    assert len(parse_log(vm.log("vdb"))) > first


def test_a_guest_without_agent_comes_up_and_survives_a_killed_libvirtd(lab: Lab) -> None:
    vm = lab.create_vm("silent", agent=False)
    pid = daemons.libvirtd_pid()
    daemons.kill()
    daemons.start()
    assert daemons.libvirtd_pid() != pid
    assert vm.is_running()
    assert "marker=" in vm.console_line("GUEST-UP")


def test_freeze_modes(lab: Lab) -> None:
    vm = lab.create_vm("stubborn")
    assert vm.domain.fsFreeze() == 1
    assert vm.agent.freeze_status() == "frozen"
    assert vm.domain.fsThaw() == 1
    vm.set_freeze_mode("fail")
    with pytest.raises(libvirt.libvirtError, match="freeze"):
        vm.domain.fsFreeze()
    assert vm.agent.freeze_status() == "thawed"


def test_truth_sees_one_byte(tmp_path: Path) -> None:
    raw = make_image(tmp_path / "a.raw", Disk("raw", size_mib=32))
    before = truth.raw_sha256(raw)
    qcow2 = tmp_path / "a.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", "-f", "raw", str(raw), str(qcow2))
    assert truth.content_sha256(qcow2, "qcow2") == before
    with open(raw, "r+b") as file:
        file.seek(20_000_001)
        file.write(b"x")
    assert truth.raw_sha256(raw) != before


def test_markers_notice_a_gap_and_a_torn_line() -> None:
    assert len(parse_log("1 5 0.1\n2 6 0.2\n")) == 2
    for bad in ("1 5 0.1\n3 6 0.2\n", "1 5 0.1\n2 6", "2 5 0.1\n"):
        with pytest.raises(LabError):
            parse_log(bad)


def test_markers_of_a_crash_forgive_only_the_last_line() -> None:
    for unfinished in ("", "2 6", "\0\0\0\0", "2 6 0.\0\0"):
        assert len(parse_crashed_log("1 5 0.1\n" + unfinished)) == 1
    with pytest.raises(LabError):
        parse_crashed_log("1 5 0.1\n\0\0\0\n3 6 0.2\n")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_loop_file_systems(loop_fs: Callable[[str, int], LoopFileSystem], kind: str) -> None:
    file_system = loop_fs(kind, 64)
    (file_system.path / "data").write_bytes(os.urandom(1 << 20))
    clone = subprocess.run(
        ["cp", "--reflink=always", file_system.path / "data", file_system.path / "copy"],
        capture_output=True,
        check=False,
    )
    assert (clone.returncode == 0) == (kind != "ext4")
    filler = file_system.fill(leave_bytes=0)
    with pytest.raises(OSError, match="No space left"):
        (file_system.path / "more").write_bytes(bytes(64 << 20))
    filler.unlink()
    file_system.remount("ro")
    with pytest.raises(OSError, match="Read-only"):
        (file_system.path / "new").write_bytes(b"")


def test_real_ansible_answers(ansible: Ansible) -> None:
    assert ansible.module("ansible.builtin.ping", data="hello")["ping"] == "hello"
    played = ansible.playbook(
        "- hosts: all\n  gather_facts: false\n  tasks:\n    - name: Say\n      debug: {msg: '{{ word }}'}\n", word="x"
    )
    assert played.task("Say").data["msg"] == "x"
    assert ansible.module("ansible.builtin.fail", fails=True, msg="no").message == "no"


def test_a_private_environment_leaves_nothing_behind(tmp_path: Path) -> None:
    script = tmp_path / "messy.py"
    script.write_text(
        "from pathlib import Path\n"
        "from ansible_collections.kvmops.backup.tests.lab.vm import Lab\n"
        "from ansible_collections.kvmops.backup.tests.lab.loopfs import LoopFileSystem\n"
        "lab = Lab(Path('/var/lib/libvirt/images/messy'))\n"
        "lab.create_vm('left-running')\n"
        "LoopFileSystem('ext4', 16, lab.directory).__enter__()\n"
        "print('mess made')\n"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [ENTER, "/usr/bin/python3", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "KVMOPS_LAB_SCRATCH": str(scratch)},
    )
    assert done.stdout == "mess made\n", done.stderr
    assert list(scratch.iterdir()) == []
    # the kernel lets go of it when nobody looks at it any more, as a udev of the host may do for a moment
    wait_for("no loop device", lambda: str(scratch) not in run("losetup", "--list", "--output", "BACK-FILE"), 60)
    assert str(scratch) not in Path("/proc/self/mountinfo").read_text()
    assert "left-running" not in run("ps", "-e", "-o", "args")
