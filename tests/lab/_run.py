# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Commands and waiting, for the lab only."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Callable, TypeVar

T = TypeVar("T")
_QUIET_S = 0.25  # what _slowness() measures, on two cores with nothing else to do


class LabError(AssertionError):
    """Something the test needs did not happen; says what and how it looked."""


def run(*argv: str, ok: tuple[int, ...] = (0,), timeout_s: float = 300) -> str:
    """Standard output of a command; LabError with both outputs when its exit code is not in ``ok``."""
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL
    )
    if done.returncode not in ok:
        raise LabError(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def within(taken_s: float, limit_s: float) -> bool:
    """Whether what took so long has kept a limit that is meant for a quiet machine, this one being as slow as it is now."""
    return taken_s < limit_s or taken_s < limit_s * _slowness()


def _slowness() -> float:
    """How many times longer than on a quiet machine a small program takes."""
    taken = []
    for _dummy in range(3):
        begin = time.monotonic()
        run(sys.executable, "-c", "import subprocess, libvirt, lxml.etree")
        taken.append(time.monotonic() - begin)
    return max(taken) / _QUIET_S


def wait_for(what: str, probe: Callable[[], T | None], timeout_s: float, every_s: float = 0.05) -> T:
    """The first true answer of ``probe``; LabError naming ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout_s:.0f} s for {what}; last answer: {answer!r}")
        time.sleep(every_s)
