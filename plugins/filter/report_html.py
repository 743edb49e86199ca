# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from zoneinfo import ZoneInfo

from ansible.errors import AnsibleFilterError

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.plugin_utils._report import model, page

DOCUMENTATION = r"""
name: report_html
short_description: The state of all backups as one HTML page
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Renders what hosts have told with M(kvmops.backup.vm_info) and M(kvmops.backup.backup_info). The page needs no network and no
    scripts. The role P(kvmops.backup.report#role) uses it.
positional: _input
options:
  _input:
    description: For each host C(host), C(vms) and C(archives); a host without these did not answer.
    type: list
    elements: dict
    required: true
  now:
    description: Unix time of the report.
    type: int
    required: true
  max_age:
    description: How old the newest good point of a VM may be, for example V(26h).
    type: str
    default: 26h
  objectives:
    description: The same for names and globs of VMs; the first that fits counts.
    type: dict
    default: {}
  title:
    description: Heading of the page.
    type: str
    default: Backups
  timezone:
    description: Time zone of the times on the page, such as V(Europe/Berlin); that of the control node if empty.
    type: str
    default: ''
"""

EXAMPLES = r"""
- name: Write the page
  ansible.builtin.copy:
    dest: /var/www/backups.html
    content: "{{ [{'host': 'kvm01', 'vms': chosen.vms, 'archives': found.archives}] | kvmops.backup.report_html(now=1795309200) }}"
    mode: "0644"
"""

RETURN = r"""
_value:
  description: The page.
  type: str
"""


def report_html(
    hosts: Sequence[Mapping[str, Any]],
    now: int,
    max_age: str = "26h",
    objectives: Mapping[str, str] | None = None,
    title: str = "Backups",
    timezone: str = "",
) -> str:
    """See DOCUMENTATION."""
    try:
        report = model.report(hosts, now=now, max_age=max_age, objectives=objectives)
        return page.render(report, title=title, tz=ZoneInfo(timezone) if timezone else None)
    except (KvmopsError, *model.ODD_FACTS) as error:
        raise AnsibleFilterError(f"report_html: {error}") from error


class FilterModule:
    """What Ansible asks for filters."""

    def filters(self) -> dict[str, Any]:
        return {"report_html": report_html}
