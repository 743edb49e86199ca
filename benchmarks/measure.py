# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs commands by turns and measures each: wall clock, processor time, peak memory, size of what it made."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

_READ_BYTES = 4 << 20
#: A job is measured again when one of its commands varied more than this (slowest to fastest, of the median),
_WIDE_SPREAD = 0.3
#: or when others took more than this part of the processor time in one of the runs that count.
_MUCH_DISTURBED = 0.1
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchmarkError(Exception):
    """A command failed, or two results that must be equal are not."""


def _nothing() -> None:
    pass


def _no_processes() -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class Contender:
    """One way to do a job: the commands of a pipe.

    `output`: the file or directory it makes, removed before each run and measured after it; a directory is made anew.
    `durable`: the command itself fsyncs what it makes; else that is done after it, and measured.
    `before` and `after` run outside the measurement. `helpers`: processes whose processor time counts too (QEMU).
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    output: Path | None = None
    output_is_directory: bool = False
    durable: bool = False
    before: Callable[[], None] = _nothing
    after: Callable[[], None] = _nothing
    helpers: Callable[[], tuple[int, ...]] = _no_processes


@dataclass(frozen=True)
class Goal:
    """We are `ratio` times as fast as `contender` (its index), or need at most `at_most_s`, however large the data are."""

    contender: int
    ratio: float = 0.0
    at_most_s: float = 0.0

    def reached(self, ratio: float, ours_s: float) -> bool:
        """Whether that is so."""
        return ours_s <= self.at_most_s if self.at_most_s else ratio >= self.ratio


@dataclass(frozen=True)
class Job:
    """What is measured: `contenders[0]` (us) against the others. `sources` are in the page cache (or with --cold are not).

    `check` raises BenchmarkError when the last results are not what they must be. `note` finds out more after the measurement.
    """

    title: str
    contenders: tuple[Contender, ...]
    goals: tuple[Goal, ...] = ()
    sources: tuple[Path, ...] = ()
    check: Callable[[], None] = _nothing
    note: Callable[[], str] = str


#: Jobs that share what is set up before and cleaned up after them.
Jobs = Generator[Job, None, None]


@dataclass(frozen=True)
class Sample:
    """One run: after `exit_s` the command ended, after `wall_s` its output was durable too; `load`: the load average before it.

    `disturbed`: the part of the machine's processor time meanwhile that others took, the hypervisor included.
    """

    exit_s: float
    wall_s: float
    cpu_s: float
    rss_bytes: int
    size_bytes: int
    load: float
    disturbed: float


@dataclass(frozen=True)
class Samples:
    """The runs of one contender that count."""

    name: str
    durable: bool
    runs: tuple[Sample, ...]

    def median(self, field: str) -> float:
        """The median of a field of Sample."""
        return float(statistics.median(getattr(run, field) for run in self.runs))

    @property
    def spread(self) -> float:
        """Slowest minus fastest, as a part of the median."""
        walls = [run.wall_s for run in self.runs]
        return (max(walls) - min(walls)) / statistics.median(walls)

    @property
    def disturbed(self) -> float:
        """Of the run that was disturbed most."""
        return max(run.disturbed for run in self.runs)


@dataclass(frozen=True)
class Result:
    """A measured job."""

    job: Job
    samples: tuple[Samples, ...]
    note: str

    def ratio(self, contender: int, field: str = "wall_s") -> float:
        """How many times as long as we a contender takes (ratio of the medians)."""
        return self.samples[contender].median(field) / self.samples[0].median("wall_s")


def measure(job: Job, rounds: int, cold: bool) -> Result:
    """Runs the contenders by turns, `rounds` times each; up to twice as often while others disturb or the times vary.

    The `rounds` runs of each that were disturbed least count.
    """
    runs: list[list[Sample]] = [[] for _dummy in job.contenders]

    def results() -> tuple[Samples, ...]:
        calm = [tuple(sorted(own, key=lambda run: run.disturbed)[:rounds]) for own in runs]
        return tuple(Samples(c.name, c.durable, own) for c, own in zip(job.contenders, calm))

    for number in range(2 * rounds):
        if number >= rounds and all(
            each.spread <= _WIDE_SPREAD and each.disturbed <= _MUCH_DISTURBED for each in results()
        ):
            break
        for contender, own in zip(job.contenders, runs):
            own.append(_run(contender, job.sources, cold))
            told = f"  {job.title}, {contender.name}: {own[-1].wall_s:.3f} s, {own[-1].disturbed:.0%} disturbed"
            print(told, file=sys.stderr, flush=True)
    job.check()
    for contender in job.contenders:
        if contender.output:
            remove(contender.output)
    return Result(job, results(), job.note())


def _run(contender: Contender, sources: Sequence[Path], cold: bool) -> Sample:
    contender.before()
    if contender.output:
        remove(contender.output)
        if contender.output_is_directory:
            contender.output.mkdir(parents=True)
            contender.output.chmod(0o755)
    for source in sources:
        evict(source) if cold else warm(source)
    os.sync()
    load = os.getloadavg()[0]
    helpers = contender.helpers()
    helped = sum(map(_cpu_of, helpers))
    busy = _busy_s()
    begin = time.perf_counter()
    cpu_s, rss_bytes = _pipe(contender.commands)
    exit_s = time.perf_counter() - begin
    if contender.output and not contender.durable:
        cpu_s += _pipe([("sync", *map(str, [*files(contender.output), contender.output.parent]))])[0]
    wall_s = time.perf_counter() - begin
    cpu_s += sum(map(_cpu_of, helpers)) - helped
    others_s = max(0.0, _busy_s() - busy - cpu_s)
    size = sum(file.stat().st_size for file in files(contender.output)) if contender.output else 0
    contender.after()
    return Sample(exit_s, wall_s, cpu_s, rss_bytes, size, load, others_s / wall_s / (os.cpu_count() or 1))


def _pipe(commands: Sequence[Sequence[str]]) -> tuple[float, int]:
    """Processor seconds (with children) and the sum of the peak memories of the commands of a pipe."""
    # Linux counts the memory of the process that forked into a peak, so a small one has to: GNU time.
    with ExitStack() as stack:
        reports = [stack.enter_context(tempfile.NamedTemporaryFile("r")) for _dummy in commands]
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))
        children: list[subprocess.Popen[bytes]] = []
        for command, report in zip(commands, reports):
            last = len(children) == len(commands) - 1
            child = subprocess.Popen(
                ["time", "-q", "-f", "%M", "-o", report.name, *command],
                stdin=children[-1].stdout if children else subprocess.DEVNULL,
                stdout=errors if last else subprocess.PIPE,
                stderr=errors,
            )
            if children and children[-1].stdout:
                children[-1].stdout.close()
            children.append(child)
        cpu_s = 0.0
        for child, command in zip(children, commands):
            _pid, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            cpu_s += usage.ru_utime + usage.ru_stime
            if child.returncode:
                errors.seek(0)
                raise BenchmarkError(f"{' '.join(command)}: exit code {child.returncode}\n{errors.read()}")
        return cpu_s, sum(int(report.read()) for report in reports) << 10


def _busy_s() -> float:
    """Processor seconds that this machine has spent, and the hypervisor has kept from it, since it was started."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def _cpu_of(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def files(path: Path) -> list[Path]:
    """The regular files at or below a path."""
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def remove(path: Path) -> None:
    """Removes a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def warm(path: Path) -> None:
    """Reads a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(_READ_BYTES)
        while file.readinto(buffer):
            pass


def evict(path: Path) -> None:
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def same(one: Path, other: Path) -> None:
    """Raises BenchmarkError unless two files hold the same bytes."""
    if subprocess.run(["cmp", str(one), str(other)], check=False).returncode:
        raise BenchmarkError(f"{one} and {other} differ")
