#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vdisk_cross_attach
short_description: Attach disks of a VM, frozen at one moment, read-only to another VM
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - For backup appliances (and whatever else reads disks inside of a VM). A disk of one VM appears read-only in another
    one, the receiver, while its own VM goes on.
  - The first attach takes the snapshot C(vdisks_attached_to_another_domains) of the VM. Later disks of that VM are attached
    from the same snapshot, so all show one moment. After the last detach the snapshot is merged, and the VM
    is what it was.
  - The receiver gets the disk at bus virtio, read-only, without host cache, under a serial of its own for each attach. It
    need not run, and keeps the disk when it is restarted.
  - While a disk is attached, every module of this collection refuses to snapshot, revert, merge, back up, restore over,
    mark or clone its VM, and names the receivers.
  - What a receiver does not have any more, because it was deleted or somebody has taken the disk out, is freed by the next
    run of any changing module on either VM.
  - The guide C(docs/CROSS_ATTACH.md) has the order of calls, and what to do inside of the receiver.
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.progress
  - kvmops.backup._libvirt
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  vm:
    description:
      - Name or UUID of the receiver, the VM that reads the disk. Required but for O(state=reconciled).
      - With O(state=reconciled), only what this VM has or has given; all of the host if not given.
    type: str
  vdisk:
    description:
      - The disk, by its id (M(kvmops.backup.vm_info)), its path, its serial, or with O(source_vm) its target such as V(vda).
      - A disk of a template, which must be off, is attached itself; no snapshot is made of a template.
    type: str
  source_vm:
    description:
      - Name or UUID of the VM that the disk belongs to. Needed for a target, and where a path or serial is not unique.
    type: str
  thin_clone:
    description:
      - Where O(vdisk) is a disk of a template, the disk of this thin clone that stands on it is meant.
    type: str
  consistency:
    description:
      - How the disks of a running VM are frozen at the first attach. V(agent) freezes the file systems by the guest agent, so
        that they can be mounted without their journal; V(crash) is a state as after a power failure; V(auto) is V(agent) where
        an agent answers, else V(crash). There is never a memory image.
      - Without meaning for later disks of the same VM, which show the moment of the first.
    type: str
    choices: [auto, agent, crash]
    default: auto
  lease:
    description:
      - How long the disk is to be attached, for example V(8h). When that is over, nothing happens by itself. Modules that touch
        the VM say so, and O(state=reconciled) with O(expired=true) detaches it.
      - An attach of what is attached already begins the time anew.
    type: str
  expired:
    description:
      - With O(state=reconciled), also detach what is past its lease.
    type: bool
    default: false
  state:
    description:
      - V(attached) attaches the disk if that receiver does not have it.
      - V(detached) takes it from the receiver. Where the guest does not let it go (no operating system is up), the module fails
        with C(device did not detach), and the disk stays recorded. The next run finishes when it is gone.
      - V(reconciled) looks at everything that is recorded as attached and frees what is not any more.
    type: str
    choices: [attached, detached, reconciled]
    default: attached
  bandwidth:
    description:
      - Limit of what the merge after the last detach writes in a second, for example V(50M). V(0) for none.
    type: str
    default: '0'
  wait_timeout:
    description:
      - How long to wait for another operation on one of the two VMs to end, for example V(30m). With V(0) the module
        fails at once and names the holder.
    type: str
    default: 10m
seealso:
  - module: kvmops.backup.vdisk_cross_attach_info
  - module: kvmops.backup.vm_info
"""

EXAMPLES = r"""
- name: Let the appliance read all disks of web01, as they are at one moment
  kvmops.backup.vdisk_cross_attach:
    vm: appliance
    source_vm: web01
    vdisk: "{{ item }}"
    lease: 8h
  loop: [vda, vdb]
  register: attached

- name: Give them back
  kvmops.backup.vdisk_cross_attach:
    vm: appliance
    vdisk: "{{ item.vdisks[0].id }}"
    state: detached
  loop: "{{ attached.results }}"

- name: Clean up what appliances have left behind
  kvmops.backup.vdisk_cross_attach:
    state: reconciled
    expired: true
