# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

from ansible_collections.kvmops.backup.plugins.plugin_utils._weekly import failures

DOCUMENTATION = r"""
name: weekly_failures
short_description: The failed VMs that a host of a play tells of
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Chooses the rows of P(kvmops.backup.backup_outcomes#filter) that a host fails for. With C(serial), a batch that fails would
    keep Ansible from starting the next one, so the first host of the last batch tells of all.
    The role P(kvmops.backup.weekly_backup#role) uses this filter.
positional: _input, host, hosts, batch, all_hosts
options:
  _input:
    description: The rows of each host that has been asked so far.
    type: dict
    required: true
  host:
    description: C(inventory_hostname).
    type: str
    required: true
  hosts:
    description: C(ansible_play_hosts).
    type: list
    elements: str
    required: true
  batch:
    description: C(ansible_play_batch).
    type: list
    elements: str
    required: true
  all_hosts:
    description: C(ansible_play_hosts_all).
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Fail if a VM was not backed up
  ansible.builtin.assert:
    that: told.failed | length == 0
  vars:
    asked: "{{ ansible_play_hosts | map('extract', hostvars) | selectattr('backup_rows', 'defined') }}"
    rows: "{{ dict(asked | map(attribute='inventory_hostname') | zip(asked | map(attribute='backup_rows'))) }}"
    told: >-
      {{ rows | kvmops.backup.weekly_failures(inventory_hostname, ansible_play_hosts, ansible_play_batch,
                                              ansible_play_hosts_all) }}
"""

RETURN = r"""
_value:
  description:
    - C(turn), whether it is the host's turn to tell; C(failed), the rows whose result is C(FAILED); C(of), the number of rows
      that they are among.
  type: dict
"""


class FilterModule:
    """What Ansible asks for filters."""

    def filters(self) -> dict[str, Any]:
        return {"weekly_failures": failures}
