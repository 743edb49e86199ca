# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  uri:
    description:
      - The libvirt connection on the host that the module runs on. A connection to another host, such as
        C(qemu+ssh://kvm02/system), is refused, because the files of that host's VMs are not on this host.
      - To change VMs of C(qemu:///system), the module must run as root (C(become)), so that all runs see each other's locks and
        journals.
    type: str
    default: qemu:///system
requirements:
  - Python bindings of libvirt (C(python3-libvirt), on SUSE C(python3-libvirt-python))
"""
