# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role schedule: units that systemd accepts and that run what they shall. Nothing here needs a running systemd."""

from __future__ import annotations

import json
import shlex
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.kvmops.backup.tests.lab._run import run
from ansible_collections.kvmops.backup.tests.lab.modules import Ansible, PlaybookResult

PLAY = """
- hosts: all
  gather_facts: false
  roles:
    - role: kvmops.backup.schedule
"""
COMMAND = str(Path(sys.executable).parent / "ansible-playbook")
WARNING = "kvmops.backup.schedule : Say that it would fail"
VARIABLES = Path("/etc/kvmops-backup/nightly.json")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    directory = tmp_path / "units"
    directory.mkdir()
    return directory


def play(
    ansible: Ansible, units: Path, fails: bool = False, diff: bool = False, **options: Any
) -> PlaybookResult:
    given = {"name": "nightly", "unit_directory": str(units), "command": COMMAND, **options}
    return ansible.playbook(PLAY, fails=fails, diff=diff, **{f"schedule_{name}": value for name, value in given.items()})


def changed_tasks(played: PlaybookResult) -> list[str]:
    return [task.task for task in played.tasks if task.data.get("changed")]


@pytest.mark.parametrize(
    ("option", "value"), [("on_calendar", "every day"), ("on_calendar", ""), ("random_delay", "5 mn")]
)
def test_a_time_that_systemd_cannot_read_leaves_the_old_timer_alone(
    ansible: Ansible, units: Path, option: str, value: str
) -> None:
    play(ansible, units)
    before = {path.name: path.read_bytes() for path in units.iterdir() if path.is_file()}
    refused = play(ansible, units, fails=True, **{option: value})
    assert f'schedule_{option}: systemd cannot read "{value}"' in refused.output.replace('\\"', '"')
    assert before == {path.name: path.read_bytes() for path in units.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("option", "value"),
    [("arguments", ["--limit=a\nExecStartPost=/bin/x"]), ("environment", {"A": "b\nUser=root"}), ("playbook", "a\rb")],
)
def test_a_line_break_is_no_way_into_a_unit(ansible: Ansible, units: Path, option: str, value: Any) -> None:
    refused = play(ansible, units, fails=True, **{option: value})
    assert f"schedule_{option}: a line break" in refused.output and list(units.iterdir()) == []


def test_units_are_right_and_a_second_run_changes_nothing(ansible: Ansible, units: Path) -> None:
    secret = {"password": "pLanted7", "weekly_backup_path": "/srv/back up", "weekly_backup_vms": ['a 100% "b" $c']}
    options: dict[str, Any] = {
        "extra_vars": secret,
        "arguments": ["--limit", 'kvm01:100% "x" $HOME \\y'],
        "environment": {"ANSIBLE_COLLECTIONS_PATH": "/opt/my collections"},
        "on_calendar": "Mon..Sun 01:30 Europe/Berlin",
        "inventory": "/etc/ansible/my hosts",
    }
    first = play(ansible, units, diff=True, **options)
    assert changed_tasks(first) and "OnCalendar" in first.output and "pLanted7" not in first.output
    assert "kvmops.backup.weekly_backup" in first.task(WARNING).data["msg"]  # there are no collections in /opt
    assert changed_tasks(play(ansible, units, **options)) == []

    service, timer = units / "nightly.service", units / "nightly.timer"
    run("systemd-analyze", "verify", "--man=no", str(service), str(timer))
    assert "Persistent=true" in timer.read_text(encoding="utf-8")
    assert "OnCalendar=Mon..Sun 01:30 Europe/Berlin\n" in timer.read_text(encoding="utf-8")
    run("systemd-analyze", "calendar", "Mon..Sun 01:30 Europe/Berlin")
    assert (units / "timers.target.wants" / "nightly.timer").resolve() == timer
    assert json.loads(VARIABLES.read_text(encoding="utf-8")) == secret
    assert stat.S_IMODE(VARIABLES.stat().st_mode) == 0o600
    line = next(line for line in service.read_text(encoding="utf-8").splitlines() if line.startswith("ExecStart="))
    words = shlex.split(line.partition("=")[2])
    assert [word.replace("%%", "%").replace("$$", "$") for word in words] == [
        COMMAND, "-i", "/etc/ansible/my hosts", "-e", f"@{VARIABLES}",
        "--limit", 'kvm01:100% "x" $HOME \\y', "kvmops.backup.weekly_backup",
    ]  # fmt: skip

    assert changed_tasks(play(ansible, units, state="absent"))
    assert changed_tasks(play(ansible, units, state="absent")) == []
    assert [path for path in units.rglob("*") if path.is_file() or path.is_symlink()] == []
    assert not VARIABLES.exists()


def test_the_command_of_the_unit_runs_a_playbook(ansible: Ansible, units: Path, tmp_path: Path) -> None:
    playbook = tmp_path / "proof.yml"
    playbook.write_text(
        "- hosts: all\n  gather_facts: false\n  tasks:\n"
        "    - ansible.builtin.copy: {dest: '{{ proof }}', content: '{{ said }}', mode: '0644'}\n",
        encoding="utf-8",
    )
    proof = tmp_path / "proof"
    played = play(
        ansible,
        units,
        playbook=str(playbook),
        extra_vars={"proof": str(proof), "said": "done", "ansible_python_interpreter": "/usr/bin/python3"},
        arguments=["-clocal"],
    )
    assert played.task(WARNING).status == "skipped"
    service = (units / "nightly.service").read_text(encoding="utf-8")
    run("sh", "-c", next(line for line in service.splitlines() if line.startswith("ExecStart=")).partition("=")[2])
    assert proof.read_text(encoding="utf-8") == "done"
    play(ansible, units, state="absent")


def test_what_systemd_would_not_take_is_seen_here(ansible: Ansible, units: Path) -> None:
    """The check of the first test can fail."""
    play(ansible, units)
    timer = units / "nightly.timer"
    timer.write_text(timer.read_text().replace("OnCalendar=", "OnCalendar=every full moon "))
    with pytest.raises(Exception, match="full moon"):
        run("systemd-analyze", "verify", "--man=no", str(timer))
    play(ansible, units, state="absent")
    assert shutil.which("systemd-analyze")
