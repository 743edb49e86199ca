#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_restore
short_description: Restore a virtual machine from an archive
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Restores a virtual machine from an archive of M(kvmops.backup.vm_backup), or from a foreign C(.tar) or
    C(.tar.zst) of qcow2 images and a libvirt domain XML. A bare domain C(.xml) becomes a VM without disks.
  - Restores an OVF package (C(.ova), C(.ovf)) directly, with the same result as M(kvmops.backup.ova_convert) and a restore
    of its archive.
  - Restores the snapshots of the point too, internal and external, with and without memory. M(kvmops.backup.vm_snapshot)
    can revert to them.
  - Every byte is checked against its digest while it is written (foreign archives have no digests). A damaged point never
    becomes a VM, and a failed restore leaves nothing behind.
  - A template is restored as a template. A thin clone is put on the template of this host whose disks have the content
    that the clone stood on, whatever the template's name and place. The restore is refused if there is no template, if the
    template differs, or if its disks do not correspond.
  - Before the first byte is written, the module names everything that the host lacks (pool, network or bridge, machine type,
    CPU, firmware, emulator, space).
  - Refused over a VM whose disks are attached to other VMs (M(kvmops.backup.vdisk_cross_attach)).
extends_documentation_fragment:
  - kvmops.backup._attributes
  - kvmops.backup._attributes.progress
  - kvmops.backup._archive
  - kvmops.backup._libvirt
attributes:
  check_mode:
    support: full
    details:
      - Predicts name, UUID and the path of every disk.
  diff_mode:
    support: full
    details:
      - Shows the configuration of the VM before and after.
  idempotent:
    support: full
    details:
      - No change if the VM exists and was restored from that point. A VM that has changed since is restored again only with
        O(force) and while it is off; otherwise a warning says so.
