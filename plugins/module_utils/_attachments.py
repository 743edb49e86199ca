# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which disks of a VM are attached to other VMs, as this host remembers it: ``<state>/attached/<uuid of the source>.json``.

A record is there before anything is attached, and goes when nothing is any more. Whoever writes holds the lock ``vm-<uuid>``.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid as uuids
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _files, _json, _paths, _state_file
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._ownership import Ownership

SNAPSHOT = "vdisks_attached_to_another_domains"
DESCRIPTION = (
    "Made by kvmops.backup: disks of this VM, as they were then, are attached to other VMs. It goes with the last detach "
    "(kvmops.backup.vdisk_cross_attach with state: detached)."
)
# 20 characters are all that virtio hands on, so all of it is seen in /dev/disk/by-id
_SERIAL = re.compile(r"kvmops[0-9a-f]{14}")


@dataclass(frozen=True)
class Attachment:
    """One disk of the source at one receiver.

    `target`, `path`: of the disk in its own VM, the path as it is without the snapshot. `attached_path`: what is attached.
    `receiver_target`, `serial`: in the receiver. `moment`: unix time of what it shows. `lease_until` 0: for as long as
    nobody detaches it. `leaving`: a detach has begun. `template`: name of the template that the source is a thin clone of;
    `template_names`: id and path of the template's disk below this one.
    """

    disk_id: str
    target: str
    path: str
    attached_path: str
    format: str
    size_bytes: int
    pool: str
    receiver_uuid: str
    receiver_name: str
    receiver_target: str
    serial: str
    moment: int
    consistency: str
    lease_until: int = 0
    leaving: bool = False
    template: str = ""
    template_names: tuple[str, ...] = ()

    def expired(self, now: float) -> bool:
        """Whether it was attached for a time that is over."""
        return 0 < self.lease_until < now


@dataclass(frozen=True)
class ZfsClone:
    """A ZFS dataset with disks of the source: its snapshot, the clone of that, and where both datasets are mounted.

    `mounted` "": the clone is still to be made. `stays`: a user has detached the clone by its own name.
    """

    snapshot: str
    clone: str
    mount_point: str
    mounted: str = ""
    stays: bool = False


@dataclass(frozen=True)
class Record:
    """What is attached of one VM.

    `snapshot`: name of the snapshot that freezes its disks, "" where none does; `created`: its unix time, 0 until it is
    known to be there. `owners`: who may use the attached files when nothing of this is there, by path. `zfs`: in the place of
    the snapshot, for disks on ZFS.
    """

    source_uuid: str
    source_name: str
    snapshot: str = ""
    created: int = 0
    consistency: str = ""
    attachments: tuple[Attachment, ...] = ()
    owners: Mapping[str, Ownership] = field(default_factory=dict)
    zfs: tuple[ZfsClone, ...] = ()

    @property
    def is_frozen(self) -> bool:
        """Whether there is something to attach from, and to remove after the last detach."""
        return bool(self.snapshot or self.zfs)

    @property
    def frozen_by(self) -> str:
        """The snapshots, for messages."""
        return self.snapshot or ", ".join(each.snapshot for each in self.zfs)

    def without(self, *gone: Attachment) -> Record:
        """The same without some of the attachments."""
        serials = {each.serial for each in gone}
        return replace(self, attachments=tuple(each for each in self.attachments if each.serial not in serials))

    def having(self, attachment: Attachment) -> Record:
        """The same with this attachment, in the place of an older one of its serial."""
        return replace(self, attachments=(*self.without(attachment).attachments, attachment))

    @property
    def receivers(self) -> tuple[str, ...]:
        """Names of the VMs that have one of its disks."""
        return tuple(sorted({each.receiver_name for each in self.attachments}))


def with_clones(record: Record, clones: Iterable[ZfsClone]) -> Record:
    """The same with other ZFS clones. Pure."""
    return replace(record, zfs=tuple(clones))


def disk_id(vm_uuid: str, path: str) -> str:
    """The id of a disk: the same on every run and host. `path`: of the lowest image that is the VM's own. Pure."""
    return str(uuids.uuid5(uuids.UUID(vm_uuid), path))


def serial(identity: str, receiver_uuid: str, moment_ns: int) -> str:
    """The serial under which a receiver sees a disk: another one for each attach. Pure."""
    text = f"{identity} {receiver_uuid} {moment_ns}"
    return f"kvmops{hashlib.sha256(text.encode()).hexdigest()[:14]}"


def is_serial(text: str) -> bool:
    """Whether a disk with this serial was attached by us. Pure."""
    return bool(_SERIAL.fullmatch(text))


def load(uuid: str) -> Record | None:
    """The record of a source. Raises KvmopsError for one that cannot be read: nobody can tell then what is attached."""
    path = _path(uuid)
    try:
        return _decode(_json.parse(_files.read_kept(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "Look at the state directory: the record tells which disks of the VM other VMs have."
        raise KvmopsError(f"The record {path}", f"it cannot be read: {error}", hint) from error


def everything(*, strict: bool = False) -> Iterator[Record]:
    """The records of this host that can be read; ``strict``: raises KvmopsError for one that cannot, as load() does."""
    names: list[str] = []
    with suppress(FileNotFoundError):
        names = sorted(os.listdir(_directory()))
    for name in names:
        uuid, _dot, ending = name.partition(".")
        if ending != "json":
            continue
        try:
            found = load(uuid)
        except KvmopsError:  # of another VM, as a rule: that one says so
            if strict:
                raise
            continue
        if found is not None:
            yield found


def are_there() -> bool:
    """Whether anything may be attached on this host."""
    try:
        return bool(os.listdir(_directory()))
    except FileNotFoundError:
        return False


def held_by(receiver_uuid: str) -> list[tuple[Record, Attachment]]:
    """The attached disks of one receiver."""
    return [
        (record, each) for record in everything() for each in record.attachments if each.receiver_uuid == receiver_uuid
    ]


def save(record: Record) -> None:
    """Keeps it, durably. Raises KvmopsError where the state directory cannot take it."""
    owners = {name: _owner_facts(each) for name, each in record.owners.items()}
    _state_file.save(_path(record.source_uuid), {**asdict(record), "owners": owners})


def drop(uuid: str) -> None:
    """Nothing of the VM is attached any more, durably."""
    with suppress(FileNotFoundError):
        os.unlink(_path(uuid))
        _files.sync_directory(_directory())


def _owner_facts(each: Ownership) -> dict[str, Any]:
    return {**asdict(each), "label": each.label.hex(), "acl": each.acl.hex()}


def _owner(facts: Mapping[str, Any]) -> Ownership:
    ids = (int(facts["uid"]), int(facts["gid"]), int(facts["mode"]))
    return Ownership(*ids, bytes.fromhex(facts["label"]), bytes.fromhex(facts["acl"]))


def _decode(found: Mapping[str, Any]) -> Record:
    values = dict(found)
    values["attachments"] = tuple(
        Attachment(**{**each, "template_names": tuple(each["template_names"])}) for each in found["attachments"]
    )
    values["zfs"] = tuple(ZfsClone(**each) for each in found["zfs"])
    values["owners"] = {path: _owner(each) for path, each in found["owners"].items()}
    return Record(**values)


def _directory() -> str:
    return os.path.join(_paths.state_dir(), "attached")


def _path(uuid: str) -> str:
    if not uuid or "/" in uuid or uuid.startswith("."):
        raise ValueError(f"not a uuid: {uuid!r}")
    return os.path.join(_directory(), f"{uuid}.json")
