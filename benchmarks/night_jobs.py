# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a run costs, and a night of many VMs: processor time of a module's start; the weekly role on tiny VMs that are off.

These are no races: there is no peer, and what counts is that a VM costs the same, however many others there are.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from base64 import b64decode
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import libvirt

from ansible_collections.kvmops.backup.benchmarks.measure import BenchmarkError
from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._archive.writer import ArchiveWriter
from ansible_collections.kvmops.backup.plugins.module_utils._image.source import FileSource
from ansible_collections.kvmops.backup.tests.lab import daemons
from ansible_collections.kvmops.backup.tests.lab.modules import run_module

_ROUNDS = 7
_AT_ONCE = 8
_WEEKS = 6
_WEEK_S = 7 * 86400
_PLAY = """
- hosts: all
  gather_facts: false
  roles:
    - role: kvmops.backup.weekly_backup
      vars:
        weekly_backup_path: {path}
        weekly_backup_max_parallel: {at_once}
        weekly_backup_keep_days: 60
"""


def start(directory: Path) -> Iterator[str]:
    """A table of the processor time of whole modules, as Ansible sends them."""
    directory.mkdir()
    place = directory / "archives"
    place.mkdir()
    yield "| a module, from its start to its result | processor time, s | files of ours | KiB sent |"
    yield "|---|---:|---:|---:|"
    with _vms(directory, 1) as (vm,):
        run_module("vm_backup", vm=vm, path=str(place), incrementable=True)
        jobs: list[tuple[str, str, dict[str, Any]]] = [
            ("Ansible's own `ping`", "ansible.builtin.ping", {}),
            ("`vm_backup`, `max_age` satisfied", "vm_backup", {"vm": vm, "path": str(place), "max_age": "20h"}),
            ("`vm_backup`, a small increment", "vm_backup", {"vm": vm, "path": str(place), "mode": "auto"}),
            ("`vm_info`", "vm_info", {}),
            ("`backup_info`", "backup_info", {"path": str(place)}),
        ]
        for title, module, arguments in jobs:
            program = _sent(module, arguments, directory)
            seconds = statistics.median(_processor_s(program) for _round in range(_ROUNDS))
            files, sent = _ours(program)
            yield f"| {title} | {seconds:.2f} | {files} | {sent >> 10} |"
            print(f"  {title}: {seconds:.2f} s", file=sys.stderr, flush=True)


def many(directory: Path, counts: Sequence[int]) -> Iterator[str]:
    """A table of nights: fulls, and again with nothing due; the same with archives of six weeks in the place."""
    yield (
        "| VMs | archives | fulls, s per VM | nothing due, s per VM | `backup_info` cold / warm, s "
        "| controller, MiB | host, MiB | files open |"
    )
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|"
    for count in counts:
        for weeks in (0, _WEEKS):
            yield _night(directory, count, weeks)


def _night(directory: Path, count: int, weeks: int) -> str:
    place = directory / "archives"
    place.mkdir(parents=True)
    try:
        with _vms(directory, count, poisoned=True) as vms:
            _fill(place, vms, weeks)
            archives = len(os.listdir(place))
            full, peak = _play(directory, place, count)
            made = len(os.listdir(place)) - archives
            if made != count - 1:
                raise BenchmarkError(f"{made} archives were made of {count} VMs, one of which cannot be backed up")
            idle, _peak = _play(directory, place, count)
            if len(os.listdir(place)) != archives + made:
                raise BenchmarkError("a backup was made where none was due")
            shutil.rmtree("/var/cache/kvmops-backup/index", ignore_errors=True)
            info = [_timed(lambda: run_module("backup_info", path=str(place))) for _round in range(2)]
    finally:
        shutil.rmtree(directory)
    row = (
        f"| {count} | {archives + made} | {full / count:.2f} | {idle / count:.2f} | {info[0]:.1f} / {info[1]:.1f} "
        f"| {peak.controller_mib} | {peak.host_mib} | {peak.files} |"
    )
    print(f"  {row}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return row


class _Peak(threading.Thread):
    """The most memory and open files of the host while something runs, above what they were before."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._free, self._open = _available_mib(), _open_files()
        self.host_mib = self.files = self.controller_mib = 0
        self._over = threading.Event()

    def __enter__(self) -> _Peak:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Looks until it is over."""
        while not self._over.wait(0.1):
            self.host_mib = max(self.host_mib, self._free - _available_mib())
            self.files = max(self.files, _open_files() - self._open)


def _available_mib() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) >> 10


def _open_files() -> int:
    return int(Path("/proc/sys/fs/file-nr").read_text().split()[0])


