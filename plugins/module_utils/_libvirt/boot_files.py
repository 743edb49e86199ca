# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Files of the host that QEMU loads besides disks when it starts a VM: kernel, firmware, ROMs. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree


@dataclass(frozen=True)
class BootFileKind:
    """One place in a definition that names such a file: element, and attribute or "" for its text.

    ``stored``: a backup takes it. ``packaged``: one below /usr comes with the host's packages, and is left to them.
    ``public``: libvirt does not give it to QEMU's user, so that everybody has to be able to read it.
    """

    name: str
    element: str
    attribute: str = ""
    stored: bool = True
    packaged: bool = False
    public: bool = False


KINDS = (
    BootFileKind("kernel", "os/kernel"),
    BootFileKind("initial RAM disk", "os/initrd"),
    BootFileKind("device tree", "os/dtb"),
    BootFileKind("shim", "os/shim"),
    BootFileKind("firmware", "os/loader", packaged=True, public=True),
    BootFileKind("ACPI table", "os/acpi/table", packaged=True),
    BootFileKind("option ROM", "devices/*/rom", "file", packaged=True, public=True),
    BootFileKind("firmware configuration", "sysinfo/entry", "file", stored=False),  # often holds secrets
)


@dataclass(frozen=True)
class BootFile:
    """A file that a definition names; ``problem``: why it cannot be stored, "" if it can."""

    path: str
    kind: BootFileKind
    problem: str = ""


@dataclass(frozen=True)
class Named:
    """Where a definition names a file."""

    element: etree._Element
    kind: BootFileKind

    @property
    def path(self) -> str:
        """The file; "" where the element names none."""
        name = self.element.get(self.kind.attribute) if self.kind.attribute else self.element.text
        return (name or "").strip()

    def point_to(self, path: str) -> None:
        """Name another file."""
        if self.kind.attribute:
            self.element.set(self.kind.attribute, path)
        else:
            self.element.text = path


def named(root: etree._Element) -> Iterator[Named]:
    """Every such file that a <domain> names by an absolute path; firmware only where it is not libvirt's to choose."""
    chosen = root.find("os[@firmware]") is not None
    for kind in KINDS:
        for element in root.findall(kind.element):
            found = Named(element, kind)
            if found.path.startswith("/") and not (chosen and kind.element == "os/loader"):
                yield found
