#!/usr/bin/python
# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: ova_convert
short_description: Convert an OVF package of another product into an archive
version_added: 0.1.0
author:
  - kvmops.backup contributors (@kvmops)
description:
  - Converts a VM in an OVF package, as VMware, VirtualBox and other products export it, into an archive that
    M(kvmops.backup.vm_restore) restores. The package is an OVA, a directory, or the descriptor (C(.ovf)) in a directory.
  - The disks are read inside the OVA and become qcow2 images in the archive in one pass. Nothing is
    unpacked; only files that are compressed with gzip take temporary space.
  - Hardware of other products is replaced by hardware that KVM has, or left out. RV(replaced) and RV(ignored) list all
    changes, and the archive keeps both lists. Check the VM's configuration before its first start.
  - The digests of a manifest are checked while the files are read. A file that differs from the manifest is an error.
  - Scripts, properties and licences in a package are ignored.
  - Packages are not trusted. Malicious packages are refused in bounded memory and time, and no file outside of
    the package is opened.
  - The archive belongs to no VM of this host, so retention never removes it. It has no former places.
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
    details:
      - No change if an archive exists that was made from the same package with the same options. The content of the package
        counts, not its name. Options that only say how the archive is written do not count.
options:
  src:
    description:
      - Path of the package, which is an C(.ova), an C(.ovf), or a directory with one C(.ovf).
    type: path
    required: true
    aliases: [source]
  pool:
    description:
      - Storage pool to write the archive to. Without O(pool) and O(path), it is the directory that holds the package.
    type: str
  path:
    description:
      - Directory to write the archive to.
    type: path
  compress:
    description:
      - Whether to write a compressed archive. If not given, the archive is not compressed, and an existing archive may be
        compressed or not.
    type: bool
  name:
    description:
      - Name of the VM, instead of the name in the package. Required if that name is not valid for a VM.
    type: str
  system:
    description:
      - ID or name of the virtual system, if the package has several.
    type: str
  configuration:
    description:
      - ID of the configuration (deployment option), if the package has any. If not given, it is the package's default.
    type: str
  disk_bus:
    description:
      - Bus of all disks. If not given, IDE disks stay on IDE if the machine type has it, virtio-scsi disks stay on SCSI, and
        other disks are put on SATA, for which a guest needs no special drivers. A guest with virtio drivers is faster with
        V(virtio) or V(scsi).
    type: str
    choices: [sata, scsi, virtio, ide]
  nic_model:
    description:
      - Model of all network cards. If not given, a model is chosen that the guest most likely has a driver for.
    type: str
    choices: [virtio, e1000e, e1000, rtl8139, pcnet]
  networks:
    description:
      - Maps names of networks in the package to names of this host. Names that are not mapped do not change;
        M(kvmops.backup.vm_restore) can map them later.
    type: dict
    default: {}
  firmware:
    description:
      - Firmware of the VM, instead of the firmware that the package names.
    type: str
    choices: [bios, efi]
  machine:
    description:
      - Machine type of the VM. If not given, it is V(q35) for VMs with EFI, and V(pc) for others.
    type: str
    choices: [pc, q35]
seealso:
  - module: kvmops.backup.vm_restore
  - module: kvmops.backup.backup_info
"""

EXAMPLES = r"""
- name: Convert an appliance
  kvmops.backup.ova_convert:
    src: /srv/appliances/router.ova
    pool: backups
    compress: true
    networks:
      VM Network: default
  register: converted

- name: Read what was replaced
  ansible.builtin.debug:
    msg: "{{ converted.replaced }}"

- name: Restore it under another name
  kvmops.backup.vm_restore:
    source: "{{ converted.archive.path }}"
    name: router01
    pool: default

- name: Convert one VM of several, whose guest has virtio drivers
  kvmops.backup.ova_convert:
    src: /srv/appliances/cluster
    system: node1
    path: /srv/backup
    disk_bus: virtio
    nic_model: virtio
"""

RETURN = r"""
archive:
  description: The archive.
  returned: success
  type: dict
  contains:
    path:
      description: Path of the archive. In check mode, the time in the name is the time of the check.
      type: str
      returned: success
      sample: /srv/backup/router_20261122T010000Z_6f1a2b3c.tar.zst
    size:
      description: Size of the archive in bytes; null in check mode.
      type: int
      returned: success
      sample: 973078528
    compressed:
      description: Whether the archive is compressed.
      type: bool
      returned: success
      sample: true
point:
  description: The point in the archive, a Unix time.
  returned: success, when not in check mode
  type: int
  sample: 1795309200
vm:
  description: Name and UUID of the VM in the archive.
  returned: success
  type: dict
  sample: {"name": "router", "uuid": "6f1a2b3c-8d5e-5f90-a1b2-c3d4e5f60718"}
replaced:
  description: The hardware that was replaced, and its replacement.
  returned: success
  type: list
  elements: dict
  sample: [{"from": "Hard disk 1 on lsilogic", "to": "sata disk sda", "note": "needs no drivers that the guest may lack"}]
ignored:
  description: The parts of the package that were ignored, and why.
  returned: success
  type: list
  elements: dict
  sample: [{"item": "vmw:Config tools.syncTimeWithHost", "note": "an option of VMware Tools"}]
estimated_bytes:
  description: Maximum size of the archive; 0 for a compressed one.
  returned: check mode
  type: int
  sample: 2147483648
bytes_written:
  description: Number of bytes written.
  returned: changed, when not in check mode
  type: int
  sample: 973078528
duration:
  description: Seconds that the conversion took.
  returned: changed, when not in check mode
  type: float
  sample: 12.4
what:
  description: The object that the error is about.
  returned: failure
  type: str
  sample: package /srv/appliances/router.ova
why:
  description: The reason for the error.
  returned: failure
  type: str
  sample: disk1.vmdk is not what its manifest says
hint:
  description: What to do about it.
  returned: failure
  type: str
  sample: Copy or download the package again.
cancelled:
  description: Whether the operation was stopped on request.
  returned: failure
  type: bool
  sample: false
"""

from ansible_collections.kvmops.backup.plugins.module_utils._argspec import COMPRESSION, TARGET, URI, run_module
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.convert import convert
from ansible_collections.kvmops.backup.plugins.module_utils._ovf.request import ConvertRequest

ARGUMENT_SPEC = {
    **URI,
    **TARGET,
    **COMPRESSION,
    "src": {"type": "path", "required": True, "aliases": ["source"]},
    "compress": {"type": "bool"},
    "name": {"type": "str"},
    "system": {"type": "str"},
    "configuration": {"type": "str"},
    "disk_bus": {"type": "str", "choices": ["sata", "scsi", "virtio", "ide"]},
    "nic_model": {"type": "str", "choices": ["virtio", "e1000e", "e1000", "rtl8139", "pcnet"]},
    "networks": {"type": "dict", "default": {}},
    "firmware": {"type": "str", "choices": ["bios", "efi"]},
    "machine": {"type": "str", "choices": ["pc", "q35"]},
}


def main() -> None:
    run_module(
        ARGUMENT_SPEC,
        lambda params, context: convert(ConvertRequest.of(params), context),
        libraries=["lxml", "zstandard"],
        mutually_exclusive=[["pool", "path"]],
    )


if __name__ == "__main__":
    main()