def _play(directory: Path, place: Path, count: int) -> tuple[float, _Peak]:
    """Seconds of a night, and what it took. One VM fails, the others must not."""
    playbook = directory / "play.yml"
    playbook.write_text(_PLAY.format(path=place, at_once=_AT_ONCE))
    tool = Path(sys.executable).parent / "ansible-playbook"
    variables = json.dumps({"ansible_python_interpreter": "/usr/bin/python3"})
    argv = ["time", "-q", "-f", "%M", "-o", str(directory / "memory"), str(tool), "-i", "localhost,", "-c", "local"]
    begin = time.monotonic()
    with _Peak() as peak:
        done = subprocess.run(
            [*argv, "-e", variables, str(playbook)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    seconds = time.monotonic() - begin
    peak.controller_mib = int((directory / "memory").read_text()) >> 10
    if f"1 of {count} failed" not in done.stdout:
        raise BenchmarkError(f"not one VM failed, but:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return seconds, peak


def _timed(act: Any) -> float:
    begin = time.monotonic()
    act()
    return time.monotonic() - begin


def _connection() -> Any:
    return libvirt.open(daemons.URI)


@contextlib.contextmanager
def _vms(directory: Path, count: int, *, poisoned: bool = False) -> Iterator[list[str]]:
    """Names of tiny VMs that are off; of the last one, `poisoned`, the disk is not there."""
    images = directory / "images"
    images.mkdir()
    conn = _connection()
    domains = []
    try:
        for number in range(count):
            image = images / f"{number}.qcow2"
            if not (poisoned and number == count - 1):
                subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "4M"], check=True)
            domains.append(conn.defineXML(_definition(f"tiny{number}", str(uuid.UUID(int=number + 1)), image)))
        yield [domain.name() for domain in domains]
    finally:
        for domain in domains:
            domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)


def _definition(name: str, uuid_text: str, image: Path) -> str:
    return (
        f"<domain type='qemu'><name>{name}</name><uuid>{uuid_text}</uuid><memory unit='MiB'>64</memory>"
        "<os><type arch='x86_64'>hvm</type></os><devices>"
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
        "<target dev='vda' bus='virtio'/></disk></devices></domain>"
    )


def _fill(place: Path, vms: Sequence[str], weeks: int) -> None:
    """Fulls of each VM, one a week, the newest a week old."""
    conn = _connection()
    for vm in vms[:-1] if weeks else ():
        domain = conn.lookupByName(vm)
        xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        disk = xml.partition("<source file='")[2].partition("'")[0]
        for week in range(1, weeks + 1):
            at = int(time.time()) - week * _WEEK_S
            name = names.archive_name(vm, at, domain.UUIDString(), False)
            with ArchiveWriter(str(place), name, compression=None, timestamp=at) as writer:
                source = FileSource(disk)
                member = Member(
                    "vda_0.qcow2", Role.DISK, 0, target="vda", virtual_size_bytes=4 << 20, image_format="qcow2",
                    original_format="qcow2", former_path=disk, active=True,
                )  # fmt: skip
                stored = (writer.add(member, source),)
                source.close()
                writer.publish(Configuration(at, xml, vm, domain.UUIDString(), stored))


def _sent(module: str, arguments: dict[str, Any], directory: Path) -> Path:
    """The program that Ansible makes of a module, as it was sent to the host."""
    temporary = directory / "sent"
    shutil.rmtree(temporary, ignore_errors=True)
    environment = {**os.environ, "ANSIBLE_KEEP_REMOTE_FILES": "1", "ANSIBLE_REMOTE_TMP": str(temporary)}
    full_name = module if "." in module else f"kvmops.backup.{module}"
    tool = str(Path(sys.executable).parent / "ansible")
    argv = [tool, "localhost", "-c", "local", "-e", '{"ansible_python_interpreter": "/usr/bin/python3"}']
    # as a task of the user's own: the action plugin then sends the module alone
    done = subprocess.run(
        [*argv, "-m", full_name, *(["-a", json.dumps(arguments)] if arguments else []), "-B", "300", "-P", "1"],
        capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    found = list(temporary.glob(f"*/AnsiballZ_{module.rpartition('.')[2]}.py"))
    if done.returncode or not found:
        raise BenchmarkError(f"{module} was not sent:\n{done.stdout}{done.stderr}")
    return Path(shutil.move(str(found[0]), str(directory / f"{module}.py")))


def _processor_s(program: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        ["/usr/bin/python3", str(program)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise BenchmarkError(f"{program.name} failed:\n{done.stdout}{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _ours(program: Path) -> tuple[int, int]:
    """How many files of this collection are in it, and its size in bytes."""
    text = program.read_text(encoding="utf-8")
    packed = max((part for part in text.replace("'", '"').split('"')), key=len)
    with zipfile.ZipFile(BytesIO(b64decode(packed.replace("\\n", "").replace("\n", "")))) as archive:
        own = [name for name in archive.namelist() if "kvmops/backup" in name and not name.endswith("__init__.py")]
    return len(own), len(text)
