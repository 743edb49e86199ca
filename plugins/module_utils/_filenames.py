# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Names of files as the kernel takes them, and with it QEMU: ``link/..`` is the directory above what the link leads to.

So no name of a file that QEMU may open is shortened by its letters (os.path.normpath, os.path.abspath): here is what to use.
"""

from __future__ import annotations

import os

_MAX_LINKS = 40  # as the kernel


def real(path: str) -> str:
    """The one name that two spellings of a file share; "" for ""."""
    return os.path.realpath(path) if path else ""


def tidy(path: str) -> str:
    """An absolute name without doubled slashes; ``..`` stays in it. Pure."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def absolute(path: str) -> str:
    """The same file by a tidy name without ``..`` and current directory. Links stay in it where no ``..`` is."""
    full = os.path.join(os.getcwd(), path)
    return os.path.realpath(full) if ".." in full.split("/") else tidy(full)


def beside(image: str, name: str) -> str:
    """The file that QEMU opens when an image names another one, as a backing file."""
    return os.path.join(os.path.dirname(image), name)


def canonical(path: str) -> str:
    """The entry of a real directory that a name stands for; a link there is not followed."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def spellings(path: str) -> frozenset[str]:
    """A name, every link that it leads over, and the file in the end: what must stay for the name to mean that file."""
    found: set[str] = set()
    here = canonical(path)
    while here not in found and len(found) < _MAX_LINKS:
        found.add(here)
        try:
            here = canonical(beside(here, os.readlink(here)))
        except OSError:
            break  # no link
    return frozenset(found | {path, os.path.realpath(path)})