"""

RETURN = r"""
vdisks:
  description: The disk; with O(state=reconciled), all that are freed.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: Id of the disk in its own VM, see M(kvmops.backup.vm_info). It can be passed back as O(vdisk).
      type: str
      returned: success
      sample: 4f0c2f5e-7d0b-5a53-8c7e-2d1d5f0f6a3b
    name:
      description: File name of the disk.
      type: str
      returned: success
      sample: web01.qcow2
    path:
      description: Its path as it is without the snapshot.
      type: str
      returned: success
      sample: /var/lib/libvirt/images/web01.qcow2
    target:
      description: Its target in its own VM.
      type: str
      returned: success
      sample: vda
    size:
      description: Its size in bytes, as a guest sees it.
      type: int
      returned: success
      sample: 21474836480
    pool:
      description: Name of the pool that it lies in; empty for none.
      type: str
      returned: success
      sample: default
    status:
      description:
        - C(attached); C(detaching) where a guest was asked to let it go and has not yet; C(gone) where the receiver
          does not have it any more, and the next run frees it; C(detached) where this run has done that.
        - In check mode, what would be.
      type: str
      returned: success
      sample: attached
    shareable:
      description: Whether several VMs may write to it. Never, as such disks are refused.
      type: bool
      returned: success
      sample: false
    thin_clone:
      description: Name of the thin clone that it belongs to, where it was named by the disk of its template; else empty.
      type: str
      returned: success
      sample: ''
    domain:
      description: The VM that it belongs to, with C(id) (UUID) and C(name).
      type: dict
      returned: success
      sample: {id: 6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11, name: web01}
    receiver:
      description: The VM that it is attached to, with C(id) (UUID) and C(name).
      type: dict
      returned: success
      sample: {id: 0a0d3f3c-19f4-4d4a-8a6b-7a4e4c1f5b0e, name: appliance}
    attached_as:
      description:
        - How the receiver has it. C(target) in its definition, C(path) of the file that it reads, C(serial) and C(by_id),
          the link that udev makes in its guest. A guest may have another name than C(target) for it, so go by C(by_id).
      type: dict
      returned: success
      sample: {target: vdb, path: /var/lib/libvirt/images/web01.qcow2, serial: kvmops1f0c6f6f2bb0e1,
               by_id: /dev/disk/by-id/virtio-kvmops1f0c6f6f2bb0e1}
    moment:
      description: Unix time of what it shows.
      type: int
      returned: success
      sample: 1795309200
    consistency:
      description:
        - C(agent) where the file systems were frozen by the guest agent, C(crash) for a state as after a power failure,
          C(off) where the VM was off. Empty for a template.
      type: str
      returned: success
      sample: agent
    lease:
      description: Until when it is attached, in UTC; empty for as long as nobody detaches it.
      type: str
      returned: success
      sample: '2026-11-22T04:00:00Z'
attached_to:
  description: Names of the VMs that have disks of the VM, where that is the reason of the error.
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
  sample: the disk is its own
hint:
  description: What to do now.
  returned: failure
  type: str
  sample: Name another VM as vm.
cancelled:
  description: Whether the operation was stopped on request.
  returned: failure
  type: bool
  sample: false
"""

from ansible_collections.kvmops.backup.plugins.module_utils import _operations
from ansible_collections.kvmops.backup.plugins.module_utils._argspec import URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach.request import from_params
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach.run import ensure

ARGUMENT_SPEC = {
    **URI,
    "vm": {"type": "str"},
    "vdisk": {"type": "str"},
    "source_vm": {"type": "str"},
    "thin_clone": {"type": "str"},
    "consistency": {"type": "str", "choices": ["auto", "agent", "crash"], "default": "auto"},
    "lease": {"type": "str"},
    "expired": {"type": "bool", "default": False},
    "state": {"type": "str", "choices": ["attached", "detached", "reconciled"], "default": "attached"},
    "bandwidth": {"type": "str", "default": "0"},
    "wait_timeout": {"type": "str", "default": "10m"},
}


def main() -> None:
    _operations.register()
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: ensure(from_params(params), context),
        libraries=["libvirt", "lxml"],
        required_if=[["state", "attached", ["vm", "vdisk"]], ["state", "detached", ["vm", "vdisk"]]],
    )


if __name__ == "__main__":
    main()
