#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_info
short_description: Look into archives without unpacking them
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Lists archives and shows the configuration of any point in them.
  - Takes milliseconds for archives of this collection, plain or compressed, whatever their size. A foreign compressed
    archive is read once in full; the result is cached in C(/var/cache/kvmops-backup).
  - A damaged or incomplete archive is listed with a warning and does not hide the others. A directory that cannot be read
    is an error, never an empty list.
  - All results and messages of this collection show bytes of a file name that are not UTF-8 as C(%FC). Every option that
    takes a path accepts a path in this form.
  - Warns if an interrupted run left something on the VM of an archive. The next run that changes the VM settles it.
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.info
  - kvmops.backup._archive
  - kvmops.backup._libvirt
options:
  archive:
    description:
      - Path of one archive, of an OVF package (C(.ova), C(.ovf)), or of a libvirt domain C(.xml).
    type: path
  pool:
    description:
      - Storage pool that holds the archives.
    type: str
  path:
    description:
      - Directory that holds the archives.
      - Without O(archive), O(pool) and O(path), the archives in all active directory pools of the host are listed.
    type: path
  vm:
    description:
      - Only archives of the VM of this name or UUID.
      - Archives belong to a VM by UUID. Archives made before the VM was renamed belong to it; archives of another VM that
        had this name do not. If the host has no VM of this name, the names in the archives decide.
    type: str
  point:
    description:
      - Show the configuration of this point instead of the newest one.
      - Archives without this point are left out of the list. With O(archive), a missing point is an error.
    type: int
  refresh:
    description:
      - Read foreign compressed archives again instead of using the cache. Also read everything that is needed to find out
        RV(archives[].incrementable) and the content of a thin clone's template.
    type: bool
    default: false
  query:
    description:
      - A JMESPath expression over the result, for example V(archives[?size > `1000000000`].path).
        RV(matches) returns what it selects. Needs C(python3-jmespath) on the host.
    type: str
requirements:
  - jmespath (C(python3-jmespath)) for O(query)
seealso:
  - module: kvmops.backup.backup_verify
  - module: kvmops.backup.vm_restore
"""

EXAMPLES = r"""
- name: All archives of a VM in a pool
  kvmops.backup.backup_info:
    pool: backups
    vm: web01
  register: backups

- name: The disks of the newest point of one archive
  kvmops.backup.backup_info:
    archive: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar
    query: archives[0].config.disks[].path
  register: view

- name: All protected archives on this host, with their VMs
  kvmops.backup.backup_info:
    query: 'archives[?protected].{path: path, vm: vm.name}'
