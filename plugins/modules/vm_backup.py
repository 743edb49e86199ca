#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_backup
short_description: Back up a virtual machine into one archive
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Writes disks, saved states, memory image, NVRAM, CD images and configuration of a libvirt/QEMU virtual
    machine into one C(.tar) or C(.tar.zst) file.
  - A running VM keeps running; its file systems are frozen for a moment where it has a guest agent. A saved state is
    made, the files frozen by it are copied, and it is merged again, so that the VM ends on the disks it started on.
  - The archive appears under its name only when it is complete and durable. A run that was killed is put right by the
    next backup of that VM.
  - Everything that would make the backup fail or useless is refused before the VM is touched. That includes disks on
    LVM, disks on ZFS together with saved states, a managed-save image, and a target that is read-only, not mounted or
    too small.
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.progress
  - kvmops.backup._archive
  - kvmops.backup._archive.compression
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
      - Exactly one of O(pool) and O(path) is required.
    type: str
  path:
    description:
      - Directory to write the archive to. It must exist.
      - Exactly one of O(pool) and O(path) is required.
    type: path
  mode:
    description:
      - What kind of point to make. V(full) makes a new archive that stands alone.
    type: str
    choices: [full]
    default: full
  compress:
    description:
      - Whether to write a compressed archive (C(.tar.zst)).
    type: bool
    default: false
  consistency:
    description:
      - What a running VM's archive shows. A VM that is off is always consistent.
      - V(agent) freezes the guest's file systems through the guest agent; no memory image.
      - V(memory) saves the guest's memory together with the disks; a restore resumes it there.
      - V(crash) shows the disks as they would be after a power cut.
      - V(auto) uses the agent where there is one, memory otherwise. Should the agent not answer or not freeze, memory
        is used with a warning. For VMs with PCI or USB host devices, of which no memory image can be made, V(auto)
        without an agent is refused.
      - A named kind that cannot be had is an error before anything is touched.
    type: str
    choices: [auto, agent, memory, crash]
    default: auto
  include_iso:
    description:
      - Whether the images of inserted CDs go into the archive.
    type: bool
    default: true
  include_secrets:
    description:
      - Whether secrets of the configuration (such as VNC and SPICE passwords) go into the archive.
    type: bool
    default: false
  max_age:
    description:
      - Make no backup where this place has a good point of this VM that is younger than this, for example V(20h).
      - A whole number with V(s), V(m), V(h), V(d) or V(w).
    type: str
  wait_timeout:
    description:
      - How long to wait for another operation on the same VM to end, for example V(30m). With V(0) the module
        fails at once and names the holder.
    type: str
    default: '0'
  bandwidth:
    description:
      - Write at most this many bytes per second to the archive, for example V(50M). V(0) means no limit.
    type: str
    default: '0'
  notes:
    description:
      - Free text to keep with the archive. RV(kvmops.backup.backup_info#module:archives[].notes) shows it.
    type: str
seealso:
  - module: kvmops.backup.vm_restore
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
  returned: success
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
      description: Whether increments can be added to it.
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
point:
  description: The point (unix time) that was made, or the one that is young enough.
  returned: success and not check mode
  type: int
  sample: 1795309200
mode:
  description: What was made. V(none) if a point was young enough.
  returned: success
  type: str
  choices: [full, none]
  sample: full
reason:
  description: Why this mode.
  returned: success
  type: str
  sample: full backup as asked
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
  description: Bytes read from the VM's files.
  returned: when a backup was made
  type: int
  sample: 2147483648
bytes_written:
  description: Bytes written to the archive; blocks shared with the VM's files through reflinks are not counted.
  returned: when a backup was made
  type: int
  sample: 10752
estimated_bytes:
  description: Estimated size of the archive, the base of the check for free space.
  returned: when a backup is made
  type: int
  sample: 2147494400
duration:
  description: Seconds that the backup took.
  returned: when a backup was made
  type: float
  sample: 1.52
skipped:
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
  sample: Set protected to false first.
cancelled:
  description: Whether the operation was stopped on request.
  returned: failure
  type: bool
  sample: false
"""

from ansible_collections.kvmops.backup.plugins.module_utils._argspec import COMPRESSION, TARGET, URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._backup.request import from_params
from ansible_collections.kvmops.backup.plugins.module_utils._backup.run import backup

ARGUMENT_SPEC = {
    **URI,
    **TARGET,
    **COMPRESSION,
    "vm": {"type": "str", "required": True},
    "mode": {"type": "str", "choices": ["full"], "default": "full"},
    "compress": {"type": "bool", "default": False},
    "consistency": {"type": "str", "choices": ["auto", "agent", "memory", "crash"], "default": "auto"},
    "include_iso": {"type": "bool", "default": True},
    "include_secrets": {"type": "bool", "default": False},
    "max_age": {"type": "str"},
    "wait_timeout": {"type": "str", "default": "0"},
    "bandwidth": {"type": "str", "default": "0"},
    "notes": {"type": "str"},
}


def main() -> None:
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: backup(from_params(params), context),
        libraries=["libvirt", "lxml", "zstandard"],
        required_one_of=[["pool", "path"]],
        mutually_exclusive=[["pool", "path"]],
    )


if __name__ == "__main__":
    main()
