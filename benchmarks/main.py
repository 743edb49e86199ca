# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the data, measures the jobs, prints the tables. Started by `run`, in a private environment of the lab."""

from __future__ import annotations

import argparse
import datetime
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Callable

from ansible_collections.kvmops.backup.benchmarks import (
    file_jobs,
    increment_jobs,
    night_jobs,
    ova_jobs,
    report,
    vm_jobs,
)
from ansible_collections.kvmops.backup.benchmarks.limits import limits
from ansible_collections.kvmops.backup.benchmarks.measure import BenchmarkError, Jobs, Result, measure
from ansible_collections.kvmops.backup.plugins.module_utils._units import size_bytes
from ansible_collections.kvmops.backup.tests.lab import daemons
from ansible_collections.kvmops.backup.tests.lab._run import LabError

_WORK = Path("/var/lib/libvirt/images/benchmark")
_GROUPS = ("ext4", "xfs", "btrfs", "compressed", "flat", "raw", "increment", "ova", "vm", "vm-increment", "merge")
_NIGHTS = ("start", "many")  # tables of their own


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run", description=__doc__)
    parser.add_argument("--size", default="2G", help="data in the disk (default 2G)")
    parser.add_argument("--large", default="100G", help="large empty disk (default 100G)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each command, by turns; twice as many if they vary"
    )
    parser.add_argument("--only", action="append", choices=(*_GROUPS, *_NIGHTS), help="these groups of jobs (may be repeated)")
    parser.add_argument("--vms", default="25,100,400", help="how many VMs a night has, for many (default 25,100,400)")
    parser.add_argument("--cold", action="store_true", help="sources not in the page cache")
    return parser.parse_args()


def _groups(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Jobs]]]:
    source = file_jobs.make_source(_WORK, size_bytes(arguments.size, "--size"))
    large_bytes = size_bytes(arguments.large, "--large")
    yield "ext4", lambda: file_jobs.plain_on(source, _WORK, "ext4", (1.7, 1.0), None)
    yield "xfs", lambda: file_jobs.on_reflinks(source, _WORK, "xfs")
    yield "btrfs", lambda: file_jobs.on_reflinks(source, _WORK, "btrfs")
    yield "compressed", lambda: file_jobs.compressed(source, _WORK)
    yield "flat", lambda: file_jobs.flat_view(_WORK, large_bytes)
    yield "raw", lambda: file_jobs.raw_disk(source, _WORK)
    yield "increment", lambda: increment_jobs.increments(source, _WORK)
    yield "ova", lambda: ova_jobs.conversions(source, _WORK)
    yield "vm", lambda: vm_jobs.running_vm(source, _WORK)
    yield "vm-increment", lambda: vm_jobs.increments(source, _WORK)
    yield "merge", lambda: vm_jobs.merges(_WORK)


def main() -> None:
    """See the module's text."""
    arguments = _arguments()
    if not daemons.is_private():
        sys.exit("this makes and removes VMs: start it with benchmarks/run")
    _WORK.mkdir()
    _WORK.chmod(0o755)
    results: list[Result] = []
    failures: list[str] = []
    try:
        facts = [*report.machine(), *limits(_WORK)]
        for name, jobs in _groups(arguments) if set(arguments.only or _GROUPS) & set(_GROUPS) else ():
            if name in (arguments.only or _GROUPS):
                failures += _measure(jobs(), arguments, results)
        tables = list(_nights(arguments))
    finally:
        shutil.rmtree(_WORK)
    _print(arguments, facts, results, tables)
    if failures:
        sys.exit("\n".join(["FAILED:", *failures]))


def _nights(arguments: argparse.Namespace) -> Iterator[list[str]]:
    wanted = arguments.only or _NIGHTS
    if "start" in wanted:
        yield list(night_jobs.start(_WORK / "start"))
    if "many" in wanted:
        yield list(night_jobs.many(_WORK / "many", [int(count) for count in arguments.vms.split(",")]))


def _measure(jobs: Jobs, arguments: argparse.Namespace, results: list[Result]) -> list[str]:
    """Adds to `results`; what went wrong, if anything. Closing the generator ends its VMs and mounts."""
    with closing(jobs):
        try:
            for job in jobs:
                results.append(measure(job, arguments.rounds, arguments.cold))
        except (BenchmarkError, LabError, subprocess.CalledProcessError) as error:
            return [str(error)]
    return []


def _print(arguments: argparse.Namespace, facts: list[str], results: list[Result], tables: list[list[str]]) -> None:
    print(
        f"`{' '.join(['benchmarks/run', *sys.argv[1:]])}` on {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC\n"
    )
    for fact in facts:
        print(f"- {fact}")
    cache = "not in the page cache" if arguments.cold else "in the page cache"
    print(f"- {arguments.size} of data, a third of it incompressible; sources {cache}; medians\n")
    for part in (report.summary(results), report.details(results), report.notes(results)) if results else ():
        print(*part, "", sep="\n")
    for table in tables:
        print(*table, "", sep="\n")


if __name__ == "__main__":
    main()
