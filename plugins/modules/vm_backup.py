#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_backup
short_description: Back up a virtual machine into one archive, in full or as an increment
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Writes disks, snapshots, memory image, NVRAM, TPM state, CD images and configuration of a libvirt/QEMU virtual
    machine into one C(.tar) or C(.tar.zst) file.
  - A running VM keeps running; its file systems are frozen for a moment where it has a guest agent. A snapshot is
    made, the files frozen by it are copied, and it is merged again, so that the VM ends on the disks it started on.
  - The snapshot of an incrementable backup stays on the VM instead. An increment makes one more and adds what was
    frozen since, to the same file; each of its points can be restored. Whether an archive can be continued is found out
    by looking at the VM (snapshots, disks, the bytes of frozen files), never by trusting what was written down.
  - A VM with snapshots cannot be migrated live or undefined plainly. To end that, and with it the chain, delete them
    with M(kvmops.backup.vm_snapshot).
  - Of a thin clone of a template (M(kvmops.backup.vm_template)) only the clone's own layers are stored, and which content
    the template's disks have. A template has full backups only.
  - The archive appears under its name only when it is complete and durable. A run that was killed is put right by the
    next backup of that VM.
  - Everything that would make the backup fail or useless is refused before the VM is touched. That includes disks on
    LVM, disks on ZFS together with snapshots, a managed-save image, and a target that is read-only, not mounted or
    too small.
  - Refused while disks of the VM are attached to other VMs (M(kvmops.backup.vdisk_cross_attach)). Disks of others that are
    attached to this VM are left out.
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.progress
  - kvmops.backup._archive
  - kvmops.backup._archive.compression
  - kvmops.backup._archive.priority
  - kvmops.backup._libvirt
attributes:
  check_mode:
    support: full
    details:
      - Predicts mode, path and size of the archive.
  diff_mode:
    support: full
    details:
      - Shows what the archive will hold.
  idempotent:
    support: partial
    details:
      - Each run makes a backup, unless O(max_age) is given and a good point of the VM in this place is young enough.
