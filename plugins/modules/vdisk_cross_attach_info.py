#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vdisk_cross_attach_info
short_description: List the disks of VMs that are attached to other VMs
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Lists the disks that M(kvmops.backup.vdisk_cross_attach) has attached. Each is listed as the original disk, which can be
    passed back to that module.
  - Warns of disks that receivers no longer have, which the next changing run frees, and of leases that are over.
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.info
  - kvmops.backup._libvirt
options:
  another_domain:
    description:
      - Name or UUID of a receiver. If not given, all receivers.
    type: str
  source_vm:
    description:
      - Name or UUID of a VM whose disks are attached. If not given, all such VMs.
    type: str
seealso:
  - module: kvmops.backup.vdisk_cross_attach
"""

EXAMPLES = r"""
- name: What the appliance holds
  kvmops.backup.vdisk_cross_attach_info:
    another_domain: appliance
  register: held

- name: Detach all of it
  kvmops.backup.vdisk_cross_attach:
    vm: appliance
    vdisk: "{{ item.id }}"
    state: detached
  loop: "{{ held.vdisks }}"
"""

RETURN = r"""
vdisks:
  description: The attached disks.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description:
        - ID of the disk in its own VM, see M(kvmops.backup.vm_info).
        - It can be passed back as O(kvmops.backup.vdisk_cross_attach#module:vdisk).
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
          no longer has the disk, and the next run frees it.
      type: str
      returned: success
      sample: attached
    shareable:
      description: Whether several VMs may write to the disk. Always false, because such disks are refused.
      type: bool
      returned: success
      sample: false
    thin_clone:
      description: Name of the thin clone that the disk belongs to, if it was named by the disk of its template; otherwise empty.
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

from ansible_collections.kvmops.backup.plugins.module_utils._argspec import URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach.info import info
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach.request import info_from_params

ARGUMENT_SPEC = {**URI, "another_domain": {"type": "str"}, "source_vm": {"type": "str"}}


def main() -> None:
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: info(info_from_params(params), context),
        libraries=["libvirt", "lxml"],
    )


if __name__ == "__main__":
    main()
