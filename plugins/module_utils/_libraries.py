# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The one place that imports third-party libraries, each when a file that needs it is imported.

Ansible must be able to import every file of the collection without them (documentation, ansible-test, a host that lacks one):
they are None then, and _deps says what to install before anything is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jmespath
    import libvirt
    import libvirt_qemu
    import xxhash
    import zstandard
    from lxml import etree

    isal_zlib: Any

_MODULES = {"etree": "lxml.etree", "isal_zlib": "isal.isal_zlib"}
__all__ = ["etree", "isal_zlib", "jmespath", "libvirt", "libvirt_qemu", "xxhash", "zstandard"]


def __getattr__(name: str) -> Any:
    """A library at its first use: looking into an archive must not wait for libvirt."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    try:
        library = importlib.import_module(_MODULES.get(name, name))
    except ImportError:
        library = None
    globals()[name] = library
    return library