"""

RETURN = r"""
archives:
  description: The archives, sorted by VM and by the time of their newest point.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: Path of the archive.
      type: str
      returned: success
      sample: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar
    vm:
      description: C(name) and C(uuid) of the VM at the newest point; null if the file cannot be read.
      type: dict
      returned: success
      sample: {name: web01, uuid: 6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11}
    size:
      description: Size of the file in bytes.
      type: int
      returned: success
      sample: 2147494400
    compressed:
      description: Whether the archive is compressed; null if the file cannot be read.
      type: bool
      returned: success
      sample: false
    not_ours:
      description:
        - Why the archive does not count in retention, O(kvmops.backup.vm_backup#module:max_age), mode V(auto) and
          the report. Such an archive is restored as a foreign one, unless it was converted from another product's package.
        - Empty if the archive is trusted, that is if this collection made it and no other user of the host can have written it.
      type: str
      returned: success
      sample: it belongs to mallory
    conversion:
      description:
        - For a package, and for an archive that was converted from one, the name of the package and the changes to its
          hardware; otherwise null.
      type: dict
      returned: success
      sample: {"source": "router.ova", "replaced": [], "ignored": []}
    files:
      description:
        - For a package, the files that it names, each with its size and whether it exists. Empty for archives.
      type: list
      elements: dict
      returned: success
      sample: [{"name": "disk1.vmdk", "present": true, "size": 973078528}]
    incrementable:
      description:
        - Whether increments can be added, as an examination of the VM shows. If not, the warnings say why.
        - Null if it is not known, because the VM is not on this host, or because too much of its files would have to be read
          again. O(refresh) reads them.
      type: bool
      returned: success
      sample: false
    incrementable_reason:
      description:
        - The element of RV(archives[].warnings) that says why no increment can be added, or why this is not known. Empty if
          increments can be added.
      type: str
      returned: success
      sample: "no increment can be added: its cycle has ended"
    template:
      description: Whether this is the archive of a template.
      type: bool
      returned: success
      sample: false
    requires:
      description:
        - The template that the point of a thin clone needs; V(null) for any other VM. RV(archives[].warnings) says if the
          host has no such template, if the template differs, or if its disks do not correspond.
      type: dict
      returned: success
      contains:
        uuid:
          description: UUID of the template when the backup was made.
          type: str
          returned: success
          sample: 5c1f5c54-6a1e-4f7e-9d55-0c9f4c3c4f11
        name:
          description: Name of the template when the backup was made.
          type: str
          returned: success
          sample: debian12
    protected:
      description: Whether the archive is protected from deletion.
      type: bool
      returned: success
      sample: false
    notes:
      description: The notes kept with the archive.
      type: str
      returned: success
      sample: before the upgrade
    points:
      description: The points in the archive, oldest first.
      type: list
      elements: dict
      returned: success
      contains:
        point:
          description: Unix time of the point. O(point) takes this number.
          type: int
          returned: success
          sample: 1795309200
        time:
          description: The time of the point as ISO 8601 text in UTC.
          type: str
          returned: success
          sample: '2026-11-22T01:00:00Z'
        mode:
          description: Whether it is a full backup or an increment.
          type: str
          returned: success
          sample: full
        consistency:
          description: Consistency of the point, C(agent), C(memory), C(crash) or C(off). Null in a foreign archive.
          type: str
          returned: success
          sample: agent
        size:
          description: Bytes that this point added to the archive, before compression.
          type: int
          returned: success
          sample: 2147483648
    digest:
      description:
        - Digest of the newest point. If RV(archives[].digest_algorithm) is cryptographic, it covers every byte of the points,
          see O(kvmops.backup.vm_backup#module:digest). Null for archives that this collection did not make.
      type: str
      returned: success
      sample: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    digest_algorithm:
      description: The hash that protects the archive's bytes; null if RV(archives[].digest) is null.
      type: str
      returned: success
      choices: [xxh3-128, sha256, blake2b-256]
      sample: sha256
    verified:
      description:
        - The result of the last M(kvmops.backup.backup_verify) on this host; null if there is none. It has C(time), C(ok),
          C(coverage), the C(points) that the archive had then, the points that were C(lost) to damage, and whether nothing
          was added since (C(current)).
      type: dict
      returned: success
      sample: {time: '2026-11-22T06:00:00Z', ok: true, coverage: full, points: [1795309200], lost: [], current: true}
    config:
      description: The configuration of the chosen point; null if the file cannot be read.
      type: dict
      returned: success
      contains:
        point:
          description: The point that is shown.
          type: int
          returned: success
          sample: 1795309200
        name:
          description: Name of the VM.
          type: str
          returned: success
          sample: web01
        uuid:
          description: UUID of the VM.
          type: str
          returned: success
          sample: 6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11
        memory:
          description: Memory in bytes.
          type: int
          returned: success
          sample: 4294967296
        vcpus:
          description: Virtual CPUs.
          type: int
          returned: success
          sample: 4
        machine:
          description: Machine type.
          type: str
          returned: success
          sample: pc-q35-7.2
        arch:
          description: Architecture.
          type: str
          returned: success
          sample: x86_64
        firmware:
          description: C(bios) or C(efi).
          type: str
          returned: success
          sample: efi
        disks:
          description: The disks.
          type: list
          elements: dict
          returned: success
          contains:
            target:
              description: Target name.
              type: str
              returned: success
              sample: vda
            path:
              description: Former path. A restore without O(kvmops.backup.vm_restore#module:pool) changes it.
              type: str
              returned: success
              sample: /var/lib/libvirt/images/web01.qcow2
            pool:
              description: Former pool, if known.
              type: str
              returned: success
              sample: default
            format:
              description: Image format on the host.
              type: str
              returned: success
              sample: qcow2
            bus:
              description: Bus of the disk.
              type: str
              returned: success
              sample: virtio
            size:
              description: Size in bytes that the guest sees; null if it is not known.
              type: int
              returned: success
              sample: 21474836480
            members:
              description:
                - Names of the files in the archive that hold the disk, the lowest layer first; empty if the disk is not in
                  the archive.
              type: list
              elements: str
              returned: success
              sample: [vda_0.qcow2]
        cds:
          description: The CD drives, each with C(target), C(path) and C(members).
          type: list
          elements: dict
          returned: success
          sample: [{target: sda, path: /srv/iso/debian.iso, members: [0_debian.iso]}]
        nics:
          description: The network interfaces, each with C(mac), C(type), C(source) and C(model).
          type: list
          elements: dict
          returned: success
          sample: [{mac: '52:54:00:12:34:56', type: network, source: default, model: virtio}]
        boot_files:
          description:
            - Files of the host that QEMU loads for the VM, each with C(path), C(kind), and C(member) (null if the file is not in
              the archive).
          type: list
          elements: dict
          returned: success
          sample: [{path: /boot/vmlinuz, kind: kernel, member: 0_vmlinuz.boot}]
        hostdevs:
          description: Host devices passed through to the VM.
          type: list
          elements: str
          returned: success
          sample: []
    snapshots:
      description:
        - The snapshots of the VM at the chosen point, parents first, each with C(name), C(parent) and C(current).
      type: list
      elements: dict
      returned: success
      sample: [{name: before-upgrade, parent: '', current: true}]
    warnings:
      description: Faults of the archive, things that it lacks, and things that were not checked.
      type: list
      elements: str
      returned: success
      sample: ['sdb is not in the archive: LUN disks are passed through and not part of a backup']
matches:
  description: What O(query) selects.
  returned: when O(query) is given
  type: raw
  sample: [/srv/backup/web01_20261122T010000Z_6f1a2b3c.tar]
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

from collections.abc import Mapping
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _operations
from ansible_collections.kvmops.backup.plugins.module_utils._argspec import TARGET, URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._backup.incrementable import Judge
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.info import info
from ansible_collections.kvmops.backup.plugins.module_utils._catalog.request import InfoRequest
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Context
from ansible_collections.kvmops.backup.plugins.module_utils._recovery.recovery import pending
from ansible_collections.kvmops.backup.plugins.module_utils._template.about import AboutTemplate

ARGUMENT_SPEC = {
    **URI,
    **TARGET,
    "archive": {"type": "path"},
    "vm": {"type": "str"},
    "point": {"type": "int"},
    "refresh": {"type": "bool", "default": False},
    "query": {"type": "str"},
}


def _info(params: Mapping[str, Any], context: Context) -> dict[str, Any]:
    uri, thorough = params["uri"], params["refresh"]
    judge, about = Judge(uri, context, thorough=thorough), AboutTemplate(uri, context, thorough=thorough)
    result = info(InfoRequest.of(params), context, judge, about)
    uuids = sorted({each["vm"]["uuid"] for each in result["archives"] if each["vm"]})
    for notice in pending(uri, *uuids, everywhere=True):
        context.warn(notice)
    return result


def main() -> None:
    _operations.register()
    run_module(
        ARGUMENT_SPEC,
        _info,
        libraries=["lxml", "zstandard"],
        libraries_for={"query": "jmespath"},
        mutually_exclusive=[["archive", "pool", "path"]],
    )


if __name__ == "__main__":
    main()
