# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Boots, resets and ends a whole host, and runs commands on it over ssh.

A host that has booted is kept with its memory, so that the next one made of the same image is there within seconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ansible_collections.kvmops.backup.tests.lab._run import LabError, run, wait_for
from ansible_collections.kvmops.backup.tests.lab.kvm import kvm_works
from ansible_collections.kvmops.backup.tests.lab.modules import Ansible
from ansible_collections.kvmops.backup.tests.lab.qmp import Monitor

BOOT_TIMEOUT_S = 900.0
COLLECTIONS = "/opt/collections"  # on the host
_SPARE_DISKS = ("data1", "data2")
_SPARE_GIB = 6
_CHECKOUT = Path(__file__).resolve().parents[3]
# On the host: the collection as it was copied there, beside what its modules import from Ansible.
PYTHON = f"PYTHONPATH={COLLECTIONS}:/opt/ansible PYTHONDONTWRITEBYTECODE=1 KVMOPS_LAB_GUEST=/var/cache/kvmops-lab/guest python3"


def lab_cache() -> Path:
    """Where the lab keeps what takes long to make."""
    return Path(os.environ.get("KVMOPS_LAB_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '/var/cache'}/kvmops-lab")


def scratch() -> Path:
    """Where hosts that are up have their disks."""
    return Path(os.environ.get("KVMOPS_LAB_SCRATCH") or "/var/tmp")


def build(release: str) -> Path:
    """Directory with the image of a release, built when it is not there."""
    recipe = Path(__file__).with_name("build")
    done = subprocess.run(
        [str(recipe), release, str(lab_cache())],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise LabError(
            f"The host's image was not built: {recipe} ended with {done.returncode}; its messages are above."
        )
    return Path(done.stdout.strip())


class Machine:
    """One whole host. Everything that belongs to it lies in its directory, which is gone after ``down``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._worker: subprocess.Popen[str] | None = None

    @classmethod
    def up(cls, directory: Path, release: str = "trixie") -> Machine:
        """A fresh host with the collection on it."""
        image = build(release)
        booted = _booted(image)
        machine = cls(directory)
        machine._make(image, booted)
        machine._start(["-incoming", f"exec:zstd -dc {shlex.quote(str(booted / 'memory'))}"])
        with machine.monitor() as monitor:
            wait_for("the host's memory", lambda: monitor.execute("query-status")["status"] == "paused", timeout_s=300)
            monitor.execute("cont")
        machine.wait_for_ssh()
        # Its clock stood still in the meantime.
        machine.ssh(f"sudo date -u -s @{time.time():.0f} >/dev/null")
        machine.copy_collection()
        return machine

    # --- its life ---

    def _make(self, image: Path, booted: Path | None) -> None:
        if self.directory.exists():
            raise LabError(f"{self.directory} exists: a host of this name is up, or was not taken down.")
        self.directory.mkdir(parents=True)
        base = booted or image
        for disk in ("root", *_SPARE_DISKS):
            path = self._disk(disk)
            origin = base / f"{disk}.qcow2" if booted else image / "root.raw"
            if booted or disk == "root":
                kind = "qcow2" if booted else "raw"
                run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(origin), "-F", kind, str(path))
            else:
                run("qemu-img", "create", "-q", "-f", "qcow2", str(path), f"{_SPARE_GIB}G")
        shutil.copy(image / "id", self.directory / "id")
        self._write_facts({"image": str(image), "port": _free_port()})

    def _start(self, more: list[str] | None = None) -> None:
        image = Path(self._facts()["image"])
        drives = [
            argument
            for disk in ("root", *_SPARE_DISKS)
            for argument in ("-drive", f"file={self._disk(disk)},if=virtio,cache=unsafe,discard=unmap")
        ]
        argv = ["nice", "-n", "5", "qemu-system-x86_64", "-name", self.directory.name, *_hardware()]
        argv += ["-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd.img")]
        argv += ["-append", "root=/dev/vda ro console=ttyS0 quiet systemd.show_status=false", *drives]
        argv += [
            "-netdev",
            f"user,id=net,hostfwd=tcp:127.0.0.1:{self.port}-:22",
            "-device",
            "virtio-net-pci,netdev=net",
        ]
        argv += [
            "-chardev",
            f"file,id=console,path={self.directory}/console.log,append=on",
            "-serial",
            "chardev:console",
        ]
        argv += [
            "-qmp",
            f"unix:{self.directory}/qmp.sock,server=on,wait=off",
            "-pidfile",
            str(self.directory / "qemu.pid"),
        ]
        argv += ["-daemonize", *(more or [])]
        run(*argv)

    def wait_for_ssh(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Waits until the administrator can log in."""
        wait_for(
            f"ssh of {self.directory.name}",
            lambda: self._ssh("true", timeout_s=20).returncode == 0,
            timeout_s,
            every_s=1,
        )

    def monitor(self) -> Monitor:
        """QEMU's monitor."""
        return Monitor(self.directory / "qmp.sock")

    def reset(self) -> None:
        """Pulls the plug and switches on again; what was in memory is lost. Returns when ssh answers."""
        before = self.boot_id()
        self.pull_the_plug()
        self.switch_on()
        assert self.boot_id() != before

    def pull_the_plug(self) -> None:
        """The power is gone, now."""
        self._close_connections()
        self._end(signal.SIGKILL)
        (self.directory / "qmp.sock").unlink(missing_ok=True)

    def switch_on(self, wait: bool = True) -> None:
        """Boots what ``pull_the_plug`` has left."""
        self._start()
        if wait:
            self.wait_for_ssh()

    def down(self) -> None:
        """Ends it and removes all that belongs to it."""
        self._close_connections()
        self._end(signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, number: int) -> None:
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int((self.directory / "qemu.pid").read_text())
            if "qemu-system" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, number)
                wait_for("QEMU to end", lambda: _is_gone(pid), timeout_s=60)

    # --- commands and files on it ---

    @property
    def port(self) -> int:
        """Where ssh answers on 127.0.0.1."""
        return int(self._facts()["port"])

    def ssh_arguments(self) -> list[str]:
        """Options of ssh, also for Ansible."""
        directory = self.directory
        return (
            f"-F none -i {directory}/id -o IdentitiesOnly=yes"
            " -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no -o LogLevel=ERROR"
            " -o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=8"
            f" -o ControlMaster=auto -o ControlPersist=600 -o ControlPath={directory}/ssh-%r"
        ).split()

    def ssh_argv(self, user: str = "admin") -> list[str]:
        """The command that a command line of the host is put after."""
        return ["ssh", "-p", str(self.port), *self.ssh_arguments(), f"{user}@127.0.0.1"]

    def _ssh(self, command: str, user: str = "admin", timeout_s: float = 1800) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [*self.ssh_argv(user), command],
                capture_output=True,
                text=True,
                check=False,
                stdin=subprocess.DEVNULL,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess([command], 255, "", f"no end within {timeout_s:.0f} s")

    def ssh(self, command: str, user: str = "admin", check: bool = True, timeout_s: float = 1800) -> str:
        """Standard output of a command line run there as an ordinary user. LabError when it fails."""
        done = self._ssh(command, user, timeout_s)
        if check and done.returncode:
            raise LabError(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def root(self, *argv: str, check: bool = True, timeout_s: float = 1800) -> str:
        """Standard output of a command run there with sudo."""
        return self.ssh(shlex.join(["sudo", *argv]), check=check, timeout_s=timeout_s)

    def boot_id(self) -> str:
        """Another one after each boot."""
        return self.ssh("cat /proc/sys/kernel/random/boot_id").strip()

    def copy_collection(self) -> None:
        """Puts this checkout where modules that are run directly on the host, and its timers, find it."""
        place = f"{COLLECTIONS}/ansible_collections/kvmops/backup"
        excluded = (
            "__pycache__",
            ".git",
            "./.*_cache",
            "./.ansible",
            "./tests/output",
            "./tests/unit",
            "./tests/integration",
        )
        pack = ["tar", "-C", str(_CHECKOUT), *(f"--exclude={name}" for name in excluded), "-czf", "-", "."]
        unpack = f"sudo rm -rf {place} && sudo mkdir -p {place} && sudo tar -C {place} --no-same-owner -xzf -"
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
            done = subprocess.run(
                [*self.ssh_argv(), unpack], stdin=packing.stdout, capture_output=True, text=True, check=False
            )
        if done.returncode:
            raise LabError(f"The collection was not copied to the host: {done.stderr}")

    def module(
        self, module: str, *, check_mode: bool = False, fails: bool | None = False, **arguments: Any
    ) -> dict[str, Any]:
        """Runs a module directly, as root on the host: one that Ansible sends there takes a minute more to start.

        LabError when it fails, or with ``fails`` when it does not; None: either will do.
        """
        text = json.dumps({"ANSIBLE_MODULE_ARGS": {**arguments, "_ansible_check_mode": check_mode}})
        name = f"ansible_collections.kvmops.backup.plugins.modules.{module}"
        done = self._ssh(f"sudo env {PYTHON} -m {name} {shlex.quote(text)}")
        try:
            result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            raise LabError(f"{module} printed no result:\n{done.stdout}{done.stderr}") from None
        if fails is not None and bool(result.get("failed")) != fails:
            raise LabError(
                f"{module} {'did not fail' if fails else 'failed'}: {json.dumps(result, indent=2)}\n{done.stderr}"
            )
        return result

    def call(self, function: str, /, **arguments: Any) -> Any:
        """One of the calls of ``worker``, as root on the host."""
        if self._worker is None or self._worker.poll() is not None:
            command = f"sudo env {PYTHON} -m ansible_collections.kvmops.backup.tests.lab.host.worker"
            self._worker = subprocess.Popen(
                [*self.ssh_argv(), command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._worker.stdin and self._worker.stdout
        self._worker.stdin.write(json.dumps({"call": function, "arguments": arguments}) + "\n")
        self._worker.stdin.flush()
        line = self._worker.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the worker on the host ended with {self._worker.wait()}"}
        if "error" in answer:
            raise LabError(f"{function}({arguments}) on the host: {answer['error']}")
        return answer["result"]

    def ansible(self, user: str = "admin", become: bool = True, **variables: Any) -> Ansible:
        """Ansible from outside: ssh as a user who becomes root."""
        facts = {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": user,
            "ansible_become": become,
            "ansible_ssh_args": shlex.join(self.ssh_arguments()),
            "ansible_pipelining": True,
            **variables,
        }
        return Ansible(host="kvm01", connection="ssh", variables=facts)

    def keep_evidence(self, directory: Path) -> None:
        """What explains a failure: the console and this boot's journal."""
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            shutil.copy(self.directory / "console.log", directory / "console.log")
        (directory / "journal.log").write_text(
            self.ssh("sudo journalctl --no-pager -n 20000", check=False, timeout_s=300)
        )

    # --- its directory ---

    def _disk(self, name: str) -> Path:
        return self.directory / f"{name}.qcow2"

    def _facts(self) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = json.loads((self.directory / "machine.json").read_text())
        except FileNotFoundError:
            raise LabError(f"No host is up in {self.directory}") from None
        return facts

    def _write_facts(self, facts: dict[str, Any]) -> None:
        (self.directory / "machine.json").write_text(json.dumps(facts))

    def _close_connections(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            self._worker = None
        for path in self.directory.glob("ssh-*"):
            user = path.name[4:]
            subprocess.run(
                [*self.ssh_argv(user)[:-1], "-O", "exit", f"{user}@127.0.0.1"], capture_output=True, check=False
            )


def _booted(image: Path) -> Path:
    """Disks and memory of a host that has booted from the image once and waits to go on."""
    # QEMU goes on only with what it has saved itself, in the same machine.
    key = f"{run('qemu-system-x86_64', '--version')} {_hardware()}"
    booted = image / f"booted-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    with open(image / ".booted.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (booted / "complete").exists():
            shutil.rmtree(booted, ignore_errors=True)
            machine = Machine(booted)
            try:
                machine._make(image, None)
                machine._start()
                machine.wait_for_ssh()
                # libvirt has found out what QEMU can do, and systemd has nothing left to start.
                machine.ssh("sudo virsh domcapabilities >/dev/null; systemctl is-system-running --wait", check=False)
                machine.ssh("sudo sync")
                machine._close_connections()
                with machine.monitor() as monitor:
                    monitor.execute("stop")
                    monitor.execute("migrate", uri=f"exec:zstd -q -T2 -o {shlex.quote(str(booted / 'memory'))}")
                    wait_for("the host's memory", lambda: _is_saved(monitor), timeout_s=600, every_s=0.5)
            finally:
                machine._end(signal.SIGTERM)
            (booted / "complete").touch()
    return booted


def _is_saved(monitor: Monitor) -> bool:
    status = monitor.execute("query-migrate")
    if status["status"] == "failed":
        raise LabError(f"The host's memory was not saved: {status}")
    return bool(status["status"] == "completed")


def _hardware() -> list[str]:
    """KVM where it works. Emulated, the most capable processor brings SVM, so that KVM works inside in either case.

    Only one is emulated. Of two, one may run code that the other has just patched, as KVM does at each start of a guest: a panic.
    """
    processor = "-accel kvm -cpu host -smp 2" if kvm_works() else "-accel tcg,tb-size=1024 -cpu max -smp 1"
    return f"{processor} -machine q35 -m 3072 -device virtio-rng-pci -display none -no-user-config".split()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
