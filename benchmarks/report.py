# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The tables, in Markdown."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import libvirt
import zstandard

from ansible_collections.kvmops.backup.benchmarks.measure import Result


def machine() -> Iterator[str]:
    """What the numbers depend on, one fact a line."""
    cpu, memory = _field("/proc/cpuinfo", "model name"), _field("/proc/meminfo", "MemTotal")
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    yield f"{len(os.sched_getaffinity(0))} cores of {cpu}, {int(memory.split()[0]) >> 20} GiB memory"
    yield f"{system}, Linux {platform.release()}, file system {_file_system(Path('/var/lib/libvirt/images'))}"
    number = libvirt.getVersion()
    versions = [
        _first_line("tar", "--version"),
        f"zstd {_first_line('zstd', '--version').partition(' v')[2].partition(',')[0]}",
        _first_line("qemu-img", "--version"),
        f"libvirt {number // 1000000}.{number // 1000 % 1000}.{number % 1000}",
        f"virtnbdbackup {_first_line('virtnbdbackup', '-V')}",
        f"Python {platform.python_version()} with zstandard {zstandard.__version__}",
    ]
    yield ", ".join(versions)
    yield f"kvmops.backup at {os.environ.get('KVMOPS_BENCHMARK_COMMIT', 'unknown')}"


def _field(path: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:(.*)$", Path(path).read_text(), re.MULTILINE)
    return found.group(1).strip() if found else "unknown"


def _first_line(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).splitlines()[0].strip("* ")


def _file_system(path: Path) -> str:
    return subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=True
    ).stdout.strip()


def summary(results: Iterable[Result]) -> Iterator[str]:
    """One line per goal."""
    yield "| job | we, s | peer | peer, s | times as fast | goal | |"
    yield "|---|---:|---|---:|---:|---:|---|"
    for result in results:
        ours = result.samples[0]
        for goal in result.job.goals:
            peer = result.samples[goal.contender]
            ratio = result.ratio(goal.contender)
            ours_s = ours.median("wall_s")
            wanted = f"≤ {goal.at_most_s:.1f} s" if goal.at_most_s else f"{goal.ratio:.1f}"
            yield _row(
                result.job.title,
                seconds(ours_s),
                peer.name,
                seconds(peer.median("wall_s")),
                f"{ratio:.2f}",
                wanted,
                "reached" if goal.reached(ratio, ours_s) else "missed",
            )


def details(results: Iterable[Result]) -> Iterator[str]:
    """One line per contender."""
    yield (
        "| job | command | runs | durable after, s | fastest - slowest | ended after, s | ratio "
        "| CPU, s | peak memory, MiB | output, MiB | load | disturbed |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for result in results:
        for number, samples in enumerate(result.samples):
            walls = [run.wall_s for run in samples.runs]
            size = samples.median("size_bytes")
            yield _row(
                result.job.title if number == 0 else "",
                samples.name,
                str(len(walls)),
                seconds(samples.median("wall_s")),
                f"{seconds(min(walls))} - {seconds(max(walls))}",
                "" if samples.durable or not size else seconds(samples.median("exit_s")),
                f"{result.ratio(number):.2f}",
                seconds(samples.median("cpu_s")),
                f"{samples.median('rss_bytes') / 2**20:.0f}",
                f"{size / 2**20:.1f}" if size else "",
                f"{min(run.load for run in samples.runs):.1f} - {max(run.load for run in samples.runs):.1f}",
                f"{samples.median('disturbed'):.0%}",
            )


def seconds(value: float) -> str:
    """Three significant digits."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def notes(results: Sequence[Result]) -> Iterator[str]:
    """What was found out beside the times."""
    for result in results:
        if result.note:
            yield f"- {result.note}"
