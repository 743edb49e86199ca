# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes, starts, watches and removes test VMs (TCG, direct kernel boot, see guest/)."""

from __future__ import annotations

import itertools
import os
import select
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from xml.sax.saxutils import escape, quoteattr

import libvirt
from lxml import etree

from . import daemons
from ._run import LabError, run, wait_for
from .agent import GuestAgent
from .markers import Marker

# Waiting ends when it has happened: long limits cost nothing, and a machine may be busy.
BOOT_TIMEOUT_S = 300.0
TIMEOUT_S = 180.0
_ALL_UNDEFINE = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)


def build_guest() -> Path:
    """Directory with ``vmlinuz`` and ``initrd.gz`` of the test guest, built when it is not there (needs apt)."""
    if ready := os.environ.get("KVMOPS_LAB_GUEST"):
        return Path(ready)
    cache = os.environ.get("KVMOPS_LAB_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '/var/cache'}/kvmops-lab"
    return Path(run(str(Path(__file__).with_name("build-guest")), cache, timeout_s=900).strip())


@dataclass(frozen=True)
class Disk:
    """One disk of a VM to be made.

    ``path`` names an existing image to attach; without it a new one of ``size_mib`` is made, holding an ext4 that
    starts at its first byte (``ext4``) or nothing. ``options`` go to ``qemu-img create -o``.
    """

    image_format: str = "qcow2"
    size_mib: int = 64
    ext4: bool = True
    path: Path | None = None
    read_only: bool = False
    options: str = ""


class LabVm:
    """A VM, made by the lab or adopted from what a restore made."""

    def __init__(self, hypervisor: Hypervisor, name: str) -> None:
        self._hypervisor = hypervisor
        self.name = name

    @property
    def domain(self) -> libvirt.virDomain:
        """Looked up anew each time: a restart of libvirtd or a new definition does not matter."""
        return self._hypervisor.connection.lookupByName(self.name)

    @property
    def agent(self) -> GuestAgent:
        """The guest's agent; answers while the VM runs and has the channel."""
        return GuestAgent(self.domain)

    def xml(self, inactive: bool = False) -> str:
        """The domain XML with secrets, live or persistent."""
        flags = libvirt.VIR_DOMAIN_XML_SECURE | (libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0)
        return str(self.domain.XMLDesc(flags))

    def disks(self) -> dict[str, Path]:
        """Path of each file-backed disk by target, e.g. ``{"vda": Path(...)}``."""
        disks = etree.fromstring(self.xml().encode()).iterfind("devices/disk[@device='disk'][@type='file']")
        return {str(disk.xpath("string(target/@dev)")): Path(str(disk.xpath("string(source/@file)"))) for disk in disks}

    def is_running(self) -> bool:
        """Whether libvirt says it runs (or is paused)."""
        return bool(self.domain.isActive())

    def start(self, wait: bool = True) -> LabVm:
        """Starts it and waits until the guest is up: its agent answers, or without a channel the console says so."""
        self.domain.create()
        return self.wait_until_up() if wait else self

    def wait_until_up(self, timeout_s: float = BOOT_TIMEOUT_S) -> LabVm:
        """See ``start``."""
        if self._has_agent_channel():
            wait_for(f"the guest agent of {self.name}", self.agent.answers, timeout_s)
        else:
            self.console_line("GUEST-UP", timeout_s)
        return self

    def _has_agent_channel(self) -> bool:
        return "org.qemu.guest_agent.0" in self.xml()

    def console_line(self, text: str, timeout_s: float = BOOT_TIMEOUT_S) -> str:
        """The next line of the serial console that contains ``text``. A guest that is up says GUEST-UP every second."""
        pty = etree.fromstring(self.xml().encode()).xpath("string(devices/serial/source/@path)")
        console = os.open(str(pty), os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            deadline, seen = time.monotonic() + timeout_s, b""
            while time.monotonic() < deadline:
                if not select.select([console], [], [], 0.5)[0]:
                    continue
                with suppress(BlockingIOError):
                    seen += os.read(console, 4096)
                *lines, seen = seen.split(b"\n")
                for line in lines:
                    if text.encode() in line:
                        return line.decode(errors="replace").strip()
        finally:
            os.close(console)
        raise LabError(f"{self.name}: no {text!r} on the console within {timeout_s:.0f} s")

    def last_marker(self, disk: str = "vda") -> Marker:
        """The newest marker on a disk as the guest sees it (through the agent); waits for the first one."""

        def newest() -> Marker | None:
            with suppress(LabError):
                return Marker.parse(self.agent.shell(f"tail -n 1 /disk/{disk}/log"))
            return None

        return wait_for(f"a marker on {disk} of {self.name}", newest, TIMEOUT_S)

    def log(self, disk: str = "vda") -> str:
        """All markers on a disk as the guest sees it (through the agent); see markers.parse_log."""
        return self.agent.shell(f"cat /disk/{disk}/log")

    def wait_for_marker(self, number: int, timeout_s: float = TIMEOUT_S) -> Marker:
        """Waits until the writer has written at least marker ``number``."""

        def reached() -> Marker | None:
            marker = self.last_marker()
            return marker if marker.number >= number else None

        return wait_for(f"marker {number} of {self.name}", reached, timeout_s)

    def set_freeze_mode(self, mode: str) -> None:
        """ "" (plain), ``pause``, ``fail`` or ``hang``: how the guest takes the next freeze, see guest/freeze-hook."""
        self.agent.shell(f"echo '{mode}' >/run/freeze-mode")

    def frozen_digests(self) -> str:
        """``sha256sum`` lines of all files as of the last freeze in mode ``pause``."""
        return self.agent.shell("while [ ! -f /run/frozen.sha256 ]; do usleep 50000; done; cat /run/frozen.sha256")

    def booted_digests(self) -> str:
        """``sha256sum`` lines of all files as they were when the guest booted, before its writer wrote anything."""
        return self.agent.shell("cat /run/booted.sha256")

    def digests(self) -> str:
        """``sha256sum`` lines of all files on the disks now."""
        return self.agent.shell("find /disk -type f | sort | xargs sha256sum")

    def wait_until_thawed(self) -> float:
        """Waits until the guest says that its file systems are not frozen; the seconds that this took."""
        begin = time.monotonic()

        def thawed() -> bool:
            with suppress(libvirt.libvirtError):  # the agent may be silent, or not connected again yet
                return self.agent.freeze_status(timeout_s=2) == "thawed"
            return False

        wait_for(f"{self.name} to be thawed", thawed, TIMEOUT_S)
        return time.monotonic() - begin

    def shutdown(self, timeout_s: float = TIMEOUT_S) -> None:
        """Presses the power button and waits until the VM is off."""
        self.domain.shutdown()
        wait_for(f"{self.name} to power off", lambda: not self.is_running(), timeout_s)

    def destroy(self) -> None:
        """Pulls the plug, if it runs."""
        if self.is_running():
            self.domain.destroy()

    def remove(self) -> None:
        """Pulls the plug and undefines it with all its metadata; its files stay."""
        self.destroy()
        self.domain.undefineFlags(_ALL_UNDEFINE)


class Hypervisor:
    """A libvirt with VMs."""

    def __init__(self, uri: str = daemons.URI) -> None:
        self.uri = uri
        self._connection: libvirt.virConnect | None = None

    @property
    def connection(self) -> libvirt.virConnect:
        """To libvirtd; opened again when it has been restarted."""
        if self._connection is not None:
            # isAlive() says yes until a call has failed.
            with suppress(libvirt.libvirtError):
                self._connection.getLibVersion()
                return self._connection
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        self._connection = libvirt.open(self.uri)
        return self._connection

    def vm(self, name: str) -> LabVm:
        """A VM that exists there."""
        return LabVm(self, name)


class Lab(Hypervisor):
    """A directory with VMs. A context manager that removes every VM it made or adopted, and the directory.

    Files lie in ``directory`` (which QEMU's user can enter): ``boot/``, a folder per VM, and what the test puts there.
    """

    def __init__(self, directory: Path, uri: str = daemons.URI, domain_type: str = "qemu") -> None:
        super().__init__(uri)
        self.directory = directory
        self._domain_type = domain_type
        self._names: list[str] = []
        self._folders = itertools.count()
        guest = build_guest()
        self._boot = directory / "boot"
        self._boot.mkdir(parents=True)
        directory.chmod(0o755)
        # A copy: libvirt changes the owner of what it boots.
        for file in ("vmlinuz", "initrd.gz"):
            shutil.copy(guest / file, self._boot / file)

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def path(self, name: str) -> Path:
        """A new directory of this lab, open to QEMU's user; for targets, ISOs and the like."""
        directory = self.directory / name
        directory.mkdir(parents=True)
        directory.chmod(0o755)
        return directory

    def create_pool(self, name: str, path: Path | None = None) -> Path:
        """Defines and starts a directory pool (removed with the lab); returns its directory."""
        target = path or self.path(f"pool-{next(self._folders)}")
        xml = f"<pool type='dir'><name>{escape(name)}</name><target><path>{escape(str(target))}</path></target></pool>"
        self.connection.storagePoolDefineXML(xml).create()
        self._names.append(f"pool:{name}")
        return target

    def create_vm(
        self,
        name: str,
        disks: Sequence[Disk] = (Disk(),),
        *,
        agent: bool = True,
        writer: bool = True,
        mount_options: str = "rw",
        freeze_mode: str = "",
        isos: Sequence[Path] = (),
        memory_mib: int = 192,
        extra_devices: str = "",
        start: bool = True,
    ) -> LabVm:
        """Defines a VM (any name libvirt accepts) with disks vda, vdb, …, and starts it until the guest is up.

        ``agent``: channel for the guest agent; ``writer``: the guest appends markers to every ext4 disk;
        ``isos``: CD-ROMs sda, sdb, … on SATA; ``extra_devices``: XML put into ``<devices>``.
        """
        files = self.path(f"vm-{next(self._folders)}")
        command_line = (
            f"console=ttyS0 quiet panic=1 lab.mount={mount_options} lab.writer={int(writer)} lab.freeze={freeze_mode}"
            f" lab.agent={int(agent)}"
        )
        devices = [self._disk_xml(files, index, disk) for index, disk in enumerate(disks)]
        devices += [_iso_xml(index, iso) for index, iso in enumerate(isos)]
        if agent:
            devices.append("<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>")
        xml = f"""<domain type='{self._domain_type}'>
          <name>{escape(name)}</name><memory unit='MiB'>{memory_mib}</memory><vcpu>1</vcpu>
          <os>
            <type arch='x86_64' machine='q35'>hvm</type>
            <kernel>{self._boot}/vmlinuz</kernel><initrd>{self._boot}/initrd.gz</initrd><cmdline>{escape(command_line)}</cmdline>
          </os>
          <features><acpi/></features>
          <devices>
            {"".join(devices)}
            <controller type='pci' model='pcie-root'/>
            <controller type='pci' model='pcie-root-port'/><controller type='pci' model='pcie-root-port'/>
            <controller type='virtio-serial' index='0'/>
            <serial type='pty'><target port='0'/></serial>
            <memballoon model='none'/>
            {extra_devices}
          </devices>
        </domain>"""
        self.connection.defineXML(xml)
        vm = self.adopt(name)
        return vm.start() if start else vm

    def adopt(self, name: str) -> LabVm:
        """A VM that somebody else defined (a restore); removed with the lab like the others."""
        if name not in self._names:
            self._names.append(name)
        return self.vm(name)

    def read_back(self, name: str, disks: Sequence[Disk]) -> LabVm:
        """Boots a second guest that has the given existing images read-only, mounted without journal replay."""
        shown = [Disk(disk.image_format, path=disk.path, read_only=True) for disk in disks]
        return self.create_vm(name, shown, writer=False, mount_options="ro,noload")

    def close(self) -> None:
        """Removes VMs, pools and the directory."""
        for name in self._names:
            with suppress(libvirt.libvirtError):
                if name.startswith("pool:"):
                    pool = self.connection.storagePoolLookupByName(name[5:])
                    pool.destroy()
                    pool.undefine()
                else:
                    self.vm(name).remove()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        shutil.rmtree(self.directory)

    def _disk_xml(self, files: Path, index: int, disk: Disk) -> str:
        target = f"vd{'abcdefghijklmnop'[index]}"
        path = disk.path or make_image(files / f"{target}.{disk.image_format}", disk)
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='{disk.image_format}'/>"
            f"<source file={quoteattr(str(path))}/><target dev='{target}' bus='virtio'/>"
            f"{'<readonly/>' if disk.read_only else ''}</disk>"
        )


def make_image(path: Path, disk: Disk) -> Path:
    """Writes a new disk image as ``disk`` describes it."""
    raw = path.with_suffix(".new")
    with open(raw, "wb") as file:
        file.truncate(disk.size_mib << 20)
    if disk.ext4:
        run("mke2fs", "-q", "-F", "-t", "ext4", str(raw))
    if disk.image_format == "raw":
        raw.rename(path)
    else:
        options = ["-o", disk.options] if disk.options else []
        run("qemu-img", "convert", "-f", "raw", "-O", disk.image_format, *options, str(raw), str(path))
        raw.unlink()
    return path


def make_iso(path: Path, content: bytes) -> Path:
    """A file that serves as a CD image (any bytes do, padded to 2048)."""
    path.write_bytes(content + bytes(-len(content) % 2048))
    path.chmod(0o644)
    return path


def _iso_xml(index: int, iso: Path) -> str:
    return (
        f"<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file={quoteattr(str(iso))}/>"
        f"<target dev='sd{'abcdef'[index]}' bus='sata'/><readonly/></disk>"
    )
