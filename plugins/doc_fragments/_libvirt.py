# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  uri:
    description:
      - The libvirt connection on the host that the module runs on. Another host's, such as C(qemu+ssh://kvm02/system), is refused,
        as the files of its VMs are not here.
      - VMs of C(qemu:///system) are changed as root only (C(become)), so that every run finds the locks and journals of the others.
    type: str
    default: qemu:///system
requirements:
  - Python bindings of libvirt (C(python3-libvirt), on SUSE C(python3-libvirt-python))
"""
