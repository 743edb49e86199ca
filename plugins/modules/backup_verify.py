#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_verify
short_description: Check archives for damage
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Reads every byte of archives and checks it against its digest. Damage is reported by archive, member and byte range,
    together with the points that are lost.
  - Reports what was covered. Archives of this collection have digests of everything. Foreign archives have none, so
    that only their structure can be checked, and the checksums of the compression if there are any.
  - In a place, an archive that is deleted or converted meanwhile is left out with a warning. If an archive cannot be checked
    because it is in use, or its images cannot be opened for lack of space, the others are still checked. The
    module then fails at the end and names the archive, even without O(fail_on_damage).
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.info
  - kvmops.backup._attributes.progress
  - kvmops.backup._archive
  - kvmops.backup._archive.priority
  - kvmops.backup._libvirt
options:
  archive:
    description:
      - Path of one archive.
      - Exactly one of O(archive), O(pool) and O(path) is required.
    type: path
  pool:
    description:
      - Storage pool that holds the archives.
    type: str
  path:
    description:
      - Directory that holds the archives.
    type: path
  vm:
    description:
      - Only archives of the VM of this name or UUID.
      - Archives belong to a VM by UUID. Archives made before the VM was renamed belong to it; archives of another VM that
        had this name do not. If the host has no VM of this name, the names in the archives decide.
    type: str
  deep:
    description:
      - Open every disk image as well. C(qemu-img check) must find no errors, and each layer's chain must be complete.
      - Images in plain archives are opened inside the archive. Images in compressed archives are extracted to sparse
        temporary files in C(/var/tmp), one disk at a time, which needs the space of one disk.
    type: bool
    default: false
  fail_on_damage:
    description:
      - Whether the module fails if there is damage. The result is returned either way.
    type: bool
    default: true
  expected_digest:
    description:
      - The value of RV(kvmops.backup.vm_backup#module:archive.digest) when the archive was made with
        O(kvmops.backup.vm_backup#module:digest=sha256). Keep it where nobody who may write to the archive can write.
      - A text for O(archive), or a map of archives (paths or file names) to digests. If an archive of the map does not exist,
        the module fails.
      - If none of the archive's points has this digest, somebody changed the archive, even if everything else in it is
        consistent, and the module fails. Points that were added later are not covered; a warning says so.
      - Refused for archives with digests of another kind, because those find damage but no forgery.
    type: raw
  threads:
    description:
      - Number of threads that decompress and compute digests; V(0) means one per core.
    type: int
    default: 0
seealso:
  - module: kvmops.backup.backup_info
"""

EXAMPLES = r"""
- name: Check one archive
  kvmops.backup.backup_verify:
    archive: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar

- name: Check all archives of a VM, the disk images inside as well, and go on if something is damaged
  kvmops.backup.backup_verify:
    pool: backups
    vm: web01
    deep: true
    fail_on_damage: false
  register: check

- name: Name the damaged ones
  ansible.builtin.debug:
    msg: "{{ check.archives | rejectattr('ok') | map(attribute='path') }}"
"""

RETURN = r"""
archives:
  description:
    - The archives that were checked.
    - Also returned if the module fails because of damage, or because archives of a place, or images in an archive, could
      not be checked.
  returned: success, or failure because of damage or of archives that could not be checked
  type: list
  elements: dict
  contains:
    path:
      description: Path of the archive.
      type: str
      returned: success
      sample: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar
    ok:
      description: Whether no damage was found.
      type: bool
      returned: success
      sample: true
    coverage:
      description:
        - C(full) if every byte was checked against a digest, C(partial) if some bytes were, C(structure) if the archive has
          no digests.
      type: str
      returned: success
      sample: full
    checked_bytes:
      description: Bytes that were checked against digests.
      type: int
      returned: success
      sample: 2147483648
    unchecked_bytes:
      description: Bytes that have no digest to check them against.
      type: int
      returned: success
      sample: 0
    lost:
      description: The points that are lost to damage; the others can be restored.
      type: list
      elements: int
      returned: success
      sample: [1795309200]
    damage:
      description: The damaged ranges.
      type: list
      elements: dict
      returned: success
      contains:
        member:
          description: The member of the archive; empty for the archive file itself.
          type: str
          returned: success
          sample: vda_0.qcow2
        offset:
          description: First byte of the range in the member.
          type: int
          returned: success
          sample: 4194304
        length:
          description: Bytes in the range.
          type: int
          returned: success
          sample: 4194304
        points:
          description: The points that are lost with the range.
          type: list
          elements: int
          returned: success
          sample: [1795309200]
        reason:
          description: What was found.
          type: str
          returned: success
          sample: the digest differs
what:
  description: The object that the error is about.
  returned: failure
  type: str
  sample: Archive /srv/backup/web01.tar
why:
  description: The reason for the error.
  returned: failure
  type: str
  sample: it is protected
hint:
  description: What to do about it.
  returned: failure
  type: str
  sample: "Take the protection away (protected: false), or delete it all the same with force: true."
cancelled:
  description: Whether the operation was stopped on request.
  returned: failure
  type: bool
  sample: false
"""

from ansible_collections.kvmops.backup.plugins.module_utils._argspec import PRIORITY, TARGET, URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import VerifyRequest
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.verify import verify

ARGUMENT_SPEC = {
    **URI,
    **TARGET,
    **PRIORITY,
    "archive": {"type": "path"},
    "vm": {"type": "str"},
    "deep": {"type": "bool", "default": False},
    "fail_on_damage": {"type": "bool", "default": True},
    "expected_digest": {"type": "raw"},
    "threads": {"type": "int", "default": 0},
}


def main() -> None:
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: verify(VerifyRequest.of(params), context),
        libraries=["lxml", "zstandard"],
        required_one_of=[["archive", "pool", "path"]],
        mutually_exclusive=[["archive", "pool", "path"]],
    )


if __name__ == "__main__":
    main()
