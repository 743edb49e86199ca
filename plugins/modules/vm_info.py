#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_info
short_description: List the virtual machines of a host with the facts that a backup policy needs
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Lists libvirt/QEMU virtual machines, selected by name, UUID, glob, or an expression over their facts.
  - Warns if an interrupted run left something on one of the VMs. The next run that changes the VM settles it.
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.info
  - kvmops.backup._libvirt
options:
  vms:
    description:
      - Names, UUIDs and globs (V(*), V(?), V([abc])) of virtual machines. If not given, all VMs of the host; if empty, none.
    type: list
    elements: str
  select:
    description:
      - Only the VMs for which this JMESPath expression over an element of RV(vms) is true, for example
        V(state == 'running' && autostart). Needs C(python3-jmespath) on the host.
    type: str
requirements:
  - jmespath (C(python3-jmespath)) for O(select)
seealso:
  - module: kvmops.backup.vm_backup
"""

EXAMPLES = r"""
- name: All VMs whose names begin with web, and db01
  kvmops.backup.vm_info:
    vms: ['web*', db01]

- name: The running VMs that start with the host and have no snapshots
  kvmops.backup.vm_info:
    select: state == 'running' && autostart && !snapshots
  register: chosen

- name: Back them up
  kvmops.backup.vm_backup:
    vm: "{{ item.name }}"
    pool: backups
  loop: "{{ chosen.vms }}"
"""

RETURN = r"""
vms:
  description: The virtual machines, sorted by name.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name.
      type: str
      returned: success
      sample: web01
    uuid:
      description: UUID.
      type: str
      returned: success
      sample: 6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11
    title:
      description: Title; empty if there is none.
      type: str
      returned: success
      sample: Web server
    state:
      description: State as C(virsh list) shows it, such as C(running), C(paused) or C(shut off).
      type: str
      returned: success
      sample: running
    persistent:
      description: Whether the VM is persistent, not transient.
      type: bool
      returned: success
      sample: true
    autostart:
      description: Whether the VM starts with the host.
      type: bool
      returned: success
      sample: true
    template:
      description: Whether the VM is marked as a template.
      type: bool
      returned: success
      sample: false
    managed_save:
      description: Whether the VM has a managed-save image.
      type: bool
      returned: success
      sample: false
    memory:
      description: Memory in bytes.
      type: int
      returned: success
      sample: 4294967296
    vcpus:
      description: Virtual CPUs.
      type: int
      returned: success
      sample: 4
    arch:
      description: Architecture.
      type: str
      returned: success
      sample: x86_64
    machine:
      description: Machine type.
      type: str
      returned: success
      sample: pc-q35-7.2
    agent:
      description: Whether the VM has the channel for a guest agent.
      type: bool
      returned: success
      sample: true
    disks:
      description:
        - Disks and drives, each with C(id), C(target), C(device), C(type), C(path), C(format), C(bus) and C(serial).
        - C(id) is derived from the UUID of the VM and the path of the disk. Snapshots do not change it, not even those that
          incrementable backups leave. An empty drive has no C(id).
      type: list
      elements: dict
      returned: success
      sample:
        - {id: 4f0c2f5e-7d0b-5a53-8c7e-2d1d5f0f6a3b, target: vda, device: disk, type: file,
           path: /var/lib/libvirt/images/web01.qcow2, format: qcow2, bus: virtio, serial: ''}
    attached:
      description:
        - Disks of the VM that are attached to other VMs (M(kvmops.backup.vdisk_cross_attach)), each with C(target), C(receiver)
          and C(expired), which says whether the lease is over.
      type: list
      elements: dict
      returned: success
      sample: [{target: vda, receiver: appliance, expired: false}]
    nics:
      description: The network interfaces, each with C(mac), C(type), C(source) and C(model).
      type: list
      elements: dict
      returned: success
      sample: [{mac: '52:54:00:12:34:56', type: network, source: default, model: virtio}]
    hostdevs:
      description: Host devices passed through to the VM.
      type: list
      elements: str
      returned: success
      sample: []
    snapshots:
      description: Names of the VM's snapshots.
      type: list
      elements: str
      returned: success
      sample: [kvmops-1795309200]
unmatched:
  description: The elements of O(vms) that match no VM of the host.
  returned: success
  type: list
  elements: str
  sample: []
what:
  description: The object that the error is about.
  returned: failure
  type: str
  sample: Option select
why:
  description: The reason for the error.
  returned: failure
  type: str
  sample: Unknown function
hint:
  description: What to do about it.
  returned: failure
  type: str
  sample: See https://jmespath.org for the language.
cancelled:
  description: Whether the operation was stopped on request.
  returned: failure
  type: bool
  sample: false
"""

from ansible_collections.kvmops.backup.plugins.module_utils import _operations
from ansible_collections.kvmops.backup.plugins.module_utils._argspec import URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._vms import VmsRequest, info

ARGUMENT_SPEC = {**URI, "vms": {"type": "list", "elements": "str"}, "select": {"type": "str"}}


def main() -> None:
    _operations.register()
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: info(VmsRequest.of(params), context),
        libraries=["libvirt", "lxml"],
        libraries_for={"select": "jmespath"},
    )


if __name__ == "__main__":
    main()
