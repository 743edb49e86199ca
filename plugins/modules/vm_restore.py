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
  - Puts a virtual machine back from an archive of M(kvmops.backup.vm_backup), or from a foreign C(.tar) or
    C(.tar.zst) of qcow2 images and a libvirt domain XML. A bare domain C(.xml) becomes a VM without disks.
  - Of an OVF package (C(.ova), C(.ovf)) it makes what M(kvmops.backup.ova_convert) and a restore would make of it, without
    an archive in between.
  - The snapshots of the point come back with it, internal and external, with and without memory, and can be reverted
    to with M(kvmops.backup.vm_snapshot).
  - Every byte is checked against its digest while it is written (foreign archives carry none). A damaged point never
    becomes a VM, and a failed restore leaves nothing behind.
  - A template comes back as a template. A thin clone is put on the template of this host whose disks have the content
    that it was made on, whatever its name and place. It is refused if there is no template, if the template differs, or
    if its disks do not correspond.
  - Everything that the host lacks (pool, network or bridge, machine type, CPU, firmware, emulator, space) is named
    before the first byte is written.
  - Not done over a VM whose disks are attached to other VMs (M(kvmops.backup.vdisk_cross_attach)).
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
      - No change if the VM exists and was restored from that point. One that has gone on since is only taken back with
        O(force) and while it is off; otherwise a warning says so.
