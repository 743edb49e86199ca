# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules that are killed in the middle: at the Nth system call of a kind, or around the Nth call of libvirt's binding."""

from __future__ import annotations

import collections
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from .modules import module_argv

#: Runs a module and kills it before or after the Nth call of a method of libvirt's binding.
_KILLER = """
import os, runpy, signal, sys
import libvirt
kind, method, when, number = sys.argv[1:5]
original, calls = getattr(getattr(libvirt, kind), method), []
def call(self, *arguments):
    calls.append(1)
    if when == "before" and len(calls) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(self, *arguments)
    if when == "after" and len(calls) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(getattr(libvirt, kind), method, call)
sys.argv = sys.argv[5:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Steps:
    """Counts the calls of functions, from 1, and kills before call number ``kill_at`` (0: never): this process, or as told."""

    def __init__(
        self, places: Sequence[tuple[Any, str]], kill_at: int, kill: Callable[[], None] = _kill_this_process
    ) -> None:
        self.count = 0
        self._kill_at, self._kill = kill_at, kill
        for owner, name in places:
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self._kill_at:
                self._kill()
            return original(*arguments, **named)

        return call


def count_system_calls(module: str, arguments: dict[str, Any], names: Sequence[str]) -> dict[str, int]:
    """Runs a module to its end; how often its main thread made each system call (strace counts per thread).

    Which of its threads a program like qemu-img lets make a call is chance.
    """
    with tempfile.NamedTemporaryFile("r") as log:
        tracer = ["strace", "-f", "-o", log.name, "-e", f"trace=execve,{','.join(names)}"]
        subprocess.run([*tracer, *module_argv(module, arguments)], check=True, stdout=subprocess.DEVNULL)
        calls = re.findall(r"^(\d+) +(\w+)\(", log.read(), re.MULTILINE)
    main = calls[0][0]
    counted = collections.Counter(name for thread, name in calls if thread == main)
    return {name: counted[name] for name in names}


def kill_at_system_call(
    module: str, arguments: dict[str, Any], name: str, number: int
) -> subprocess.CompletedProcess[str]:
    """Runs a module that gets SIGKILL at the first thread's `number`-th system call of that name."""
    inject = ["strace", "-f", "-o", "/dev/null", "-e", f"inject={name}:signal=SIGKILL:when={number}"]
    return _run([*inject, *module_argv(module, arguments)])


def kill_around_libvirt_call(
    module: str, arguments: dict[str, Any], method: str, when: str, number: int = 1
) -> subprocess.CompletedProcess[str]:
    """Runs a module that gets SIGKILL `when` ("before", "after") the `number`-th call of `virDomain.create` or the like."""
    kind, name = method.split(".")
    return _run([sys.executable, "-c", _KILLER, kind, name, when, str(number), *module_argv(module, arguments)[2:]])


def _run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
