# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

from ansible_collections.kvmops.backup.plugins.plugin_utils._outcomes import table

DOCUMENTATION = r"""
name: backup_table
short_description: Outcomes of backups as lines of text
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Lays out rows of P(kvmops.backup.backup_outcomes#filter) in columns.
positional: _input
options:
  _input:
    description: The rows.
    type: list
    elements: dict
    required: true
  warnings:
    description: Whether to show the warnings, at most five of a row, cut after 200 characters.
    type: bool
    default: true
"""

EXAMPLES = r"""
- name: Say what was done
  ansible.builtin.debug:
    msg: "{{ result.backups | kvmops.backup.backup_outcomes | kvmops.backup.backup_table }}"
"""

RETURN = r"""
_value:
  description: One line for each row, and one below it for each of its warnings.
  type: list
  elements: str
"""


class FilterModule:
    """What Ansible asks for filters."""

    def filters(self) -> dict[str, Any]:
        return {"backup_table": table}
