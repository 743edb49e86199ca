#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_snapshot
short_description: Take, remove and revert to snapshots of a virtual machine
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - New snapshots (other products call them saved states) are external. Every disk is frozen in its file, and the guest
    writes to an overlay beside it.
  - Removing works for all kinds, external and internal, with and without memory, on branches and in the middle of a
    chain, whether the VM is running or off. Layers are merged one disk at a time with explicit base and top, so a thin
    clone is never merged into its template. A removal that would lose an internal snapshot that is to stay is refused.
  - Reverting works for all kinds on every supported libvirt, even if libvirt itself cannot revert to external snapshots.
    Afterwards the VM is off, or resumes with its memory if the snapshot has it.
  - Reverting discards the state of the VM since the snapshot, disks and memory, unless another snapshot holds it. The active
    overlays are deleted, unless a snapshot needs them. The file of a disk that has no overlay is never deleted.
  - If other images stand on the image of an internal snapshot, the revert is done in a copy of that image, so that the other
    images do not change. The copy needs the space of the image, except on file systems with reflinks.
  - After such a revert, the VM continues in the copy. This module never deletes the original; a warning names it when
    nothing needs it any more.
  - The next run of a changing module on the VM finishes or undoes a run that was killed.
  - Refused while disks of the VM are attached to other VMs (M(kvmops.backup.vdisk_cross_attach)).
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.progress
  - kvmops.backup._libvirt
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details:
      - Shows the snapshots before and after.
  idempotent:
    support: partial
    details:
      - Full for V(present) and V(absent), which compare names. V(reverted) is no change only if the snapshot has no memory, and
        the VM is off, stands on the snapshot and has not been started since.
options:
  vm:
    description:
      - Name or UUID of the virtual machine.
    type: str
    required: true
  snapshot:
    description:
      - Name of the snapshot.
      - V(all) with O(state=absent) means every snapshot of the VM.
    type: str
    required: true
  state:
    description:
      - V(present) takes the snapshot if there is none of that name. An existing snapshot does not change. Refused if another
        VM of the host uses a disk of this VM too, because both would lose what they write.
      - V(absent) removes the snapshot and merges its layers. Other snapshots stay usable.
      - V(reverted) reverts the VM to the snapshot. The state of the VM since then is lost.
      - A snapshot that a backup made for its increments is removed or reverted to like any other. This ends the cycle of
        that archive, and the next backup is a full.
    type: str
    choices: [present, absent, reverted]
    default: present
  memory:
    description:
      - Whether a new snapshot has the memory of the running VM, so that a revert resumes it.
      - Refused for a VM that is off, and for one with devices or features that QEMU cannot migrate.
    type: bool
    default: false
  quiesce:
    description:
      - Whether the guest agent freezes the file systems of the running guest while a new snapshot is taken.
      - Refused without an agent that can freeze file systems, and together with O(memory).
    type: bool
    default: false
  description:
    description:
      - Free text, kept with a new snapshot.
    type: str
  bandwidth:
    description:
      - Write at most this many bytes per second to the disks of the VM while layers are merged, for example V(50M). V(0) means
        no limit. If the guest writes so fast that the merge progresses by less than half of the limit, the limit is raised. A
        merge that a killed run left is finished in about an hour, whatever the limit.
    type: str
    default: '0'
  wait_timeout:
    description:
      - How long to wait for another operation on the same VM to end, for example V(30m). With V(0), the module
        fails at once and names the holder of the lock.
    type: str
    default: '0'
seealso:
  - module: kvmops.backup.vm_backup
  - module: kvmops.backup.vm_restore
"""

EXAMPLES = r"""
- name: Before the upgrade, with clean file systems
  kvmops.backup.vm_snapshot:
    vm: web01
    snapshot: before-upgrade
    quiesce: true

- name: Undo the upgrade
  kvmops.backup.vm_snapshot:
    vm: web01
    snapshot: before-upgrade
    state: reverted

- name: Remove every snapshot, for example to migrate the VM or to undefine it
  kvmops.backup.vm_snapshot:
    vm: web01
    snapshot: all
    state: absent
"""

RETURN = r"""
snapshots:
  description: The snapshots that the VM has (in check mode, would have), parents before children.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the snapshot.
      type: str
      returned: success
      sample: before-upgrade
    parent:
      description: Name of the parent snapshot; empty if there is none.
      type: str
      returned: success
      sample: installed
    current:
      description: Whether this is the current snapshot, which the VM continued from.
      type: bool
      returned: success
      sample: true
    memory:
      description: Whether the snapshot has the memory of the VM.
      type: bool
      returned: success
      sample: false
    external:
      description: Whether the snapshot is external, with its disks frozen in separate files and not inside a qcow2 file.
      type: bool
      returned: success
      sample: true
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
  sample: The VM web01
why:
  description: The reason for the error.
  returned: failure
  type: str
  sample: a backup job is at work on it
hint:
  description: What to do about it.
  returned: failure
  type: str
  sample: Wait until it has finished.
cancelled:
  description: Whether the operation was stopped on request.
  returned: failure
  type: bool
  sample: false
"""

from ansible_collections.kvmops.backup.plugins.module_utils import _operations
from ansible_collections.kvmops.backup.plugins.module_utils._argspec import URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.request import from_params
from ansible_collections.kvmops.backup.plugins.module_utils._snapshots.run import ensure

ARGUMENT_SPEC = {
    **URI,
    "vm": {"type": "str", "required": True},
    "snapshot": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent", "reverted"], "default": "present"},
    "memory": {"type": "bool", "default": False},
    "quiesce": {"type": "bool", "default": False},
    "description": {"type": "str"},
    "bandwidth": {"type": "str", "default": "0"},
    "wait_timeout": {"type": "str", "default": "0"},
}


def main() -> None:
    _operations.register()
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: ensure(from_params(params), context),
        libraries=["libvirt", "lxml"],
    )


if __name__ == "__main__":
    main()
