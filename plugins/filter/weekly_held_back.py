# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

from ansible_collections.kvmops.backup.plugins.plugin_utils._weekly import held_back

DOCUMENTATION = r"""
name: weekly_held_back
short_description: VMs that keep snapshots of earlier increments
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Says which VMs have snapshots of earlier increments though they get full backups only now.
    The role P(kvmops.backup.weekly_backup#role) uses this filter.
positional: _input
options:
  _input:
    description: The VMs that are backed up, as M(kvmops.backup.vm_info) returns them.
    type: list
    elements: dict
    required: true
  full_only:
    description: VMs that get full backups only, from the same module.
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: Say what keeps VMs from being migrated
  ansible.builtin.debug:
    msg: "{{ chosen.vms | kvmops.backup.weekly_held_back(full_only.vms) }}"
"""

RETURN = r"""
_value:
  description: A line for each such VM, with the way out.
  type: list
  elements: str
"""


class FilterModule:
    """What Ansible asks for filters."""

    def filters(self) -> dict[str, Any]:
        return {"weekly_held_back": held_back}
