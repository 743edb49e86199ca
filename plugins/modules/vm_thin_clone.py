#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_thin_clone
short_description: Make a thin clone of a template
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Defines a new virtual machine whose disks are empty overlays on the disks of a template. The clone has its own name, UUID,
    MAC addresses and copy of the NVRAM. This takes seconds and almost no space.
  - The clone is made completely or not at all. The next run of M(kvmops.backup.vm_restore) or of this module undoes what a
    killed run left.
  - Host devices and LUNs of the template are left out if another VM uses them. The clone's TPM is empty at first.
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.progress
  - kvmops.backup._libvirt
attributes:
  check_mode:
    support: full
    details:
      - Predicts the path of every disk.
  diff_mode:
    support: none
  idempotent:
    support: full
    details:
      - No change if a VM of that name exists and has an overlay on each of the template's disks. It may have other disks too.
options:
  template:
    description:
      - Name or UUID of the template, see M(kvmops.backup.vm_template).
    type: str
    required: true
  name:
    description:
      - Name of the clone.
    type: str
    required: true
  pool:
    description:
      - Storage pool for the clone's disks.
      - Without O(pool) and O(path), they are created beside the template's disks.
    type: str
  path:
    description:
      - Directory for the clone's disks. It must exist.
    type: path
  start:
    description:
      - Whether the clone is to run.
    type: bool
    default: false
  wait_timeout:
    description:
      - How long to wait for another operation on the template to end, for example V(30m). With V(0), the module
        fails at once and names the holder of the lock.
    type: str
    default: '0'
seealso:
  - module: kvmops.backup.vm_template
  - module: kvmops.backup.vm_backup
"""

EXAMPLES = r"""
- name: A new web server from the template
  kvmops.backup.vm_thin_clone:
    template: debian12
    name: web01
    start: true
"""

RETURN = r"""
vm:
  description: The clone.
  returned: success
  type: dict
  contains:
    name:
      description: Name of the clone.
      type: str
      returned: success
      sample: web01
    uuid:
      description: UUID of the clone. In check mode, an example of a new UUID.
      type: str
      returned: success
      sample: 0a0d3f3c-19f4-4d4a-8a6b-7a4e4c1f5b0e
disks:
  description: Disks of the clone.
  returned: success
  type: list
  elements: dict
  contains:
    target:
      description: Target of the disk in the definition.
      type: str
      returned: success
      sample: vda
    path:
      description: Path of the disk.
      type: str
      returned: success
      sample: /var/lib/libvirt/images/web01-vda.qcow2
    format:
      description: Format of the disk.
      type: str
      returned: success
      sample: qcow2
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
  sample: The thin clone web01
why:
  description: The reason for the error.
  returned: failure
  type: str
  sample: debian12 is not marked as a template
hint:
  description: What to do about it.
  returned: failure
  type: str
  sample: Mark it with kvmops.backup.vm_template.
cancelled:
  description: Whether the operation was stopped on request.
  returned: failure
  type: bool
  sample: false
"""

from ansible_collections.kvmops.backup.plugins.module_utils import _operations
from ansible_collections.kvmops.backup.plugins.module_utils._argspec import TARGET, URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._clones.thin_clone import from_params, thin_clone

ARGUMENT_SPEC = {
    **URI,
    **TARGET,
    "template": {"type": "str", "required": True},
    "name": {"type": "str", "required": True},
    "start": {"type": "bool", "default": False},
    "wait_timeout": {"type": "str", "default": "0"},
}


def main() -> None:
    _operations.register()
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: thin_clone(from_params(params), context),
        libraries=["libvirt", "lxml"],
        mutually_exclusive=[("pool", "path")],
    )


if __name__ == "__main__":
    main()
