# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

from ansible_collections.kvmops.backup.plugins.module_utils import _policy
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._units import duration_s

DOCUMENTATION = r"""
name: done_within
short_description: How young a point must be for its VM to be done today
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Turns what is meant as done today into the O(kvmops.backup.vm_backup#module:max_age) of a daily run. A point of today is
    enough, and one of an earlier day while it is younger than half of the given age, because a run may have taken long or
    have been made up for late.
  - An age of more than a day stays what it is. The role P(kvmops.backup.weekly_backup#role) uses this filter.
positional: _input
options:
  _input:
    description: How old the newest point of a VM that is done may be at most, for example V(20h).
    type: str
    required: true
  clock:
    description: The fact C(ansible_date_time) of the host.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Back up once a day, whenever the play runs
  kvmops.backup.vm_backup:
    vm: web01
    pool: backups
    max_age: "{{ '20h' | kvmops.backup.done_within(ansible_facts.date_time) }}"
"""

RETURN = r"""
_value:
  description: Seconds, as a duration such as V(72000s).
  type: str
"""


def done_within(max_age: str, clock: Mapping[str, str]) -> str:
    """See DOCUMENTATION."""
    today_s = int(clock["hour"]) * 3600 + int(clock["minute"]) * 60 + int(clock["second"])
    try:
        return f"{_policy.done_within_s(duration_s(str(max_age), 'max_age'), today_s)}s"
    except KvmopsError as error:
        raise AnsibleFilterError(f"done_within: {error}") from error


class FilterModule:
    """What Ansible asks for filters."""

    def filters(self) -> dict[str, Any]:
        return {"done_within": done_within}
