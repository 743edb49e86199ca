# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the collection's modules: directly (quick, for many runs and for killing) and through real Ansible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._run import LabError

_COLLECTION = "kvmops.backup"
_CALLBACKS = Path(__file__).with_name("callbacks")


@dataclass(frozen=True)
class ModuleResult:
    """What a module returned."""

    module: str
    data: dict[str, Any]
    output: str

    @property
    def changed(self) -> bool:
        """The module's ``changed``."""
        return bool(self.data.get("changed"))

    @property
    def failed(self) -> bool:
        """Whether the module failed."""
        return bool(self.data.get("failed"))

    @property
    def message(self) -> str:
        """The module's ``msg``."""
        return str(self.data.get("msg", ""))

    @property
    def warnings(self) -> list[str]:
        """The module's warnings."""
        return [str(warning) for warning in self.data.get("warnings", [])]

    def __getitem__(self, key: str) -> Any:
        return self.data[key]


@dataclass(frozen=True)
class TaskResult:
    """One task of a play on one host; ``status`` is ok, failed, skipped or unreachable."""

    task: str
    host: str
    status: str
    data: dict[str, Any]


@dataclass(frozen=True)
class PlaybookResult:
    """A finished ``ansible-playbook``: its exit code, what it printed, and every task's result in order."""

    exit_code: int
    output: str
    tasks: list[TaskResult]

    def task(self, name: str) -> TaskResult:
        """The last result of the task with this name."""
        for task in reversed(self.tasks):
            if task.task == name:
                return task
        raise LabError(f"no task {name!r} in: {[task.task for task in self.tasks]}\n{self.output}")


def module_argv(module: str, arguments: dict[str, Any], *, check_mode: bool = False, diff: bool = False) -> list[str]:
    """The command that runs a module directly, e.g. to put ``strace`` before it."""
    internal = {"_ansible_check_mode": check_mode, "_ansible_diff": diff}
    text = json.dumps({"ANSIBLE_MODULE_ARGS": {**arguments, **internal}})
    return [sys.executable, "-m", f"ansible_collections.{_COLLECTION}.plugins.modules.{module}", text]


def module_result(module: str, stdout: str, stderr: str) -> ModuleResult:
    """Parses what a directly run module printed; LabError when it is not a result."""
    lines = stdout.strip().splitlines()
    try:
        return ModuleResult(module, json.loads(lines[-1]), stdout + stderr)
    except (IndexError, json.JSONDecodeError):
        raise LabError(f"{module} printed no result:\n{stdout}{stderr}") from None


def run_module(
    module: str, *, check_mode: bool = False, diff: bool = False, fails: bool = False, **arguments: Any
) -> ModuleResult:
    """Runs a module directly. LabError when it fails, or with ``fails`` when it does not."""
    argv = module_argv(module, arguments, check_mode=check_mode, diff=diff)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return _expect(module_result(module, done.stdout, done.stderr), fails)


# A process counts the memory of the one that started it until it runs its own program: so a small one starts it.
_MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    print(used.ru_maxrss * 1024, used.ru_utime + used.ru_stime, file=file)
"""


def measure_module(module: str, **arguments: Any) -> tuple[ModuleResult, int, float]:
    """Runs a module directly; its result, peak memory in bytes and processor time in seconds. LabError when it fails."""
    with tempfile.NamedTemporaryFile("r") as figures:
        argv = [sys.executable, "-S", "-c", _MEASURE, figures.name, *module_argv(module, arguments)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        result = _expect(module_result(module, done.stdout, done.stderr), False)
        peak_bytes, seconds = figures.read().split()
    return result, int(peak_bytes), float(seconds)


def _expect(result: ModuleResult, fails: bool) -> ModuleResult:
    if result.failed != fails:
        raise LabError(f"{result.module} {'did not fail' if fails else 'failed'}: {result.message}\n{result.output}")
    return result


class Ansible:
    """Runs modules and playbooks on a host (this one) through the real command-line tools, with the distribution's Python.

    ``tools`` is the directory of the tools, by default those of the tests' own environment.
    """

    def __init__(
        self,
        interpreter: str = "/usr/bin/python3",
        *,
        host: str = "localhost",
        connection: str = "local",
        variables: dict[str, Any] | None = None,
        tools: Path | None = None,
    ) -> None:
        self._bin = tools or Path(sys.executable).parent
        self._host = host
        self._connection = connection
        self._variables = {"ansible_python_interpreter": interpreter, **(variables or {})}

    def module(
        self, module: str, *, check_mode: bool = False, diff: bool = False, fails: bool = False, **arguments: Any
    ) -> ModuleResult:
        """``ansible HOST -m kvmops.backup.MODULE``; as run_module otherwise. ``output`` is what a user sees."""
        name = module if "." in module else f"{_COLLECTION}.{module}"
        done = self._run("ansible", [self._host, "-m", name, "-a", json.dumps(arguments)], check_mode, diff, {})
        if len(done.tasks) != 1:
            raise LabError(f"{module}: {len(done.tasks)} results\n{done.output}")
        task = done.tasks[0]
        return _expect(ModuleResult(module, {"failed": task.status != "ok", **task.data}, done.output), fails)

    def playbook(
        self, playbook: str, *, check_mode: bool = False, diff: bool = False, fails: bool = False, **variables: Any
    ) -> PlaybookResult:
        """Runs a playbook: its text (starts with ``-``), a path, or a name like ``kvmops.backup.verify``."""
        with tempfile.TemporaryDirectory(prefix="play-") as directory:
            if playbook.lstrip().startswith("-"):
                path = Path(directory) / "play.yml"
                path.write_text(playbook, encoding="utf-8")
                playbook = str(path)
            done = self._run("ansible-playbook", [playbook], check_mode, diff, variables)
        if (done.exit_code != 0) != fails:
            raise LabError(f"{playbook} {'did not fail' if fails else 'failed'}\n{done.output}")
        return done

    def _run(
        self, tool: str, arguments: list[str], check_mode: bool, diff: bool, variables: dict[str, Any]
    ) -> PlaybookResult:
        extra = {**self._variables, **variables}
        argv = [
            str(self._bin / tool),
            "-i",
            f"{self._host},",
            "-c",
            self._connection,
            "-e",
            json.dumps(extra),
            *arguments,
        ]
        argv += ["--check"] * check_mode + ["--diff"] * diff
        with tempfile.NamedTemporaryFile(prefix="results-") as results:
            environment = {
                **os.environ,
                "ANSIBLE_CALLBACK_PLUGINS": str(_CALLBACKS),
                "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_RETRY_FILES_ENABLED": "0",
                "KVMOPS_LAB_RESULTS": results.name,
            }
            done = subprocess.run(
                argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment
            )
            lines = Path(results.name).read_text(encoding="utf-8").splitlines()
        return PlaybookResult(
            done.returncode, done.stdout + done.stderr, [TaskResult(**json.loads(line)) for line in lines]
        )
