# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Names of files as the kernel takes them, and with it QEMU: ``link/..`` is the directory above what the link leads to.

So no name of a file that QEMU may open is shortened by its letters (os.path.normpath, os.path.abspath): here is what to use.
And no file counts as missing because it cannot be looked at, as os.path.exists and its like would have it.
"""

from __future__ import annotations

import errno
import os

from ansible_collections.kvmops.backup.plugins.module_utils._errors import SourceError

_MAX_LINKS = 40  # as the kernel
_SHUT_OUT = "This user is not let in: run the task as root, and let root in on the storage (NFS: no_root_squash, FUSE: allow_root)."
_GONE = "Its storage has gone away: mount it again."
_WAYS_OUT = {
    errno.EACCES: _SHUT_OUT,
    errno.EPERM: _SHUT_OUT,
    errno.ESTALE: _GONE,
    errno.ENOTCONN: _GONE,
    errno.EHOSTDOWN: _GONE,
    errno.ETIMEDOUT: _GONE,
    errno.EIO: "The kernel's log says more: journalctl -k.",
}


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


def is_there(path: str, *, follow: bool = True) -> bool:
    """Whether there is a file (with ``follow``: not only a link). Raises SourceError where that cannot be told."""
    why = why_unseen(path, follow=follow)
    if why:
        raise SourceError(f"The file {path}", why)
    try:
        os.stat(path, follow_symlinks=follow)
    except OSError:
        return False
    return True


def why_unseen(path: str, *, follow: bool = True) -> str:
    """Why nobody here can tell whether there is a file, with what to do; "" where that can be told."""
    try:
        os.stat(path, follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        code = error.errno or errno.EIO
        hint = _WAYS_OUT.get(code, "Look at the storage that it is on.")
        return f"it cannot be looked at ({os.strerror(code)}). {hint}"
    return ""
