# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Priorities are lowered for the work, also that of threads started meanwhile, and are put back."""

from __future__ import annotations

import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ansible_collections.kvmops.backup.plugins.module_utils import _priority
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._priority import Priority


def now() -> tuple[int, str]:
    """Niceness and class of the calling thread."""
    thread = str(threading.get_native_id())
    done = subprocess.run(["ionice", "-p", thread], capture_output=True, text=True, check=True)
    return os.getpriority(os.PRIO_PROCESS, 0), done.stdout.strip()


def in_a_thread(action) -> None:
    """The priority of the test run itself stays as it is whatever goes wrong."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(action).result()


@pytest.mark.parametrize(("ionice", "shown"), [("idle", "idle"), ("best-effort", "best-effort: prio 7")])
def test_lowered_and_put_back(ionice, shown):
    def work() -> None:
        nice, before = now()
        with Priority(5, ionice).lowered():
            assert now() == (min(nice + 5, 19), shown)
            in_a_thread(lambda: seen.append(now()))
        assert now() == (nice, before)
        assert seen == [(min(nice + 5, 19), shown)]

    seen: list[tuple[int, str]] = []
    in_a_thread(work)


def test_a_class_that_was_there_comes_back():
    def work() -> None:
        subprocess.run(["ionice", "-c", "best-effort", "-n", "3", "-p", str(threading.get_native_id())], check=True)
        with pytest.raises(ZeroDivisionError), Priority(0, "idle").lowered():
            raise ZeroDivisionError
        assert now()[1] == "best-effort: prio 3"

    in_a_thread(work)


def test_nothing_asked_nothing_called(monkeypatch):
    monkeypatch.setattr(_priority.subprocess, "run", None)
    with Priority().lowered():
        pass


def test_refused():
    for nice in (-1, 20):
        with pytest.raises(RefusedError, match=f"Option nice: {nice} is no niceness"):
            Priority.of({"nice": nice, "ionice": None})


def test_without_the_tool(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RefusedError, match="ionice is not installed"), Priority(0, "idle").lowered():
        pass
    tool = tmp_path / "ionice"
    tool.write_text("#!/bin/sh\necho cannot >&2\nexit 1\n")
    tool.chmod(0o755)
    with pytest.raises(KvmopsError, match="Option ionice: cannot"), Priority(0, "idle").lowered():
        pass
