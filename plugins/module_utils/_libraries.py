# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The one place that imports third-party libraries.

Ansible must be able to import every file of the collection without them (documentation, ansible-test, a host that lacks one):
they are None then, and _deps says what to install before anything is called.
"""

from __future__ import annotations

__all__ = ["etree", "jmespath", "libvirt", "libvirt_qemu", "zstandard"]

try:
    from lxml import etree
except ImportError:
    etree = None  # type: ignore[assignment]

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

try:
    import libvirt
    import libvirt_qemu
except ImportError:
    libvirt = libvirt_qemu = None

try:
    import jmespath
except ImportError:
    jmespath = None
