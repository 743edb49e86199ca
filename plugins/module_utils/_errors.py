# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The one exception family of the collection. Modules turn it into ``fail_json`` in one place (_argspec.run_module)."""

from __future__ import annotations

from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils._text import printable


class KvmopsError(Exception):
    """An error a person can act on: what object, why, and what to do now.

    ``what`` names the object and what failed, ``why`` the reason, ``hint`` the way out (a full sentence).
    """

    def __init__(self, what: str, why: str = "", hint: str = "") -> None:
        self.what, self.why, self.hint = printable(what), printable(why), printable(hint)
        self.values: dict[str, Any] = {}  # what the failed task returns besides: what was done before
        text = f"{self.what}: {self.why}" if why else self.what
        if hint:
            text = f"{text.rstrip('.')}. {self.hint}"
        super().__init__(text)

    def result(self) -> dict[str, Any]:
        """What a module returns that has ended with this error."""
        return {
            **self.values,
            "failed": True,
            "msg": str(self),
            "what": self.what,
            "why": self.why,
            "hint": self.hint,
            "cancelled": isinstance(self, CancelledError),
        }


class RefusedError(KvmopsError):
    """The request cannot be done as asked; nothing has been touched."""


class AttachedError(RefusedError):
    """Disks of the VM are attached to other VMs, so it stays as it is; ``values`` has their names as ``attached_to``."""


class BusyError(KvmopsError):
    """Somebody else is at work on the object; the holder is named."""


class TargetError(KvmopsError):
    """The place to write to is missing, read-only, full, not mounted or not permitted."""


class SourceError(KvmopsError):
    """Bytes of the VM could not be read, or changed while they were read."""


class ArchiveError(KvmopsError):
    """The file is not an archive that can be read, or a request does not fit it."""


class DamagedError(ArchiveError):
    """Bytes of the archive are not what was written; names member, offset and length."""

    def __init__(
        self, what: str, why: str = "", hint: str = "", *, member: str = "", offset: int = 0, length: int = 0
    ) -> None:
        super().__init__(what, why, hint)
        self.member, self.offset, self.length = member, offset, length


class HostileError(ArchiveError):
    """The archive asks for something no honest archive asks for; it is refused whole."""


class QuiesceError(KvmopsError):
    """The guest agent was asked to freeze the file systems and could not; the VM is as it was."""


class SplitViewError(KvmopsError):
    """QEMU, the live and the persistent definition disagree in a way without a written recovery."""


class UnmergedError(KvmopsError):
    """Snapshots could not be merged. They and the VM are as they were: it may be backed up, with one more on top."""


class CancelledError(KvmopsError):
    """The controller or the user asked to stop."""