options:
  source:
    description:
      - Path on the host of the archive, of an OVF package (C(.ova), C(.ovf)), or of a libvirt domain C(.xml).
      - Packages, and archives that were converted from packages, have no former paths. The files of an C(.ovf) are only read
        from its own directory.
    type: path
    required: true
    aliases: [src]
  point:
    description:
      - The point to restore, as in RV(kvmops.backup.backup_info#module:archives[].points[].point).
      - If not given, it is the newest point.
    type: int
  pool:
    description:
      - Storage pool to restore all disks to.
      - Without O(pool) and O(path), disks go to their former paths. If the former pool does not exist, is read-only or is too
        full, its disks go together to the place that holds the archive.
    type: str
  path:
    description:
      - Directory to restore all disks to. It must exist. See O(pool).
    type: path
  name:
    description:
      - Name of the restored VM. If not given, it is the VM's own name.
    type: str
  uuid:
    description:
      - UUID of the restored VM. V(keep), V(new) or a UUID.
      - If not given, the UUID is kept, unless O(name) is new or the original still exists.
    type: str
  mac:
    description:
      - MAC addresses of the restored VM.
      - If not given, they are kept, unless O(name) is new or the original still exists.
    type: str
    choices: [keep, new]
  networks:
    description:
      - Maps names of networks and bridges in the archive to names of this host.
    type: dict
    default: {}
  disk_images:
    description:
      - Only for foreign archives. Required if neither names nor formats show which image belongs to which disk; the error lists
        the images with their format and size.
      - Maps target names of disks (V(vda)) to the names of their images in the archive. An empty name leaves the disk out.
      - The images of all other disks are found by their names.
    type: dict
    default: {}
  disks:
    description:
      - Only for an C(.ovf). If V(false), the VM is defined without any disk, whether the files exist or not.
    type: bool
    default: true
  system:
    description:
      - Only for packages. ID or name of the virtual system, if there are several.
    type: str
  configuration:
    description:
      - Only for packages. ID of the configuration (deployment option). If not given, it is the package's default.
    type: str
  disk_format:
    description:
      - V(keep) restores each disk in its former format, raw disks as sparse raw files. V(qcow2) restores all disks as
        qcow2. Layers of snapshots are always qcow2.
    type: str
    choices: [keep, qcow2]
    default: keep
  flatten:
    description:
      - Whether to make one standalone image of each disk, as it was at the point, and to leave all snapshots out.
      - If V(false), every snapshot of the point is restored and can be reverted to; a snapshot with a memory image resumes
        the guest. If a snapshot holds a disk's top layer, the VM gets a new overlay above it.
      - Needs twice the space of the layers during the restore. The image of a thin clone includes the data that it needs from
        the template.
    type: bool
    default: false
  start:
    description:
      - Whether to start the VM once it is restored.
    type: bool
    default: false
  start_reduced:
    description:
      - Whether O(start) starts the VM even if a part of its definition was left out because the archive is not trusted (see
        O(trust)). Otherwise such a restore is refused before anything is written.
    type: bool
    default: false
  trust:
    description:
      - Whether to trust the source although it is a foreign archive, a Domain XML, or an archive that another user
        of the host can have written.
      - A trusted source may use everything that its definition names on the host. From other sources, only a list of
        harmless elements and attributes is restored, and nothing that names a file, device or socket of the host.
        RV(skipped_devices) lists the rest. The page C(docs/SECURITY.md) of the collection has the rules.
      - An archive is trusted if this collection made it, it belongs to root or to the user who runs the module, no other user
        can write to it, and the same holds for every directory on the path (sticky directories may be world-writable). To
        declare users whose archives are trusted in a place, as on NFS with C(root_squash), set
        C(hypervisor_trusted_owners) of the role P(kvmops.backup.hypervisor#role).
      - Also whether to restore to a directory in which every user of the host may replace files. Otherwise this is refused.
    type: bool
    default: false
  force:
    description:
      - Whether to replace an existing VM of that name or UUID, and existing files. The old files do not change
        until the new files are complete and durable.
      - A running VM and a VM with a managed-save image are never replaced.
    type: bool
    default: false
  repair:
    description:
      - Whether to restore images that QEMU had marked as corrupt before the backup. C(qemu-img check -r all) repairs the
        restored copy, never the archive. RV(repaired) and warnings say what was repaired. The guest's data in such an image
        may still be damaged.
      - Without this option, such an image is refused. An image that was merely not closed (C(lazy_refcounts)) is always
        repaired, as QEMU itself does.
    type: bool
    default: false
seealso:
  - module: kvmops.backup.ova_convert
  - module: kvmops.backup.vm_backup
  - module: kvmops.backup.backup_info
  - module: kvmops.backup.vm_snapshot
"""

EXAMPLES = r"""
- name: An archive of another tool, whose image names tell nothing
  kvmops.backup.vm_restore:
    source: /srv/old/web01.tar
    disk_images:
      vda: disk-0.qcow2
      vdb: disk-1.qcow2

- name: Put a lost VM back where it was
  kvmops.backup.vm_restore:
    source: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar

- name: A copy beside the original, on another network
  kvmops.backup.vm_restore:
    source: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar
    name: web01-test
    pool: scratch
    networks:
      default: isolated
    start: true

- name: Replace the VM by an older point
  kvmops.backup.vm_restore:
    source: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar
    point: 1795309200
    force: true

- name: A copy without snapshots, one image per disk
  kvmops.backup.vm_restore:
    source: /srv/backup/web01_20261122T010000Z_6f1a2b3c.tar
    name: web01-plain
    flatten: true
"""

RETURN = r"""
vm:
  description: The restored VM.
  returned: success
  type: dict
  contains:
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
point:
  description: The point that was restored.
  returned: success
  type: int
  sample: 1795309200
disks:
  description: The restored disks, and the CD images that had to be restored.
  returned: success
  type: list
  elements: dict
  contains:
    target:
      description: Target name of the device.
      type: str
      returned: success
      sample: vda
    path:
      description: Path on the host.
      type: str
      returned: success
      sample: /var/lib/libvirt/images/web01.qcow2
    format:
      description: Image format.
      type: str
      returned: success
      sample: qcow2
snapshots:
  description: Names of the snapshots that the restored VM has.
  returned: success
  type: list
  elements: str
  sample: [before-upgrade]
skipped_devices:
  description: Devices that the restored VM does not have.
  returned: success
  type: list
  elements: dict
  contains:
    device:
      description: Target name or description of the device.
      type: str
      returned: success
      sample: sdb
    reason:
      description: Why the device was left out.
      type: str
      returned: success
      sample: the LUN is not present on this host
replaced:
  description: Hardware of another product that was replaced. Empty for archives of libvirt VMs.
  returned: success
  type: list
  elements: dict
  sample: [{"from": "Hard disk 1 on lsilogic", "to": "sata disk sda", "note": "needs no drivers that the guest may lack"}]
ignored:
  description: Parts of another product's package that were ignored.
  returned: success
  type: list
  elements: dict
  sample: [{"item": "vmw:Config tools.syncTimeWithHost", "note": "an option of VMware Tools"}]
repaired:
  description: Images whose restored copy was repaired (O(repair)), and the number of repaired faults.
  returned: success
  type: list
  elements: dict
  sample: [{target: vda, path: /var/lib/libvirt/images/web01.qcow2, corruptions: 2, leaks: 1}]
bytes_written:
  description: Bytes written to disks. Blocks shared with the archive through reflinks are not counted.
  returned: success
  type: int
  sample: 2147483648
estimated_bytes:
  description: Maximum space that the restored files need. The check for free space uses it.
  returned: success
  type: int
  sample: 2147483648
duration:
  description: Seconds that the restore took.
  returned: success
  type: float
  sample: 2.31
attached_to:
  description: Names of the receivers of this VM's disks (M(kvmops.backup.vdisk_cross_attach)), if these caused the error.
  returned: failure
  type: list
  elements: str
  sample: [appliance]
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

from ansible_collections.kvmops.backup.plugins.module_utils import _operations
from ansible_collections.kvmops.backup.plugins.module_utils._argspec import TARGET, URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import from_params
from ansible_collections.kvmops.backup.plugins.module_utils._restore.run import restore

ARGUMENT_SPEC = {
    **URI,
    **TARGET,
    "source": {"type": "path", "required": True, "aliases": ["src"]},
    "point": {"type": "int"},
    "name": {"type": "str"},
    "uuid": {"type": "str"},
    "mac": {"type": "str", "choices": ["keep", "new"]},
    "networks": {"type": "dict", "default": {}},
    "disk_images": {"type": "dict", "default": {}},
    "disks": {"type": "bool", "default": True},
    "system": {"type": "str"},
    "configuration": {"type": "str"},
    "disk_format": {"type": "str", "choices": ["keep", "qcow2"], "default": "keep"},
    "flatten": {"type": "bool", "default": False},
    "start": {"type": "bool", "default": False},
    "start_reduced": {"type": "bool", "default": False},
    "trust": {"type": "bool", "default": False},
    "force": {"type": "bool", "default": False},
    "repair": {"type": "bool", "default": False},
}


def main() -> None:
    _operations.register()
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: restore(from_params(params), context),
        libraries=["libvirt", "lxml", "zstandard"],
        mutually_exclusive=[["pool", "path"]],
    )


if __name__ == "__main__":
    main()
