# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Warnings as values: a code for the code, a text for people.

A notice is made where the fault is found, carried by plans and outcomes, and told by `Context.warn`. Code that has to know which
warning it has asks for the notice's code. The text is for reading only; it becomes Ansible's in `_argspec`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, unique


@unique
class Code(str, Enum):
    """The kinds of warnings, each with what it says. A code never gets another meaning."""

    # what an archive or a restored VM does not have
    LEFT_OUT = "left-out"  # A disk, device, file or system is not taken over.
    LOWER_CONSISTENCY = "lower-consistency"  # The disks are less consistent than a guest agent would have made them.
    NOT_AS_DEFINED = "not-as-defined"  # The running VM differs from its persistent definition.
    KEY_NOT_STORED = "key-not-stored"  # Something is encrypted, and its key is not part of the backup.
    SECRETS_STORED = "secrets-stored"  # The archive may hold passwords.
    IMAGE_CORRUPT = "image-corrupt"  # QEMU has marked an image as corrupt.
    IMAGE_NOT_CLOSED = "image-not-closed"  # QEMU did not close an image; its reference counts are renewed later.
    RECORDED = "recorded"  # A warning that an archive has kept from the run that made it.
    # the VM and its snapshots
    GUEST_STOPPED = "guest-stopped"  # The guest stands still after an I/O error.
    SNAPSHOT_STAYS = "snapshot-stays"  # The VM has a snapshot that a backup made, and keeps it.
    LAYERS_STAY = "layers-stay"  # Layers or disks of removed or reverted snapshots stay.
    MANY_LAYERS = "many-layers"  # A disk stands on so many layers that the VM may not start.
    UNMERGED = "unmerged"  # Snapshots of earlier backups are still to be merged.
    NO_INCREMENT = "no-increment"  # No increment can be added to the archive.
    READ_AGAIN = "read-again"  # The next increment reads frozen files again.
    OTHERS_DISK = "others-disk"  # The content of another VM's disk goes into the archive.
    TEMPLATE_IN_USE = "template-in-use"  # A template runs, or its clones stand on other content than it has now.
    # places and archives
    SPACE = "space"  # There may be too little space.
    WEAK_FILE_SYSTEM = "weak-file-system"  # The file system of a place lacks something that protects archives.
    ONE_HOST_ONLY = "one-host-only"  # Backups at work are counted on this host only.
    NOT_MOUNTED = "not-mounted"  # A place is empty, and what belongs there is not mounted.
    FOREIGN = "foreign"  # An archive is not trusted to be made by this collection.
    NOTHING_FOUND = "nothing-found"  # There is no archive, or no attached disk, of the kind that was asked for.
    NOT_LOOKED_AT = "not-looked-at"  # An archive or VM could not be looked at, and is left out or judged by its name.
    NOT_COVERED = "not-covered"  # A verification does not say anything about part of an archive.
    NOT_REMOVED = "not-removed"  # Archives that should have been removed stay.
    REMOVED = "removed"  # Archives were removed before the run failed.
    NO_NOTES = "no-notes"  # The notes of an archive could not be written.
    MATCHED_BY_GUESS = "matched-by-guess"  # The image of a disk was chosen without proof.
    UNDECIDED = "undecided"  # Nothing tells which image of an archive is which disk's.
    # a restored VM on its host
    OTHER_PLACE = "other-place"  # The disks go elsewhere than they were.
    REACHES_HOST = "reaches-host"  # The VM reaches something of the host.
    CHANGED = "changed"  # The definition had to be changed for this host, or for a copy.
    FROM_HOST = "from-host"  # A file of the host is used, or replaced, by one of the same name.
    FIRMWARE_STATE = "firmware-state"  # The archive does not hold the state of the firmware or the TPM.
    GONE_ON = "gone-on"  # A restored VM has gone on since, and stays as it is.
    FILES_STAY = "files-stay"  # Files of the replaced VM, or of the archive, stay where they are.
    NO_BACKUP = "no-backup"  # The restored VM cannot be backed up as it is.
    REPAIRED = "repaired"  # A corrupt image is repaired.
    SAME_NETWORK = "same-network"  # A copy has the MAC addresses of its original.
    # packages of other products
    ODD_PACKAGE = "odd-package"  # A package contradicts itself or lacks something; the text says what was taken instead.
    OTHER_HARDWARE = "other-hardware"  # The guest finds other hardware than it had.
    # runs before this one
    PUT_RIGHT = "put-right"  # What a dead run left was put right.
    TO_PUT_RIGHT = "to-put-right"  # What a dead run left will be put right by the next change.
    CANNOT_PUT_RIGHT = "cannot-put-right"  # What a dead run left cannot be put right now.
    LEASE_OVER = "lease-over"  # A disk is attached for longer than it was to be.


@dataclass(frozen=True)
class Notice:
    """One warning. `text`: a clause or sentence that names its object, says why and, where there is one, the way out."""

    code: Code
    text: str

    def __str__(self) -> str:
        return self.text

    def about(self, what: str) -> Notice:
        """The same of an object that the text leaves open."""
        return Notice(self.code, f"{what}: {self.text}")


#: What a notice is told to: `Context.warn`, as a rule.
Warn = Callable[[Notice], None]
