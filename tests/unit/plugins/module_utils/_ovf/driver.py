# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Converts packages in a process of its own: driver.py DIRECTORY plain|compressed PACKAGE…

Prints the seconds and the archive or error for each, and peak memory in KiB.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._archive import writer
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.convert import convert
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.request import ConvertRequest
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context, Progress

for _name in ("state_dir", "cache_dir", "run_dir"):
    if os.environ.get(f"KVMOPS_TESTS_{_name.upper()}"):
        setattr(_paths, _name, lambda name=_name: os.environ[f"KVMOPS_TESTS_{name.upper()}"])


def main(directory: str, form: str, *sources: str) -> None:
    if os.environ.get("KILL"):  # in the middle of a disk
        add = writer.ArchiveWriter.add

        def killed(*arguments: object) -> object:
            add(*arguments)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        writer.ArchiveWriter.add = killed  # type: ignore[method-assign,assignment]
    for source in sources:
        begin = time.monotonic()
        request = ConvertRequest(source=source, path=directory, compress=form == "compressed")
        try:
            found = convert(request, Context(Progress(), lambda _text: None))["archive"]["path"]
        except KvmopsError as error:
            found = f"refused: {type(error).__name__}: {error}"
        print(f"{time.monotonic() - begin:.2f}", found)
    with open(
        "/proc/self/status", encoding="ascii"
    ) as file:  # getrusage remembers the process that this one was forked from
        print(next(line.split()[1] for line in file if line.startswith("VmHWM")))


main(*sys.argv[1:])
