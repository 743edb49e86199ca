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
  - A running VM keeps running. If it has a guest agent, its file systems are frozen for a moment. The module takes a
    snapshot, copies the frozen files, and merges the snapshot, so that the VM ends on the disks it started on.
  - The snapshot of an incrementable backup stays on the VM instead. An increment takes one more snapshot and adds the newly
    frozen data to the same file. Each of its points can be restored. The module examines the VM (snapshots, disks, the bytes
    of frozen files) to find out whether an archive can be continued, and never relies on records alone.
  - libvirt refuses to migrate a VM with snapshots live, and to undefine it without further options.
    M(kvmops.backup.vm_snapshot) deletes the snapshots, which also ends the cycle.
  - For a thin clone of a template (M(kvmops.backup.vm_template)), the archive holds only the clone's own layers and the
    digests of the template's disks. A template gets full backups only.
  - The archive appears under its name only when it is complete and durable. The next backup of the VM settles what a killed
    run left.
  - Everything that would make the backup fail or be useless is refused before the VM is touched. This includes disks on
    LVM, disks on ZFS together with snapshots, a managed-save image, and a target that is read-only, not mounted or
    too small.
  - Refused while disks of the VM are attached to other VMs (M(kvmops.backup.vdisk_cross_attach)). Disks of other VMs that
    are attached to this VM are left out.
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
      - Storage pool (directory, file system or network file system) to write the archive to.
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
      - V(incremental) adds a point to an incrementable archive. If the VM no longer stands on that archive's newest point, it
        fails with the reason.
      - V(auto) does the same, but makes a new incrementable full instead of failing. RV(reason) says why.
    type: str
    choices: [full, incremental, auto]
    default: full
  incrementable:
    description:
      - Whether the snapshot of a full stays on the VM, so that increments can follow. With O(mode=auto) it always does.
      - A full that begins such a cycle first merges the snapshots that this collection made for earlier archives of
        the VM in the same place, and for archives elsewhere that can no longer be continued. It never merges the user's.
      - Not possible for transient VMs, and for disks that are on ZFS, on block devices or encrypted. Not possible either while
        a VM that is off has libvirt checkpoints (of another backup tool); O(mode=auto) then makes a full that stands alone.
      - Not possible if this VM and another VM of the host, running or off, use the same file and at least one of them writes
        to it, as their definitions or snapshots show. Both would lose what they write. O(mode=auto) makes a full that stands
        alone. Only files that neither VM writes to (a template, a common base image) may be shared.
    type: bool
    default: false
  archive:
    description:
      - Path of the archive to add the increment to. The default is the newest incrementable archive of the VM in the place.
      - Without O(pool) and O(path), the place is the directory of this archive.
    type: path
  increment_limit:
    description:
      - When an archive has this many points, the full included, all snapshots of the VM are deleted (merged into its
        disks), including your own. RV(merged_snapshots) lists them. See O(increment_limit_deletes).
      - The run that adds the point merges the snapshots after the point is safe. The next run with O(mode=auto) makes a full.
        With a limit of 7 and a daily run, there is one full a week. V(1) makes every run a full. V(0) means no limit.
      - If the snapshots cannot be merged, the point stays. O(unmerged) decides whether the run fails, and the next run of this
        module tries again.
      - Without a limit, a run with O(mode=auto) begins a new archive before a disk stands on 24 images, because some
        releases of libvirt do not start a VM with more. It warns from 20 images on.
    type: int
    default: 0
  increment_limit_deletes:
    description:
      - Which snapshots are deleted at the O(increment_limit). V(all) deletes all snapshots of the VM, V(own) only those that
        this collection made.
    type: str
    choices: [all, own]
    default: all
  full_weekday:
    description:
      - With this option, a full is due if this place has no good full of the VM since the last such day began (00:00 in the
        host's time zone). O(mode=auto) then makes one, whatever O(max_age) says, so the run after a missed day makes the full.
      - Without this option, O(mode=auto) makes a full only when a cycle ends (O(increment_limit), or a VM that no longer stands
        on its archive).
    type: str
    choices: [monday, tuesday, wednesday, thursday, friday, saturday, sunday]
  compress:
    description:
      - Whether to write a compressed archive (C(.tar.zst)). An increment is compressed if its archive is.
    type: bool
    default: false
  consistency:
    description:
      - How the state of a running VM is captured. The backup of a VM that is off is always consistent.
      - V(agent) freezes the guest's file systems through the guest agent, without a memory image.
      - V(memory) saves the guest's memory together with the disks. Reverting to that state after a restore resumes the guest.
      - V(crash) captures the disks as they would be after a power failure.
      - V(auto) uses the agent if there is one, and memory otherwise. If the agent does not answer or does not freeze, memory
        is used with a warning. If no memory image of the VM can be made (PCI or USB host devices, and devices that QEMU
        reports as not migratable, such as ivshmem or emulated NVMe), V(auto) without an agent is refused.
      - A VM that is paused, by a user or by an I/O error, or that has crashed, gets V(crash) with a warning. A VM that is
        suspended to RAM is refused, because libvirt takes no snapshot of it.
      - If the requested kind is not possible, the module fails before anything is touched.
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
      - Whether the host's files that QEMU loads for the VM go into the archive, once each. These are kernel, initial RAM disk
        and device tree of direct kernel boot, and firmware, ACPI tables and option ROMs that do not come from the host's
        packages (below C(/usr)).
      - RV(skipped_devices) lists the files that are left out, because of this option or because they cannot be read.
    type: bool
    default: true
  include_secrets:
    description:
      - Whether secrets of the configuration (such as VNC and SPICE passwords) go into the archive.
    type: bool
    default: false
  max_age:
    description:
      - Make no backup if this place has a good point of this VM that is younger than this, for example V(20h),
        and no full is due (O(full_weekday)).
      - A whole number with V(s), V(m), V(h), V(d) or V(w).
    type: str
  keep_last:
    description:
      - After a successful backup, keep only this many of the newest archives of this VM in the place. V(0) means no such rule.
      - M(kvmops.backup.backup_retention) describes which archives are never removed, and has more rules.
    type: int
  keep_days:
    description:
      - After a successful backup, remove the archives of this VM in the place whose newest point is older than this many days.
        V(0) means no such rule.
      - Together with O(keep_last), an archive must satisfy both rules to be kept.
    type: int
  free_space:
    description:
      - Whether to remove the oldest archives in the place, of any VM, before the backup until it fits. As few as possible are
        removed, and none if that would not be enough.
      - M(kvmops.backup.backup_retention) describes which archives are never removed.
    type: bool
    default: false
  max_parallel:
    description:
      - How many backups may write to this place at the same time. Others wait for their turn, at most O(wait_timeout). V(0)
        means no limit, but such a backup counts for other backups that have a limit.
      - All hosts that share the place are counted together if its file system shares locks between them. Otherwise
        (C(nolock), C(local_lock), C(nobrl), 9p, virtiofs), each host counts only its own backups, with a warning.
      - On network file systems, at most 2 are recommended.
    type: int
    default: 0
  wait_timeout:
    description:
      - How long to wait for another operation on the same VM to end, and for a turn (O(max_parallel)), for example V(30m).
        With V(0), the module fails at once and names the holder of the lock.
      - If not given, it is V(0) for the VM and one day for the turn.
    type: str
  bandwidth:
    description:
      - Write at most this many bytes per second, for example V(50M), to the archive, and to the disks while snapshots
        are merged; the disks of a VM share this limit. V(0) means no limit.
      - If the guest writes so fast to a disk that its merge progresses by less than half of the limit, the limit of the merge
        is raised. A merge that a killed run left is finished in about an hour, whatever the limit.
    type: str
    default: '0'
  digest:
    description:
      - The hash that protects the archive's bytes. Each of them finds damage.
      - V(xxh3-128) needs almost no CPU time. It needs the Python library xxhash (C(python3-xxhash)), on this host and on every
        host that restores or verifies the archive.
      - V(sha256) also detects deliberate changes. RV(archive.digest) then covers every byte of the point. Keep it elsewhere and
        pass it as O(kvmops.backup.backup_verify#module:expected_digest).
      - V(auto) uses V(xxh3-128) if its library is installed, otherwise SHA-256 or BLAKE2b, whichever is faster on this host.
        An increment uses the hash of its archive. If O(mode=auto) finds an archive with a hash other than the requested one, it
        makes a full.
    type: str
    choices: [auto, xxh3-128, sha256]
    default: auto
  unmerged:
    description:
      - The result of a run that published its point but could not merge snapshots that should be merged (AppArmor or SELinux
        denies it, a file system is full, something else needs the disks).
      - With V(warn), the run succeeds, and warnings name the snapshots, the reason and the remedy. The next run tries again.
        With V(fail), the run fails, but still returns RV(archive) and RV(point).
      - If QEMU and libvirt disagree about the disks of the VM, no backup is made in either case.
    type: str
    choices: [warn, fail]
    default: warn
  notes:
    description:
      - Free text to keep with the archive. It replaces earlier notes.
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
  description: The archive that was written, that would be written (check mode), or that is recent enough (O(max_age)).
  returned: success, and failure after the point was published
  type: dict
  contains:
    path:
      description: Path of the archive on the host.
      type: str
      returned: success
      sample: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar
    size:
      description: Size of the archive in bytes. In check mode, an estimate.
      type: int
      returned: success
      sample: 2147494400
    compressed:
      description: Whether the archive is compressed.
      type: bool
      returned: success
      sample: false
    incrementable:
      description: Whether increments can be added, as in RV(kvmops.backup.backup_info#module:archives[].incrementable).
      type: bool
      returned: success
      sample: false
    points:
      description: The points in the archive, oldest first, as in RV(kvmops.backup.backup_info#module:archives[].points).
      type: list
      elements: dict
      returned: success
      sample:
        - {point: 1795309200, time: '2026-11-22T01:00:00Z', mode: full, consistency: agent, size: 2147483648}
    digest:
      description:
        - Digest of the newest point, 64 hexadecimal digits; null for a full in check mode.
        - If RV(archive.digest_algorithm) is V(sha256) or V(blake2b-256), the digest covers every byte of the point and of the
          points before it, see O(kvmops.backup.backup_verify#module:expected_digest).
      type: str
      returned: success
      sample: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    digest_algorithm:
      description: The hash that protects the archive's bytes.
      type: str
      returned: success
      choices: [xxh3-128, sha256, blake2b-256]
      sample: sha256
point:
  description: The point (Unix time) that was made, or the point that is recent enough.
  returned: success and not check mode, and failure after it was published
  type: int
  sample: 1795309200
mode:
  description: The kind of point that was made. V(none) if a point was recent enough.
  returned: success
  type: str
  choices: [full, incremental, none]
  sample: full
reason:
  description: Why this mode was chosen. For a full instead of an increment, why the newest archive cannot be continued.
  returned: success
  type: str
  sample: full backup as asked
removed_archives:
  description: Archives removed (in check mode, to be removed) because of O(keep_last), O(keep_days) or O(free_space), and why.
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
  description: Names of the snapshots that were merged and removed (in check mode, that would be merged first).
  returned: success
  type: list
  elements: str
  sample: [kvmops-1795309200]
consistency:
  description: The consistency of the point. In check mode, the consistency that would be tried.
  returned: when a backup is made
  type: str
  choices: [agent, memory, crash, 'off']
  sample: agent
frozen_ms:
  description: How long the guest's file systems were frozen, or the guest was paused, in milliseconds.
  returned: when a backup was made
  type: int
  sample: 210
bytes_read:
  description: Bytes of the VM's files in the new point.
  returned: when a backup was made
  type: int
  sample: 2147483648
bytes_written:
  description: Bytes written to the archive. Blocks shared with the VM's files through reflinks are not counted.
  returned: when a backup was made
  type: int
  sample: 10752
estimated_bytes:
  description: Estimated size of the archive or of the increment. The check for free space uses it.
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
  description: Names of the receivers of this VM's disks (M(kvmops.backup.vdisk_cross_attach)), if these caused the error.
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
  description: The reason for the error.
  returned: failure
  type: str
  sample: it is protected
hint:
  description: What to do about it.
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
from ansible_collections.kvmops.backup.plugins.module_utils._argspec import run_module
from ansible_collections.kvmops.backup.plugins.module_utils._backup_options import (
    ARGUMENT_SPEC,
    LIBRARIES,
    RULES,
    operation,
)


def main() -> None:
    _operations.register()
    run_module(ARGUMENT_SPEC, operation, libraries=LIBRARIES, **RULES)


if __name__ == "__main__":
    main()
