#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_retention
short_description: Remove old archives of virtual machines by rules, or until space is free
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Removes the archives in a place that no rule keeps. The rules apply to each VM separately; an archive
    belongs to a VM by UUID. The age of an archive is the age of its newest point.
  - The counting rules are those of Proxmox, in the order last, hourly, daily, weekly, monthly, yearly. Each rule considers
    only the archives that the rules before it did not keep, keeps the newest archive of each period, and does not count
    periods without an archive. Weeks are ISO weeks; hours, days and weeks are in the host's time zone.
  - Whatever the rules say, the module never removes the last good archive of a VM, protected archives
    (M(kvmops.backup.backup_archive)), archives that are being written, restored or verified, the archive that
    M(kvmops.backup.vm_backup) with C(mode=auto) would continue, the archive of a template that a kept archive of a thin
    clone needs, and every file that is not certainly an archive made by this collection.
  - No rule counts protected archives, damaged archives and archives dated in the future. A damaged archive is removed when
    it is older than everything that the rules keep.
  - Nothing is removed when the place cannot be listed.
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.progress
  - kvmops.backup._archive
  - kvmops.backup._libvirt
attributes:
  check_mode:
    support: full
    details:
      - Returns what would be kept and removed, with the reason for each.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  pool:
    description:
      - Storage pool (directory, file system or network file system) that holds the archives.
      - One of O(pool) and O(path) is required.
    type: str
  path:
    description:
      - Directory that holds the archives. Subdirectories are not searched.
      - One of O(pool) and O(path) is required.
    type: path
  vm:
    description:
      - Name or UUID of the VM that the O(keep_last) to O(keep_yearly) rules apply to. The default is all VMs.
      - This option does not restrict O(free_space).
    type: str
  keep_last:
    description:
      - Keep this many of a VM's newest archives. Without other rules, no more are kept.
      - In this and every other rule, V(0) is the same as not giving the rule. Without any rule, nothing is removed.
    type: int
  keep_days:
    description:
      - Remove archives whose newest point is older than this many days, even if another rule would keep them.
    type: int
  keep_hourly:
    description:
      - Keep the newest archive of each hour, for this many hours.
    type: int
  keep_daily:
    description:
      - Keep the newest archive of each day, for this many days.
    type: int
  keep_weekly:
    description:
      - Keep the newest archive of each ISO week, for this many ISO weeks.
    type: int
  keep_monthly:
    description:
      - Keep the newest archive of each month, for this many months.
    type: int
  keep_yearly:
    description:
      - Keep the newest archive of each year, for this many years.
    type: int
  free_space:
    description:
      - Remove the oldest archives, of any VM, until this much space is free in the place, for example V(200G). This includes
        archives that the other rules keep, but not those that are never removed, nor the newest good archive of a VM.
      - If removing all permitted archives would not be enough, the module fails and removes nothing. It also fails if the
        removal freed less than expected, as under snapshots of the file system; warnings then list the removed archives.
    type: str
seealso:
  - module: kvmops.backup.vm_backup
  - module: kvmops.backup.backup_archive
  - name: Prune simulator of Proxmox
    description: Shows what a set of keep rules leaves.
    link: https://pbs.proxmox.com/docs/prune-simulator/
"""

EXAMPLES = r"""
- name: Keep a month of archives of all VMs
  kvmops.backup.backup_retention:
    pool: backups
    keep_days: 30

- name: A week of days, a quarter of weeks, a year of months
  kvmops.backup.backup_retention:
    path: /srv/backup
    keep_daily: 7
    keep_weekly: 13
    keep_monthly: 12

- name: Show what would go, and why
  kvmops.backup.backup_retention:
    pool: backups
    vm: web01
    keep_last: 3
  check_mode: true
  register: retention

- name: Have room for the coming night
  kvmops.backup.backup_retention:
    pool: backups
    free_space: 200G
"""

RETURN = r"""
kept:
  description: The archives that stay in the place, and why. With O(vm), only the archives of that VM.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: Path of the archive.
      type: str
      returned: success
      sample: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar
    reason:
      description: Why the archive stays.
      type: str
      returned: success
      sample: it is number 1 of 3 (keep_last)
removed:
  description: The archives that were removed (in check mode, that would be removed), and why.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: Path of the archive.
      type: str
      returned: success
      sample: /srv/backup/web01_20261015T010000Z_6f1a2b3c.tar
    reason:
      description: Why the archive is removed.
      type: str
      returned: success
      sample: it is older than 30 days (keep_days)
freed_bytes:
  description: Bytes that the removal frees. Blocks shared with other files are not counted.
  returned: success
  type: int
  sample: 2147494400
what:
  description: The object that the error is about.
  returned: failure
  type: str
  sample: The directory /srv/backup
why:
  description: The reason for the error.
  returned: failure
  type: str
  sample: 2.0 TiB cannot be had
hint:
  description: What to do about it.
  returned: failure
  type: str
  sample: Nothing was removed. Free space by other means, unprotect archives, or ask for less.
cancelled:
  description: Whether the operation was stopped on request.
  returned: failure
  type: bool
  sample: false
"""

from collections.abc import Mapping
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._argspec import TARGET, URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._backup.incrementable import Judge
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import RULES, RetentionRequest
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.retention import retain
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context

_KEEP = [f"keep_{rule}" for rule in RULES]
ARGUMENT_SPEC = {
    **URI,
    **TARGET,
    "vm": {"type": "str"},
    **{option: {"type": "int"} for option in _KEEP},
    "free_space": {"type": "str"},
}


def run(params: Mapping[str, Any], context: Context) -> dict[str, Any]:
    request = RetentionRequest.of(params)
    return retain(request, context, Judge(request.uri, context, thorough=False).continued)


def main() -> None:
    run_module(
        ARGUMENT_SPEC,
        run,
        libraries=["lxml", "zstandard"],
        required_one_of=[["pool", "path"], [*_KEEP, "free_space"]],
        mutually_exclusive=[["pool", "path"]],
    )


if __name__ == "__main__":
    main()
