# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""CPU and disk priority of long copies: lowered for others' sake, and put back for what a guest waits for."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError, RefusedError

_LOWEST = "7"  # of the eight levels of best-effort and realtime; idle has none


@dataclass(frozen=True)
class Priority:
    """`nice`: what is added to the niceness, 0 to 19; `ionice`: scheduling class of disk accesses, "" as it is."""

    nice: int = 0
    ionice: str = ""

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Priority:
        """From the parameters of a module. Raises RefusedError."""
        nice = params["nice"]
        if not 0 <= nice <= 19:
            raise RefusedError("Option nice", f"{nice} is no niceness", "Use 0 (as it is) to 19 (after all others).")
        return cls(nice, params["ionice"] or "")

    @contextmanager
    def lowered(self) -> Iterator[None]:
        """For this thread and the threads and processes that it starts meanwhile. Raises KvmopsError."""
        # Linux keeps both per thread
        before = os.getpriority(os.PRIO_PROCESS, 0)
        classed = _set_class(self.ionice, _LOWEST) if self.ionice else None
        if self.nice:
            os.setpriority(os.PRIO_PROCESS, 0, min(before + self.nice, 19))
        try:
            yield
        finally:
            if self.nice:
                # without the privilege the rest of the run stays as nice
                with suppress(PermissionError):
                    os.setpriority(os.PRIO_PROCESS, 0, before)
            if classed:
                _set_class(*classed)


USUAL = Priority()


def _set_class(name: str, level: str) -> tuple[str, str]:
    """Sets class and level of this thread's disk accesses; what they were."""
    thread = str(threading.get_native_id())
    former, _colon, was = _ionice("-p", thread).strip().partition(": prio ")  # "best-effort: prio 4", "idle"
    levels = ["-n", level] if name in ("best-effort", "realtime") else []
    _ionice("-c", name, *levels, "-p", thread)
    return former, was


def _ionice(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["ionice", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise RefusedError("Option ionice", "ionice is not installed", "Install util-linux.") from error
    except subprocess.CalledProcessError as error:
        raise KvmopsError("Option ionice", error.stderr.strip(), "Leave the option out.") from error
    return done.stdout
