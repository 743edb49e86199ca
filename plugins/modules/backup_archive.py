#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_archive
short_description: Compress, protect, annotate or delete an archive
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Compresses or uncompresses an archive. The old file stays until the new one is durable and verified. Points,
    protection and notes carry over.
  - Protects an archive from deletion, and keeps notes with it.
  - Deletes an archive. Only with O(force) does it delete a protected archive, the last good archive of its VM in that directory,
    the last archive of a template that archives of thin clones there need, or a file that cannot be read as an archive.
  - An archive is good if this collection made it and no damage is known in it. A damaged archive of this collection is
    not good and is deleted without O(force).
  - Refuses files that are not named like an archive, and read-only places.
  - Fails while another operation is at work on the VM, and names the holder of the lock. A deletion waits for a run of
    retention in the same directory.
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.progress
  - kvmops.backup._archive
  - kvmops.backup._archive.compression
  - kvmops.backup._libvirt
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  archive:
    description:
      - Path of the archive. Its name ends with C(.tar) or C(.tar.zst). Other files are refused, whatever the other
        options are.
      - With O(compressed), the archive is also found under the name that it has after the change, so that a
        second run of the same task changes nothing.
    type: path
    required: true
  state:
    description:
      - V(absent) deletes the archive. It is no error if the archive does not exist.
    type: str
    choices: [present, absent]
    default: present
  compressed:
    description:
      - Whether the archive is to be compressed. If not given, the compression does not change.
      - The file name gains or loses the suffix C(.zst).
    type: bool
  protected:
    description:
      - Whether the archive is to be protected from deletion. If not given, the protection does not change.
      - A file that cannot be read as an archive is refused.
    type: bool
  notes:
    description:
      - Text to keep with the archive. An empty text removes the notes. If not given, the notes do not change.
      - A file that cannot be read as an archive is refused.
    type: str
  trust:
    description:
      - Whether to compress or uncompress an archive that another user of the host can have written. The result belongs to
        the user who runs the module. From then on it is trusted, with everything that its definitions name on the host.
    type: bool
    default: false
  force:
    description:
      - Whether to delete a protected archive, the last good archive of a VM, or a file that cannot be
        read as an archive. A read error may be temporary, so check the reason first.
    type: bool
    default: false
seealso:
  - module: kvmops.backup.backup_info
"""

EXAMPLES = r"""
- name: Compress an archive
  kvmops.backup.backup_archive:
    archive: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar
    compressed: true

- name: Keep it, and say why
  kvmops.backup.backup_archive:
    archive: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar.zst
    protected: true
    notes: last state before the migration

- name: Delete an archive
  kvmops.backup.backup_archive:
    archive: /srv/backup/web01_20261015T010000Z_6f1a2b3c.tar
    state: absent
"""

RETURN = r"""
archive:
  description: The archive after the change, or before it was deleted.
  returned: success, unless there was nothing to delete
  type: dict
  contains:
    path:
      description: Path of the archive; compression changes it.
      type: str
      returned: success
      sample: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar.zst
    size:
      description: Size of the archive in bytes. In check mode, the size before compression.
      type: int
      returned: success
      sample: 973078528
    compressed:
      description: Whether the archive is compressed; null if the file cannot be read.
      type: bool
      returned: success
      sample: true
    protected:
      description: Whether the archive is protected.
      type: bool
      returned: success
      sample: false
    notes:
      description: The notes kept with the archive.
      type: str
      returned: success
      sample: ''
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

from ansible_collections.kvmops.backup.plugins.module_utils._argspec import COMPRESSION, URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.change import change
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import ChangeRequest

ARGUMENT_SPEC = {
    **URI,
    **COMPRESSION,
    "archive": {"type": "path", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "compressed": {"type": "bool"},
    "protected": {"type": "bool"},
    "notes": {"type": "str"},
    "trust": {"type": "bool", "default": False},
    "force": {"type": "bool", "default": False},
}


def main() -> None:
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: change(ChangeRequest.of(params), context),
        libraries=["lxml", "zstandard"],
    )


if __name__ == "__main__":
    main()
