#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_template
short_description: Mark a virtual machine as a template for thin clones
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - A template is a virtual machine that is marked in its metadata. Thin clones stand on its disks, so the template must stay
    off and unchanged as long as it has clones.
  - The backup of a thin clone holds only the clone's own layers, and identifies the template by the content of its disks.
    A restore refuses to put the clone on any other content.
  - A template gets full backups only, and no snapshots.
  - See C(docs/TEMPLATES.md) of the collection.
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.progress
  - kvmops.backup._libvirt
attributes:
  check_mode:
    support: full
    details:
      - Returns the digest only if it is known without reading the disks.
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  vm:
    description:
      - Name or UUID of the virtual machine.
    type: str
    required: true
  state:
    description:
      - V(present) marks the VM as a template. Refused for a VM that is running, has a managed-save image or snapshots, or has
        a disk that is not a qcow2 or raw file. The content of its disks is read once for the digest.
      - V(absent) removes the mark. Refused while thin clones on this host stand on the VM's disks.
    type: str
    choices: [present, absent]
    default: present
  wait_timeout:
    description:
      - How long to wait for another operation on the same VM to end, for example V(30m). With V(0), the module
        fails at once and names the holder of the lock.
    type: str
    default: '0'
seealso:
  - module: kvmops.backup.vm_thin_clone
  - module: kvmops.backup.vm_backup
"""

EXAMPLES = r"""
- name: Make a template of an installed VM that is shut down
  kvmops.backup.vm_template:
    vm: debian12

- name: An ordinary VM again
  kvmops.backup.vm_template:
    vm: debian12
    state: absent
"""

RETURN = r"""
template:
  description: The VM.
  returned: success
  type: dict
  contains:
    uuid:
      description: UUID of the VM.
      type: str
      returned: success
      sample: 5c1f5c54-6a1e-4f7e-9d55-0c9f4c3c4f11
    name:
      description: Name of the VM.
      type: str
      returned: success
      sample: debian12
    digest:
      description:
        - One digest of the content of all disks in order, as a guest sees it. It does not depend on how the disks are stored.
        - V(null) if it is not known without reading the disks (check mode, O(state=absent)), and for a running template.
      type: str
      returned: success
      sample: 1f0c6f6f2bb0e1d6d2ba5bb0a60c4b3e3a4bd1f7f24a53b7a7c1f2e6c0b3a5d9
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
  sample: The VM debian12
why:
  description: The reason for the error.
  returned: failure
  type: str
  sample: it is running, and clones cannot stand on disks that change
hint:
  description: What to do about it.
  returned: failure
  type: str
  sample: Shut it down first.
cancelled:
  description: Whether the operation was stopped on request.
  returned: failure
  type: bool
  sample: false
"""

from ansible_collections.kvmops.backup.plugins.module_utils import _operations
from ansible_collections.kvmops.backup.plugins.module_utils._argspec import URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._clones.template import from_params, template

ARGUMENT_SPEC = {
    **URI,
    "vm": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "wait_timeout": {"type": "str", "default": "0"},
}


def main() -> None:
    _operations.register()
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: template(from_params(params), context),
        libraries=["libvirt", "lxml"],
    )


if __name__ == "__main__":
    main()
