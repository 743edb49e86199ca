# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs one operation in a process of its own, for tests that kill it, watch it or measure it: driver.py OPERATION ARGUMENT…

`write DIR [compressed]`, `append PATH [FILE]`, `compress PATH`, `uncompress PATH`, `read PATH`; the
last line of the output is the peak memory in KiB.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ansible_collections.kvmops.backup.plugins.module_utils import _paths
from ansible_collections.kvmops.backup.plugins.module_utils._archive import convert
from ansible_collections.kvmops.backup.plugins.module_utils._archive.reader import open_archive
from ansible_collections.kvmops.backup.plugins.module_utils._archive.verify import verify_file
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._archive import archives

BIG = {"vda_0.qcow2": archives.noise(2**20, 7), "vdb_0.qcow2": b"x" * 5000}


def kill_at(step: int) -> None:
    """Lets the process die, as by SIGKILL, before the `step`th call of those that change files; counts them in this order."""
    import fcntl

    count = 0

    def wrap(module: object, name: str) -> None:
        original = getattr(module, name)

        def call(*args: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == step:
                os._exit(137)
            return original(*args, **options)

        setattr(module, name, call)

    for name in ("pwrite", "fsync", "ftruncate", "rename", "replace", "link", "unlink", "open"):
        wrap(os, name)
    wrap(fcntl, "ioctl")
    from ansible_collections.kvmops.backup.plugins.module_utils import _files

    wrap(_files, "_renameat2")


def read(path: str) -> None:
    print("verify", verify_file(path, threads=THREADS).ok)
    with open_archive(path) as reader:
        point = reader.point()
        for member in point.members:
            reader.read(member.name, 0, 100)


THREADS = int(os.environ.get("THREADS", "2"))

if __name__ == "__main__":
    operation, *arguments = sys.argv[1:]
    if os.environ.get("KVMOPS_TESTS_STATE"):
        _paths.state_dir = lambda: os.environ["KVMOPS_TESTS_STATE"]
    if os.environ.get("KILL_AT"):
        kill_at(int(os.environ["KILL_AT"]))
    try:
        if operation == "write":
            archives.write(Path(arguments[0]), BIG, compressed="compressed" in arguments, threads=THREADS)
        elif operation == "write_file":
            archives.write(
                Path(arguments[0]),
                {"vda_0.qcow2": Path(arguments[1])},
                compressed="compressed" in arguments,
                threads=THREADS,
            )
        elif operation == "append":
            content = Path(arguments[1]) if len(arguments) > 1 else BIG["vda_0.qcow2"]
            archives.append(arguments[0], {"vda_1.snapshot": content}, threads=THREADS)
        elif operation == "compress":
            convert.compress(arguments[0], threads=THREADS)
        elif operation == "uncompress":
            convert.uncompress(arguments[0], threads=THREADS)
        elif operation == "extract":
            archives.extract_to_files(arguments[0], Path(arguments[1]), threads=THREADS)
        elif operation == "read":
            read(arguments[0])
    except KvmopsError as error:
        print(type(error).__name__, str(error).encode("ascii", "backslashreplace").decode()[:600])
    # Not getrusage(): its peak is that of the process before exec, too.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