options:
  source:
    description:
      - Path on the host of the archive, of an OVF package (C(.ova), C(.ovf)), or of a libvirt domain C(.xml).
      - Packages, and archives that were converted from one, have no former paths. Files of an C(.ovf) are only taken from
        the directory that it is in.
    type: path
    required: true
    aliases: [src]
  point:
    description:
      - The point to restore, as RV(kvmops.backup.backup_info#module:archives[].points[].point) names it.
      - The newest one if not given.
    type: int
  pool:
    description:
      - Storage pool to restore all disks to.
      - Without O(pool) and O(path), disks go to their former paths. Where the former pool is gone, read-only or too
        full, its disks go together to the place that holds the archive.
    type: str
  path:
    description:
      - Directory to restore all disks to. It must exist. See O(pool).
    type: path
  name:
    description:
      - Name of the restored VM. The VM's own if not given.
    type: str
  uuid:
    description:
      - UUID of the restored VM. V(keep), V(new) or a UUID.
      - If not given, it is kept, but new when O(name) is new or the original still exists.
    type: str
  mac:
    description:
      - MAC addresses of the restored VM.
      - If not given, they are kept, but new when O(name) is new or the original still exists.
    type: str
    choices: [keep, new]
  networks:
    description:
      - Names of networks and bridges in the archive, and those of this host to use instead.
    type: dict
    default: {}
  disk_images:
    description:
      - Only for foreign archives, where neither names nor formats tell which image belongs to which disk; nothing is
        restored then until this option says it. The error lists the images with their format and size.
      - Target names of disks (V(vda)) and the names of their images in the archive. An empty name leaves the disk out.
      - Disks that are not named here are told by their names as always.
    type: dict
    default: {}
  disks:
    description:
      - Only for an C(.ovf). If V(false), the VM is defined without any disk, whether the files are there or not.
    type: bool
    default: true
  system:
    description:
      - Only for packages. Id or name of the virtual system, where there are several.
    type: str
  configuration:
    description:
      - Only for packages. Id of the configuration (deployment option). The package's default if not given.
    type: str
  disk_format:
    description:
      - V(keep) restores each disk in the format it had, raw disks as sparse raw files. V(qcow2) makes all of them
        qcow2. Layers of snapshots are qcow2 in any case.
    type: str
    choices: [keep, qcow2]
    default: keep
  flatten:
    description:
      - Whether to make one standalone image of each disk, as it was at the point, and to leave all snapshots out.
      - If V(false), every snapshot of the point is restored and can be reverted to; one with a memory image resumes
        the guest. The disks of the VM are then fresh overlays where a snapshot holds the layer below.
      - Takes the space of the layers twice while it runs. Of a thin clone, the image holds what it needs of its template.
    type: bool
    default: false
  start:
    description:
      - Whether to start the VM once it is restored.
    type: bool
    default: false
  start_reduced:
    description:
      - Whether O(start) starts the VM also where something of its definition was left out because the archive is not
        ours to trust (see O(trust)). Otherwise such a restore is refused before anything is written.
    type: bool
    default: false
  trust:
    description:
      - Whether to take the source as ours although it is a foreign archive, a Domain XML, or an archive that another user
        of the host can have written.
      - What is ours to trust may use what its definition names on the host. From other sources only what is on a list of
        harmless elements and attributes comes along, and nothing that names a file, device or socket of the host; the
        rest is in RV(skipped_devices). The page C(docs/SECURITY.md) of the collection has the rules.
      - An archive is ours if it was made by this collection, belongs to root or to the user who runs, no other can write
        to it, and this holds for every directory on the way to it (sticky ones may be written to by all). Users whose
        archives count as ours in a place of their own, as on NFS with C(root_squash), are set on the host with
        C(hypervisor_trusted_owners) of the role P(kvmops.backup.hypervisor#role).
      - Also whether to restore into a directory in which every user of the host may replace files; without it that is refused.
    type: bool
    default: false
  force:
    description:
      - Whether to replace an existing VM of that name or UUID, and existing files. The old ones stay as they are
        until the new ones are complete and durable.
      - A running VM and a VM with a managed-save image are never replaced.
    type: bool
    default: false
  repair:
    description:
      - Whether to restore images that QEMU had marked as corrupt before they were backed up. The restored copy is repaired
        with C(qemu-img check -r all), never the archive; RV(repaired) and warnings say what was mended. What the guest has
        in such an image may be damaged all the same.
      - Without it such an image is refused. One that was only not closed (reference counts that are written late) is
        repaired in any case, as QEMU itself does.
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
      description: Its name.
      type: str
      returned: success
      sample: web01
    uuid:
      description: Its UUID.
      type: str
      returned: success
      sample: 6f1a2b3c-9d43-4c43-9b1e-0f5b9a9c7d11
point:
  description: The point that was restored.
  returned: success
  type: int
  sample: 1795309200
disks:
  description: The restored disks, and CD images where they had to be restored.
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
      description: Why it was left out.
      type: str
      returned: success
      sample: the LUN is not present on this host
replaced:
  description: What of another product's hardware was replaced. Empty for archives of VMs of libvirt.
  returned: success
  type: list
  elements: dict
  sample: [{"from": "Hard disk 1 on lsilogic", "to": "sata disk sda", "note": "needs no drivers that the guest may lack"}]
ignored:
  description: What of another product's package was ignored.
  returned: success
  type: list
  elements: dict
  sample: [{"item": "vmw:Config tools.syncTimeWithHost", "note": "an option of VMware Tools"}]
repaired:
  description: Images of which the restored copy was repaired (O(repair)), and how many faults were mended.
  returned: success
  type: list
  elements: dict
  sample: [{target: vda, path: /var/lib/libvirt/images/web01.qcow2, corruptions: 2, leaks: 1}]
bytes_written:
  description: Bytes written to disks; blocks shared with the archive through reflinks are not counted.
  returned: success
  type: int
  sample: 2147483648
estimated_bytes:
  description: Space that the restored files may need at most, the base of the check for free space.
  returned: success
  type: int
  sample: 2147483648
duration:
  description: Seconds that the restore took.
  returned: success
  type: float
  sample: 2.31
attached_to:
  description: Names of the VMs that have disks of this one (M(kvmops.backup.vdisk_cross_attach)), where that is the reason.
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
  description: The reason of the error.
  returned: failure
  type: str
  sample: it is protected
hint:
  description: What to do now.
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
