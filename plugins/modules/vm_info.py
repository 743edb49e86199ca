#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_info
short_description: List the virtual machines of a host with the facts that a backup policy chooses by
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Lists libvirt/QEMU virtual machines, chosen by name, UUID, glob, or by an expression over their facts.
  - Warns where a run that was interrupted has left something on one of them; the next run that changes the VM puts it right.
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.info
  - kvmops.backup._libvirt
options:
  vms:
    description:
      - Names, UUIDs and globs (V(*), V(?), V([abc])) of virtual machines. All of the host if not given, none if it is empty.
    type: list
    elements: str
  select:
    description:
      - Only those for which this JMESPath expression over one element of RV(vms) is true, for example
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
      description: Title; empty without one.
      type: str
      returned: success
      sample: Web server
    state:
      description: State as C(virsh list) has it, such as C(running), C(paused) or C(shut off).
      type: str
      returned: success
      sample: running
    persistent:
      description: Whether it has a definition that outlives it.
      type: bool
      returned: success
      sample: true
    autostart:
      description: Whether it starts with the host.
      type: bool
      returned: success
      sample: true
    template:
      description: Whether it is marked as a template.
      type: bool
      returned: success
      sample: false
    managed_save:
      description: Whether it has a managed-save image.
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
      description: Whether it has the channel of a guest agent.
      type: bool
      returned: success
      sample: true
    disks:
      description:
        - Disks and drives, each with C(id), C(target), C(device), C(type), C(path), C(format), C(bus) and C(serial).
        - C(id) is made of the UUID of the VM and the path of the disk. Snapshots, and backups that keep theirs, do not change
          it. An empty drive has none.
      type: list
      elements: dict
      returned: success
      sample:
        - {id: 4f0c2f5e-7d0b-5a53-8c7e-2d1d5f0f6a3b, target: vda, device: disk, type: file,
           path: /var/lib/libvirt/images/web01.qcow2, format: qcow2, bus: virtio, serial: ''}
    attached:
      description:
        - Disks of it that are attached to other VMs (M(kvmops.backup.vdisk_cross_attach)), each with C(target), C(receiver) and
          C(expired), whether its lease is over.
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
      description: Names of its snapshots.
      type: list
      elements: str
      returned: success
      sample: [kvmops-1795309200]
unmatched:
  description: Those of O(vms) that no VM of the host fits.
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
  description: The reason of the error.
  returned: failure
  type: str
  sample: Unknown function
hint:
  description: What to do now.
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
