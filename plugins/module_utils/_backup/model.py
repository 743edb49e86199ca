# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What is known before a backup, and what it will do: the values that facts, plan and run hand on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Consistency,
    Member,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup.disks import Image
from ansible_collections.kvmops.backup.plugins.module_utils._backup.members import Base, PlannedMember
from ansible_collections.kvmops.backup.plugins.module_utils._backup.template_base import Thin
from ansible_collections.kvmops.backup.plugins.module_utils._capabilities import Capabilities
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.agent import AgentState
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.boot_files import BootFile
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.domain import Disk, DomainView
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.snapshots import Snapshot
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.standing import Standing
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.snapshot import SnapshotPlan


@dataclass(frozen=True)
class VmFacts:
    """What is known about a VM before anything is touched.

    `standing`: whether a running one stands still, and why. `autostart`: it starts with the host.
    `view`: of the definition that counts now (live for a running VM). `images`: every image that its disks and snapshots
    stand on, by path. `free_bytes`: free space of the file systems of those images, by device id. `foreign_jobs`: jobs at
    work on the VM that are not ours. `locked_images`: images of an off VM that a QEMU has open all the same.
    `tpm_path`: directory with the state of an emulated TPM, "" where there is none. `file_bytes`: sizes in an archive of what is
    stored besides images, by path. `checkpoints`: those because of which libvirt takes no snapshot of the VM, which is off.
    `memory_blockers`: what keeps the memory of a running VM from being saved, in QEMU's words. `unmerged`: names
    of snapshots that an earlier run should have merged and could not. `shared`: files of its disks that
    another VM has too, with the name of that one (`find.shared`). `boot_files`: files of the host that its definitions name and
    QEMU loads. `unseen`: files of its disks that cannot be looked at, and why. `snapshot_files`: files beside its disks that are
    named as those of our snapshots. `thin`: the template that it stands on, or is. `attached`: disks of other VMs that it holds;
    `view` and all definitions are without them.
    """

    name: str
    uuid: str
    running: bool
    persistent_xml: str
    live_xml: str
    view: DomainView
    images: Mapping[str, Image]
    standing: Standing = Standing.RUNS
    autostart: bool = False
    snapshots: tuple[Snapshot, ...] = ()
    snapshot_disks: Mapping[str, tuple[Disk, ...]] = field(default_factory=dict)
    agent: AgentState = AgentState.OFF
    managed_save: bool = False
    foreign_jobs: tuple[str, ...] = ()
    locked_images: tuple[str, ...] = ()
    nvram_bytes: int = 0
    tpm_path: str = ""
    file_bytes: Mapping[str, int] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = ()
    memory_blockers: tuple[str, ...] = ()
    unmerged: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    boot_files: tuple[BootFile, ...] = ()
    unseen: Mapping[str, str] = field(default_factory=dict)
    snapshot_files: frozenset[str] = frozenset()
    thin: Thin = field(default_factory=Thin)
    attached: tuple[Disk, ...] = ()
    free_bytes: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetFacts:
    """The place that the archive goes to; `file_names` are those that are there already.

    `can`: what its file system can do. `hint`: what now, if it is too full.
    """

    directory: str
    free_bytes: int
    device_id: int
    fs_type: str
    file_names: frozenset[str] = frozenset()
    can: Capabilities = field(default_factory=Capabilities)
    hint: str = "Free space there or choose another place."


@dataclass(frozen=True)
class BackupPlan:
    """Everything a run will do. `snapshot` None: the VM's files are copied as they stand.

    `members`: what is stored; `kept`: members of older points that this one needs too. `needed_bytes`: room that the target must
    have, less than the estimate where blocks are shared. `base`: the archive that the point is added to, None for a new one.
    `stays`: the snapshot is kept, so that the next increment can stand on it. `below`: evidence of the
    files that the content of a template was read from.
    """

    vm_name: str
    vm_uuid: str
    running: bool
    timestamp: int
    directory: str
    archive_name: str
    consistency: Consistency
    snapshot: SnapshotPlan | None
    members: tuple[PlannedMember, ...]
    configuration: Configuration
    estimated_bytes: int
    needed_bytes: int = 0
    reason: str = ""
    kept: tuple[Member, ...] = ()
    base: Base | None = None
    stays: bool = False
    below: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def archive_path(self) -> str:
        """Where the archive is or will be."""
        return self.base.path if self.base else os.path.join(self.directory, self.archive_name)

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """What a person should know before and after the run."""
        skipped = (f"{each.device} is not in the backup: {each.reason}" for each in self.configuration.skipped)
        return (*self.configuration.warnings, *(Notice(Code.LEFT_OUT, text) for text in skipped))
