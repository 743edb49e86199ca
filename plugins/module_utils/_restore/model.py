# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a restore looks at (the host, as plain values), what it will do (the plan) and what it has done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Member,
    Skipped,
    TemplateRequirement,
)
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import PlaceKind
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._template.match import Match


@dataclass(frozen=True)
class RestorePlace:
    """A directory that files may be restored into.

    `problem` says why nothing can be written there ("" = it can), `filesystem` is equal for places that share their
    free bytes, `names` are the files that are there now. `pool` is "" for a directory that is no active pool's.
    `real_path` is `path` without symbolic links, where that differs. `kind`: what the bytes lie on. `open_to_all`: the directory
    in which every user could replace a file of it, "" for none.
    """

    path: str
    pool: str = ""
    filesystem: str = ""
    free_bytes: int = 0
    problem: str = ""
    names: frozenset[str] = frozenset()
    real_path: str = ""
    kind: PlaceKind = PlaceKind.DIR
    open_to_all: str = ""


@dataclass(frozen=True)
class DiskState:
    """One image of a restored VM as it was left: what tells that nobody has written to it since. ``top``: a disk shows it."""

    target: str
    path: str
    format: str
    inode: int
    size_bytes: int
    mtime_ns: int
    top: bool = True


@dataclass(frozen=True)
class Mark:
    """What a restore writes into the metadata of the VM: which point of which configuration it came from, and if `flat`."""

    point: int
    configuration: str
    token: str
    disks: tuple[DiskState, ...] = ()
    flat: bool = False


@dataclass(frozen=True)
class ExistingVm:
    """A VM of this host. `files`: every file that its definitions and snapshots name, with their layers, by all their names;
    `disk_files`: those of its disks and snapshots that are there, each by its place in a real directory.

    `locked_files`: those that a QEMU holds although libvirt says the VM is off; `touched_files`: those of its mark that
    are no longer as the restore left them or that its disks do not show any more, and what they show instead. `template`:
    it is marked as one. `missing_bases`: those of `files` that its disks stand on and that are not there. `own_disks`: real
    paths of what its disks and snapshots name themselves, not of what these stand on.
    """

    name: str
    uuid: str
    running: bool = False
    persistent: bool = True
    managed_save: bool = False
    xml: str = ""
    macs: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    disk_files: frozenset[str] = frozenset()
    hostdevs: frozenset[str] = frozenset()
    locked_files: frozenset[str] = frozenset()
    mark: Mark | None = None
    touched_files: frozenset[str] = frozenset()
    snapshots: tuple[str, ...] = ()
    template: bool = False
    missing_bases: frozenset[str] = frozenset()
    own_disks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class HostCapabilities:
    """What this host can run for the architecture and type of the VM; from libvirt's domain capabilities.

    `problem` not "": it runs none of that kind. `cpu_models`: name → usable; `firmware`: files of loaders it knows.
    `devices`: values that it takes by the key in `needs.DEVICES`; a key that libvirt does not tell of is not there.
    """

    problem: str = ""
    emulator: str = ""
    emulators: frozenset[str] = frozenset()
    machines: frozenset[str] = frozenset()
    cpu_modes: frozenset[str] = frozenset()
    cpu_models: Mapping[str, bool] = field(default_factory=dict)
    firmware: frozenset[str] = frozenset()
    firmware_auto: frozenset[str] = frozenset()
    devices: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class HostFile:
    """A file of this host that a configuration names.

    `public`: any user may read it. `settled`: only root, or the user who runs, can write to it or put another in its place.
    `pool_iso`: an .iso in a storage pool that is no VM's disk.
    `matches`: same bytes as the archive's member; None where that was not compared.
    """

    size_bytes: int
    public: bool
    pool_iso: bool
    matches: bool | None = None
    settled: bool = True


@dataclass(frozen=True)
class BlockDevice:
    """A path that a LUN of the configuration names. `problem`: why it cannot be given to a VM ("" = it can)."""

    real_path: str
    problem: str = ""


