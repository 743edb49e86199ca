# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

from ansible_collections.kvmops.backup.plugins.plugin_utils._weekly import choices

DOCUMENTATION = r"""
name: weekly_choices
short_description: What each VM of a weekly policy gets
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Turns VMs into the O(kvmops.backup.vm_backup_many#module:vms) of a daily run. A VM gets the mode V(auto), a template or one of
    O(full_only) gets V(full); a template once a week. The role P(kvmops.backup.weekly_backup#role) uses this filter.
positional: _input
options:
  _input:
    description: The VMs, as M(kvmops.backup.vm_info) returns them.
    type: list
    elements: dict
    required: true
  full_only:
    description: VMs that get full backups only, from the same module.
    type: list
    elements: dict
    default: []
"""

EXAMPLES = r"""
- name: Find the VMs
  kvmops.backup.vm_info:
  register: found

- name: Back them up
  kvmops.backup.vm_backup_many:
    vms: "{{ found.vms | kvmops.backup.weekly_choices }}"
    defaults:
      pool: backups
"""

RETURN = r"""
_value:
  description: For each VM C(vm) and C(mode), and C(max_age) for a template.
  type: list
  elements: dict
"""


class FilterModule:
    """What Ansible asks for filters."""

    def filters(self) -> dict[str, Any]:
        return {"weekly_choices": choices}