options:
  vm:
    description:
      - Name or UUID of the virtual machine.
    type: str
    required: true
  pool:
    description:
      - Storage pool of type directory, file system or network file system to write the archive to.
      - One of O(pool), O(path) and O(archive) is required; O(pool) and O(path) exclude each other.
    type: str
  path:
    description:
      - Directory to write the archive to. It must exist.
      - One of O(pool), O(path) and O(archive) is required; O(pool) and O(path) exclude each other.
    type: path
  mode:
    description:
      - What kind of point to make. V(full) makes a new archive that stands alone.
      - V(incremental) adds a point to an archive that was made incrementable, and fails with the reason where the VM does
        not stand on that archive's newest point any more.
      - V(auto) does the same, and makes a full (incrementable again) where that cannot be; RV(reason) says why.
    type: str
    choices: [full, incremental, auto]
    default: full
  incrementable:
    description:
      - Whether the snapshot of a full stays on the VM, so that increments can follow. Always so with O(mode=auto).
      - A full that begins such a cycle first merges the snapshots that this collection made for earlier archives of
        the VM in the same place, and for archives elsewhere that cannot be continued any more; never the user's.
      - Not possible for transient VMs, for disks on ZFS, on block devices, or encrypted, and while a VM that is off has
        libvirt checkpoints (of another backup tool); with O(mode=auto) that one gets a full that stands alone.
      - Nor for a VM with a disk that another VM of the host has too, running or off, by its definitions or its snapshots',
        as a disk or below one, because both would lose what they write. With O(mode=auto) it gets a full that stands alone. Only
        what both VMs just stand on (a template, an image in the cloud style) may be shared.
    type: bool
    default: false
  archive:
    description:
      - Path of the archive to add the increment to. The default is the newest archive of the VM in the place that was
        made incrementable.
      - Without O(pool) and O(path) its directory is the place.
    type: path
  increment_limit:
    description:
      - When an archive has this many points, the full included, all snapshots of the VM are deleted (merged into its
        disks), your own too; RV(merged_snapshots) lists them. See O(increment_limit_deletes).
      - It happens in the run that adds the point, after the point is safe. The next run with O(mode=auto) makes a full.
        With a limit of 7 and a daily run there is one full each week. V(1) makes every run a full, V(0) means no limit.
      - If they cannot be merged, the point stays, O(unmerged) says what becomes of the run, and the next run of this module
        tries again.
      - Without a limit, a run with O(mode=auto) begins a new archive before a disk stands on 24 images, which some
        releases of libvirt do not start any more; from 20 on it warns.
    type: int
    default: 0
  increment_limit_deletes:
    description:
      - Which snapshots go at the O(increment_limit), V(all) of the VM or only those that this collection has made
        (V(own)).
    type: str
    choices: [all, own]
    default: all
  full_weekday:
    description:
      - A full is owed where this place has no good full of the VM since the last such day began (00:00 in the time zone
        of the host). O(mode=auto) makes one then, whatever O(max_age) says. So a missed day heals on the next run.
      - Without it only what ends a chain leads to a full (O(increment_limit), or a VM that no longer stands on its archive).
    type: str
    choices: [monday, tuesday, wednesday, thursday, friday, saturday, sunday]
  compress:
    description:
      - Whether to write a compressed archive (C(.tar.zst)). An increment is stored as its archive is.
    type: bool
    default: false
  consistency:
    description:
      - What a running VM's archive shows. A VM that is off is always consistent.
      - V(agent) freezes the guest's file systems through the guest agent; no memory image.
      - V(memory) saves the guest's memory together with the disks; a restore resumes it there.
      - V(crash) shows the disks as they would be after a power cut.
      - V(auto) uses the agent where there is one, memory otherwise. Should the agent not answer or not freeze, memory
        is used with a warning. For VMs of which no memory image can be made (PCI or USB host devices, and whatever QEMU
        names as not migratable, such as ivshmem or emulated NVMe), V(auto) without an agent is refused.
      - A VM that is paused, by a person or by an I/O error, or has crashed, gets V(crash) with a warning. One that is
        suspended to RAM is refused, because libvirt takes no snapshot of it.
      - A named kind that cannot be had is an error before anything is touched.
    type: str
    choices: [auto, agent, memory, crash]
    default: auto
  include_iso:
    description:
      - Whether the images of inserted CDs go into the archive.
    type: bool
    default: true
  include_boot_files:
    description:
      - Whether the files of the host that QEMU loads for the VM go into the archive once, namely kernel, initial RAM disk and
        device tree of direct kernel boot, and firmware, ACPI tables and option ROMs that do not come with the packages
        of the host (below C(/usr)).
      - What is left out, by this option or because it cannot be read, is told in RV(skipped_devices).
    type: bool
    default: true
  include_secrets:
    description:
      - Whether secrets of the configuration (such as VNC and SPICE passwords) go into the archive.
    type: bool
    default: false
  max_age:
    description:
      - Make no backup where this place has a good point of this VM that is younger than this, for example V(20h),
        and O(full_weekday) does not ask for a full.
      - A whole number with V(s), V(m), V(h), V(d) or V(w).
    type: str
  keep_last:
    description:
      - After a good backup, keep only the newest so many archives of this VM in the place. V(0) means no such rule.
      - What is never removed is told in M(kvmops.backup.backup_retention), which has more rules.
    type: int
  keep_days:
    description:
      - After a good backup, remove the archives of this VM in the place whose newest point is older than so many days. V(0)
        means no such rule.
      - Together with O(keep_last) both rules limit what is kept.
    type: int
  free_space:
    description:
      - Whether to remove the oldest archives in the place, of whatever VM, before the backup until it fits. As few go as
        possible, and none where that would not be enough.
      - What is never removed is told in M(kvmops.backup.backup_retention).
    type: bool
    default: false
  max_parallel:
    description:
      - How many backups may be at work in this place at once; more wait for their turn, as long as O(wait_timeout). V(0)
        means no limit, but such a run counts for others that have one.
      - All hosts that share the place count together where its file system has locks that they share. Where it has not
        (C(nolock), C(local_lock), C(nobrl), 9p, virtiofs), each host counts for itself, with a warning.
      - On network file systems at most 2 are recommended.
    type: int
    default: 0
  wait_timeout:
    description:
      - How long to wait for another operation on the same VM to end, and for a turn (O(max_parallel)), for example V(30m).
        With V(0) the module fails at once and names the holder.
      - If not given, it is V(0) for the VM and a day for the turn.
    type: str
  bandwidth:
    description:
      - Write at most this many bytes per second, for example V(50M), to the archive, and to the disks while snapshots
        are merged; the disks of a VM share it. V(0) means no limit.
      - Should the guest itself write so fast to a disk that is being merged that the merge does not come nearer to its end
        by half of that, the limit of the merge is raised. A merge that a killed run has left is given about an hour.
    type: str
    default: '0'
  digest:
    description:
      - The hash that protects the archive's bytes. Every one finds damage.
      - V(xxh3-128) costs next to nothing. It needs the Python library xxhash (C(python3-xxhash)), here and wherever the archive is
        restored or verified.
      - V(sha256) also makes an anchor. RV(archive.digest) then stands for every byte of the point. Keep it elsewhere, and
        O(kvmops.backup.backup_verify#module:expected_digest) finds whatever anybody changed in the archive since.
      - V(auto) takes V(xxh3-128) where its library is installed, else SHA-256 or BLAKE2b, whichever is faster here. An increment
        uses what its archive has. If O(mode=auto) finds an archive with another hash than asked for, it makes a full.
    type: str
    choices: [auto, xxh3-128, sha256]
    default: auto
  unmerged:
    description:
      - What it makes of a run that its point is published, and snapshots that should be merged are still there, because
        their disks cannot be merged now (AppArmor or SELinux denies it, a file system is full, they are needed otherwise).
      - With V(warn) warnings say which, why, and what helps, and the run succeeds; the next one tries again. With V(fail) the run
        fails then, with RV(archive) and RV(point) all the same.
      - Where QEMU and libvirt disagree about the disks of the VM, no backup is made in either case.
    type: str
    choices: [warn, fail]
    default: warn
  notes:
    description:
      - Free text to keep with the archive, in place of what was there.
      - RV(kvmops.backup.backup_info#module:archives[].notes) shows it.
    type: str
seealso:
  - module: kvmops.backup.vm_restore
  - module: kvmops.backup.backup_retention
  - module: kvmops.backup.backup_info
  - module: kvmops.backup.backup_verify
"""

EXAMPLES = r"""
- name: Back up a VM into a storage pool
  kvmops.backup.vm_backup:
    vm: web01
    pool: backups

- name: Compressed, and only if there is no good backup of today yet
  kvmops.backup.vm_backup:
    vm: web01
    path: /srv/backup
    compress: true
    max_age: 20h

- name: Every night an increment, every seventh time a full
  kvmops.backup.vm_backup:
    vm: web01
    pool: backups
    mode: auto
    increment_limit: 7

- name: The first run from Sunday on makes a full, the others increments; a second run of a day does nothing
  kvmops.backup.vm_backup:
    vm: web01
    pool: backups
    mode: auto
    full_weekday: sunday
    max_age: 20h

- name: The same, with the files of a month, two backups at a time, and room made for them
  kvmops.backup.vm_backup:
    vm: web01
    pool: backups
    mode: auto
    increment_limit: 7
    keep_days: 30
    free_space: true
    max_parallel: 2
    wait_timeout: 4h

- name: An increment or an error, never a full
  kvmops.backup.vm_backup:
    vm: web01
    pool: backups
    mode: incremental

- name: Insist on frozen file systems
  kvmops.backup.vm_backup:
    vm: db01
    pool: backups
    consistency: agent
    notes: before the upgrade to 17
  register: backup

- name: Show where it is and how long the guest stood still
  ansible.builtin.debug:
    msg: "{{ backup.archive.path }}: {{ backup.archive.size }} bytes, frozen for {{ backup.frozen_ms }} ms"
"""

RETURN = r"""
archive:
  description: The archive that was written, that would be written (check mode), or that is young enough (O(max_age)).
  returned: success, and failure after the point was published
  type: dict
  contains:
    path:
      description: Path of the archive on the host.
      type: str
      returned: success
      sample: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar
    size:
      description: Size of the archive in bytes. In check mode the estimate.
      type: int
      returned: success
      sample: 2147494400
    compressed:
      description: Whether it is compressed.
      type: bool
      returned: success
      sample: false
    incrementable:
      description: Whether increments can be added to it, as RV(kvmops.backup.backup_info#module:archives[].incrementable) has it.
      type: bool
      returned: success
      sample: false
    points:
      description: The points in it, oldest first, as RV(kvmops.backup.backup_info#module:archives[].points) has them.
      type: list
      elements: dict
      returned: success
      sample:
        - {point: 1795309200, time: '2026-11-22T01:00:00Z', mode: full, consistency: agent, size: 2147483648}
    digest:
      description:
        - Digest of the newest point, 64 hexadecimal digits; null in check mode of a full.
        - Where RV(archive.digest_algorithm) is V(sha256) or V(blake2b-256), it stands for every byte of the point and of those
          before it, see O(kvmops.backup.backup_verify#module:expected_digest).
      type: str
      returned: success
      sample: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    digest_algorithm:
      description: What the bytes in the archive are protected with.
      type: str
      returned: success
      choices: [xxh3-128, sha256, blake2b-256]
      sample: sha256
point:
  description: The point (unix time) that was made, or the one that is young enough.
  returned: success and not check mode, and failure after it was published
  type: int
  sample: 1795309200
mode:
  description: What was made. V(none) if a point was young enough.
  returned: success
  type: str
  choices: [full, incremental, none]
  sample: full
reason:
  description: Why this mode; for a full in place of an increment, why the newest archive cannot be continued.
  returned: success
  type: str
  sample: full backup as asked
removed_archives:
  description: Archives that were removed (in check mode would be), by O(keep_last), O(keep_days) or O(free_space), and why.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: Path of the archive.
      type: str
      returned: success
      sample: /srv/backup/web01_20261015T010000Z_6f1a2b3c.tar
    reason:
      description: Why it was removed.
      type: str
      returned: success
      sample: it is older than 30 days (keep_days)
merged_snapshots:
  description: Names of the snapshots that were merged (in check mode would be merged first) and are gone.
  returned: success
  type: list
  elements: str
  sample: [kvmops-1795309200]
consistency:
  description: What was reached, or would be tried (check mode).
  returned: when a backup is made
  type: str
  choices: [agent, memory, crash, 'off']
  sample: agent
frozen_ms:
  description: How long the guest's file systems were frozen, or the guest stood still, in milliseconds.
  returned: when a backup was made
  type: int
  sample: 210
bytes_read:
  description: Bytes of the VM's files that are in the new point.
  returned: when a backup was made
  type: int
  sample: 2147483648
bytes_written:
  description: Bytes written to the archive; blocks shared with the VM's files through reflinks are not counted.
  returned: when a backup was made
  type: int
  sample: 10752
estimated_bytes:
  description: Estimated size of the archive, or of what an increment adds; the base of the check for free space.
  returned: when a backup is made
  type: int
  sample: 2147494400
duration:
  description: Seconds that the backup took.
  returned: when a backup was made
  type: float
  sample: 1.52
skipped_devices:
  description: Devices that are not in the archive.
  returned: when a backup is made
  type: list
  elements: dict
  contains:
    device:
      description: Target name of the device.
      type: str
      returned: success
      sample: sdb
    reason:
      description: Why it is not in the archive.
      type: str
      returned: success
      sample: LUN disks are passed through and not part of a backup
attached_to:
  description: Names of the VMs that have disks of this one (M(kvmops.backup.vdisk_cross_attach)), where that is the reason.
  returned: failure
  type: list
  elements: str
  sample: [appliance]
what:
  description: The object that the error is about.
  returned: failure
  type: str
  sample: Archive /srv/backup/web01.tar
why:
  description: The reason of the error.
  returned: failure
  type: str
  sample: it is protected
hint:
  description: What to do now.
  returned: failure
  type: str
  sample: "Take the protection away (protected: false), or delete it all the same with force: true."
cancelled:
  description: Whether the operation was stopped on request.
  returned: failure
  type: bool
  sample: false
"""

from ansible_collections.kvmops.backup.plugins.module_utils import _operations
from ansible_collections.kvmops.backup.plugins.module_utils._argspec import (
    COMPRESSION,
    PRIORITY,
    TARGET,
    URI,
    run_module,
)
from ansible_collections.kvmops.backup.plugins.module_utils._backup.backup import backup
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import from_params
from ansible_collections.kvmops.backup.plugins.module_utils._policy import WEEKDAYS

ARGUMENT_SPEC = {
    **URI,
    **TARGET,
    **PRIORITY,
    **COMPRESSION,
    "vm": {"type": "str", "required": True},
    "mode": {"type": "str", "choices": ["full", "incremental", "auto"], "default": "full"},
    "incrementable": {"type": "bool", "default": False},
    "archive": {"type": "path"},
    "increment_limit": {"type": "int", "default": 0},
    "increment_limit_deletes": {"type": "str", "choices": ["all", "own"], "default": "all"},
    "full_weekday": {"type": "str", "choices": list(WEEKDAYS)},
    "compress": {"type": "bool", "default": False},
    "consistency": {"type": "str", "choices": ["auto", "agent", "memory", "crash"], "default": "auto"},
    "include_iso": {"type": "bool", "default": True},
    "include_boot_files": {"type": "bool", "default": True},
    "include_secrets": {"type": "bool", "default": False},
    "max_age": {"type": "str"},
    "keep_last": {"type": "int"},
    "keep_days": {"type": "int"},
    "free_space": {"type": "bool", "default": False},
    "max_parallel": {"type": "int", "default": 0},
    "wait_timeout": {"type": "str"},
    "bandwidth": {"type": "str", "default": "0"},
    "digest": {"type": "str", "choices": ["auto", "xxh3-128", "sha256"], "default": "auto"},
    "unmerged": {"type": "str", "choices": ["warn", "fail"], "default": "warn"},
    "notes": {"type": "str"},
}


def main() -> None:
    _operations.register()
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: backup(from_params(params), context),
        libraries=["libvirt", "lxml", "zstandard"],
        required_one_of=[["pool", "path", "archive"]],
        mutually_exclusive=[["pool", "path"]],
    )


if __name__ == "__main__":
    main()
