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
  - Attaches a disk of one VM read-only to another VM, the receiver, while the disk's own VM runs on. The module is for backup
    appliances and other software that reads disks inside of a VM.
  - The first attach takes the snapshot C(vdisks_attached_to_another_domains) of the VM. Later disks of that VM are attached
    from the same snapshot, so all show the same moment. After the last detach the snapshot is merged, and the VM
    is as before.
  - The receiver gets the disk on the virtio bus, read-only, without host cache, with a new serial for each attach. The
    receiver may be off, and it keeps the disk when it is restarted.
  - While a disk is attached, every module of this collection refuses to snapshot, revert, merge, back up, restore over,
    mark or clone the disk's VM, and names the receivers.
  - If a receiver no longer has a disk, because the receiver was deleted or somebody removed the disk, the next run of any
    changing module on either VM frees it.
  - The guide C(docs/CROSS_ATTACH.md) describes the order of calls and the work inside of the receiver.
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
      - Name or UUID of the receiver, the VM that reads the disk. Required unless O(state=reconciled).
      - With O(state=reconciled), only the disks of which this VM is the receiver or the source. If not given, all disks on
        the host.
    type: str
  vdisk:
    description:
      - ID (M(kvmops.backup.vm_info)), path or serial of the disk or, with O(source_vm), its target such as V(vda).
      - A disk of a template is attached itself, without a snapshot. The template must be off.
    type: str
  source_vm:
    description:
      - Name or UUID of the VM that the disk belongs to. Required for a target, and for a path or serial that is not unique.
    type: str
  thin_clone:
    description:
      - Name of a thin clone. If O(vdisk) is a disk of a template, the clone's disk that stands on it is attached instead.
    type: str
  consistency:
    description:
      - How the disks of a running VM are frozen at the first attach. V(agent) freezes the file systems through the guest agent,
        so that they can be mounted without their journal. V(crash) gives the state after a power failure. V(auto) is V(agent)
        if an agent answers, otherwise V(crash). A memory image is never made.
      - Has no effect on later disks of the same VM, which show the moment of the first.
    type: str
    choices: [auto, agent, crash]
    default: auto
  lease:
    description:
      - How long the disk is to be attached, for example V(8h). When the lease is over, nothing happens by itself. Modules that
        touch the VM report it, and O(state=reconciled) with O(expired=true) detaches the disk.
      - Attaching a disk that is already attached restarts the lease. This is no change.
    type: str
  expired:
    description:
      - With O(state=reconciled), also detach disks whose lease is over.
    type: bool
    default: false
  state:
    description:
      - V(attached) attaches the disk if the receiver does not have it.
      - V(detached) detaches the disk from the receiver. If the guest does not release it (no operating system is running), the
        module fails with C(device did not detach), and the disk stays recorded. A later run finishes once the disk is gone.
      - V(reconciled) checks all disks that are recorded as attached, and frees those that receivers no longer have.
    type: str
    choices: [attached, detached, reconciled]
    default: attached
  bandwidth:
    description:
      - Write at most this many bytes per second in the merge after the last detach, for example V(50M). V(0) means no limit.
    type: str
    default: '0'
  wait_timeout:
    description:
      - How long to wait for another operation on one of the two VMs to end, for example V(30m). With V(0), the module
        fails at once and names the holder of the lock.
      - The default is not V(0) as in the other modules, because several tasks or appliances usually attach and detach disks
        of one VM at the same time, and each takes only seconds.
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
  description: The disk; with O(state=reconciled), all disks that are freed.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: ID of the disk in its own VM, see M(kvmops.backup.vm_info). It can be passed back as O(vdisk).
      type: str
      returned: success
      sample: 4f0c2f5e-7d0b-5a53-8c7e-2d1d5f0f6a3b
    name:
      description: File name of the disk.
      type: str
      returned: success
      sample: web01.qcow2
    path:
      description: Path of the disk when the VM has no snapshot of this collection.
      type: str
      returned: success
      sample: /var/lib/libvirt/images/web01.qcow2
    target:
      description: Target of the disk in its own VM.
      type: str
      returned: success
      sample: vda
    size:
      description: Size of the disk in bytes, as a guest sees it.
      type: int
      returned: success
      sample: 21474836480
    pool:
      description: Name of the pool that the disk is in; empty if it is in no pool.
      type: str
      returned: success
      sample: default
    status:
      description:
        - C(attached); C(detaching) if the guest was asked to release the disk and has not done so yet; C(gone) if the receiver
          no longer has the disk, and the next run frees it; C(detached) if this run detached it.
        - In check mode, the predicted status.
      type: str
      returned: success
      sample: attached
    shareable:
      description: Whether several VMs may write to the disk. Always false, because such disks are refused.
      type: bool
      returned: success
      sample: false
    thin_clone:
      description: Name of the thin clone that the disk belongs to, if O(thin_clone) was given; otherwise empty.
      type: str
      returned: success
      sample: ''
    domain:
      description: The VM that the disk belongs to, with C(id) (UUID) and C(name).
      type: dict
      returned: success
      sample: {id: 6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11, name: web01}
    receiver:
      description: The receiver, with C(id) (UUID) and C(name).
      type: dict
      returned: success
      sample: {id: 0a0d3f3c-19f4-4d4a-8a6b-7a4e4c1f5b0e, name: appliance}
    attached_as:
      description:
        - The disk in the receiver, with the C(target) in the receiver's definition, the C(path) of the file that is read, the
          C(serial), and C(by_id), the link that udev makes in the guest. Identify the disk by C(by_id), because its name in
          the guest can differ from C(target).
      type: dict
      returned: success
      sample: {target: vdb, path: /var/lib/libvirt/images/web01.qcow2, serial: kvmops1f0c6f6f2bb0e1,
               by_id: /dev/disk/by-id/virtio-kvmops1f0c6f6f2bb0e1}
    moment:
      description: Unix time of the content that the disk shows.
      type: int
      returned: success
      sample: 1795309200
    consistency:
      description:
        - C(agent) if the guest agent froze the file systems, C(crash) for a state as after a power failure, C(off) if the VM
          was off. Empty for a template.
      type: str
      returned: success
      sample: agent
    lease:
      description: End of the lease in UTC; empty without a lease.
      type: str
      returned: success
      sample: '2026-11-22T04:00:00Z'
attached_to:
  description: Names of the receivers of the VM's disks, if these caused the error.
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
  sample: the disk is its own
hint:
  description: What to do about it.
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
