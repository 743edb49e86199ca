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
  - New snapshots (other products call them saved states) are external, every disk is frozen in its file and the guest
    goes on in an overlay beside it.
  - Removing works for all kinds, external and internal, with and without memory, on branches and in the middle of a
    chain, whether the VM runs or is off. Layers are merged one disk at a time with explicit base and top, so that a thin
    clone is never merged into its template. What would lose an internal snapshot that shall stay is refused.
  - Reverting works for all kinds on every supported libvirt, also where libvirt itself cannot revert external ones.
    The VM is off afterwards, or resumes with its memory if the snapshot has it.
  - Reverting loses what the VM has been since, disks and memory, unless it is saved by a snapshot. The active
    overlays are deleted, unless a snapshot needs them. The file of a disk that has no overlay is never deleted.
  - An internal snapshot whose image others stand on by now is reverted to in a copy of that image, so that the others
    stay what they are. That takes the room of the image, except on file systems with reflinks.
  - After such a revert the VM goes on in the copy. The original is never deleted by this module; a warning names it when
    nothing needs it any more.
  - A run that was killed is finished or taken back by the next run of a changing module on that VM.
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
      - Full for V(present) and V(absent), which go by the name. V(reverted) is no change only where the VM is off, on
        a snapshot without memory, and has not been started since.
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
      - V(present) takes the snapshot if there is none of that name; an existing one is left as it is. Refused while another
        VM of the host has a disk of this one too, as both would lose what they write.
      - V(absent) removes it and merges its layers. Other snapshots stay usable.
      - V(reverted) brings the VM back to it. What the VM has been since is lost.
      - A snapshot that a backup made for its increments is removed or reverted like any other. It ends the chain of
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
      - Whether the file systems of the running guest are frozen through its agent while a new snapshot is taken.
      - Refused without an agent that can do it, and together with O(memory).
    type: bool
    default: false
  description:
    description:
      - Text for people, kept with a new snapshot.
    type: str
  bandwidth:
    description:
      - Write at most this many bytes per second to the disks of the VM while layers are merged, for example V(50M). V(0) means
        no limit. Should the guest itself write so fast that the merge does not come nearer to its end by half of that, it is
        raised. A merge that a killed run has left is given about an hour.
    type: str
    default: '0'
  wait_timeout:
    description:
      - How long to wait for another operation on the same VM to end, for example V(30m). With V(0) the module
        fails at once and names the holder.
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
  description: The snapshots that the VM has now (check mode, would have), parents before children.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
      returned: success
      sample: before-upgrade
    parent:
      description: The snapshot that it was taken upon, empty for none.
      type: str
      returned: success
      sample: installed
    current:
      description: Whether it is the one that the VM has gone on from.
      type: bool
      returned: success
      sample: true
    memory:
      description: Whether it has the memory of the VM.
      type: bool
      returned: success
      sample: false
    external:
      description: Whether its disks are frozen in files of their own, not inside a qcow2.
      type: bool
      returned: success
      sample: true
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
  sample: The VM web01
why:
  description: The reason of the error.
  returned: failure
  type: str
  sample: a backup job is at work on it
hint:
  description: What to do now.
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
