# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What people take for a package, told by its name or first bytes: what it is, and the way to a package. Pure."""

from __future__ import annotations

from collections.abc import Iterable

#: For a path that leads nowhere, such as a URL.
NOT_HERE = "The path is one on the managed host. Copy or download the package there first (ansible.builtin.copy, get_url)."
_VMWARE = "Export the VM as an OVA, in VMware's menu or with 'ovftool VM.vmx VM.ova'."
_VIRTUALBOX = "Export the VM as an OVA: 'VBoxManage export VM -o VM.ova'."
_DISK = "Name the .ovf or .ova that it belongs to."
_HYPER_V = "Hyper-V exports no OVF. Copy its VHDX, and write an .ovf for it or define a VM with it."
_BY_SUFFIX = {
    ".vmx": ("the configuration of a VMware VM", _VMWARE),
    ".vmtx": ("the configuration of a VMware template", _VMWARE),
    ".vbox": ("the configuration of a VirtualBox VM", _VIRTUALBOX),
    ".vmdk": ("a disk without its VM", _DISK),
    ".vdi": ("a disk of VirtualBox", _VIRTUALBOX),
    ".vhd": ("a disk without its VM", _DISK),
    ".vhdx": ("a disk without its VM", _DISK),
    ".qcow2": ("a disk without its VM", _DISK),
    ".vmcx": ("the configuration of a Hyper-V VM", _HYPER_V),
    ".xva": ("an export of XenServer in its own format", "Export the VM as OVF/OVA."),
    ".mf": ("the manifest of a package", "Name the .ovf beside it."),
}
_BY_BYTES = (
    (b"PK\3\4", "a ZIP archive", "Unpack it, and name the .ova or .ovf in it."),
    (b"KDMV", *_BY_SUFFIX[".vmdk"]),
    (b"vhdxfile", *_BY_SUFFIX[".vhdx"]),
    (b"QFI\xfb", *_BY_SUFFIX[".qcow2"]),
    (b"<", "an XML or HTML document", "A descriptor has the suffix .ovf. A download may have failed with a page of HTML."),
)
#: Directories of a Hyper-V export.
_DIRECTORIES = ("virtual machines", "virtual hard disks")


def file(path: str, head: bytes) -> tuple[str, str] | None:
    """What a file is that is no package, and the way out; None where nobody knows."""
    name = path.lower()
    if name.endswith(".ova"):
        found = next((row for row in _BY_BYTES if head.startswith(row[0])), None)
        return None if found is None else (found[1], found[2])
    return next((known for suffix, known in _BY_SUFFIX.items() if name.endswith(suffix)), None)


def listed(names: Iterable[str]) -> tuple[str, str] | None:
    """The same for the names of what is there instead of a descriptor."""
    for name in sorted(names):
        if name.lower() in _DIRECTORIES:
            return f"{name}: the export of a Hyper-V VM", _HYPER_V
        for suffix, (what, hint) in _BY_SUFFIX.items():
            if name.lower().endswith(suffix) and hint != _DISK and suffix != ".mf":
                return f"{name}: {what}", hint
    return None
