# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Who the restored VM is: name, uuid, MAC addresses, and which VM makes way for it."""

from __future__ import annotations

import secrets
import uuid as uuid_module
from collections.abc import Sequence
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import ExistingVm

MAC_PREFIX = "52:54:00"


class Fresh:
    """Source of new identifiers; a test gives its own."""

    def uuid(self) -> str:
        """A random version 4 UUID."""
        return str(uuid_module.uuid4())

    def mac(self) -> str:
        """A random address with the prefix that QEMU and libvirt use."""
        return MAC_PREFIX + "".join(f":{byte:02x}" for byte in secrets.token_bytes(3))


@dataclass(frozen=True)
class IdentityWish:
    """What was asked for: ``name`` "": the archive's; ``uuid``: "", keep, new or a UUID; ``mac``: "", keep or new."""

    name: str = ""
    uuid: str = ""
    mac: str = ""
    force: bool = False


@dataclass(frozen=True)
class Identity:
    """The decision. ``new``: a copy beside the original or under another name, so nothing may be shared with it.

    ``macs``: one per interface, in the order they were given. ``problems``: why it cannot be done, all of them.
    """

    name: str
    uuid: str
    new: bool
    macs: tuple[str, ...]
    replaced: ExistingVm | None = None
    problems: tuple[str, ...] = ()


def is_name(name: str) -> bool:
    """Whether libvirt's QEMU driver and its XML take this as a VM's name."""
    forbidden = any(ord(letter) < 32 or letter in "/\ufffe\uffff" or "\ud800" <= letter <= "\udfff" for letter in name)
    return bool(name.strip()) and not forbidden


def decide(name: str, uuid: str, macs: Sequence[str], wish: IdentityWish, vms: Sequence[ExistingVm], fresh: Fresh) -> Identity:
    """Identity of a restored VM ``name``, ``uuid`` with the addresses ``macs`` ("" for an interface without one)."""
    problems: list[str] = []
    chosen = wish.name or name
    asked = {"": "", "new": "", "keep": uuid}.get(wish.uuid, wish.uuid.lower())
    replaced = _replaced(chosen, asked, wish.force, vms, problems)
    others = [vm for vm in vms if vm is not replaced]
    original_stays = any(vm.uuid == uuid for vm in others)
    new = chosen != name or original_stays
    return Identity(
        name=chosen,
        uuid=_uuid(uuid, new, wish.uuid, replaced, others, fresh, problems),
        new=new,
        macs=_macs(macs, new, wish.mac, others, fresh, problems),
        replaced=replaced,
        problems=tuple(problems),
    )


def _replaced(name: str, uuid: str, force: bool, vms: Sequence[ExistingVm], problems: list[str]) -> ExistingVm | None:
    """The VM that makes way: the one of that name, or with ``force`` the one whose uuid was asked for."""
    vm = next((vm for vm in vms if vm.name == name), None)
    if vm is None and force:
        vm = next((vm for vm in vms if uuid and vm.uuid == uuid), None)
    if vm is None:
        return None
    if vm.running:
        problems.append(f"the VM {vm.name} exists and is running")
    elif vm.managed_save:
        problems.append(
            f"the VM {vm.name} exists and has a managed-save image (start it, or use 'virsh managedsave-remove')"
        )
    elif vm.locked_files:
        held = ", ".join(sorted(vm.locked_files))
        problems.append(f"the VM {vm.name} exists and is off for libvirt, but a process holds {held}")
    elif not force:
        problems.append(f"a VM named {vm.name} exists (another 'name' restores beside it, 'force: true' replaces it)")
    return vm


def _uuid(
    former: str,
    new: bool,
    wish: str,
    replaced: ExistingVm | None,
    others: Sequence[ExistingVm],
    fresh: Fresh,
    problems: list[str],
) -> str:
    taken = {vm.uuid: vm.name for vm in others}
    if wish not in ("", "keep", "new"):
        try:
            chosen = str(uuid_module.UUID(wish))
        except ValueError:
            problems.append(f"{wish!r} is not a UUID")
            return former
    elif wish == "keep":
        chosen = former
    elif wish == "new" or not former:
        chosen = ""
    elif new:
        # the copy that is replaced passes its own uuid on: one definition, never a moment without
        chosen = replaced.uuid if replaced is not None and replaced.uuid != former else ""
    else:
        chosen = former
    while not chosen or (wish in ("", "new") and chosen in taken):
        chosen = fresh.uuid()
    if chosen in taken:
        problems.append(f"the uuid {chosen} is that of the VM {taken[chosen]} ('uuid: new' gives another)")
    return chosen


def _macs(
    former: Sequence[str], new: bool, wish: str, others: Sequence[ExistingVm], fresh: Fresh, problems: list[str]
) -> tuple[str, ...]:
    taken = {mac: vm.name for vm in others for mac in vm.macs}
    renew = wish == "new" or (wish == "" and new)
    chosen: list[str] = []
    for mac in former:
        mac = mac.lower()
        if renew or not mac:
            mac = fresh.mac()
            while mac in taken or mac in chosen or mac in former:
                mac = fresh.mac()
        elif mac in taken:
            problems.append(f"the MAC address {mac} is that of the VM {taken[mac]} ('mac: new' gives another)")
        chosen.append(mac)
    return tuple(chosen)
