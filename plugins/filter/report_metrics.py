# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.plugin_utils._report import metrics, model

DOCUMENTATION = r"""
name: report_metrics
short_description: The state of all backups as a Prometheus textfile
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Renders what hosts have told with M(kvmops.backup.vm_info) and M(kvmops.backup.backup_info) for the textfile collector of
    the node exporter. The role P(kvmops.backup.report#role) uses it.
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
  name:
    description:
      - The label C(report) of every series.
      - The node exporter refuses a series that another file in its directory has too. So reports need names of their own.
    type: str
    default: ''
  place:
    description: The label C(place) of every series, where the archives are.
    type: str
    default: ''
"""

EXAMPLES = r"""
- name: Write the metrics
  ansible.builtin.copy:
    dest: /var/lib/prometheus/node-exporter/kvmops_backup_nightly.prom
    content: "{{ [{'host': 'kvm01', 'vms': a.vms, 'archives': b.archives}]
                 | kvmops.backup.report_metrics(now=1795309200, name='nightly', place='/srv/backup') }}"
    mode: "0644"
"""

RETURN = r"""
_value:
  description: The text of the file.
  type: str
"""


def report_metrics(
    hosts: Sequence[Mapping[str, Any]],
    now: int,
    max_age: str = "26h",
    objectives: Mapping[str, str] | None = None,
    name: str = "",
    place: str = "",
) -> str:
    """See DOCUMENTATION."""
    try:
        report = model.report(hosts, now=now, max_age=max_age, objectives=objectives)
        return metrics.render(report, name=name, place=place)
    except (KvmopsError, *model.ODD_FACTS) as error:
        raise AnsibleFilterError(f"report_metrics: {error}") from error


class FilterModule:
    """What Ansible asks for filters."""

    def filters(self) -> dict[str, Any]:
        return {"report_metrics": report_metrics}
