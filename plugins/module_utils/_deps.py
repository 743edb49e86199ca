# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The libraries that the modules need on the host, and what to install where one is missing."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterable
from dataclasses import dataclass

from ansible.module_utils.basic import missing_required_lib


@dataclass(frozen=True)
class Library:
    """A third-party Python library: what is imported, and the packages that hold it (Debian and Ubuntu, RHEL, SUSE)."""

    module: str
    debian: str
    rhel: str
    suse: str


LIBRARIES = {
    library.module: library
    for library in (
        Library("libvirt", "python3-libvirt", "python3-libvirt", "python3-libvirt-python"),
        Library("lxml", "python3-lxml", "python3-lxml", "python3-lxml"),
        Library("zstandard", "python3-zstandard", "python3-zstandard (EPEL)", "python3-zstandard"),
        Library("jmespath", "python3-jmespath", "python3-jmespath", "python3-jmespath"),
    )
}


@dataclass(frozen=True)
class Missing:
    """A library that cannot be imported: the message for the user, and the traceback of the import."""

    message: str
    traceback: str


def first_missing(modules: Iterable[str]) -> Missing | None:
    """The first of the libraries that the module's interpreter cannot import; None where it can import all."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            library = LIBRARIES[module]
            reason = (
                f"by this collection (Debian, Ubuntu: {library.debian}; RHEL: {library.rhel}; SUSE: {library.suse}; "
                "the role kvmops.backup.hypervisor installs it)"
            )
            return Missing(missing_required_lib(module, reason=reason), traceback.format_exc())
    return None
