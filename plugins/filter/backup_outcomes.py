# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

from ansible_collections.kvmops.backup.plugins.plugin_utils._outcomes import outcomes

DOCUMENTATION = r"""
name: backup_outcomes
short_description: Who was backed up, how, and why not
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Turns the results of M(kvmops.backup.vm_backup_many), and of verifications, into one row for each VM, failures first.
positional: _input
options:
  _input:
    description: RV(kvmops.backup.vm_backup_many#module:backups).
    type: list
    elements: dict
    required: true
  verified:
    description: Results of M(kvmops.backup.backup_verify) for the archives that were written.
    type: list
    elements: dict
    default: []
  unmatched:
    description: For each host, the names that none of its VMs fits. One that fits nowhere is a failure.
    type: list
    elements: list
    default: []
  attached:
    description:
      - What a VM is that was not backed up because its disks are attached to other VMs (M(kvmops.backup.vdisk_cross_attach)),
        V(skip) or V(fail).
    type: str
    choices: [skip, fail]
    default: skip
"""

EXAMPLES = r"""
- name: Say who failed
  ansible.builtin.debug:
    msg: "{{ result.backups | kvmops.backup.backup_outcomes | selectattr('result', 'equalto', 'FAILED') }}"
"""

RETURN = r"""
_value:
  description:
    - Rows with C(vm), C(result) (C(full), C(incremental), C(done already), C(skipped) or C(FAILED)), C(why), C(archive),
      C(bytes) and C(warnings).
  type: list
  elements: dict
"""


class FilterModule:
    """What Ansible asks for filters."""

    def filters(self) -> dict[str, Any]:
        return {"backup_outcomes": outcomes}