@dataclass(frozen=True)
class HostFacts:
    """Everything a plan depends on, gathered before it; see facts.gather.

    `former`: places.former_key of a member → the place it stands for now (a pool may have moved); absent: gone.
    `nvram_place`, `tpm_place`: where libvirt keeps NVRAM and the state of emulated TPMs.
    `files`: host files named by the configuration (CD images, kernels, …) that exist.
    `block_devices`: those of the LUNs in the configuration that are here, by the path given there.
    `hostdevs`: identity of the host devices (host_exposure.hostdev_identity) that are here.
    `template`: what this host has of the template that a thin clone needs, None for any other VM.
    `pools`: directories of the active pools by name.
    """

    archive_place: RestorePlace
    nvram_place: RestorePlace
    tpm_place: RestorePlace
    target: RestorePlace | None = None
    former: Mapping[str, RestorePlace] = field(default_factory=dict)
    vms: tuple[ExistingVm, ...] = ()
    networks: frozenset[str] = frozenset()
    interfaces: frozenset[str] = frozenset()
    capabilities: HostCapabilities = field(default_factory=HostCapabilities)
    files: Mapping[str, HostFile] = field(default_factory=dict)
    block_devices: Mapping[str, BlockDevice] = field(default_factory=dict)
    hostdevs: frozenset[str] = frozenset()
    template: Match | None = None
    pools: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedFile:
    """A member and the file it becomes. `backing` is the final path of the layer below it, with its format.

    `path` is a directory for the state of a TPM. `temporary`: only needed until another file has been made of it. `head`: what
    a memory image gets instead of its first bytes, which must be `former_head` (both b"": nothing). `public`: everybody may
    read it.
    """

    member: Member
    path: str
    format: str
    pool: str = ""
    backing: str = ""
    backing_format: str = ""
    temporary: bool = False
    head: bytes = b""
    former_head: bytes = b""
    public: bool = False


@dataclass(frozen=True)
class MadeFile:
    """An image that is not in the archive: a fresh qcow2 on `backing`, or (`flat`) the content of `backing` and all below it."""

    target: str
    path: str
    format: str
    backing: str
    backing_format: str
    pool: str = ""
    flat: bool = False


@dataclass(frozen=True)
class PlannedState:
    """A snapshot as it will be defined."""

    name: str
    xml: str
    parent: str
    current: bool


@dataclass(frozen=True)
class PlannedDisk:
    """A disk of the VM as it will be: the top file of its chain."""

    target: str
    path: str
    format: str


@dataclass(frozen=True)
class RestorePlan:
    """Every step of a restore, decided.

    `unchanged`: the VM is there already and was restored from this point. `replaced`: the VM that will be gone.
    `set_aside`: existing files whose names the restore takes, removed once the new VM stands.
    `domain_xml`: the definition, without the mark. `refresh_pools`: names of pools that get new files.
    `made`: files that are made of those in `files`. `states`: the snapshots, parents first. `flat`: they were given up.
    `repair`: images that QEMU had marked as corrupt are repaired.
    `requires`: content of the template that files stand on; it is compared once more before they take their places.
    `reduced`: what of the definition was left out because the archive is not ours to trust.
    `autostart`: the VM starts with the host, as the original did, which is gone; False: as the replaced VM does, if there is one.
    """

    name: str
    uuid: str
    point: int
    configuration: str
    domain_xml: str
    disks: tuple[PlannedDisk, ...]
    files: tuple[PlannedFile, ...]
    made: tuple[MadeFile, ...] = ()
    states: tuple[PlannedState, ...] = ()
    flat: bool = False
    unchanged: bool = False
    replaced: ExistingVm | None = None
    set_aside: tuple[str, ...] = ()
    refresh_pools: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[Notice, ...] = ()
    lacking: tuple[Notice, ...] = ()
    estimated_bytes: int = 0
    start: bool = False
    reduced: tuple[str, ...] = ()
    repair: bool = False
    autostart: bool = False
    requires: TemplateRequirement | None = None

    @property
    def left_out(self) -> tuple[Notice, ...]:
        """A warning for each thing that is skipped."""
        return tuple(Notice(Code.LEFT_OUT, f"{item.device} is left out: {item.reason}") for item in self.skipped)

    @property
    def all_files(self) -> tuple[PlannedFile | MadeFile, ...]:
        """Every file of the restore, those that others are made of first."""
        return (*self.files, *self.made)


@dataclass(frozen=True)
class RepairedImage:
    """An image of which the restored copy was repaired, and what qemu-img has mended in it."""

    target: str
    path: str
    corruptions: int
    leaks: int


@dataclass(frozen=True)
class RestoreResult:
    """What was done; the shape of `vm_restore`'s return values."""

    changed: bool
    name: str
    uuid: str
    point: int
    disks: tuple[PlannedDisk, ...]
    snapshots: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    bytes_written: int = 0
    duration_s: float = 0.0
    repaired: tuple[RepairedImage, ...] = ()
