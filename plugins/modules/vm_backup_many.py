#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_backup_many
short_description: Back up several virtual machines of a host side by side
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Does what M(kvmops.backup.vm_backup) does for each VM of a list, several at a time, with the progress of all of them in the
    output of the play. A VM that fails never stops the others. The task fails at the end and names the failed VMs.
  - One run of one module on the host makes all backups of the task. That takes much less time than a task for each VM.
  - When the play is stopped, all running backups are stopped and cleaned up.
  - The role P(kvmops.backup.weekly_backup#role) uses it.
extends_documentation_fragment:
  - kvmops.backup._attributes.many
options:
  vms:
    description:
      - One element for each backup, with the options of M(kvmops.backup.vm_backup). Each requires C(vm).
    type: list
    elements: dict
    required: true
  defaults:
    description:
      - Options of M(kvmops.backup.vm_backup) for all backups. The options in an element of O(vms) override them.
    type: dict
    default: {}
  at_once:
    description:
      - How many backups of this task run at the same time; V(0) means all, but not more than the host allows.
        That is four for each of its cores and at least eight, if there is enough free memory.
        O(kvmops.backup.vm_backup#module:max_parallel) also counts the backups of other tasks that write to the same place.
    type: int
    default: 0
seealso:
  - module: kvmops.backup.vm_backup
"""

EXAMPLES = r"""
- name: Back up three VMs, two at a time
  kvmops.backup.vm_backup_many:
    vms:
      - vm: web01
      - vm: web02
      - vm: db01
        consistency: agent
    defaults:
      pool: backups
      compress: true
    at_once: 2
"""

RETURN = r"""
backups:
  description:
    - The results of M(kvmops.backup.vm_backup) in the order of O(vms), each with C(vm), C(failed), C(changed) and
      C(warnings). C(msg) says why a backup failed.
  returned: success or failure
  type: list
  elements: dict
  sample:
    - {vm: web01, failed: false, changed: true, mode: full, reason: full backup as asked, warnings: []}
    - {vm: db01, failed: true, changed: false, msg: 'The VM db01: there is no VM of that name or uuid on this host.', warnings: []}
"""

from ansible_collections.kvmops.backup.plugins.module_utils import _operations
from ansible_collections.kvmops.backup.plugins.module_utils._argspec import run_module
from ansible_collections.kvmops.backup.plugins.module_utils._backup_many import backups
from ansible_collections.kvmops.backup.plugins.module_utils._backup_options import LIBRARIES
from ansible_collections.kvmops.backup.plugins.module_utils._backup_results import ARGUMENT_SPEC


def main() -> None:
    _operations.register()
    run_module(ARGUMENT_SPEC, backups, libraries=LIBRARIES)


if __name__ == "__main__":
    main()
