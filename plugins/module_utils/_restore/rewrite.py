# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""One way for every definition in an archive: the VM's own, those in snapshots, those in memory images. Pure.

Whatever a definition may reach on the host is decided here, so that no other way leads past the rules.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Skipped
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import firmware_state
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Notice
from ansible_collections.kvmops.backup.plugins.module_utils._restore import (
    boot,
    definition,
    disks,
    host_exposure,
    host_requirements,
    mark,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.identity import Fresh, Identity
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import (
    ExistingVm,
    HostFacts,
    MadeFile,
    PlannedFile,
)
from ansible_collections.kvmops.backup.plugins.module_utils._template import mark as template_mark

VM_TYPES = ("kvm", "qemu")


@dataclass(frozen=True)
class Circumstances:
    """What is the same for all definitions of a restore.

    ``macs``: new address by former one. ``trusted``: the archive is ours, or the user takes it as ours.
    ``template``: the VM gets the mark of one.
    ``boot``: where kernels and the like are that the restore writes or has compared, by former path.
    """

    host: HostFacts
    others: Sequence[ExistingVm]
    who: Identity
    macs: Mapping[str, str]
    genid: str
    networks: Mapping[str, str]
    trusted: bool
    bare: bool
    fresh: Fresh
    template: bool = False
    boot: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewritten:
    """What there is to say about a rewritten definition.

    ``lacking``: what it needs and the host does not have. ``reduced``: devices that only an archive of ours would get.
    """

    warnings: tuple[Notice, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    lacking: tuple[str, ...] = ()
    reduced: tuple[str, ...] = ()


def rewrite(
    root: etree._Element,
    fates: Mapping[str, disks.Fate],
    tops: Mapping[str, PlannedFile | MadeFile],
    now: Circumstances,
    macs: Sequence[str] = (),
) -> Rewritten:
    """Rewrites a definition in place. ``tops``: the file of each restored disk by target.

    ``macs``: addresses of its interfaces, one by one, where they were decided for this very definition.
    """
    nvram = nvram_path(root, now.who, now.host)
    etree.strip_elements(root, etree.Comment, with_tail=False)  # texts are judged as a whole
    by_former = (now.macs.get(mac) or now.fresh.mac() for mac in definition.mac_addresses(root))
    addresses = list(zip(root.findall("devices/interface"), macs or by_former))
    own = boot.detach(root, now.boot)
    if not now.trusted:
        host_exposure.strip_boot_files(each.element for each in own)
    exposed = host_exposure.apply(root, trusted=now.trusted, copy=now.who.new)
    mark.strip(root)
    template_mark.put(root, now.template)
    lacking = host_requirements.missing(root, now.networks, now.host, trusted=now.trusted)
    host_devices, absent = host_exposure.decide_hostdevs(root, now.host, now.others, bare=now.bare)
    stay = root.findall("devices/interface")
    changes = definition.Changes(
        identity=replace(now.who, macs=tuple(mac for interface, mac in addresses if interface in stay)),
        genid=now.genid,
        fates=fates,
        disks=_new_disks(root, tops),
        networks=now.networks,
        nvram_path=nvram,
        trusted=now.trusted,
    )
    untrusted = [target for target, fate in fates.items() if isinstance(fate, disks.Dropped) and fate.untrusted]
    outcome = definition.apply(root, changes, now.host)
    boot.attach(own)
    return Rewritten(
        warnings=(*exposed.warnings, *host_devices, *outcome.warnings),
        skipped=(*outcome.skipped, *exposed.skipped, *absent),
        lacking=tuple(lacking),
        reduced=(*untrusted, *(() if now.trusted else (item.device for item in exposed.skipped))),
    )


def nvram_path(root: etree._Element, who: Identity, host: HostFacts) -> str:
    """Always in libvirt's own directory: the definition must not name another file of the host."""
    nvram = root.find("os/nvram")
    if nvram is None:  # libvirt takes its default where it chooses the firmware
        chosen = root.find("os[@firmware='efi']") is not None
        return os.path.join(host.nvram_place.path, firmware_state.default_nvram(who.name, "raw")) if chosen else ""
    source = nvram.find("source")
    former = (nvram.text or "").strip() or (source.get("file") or "" if source is not None else "")
    name = os.path.basename(former)
    others = (vm.files for vm in host.vms if vm is not who.replaced)
    taken = any(os.path.join(host.nvram_place.path, name) in files for files in others)
    if who.new or not name or name.startswith(".") or taken:
        name = f"{names.stem(who.name)}_VARS.fd"
    return os.path.join(host.nvram_place.path, name)


def _new_disks(root: etree._Element, tops: Mapping[str, PlannedFile | MadeFile]) -> dict[str, definition.NewDisk]:
    volumes = {}
    for element in root.findall("devices/disk[@type='volume']"):
        target, source = element.find("target"), element.find("source")
        if target is not None and source is not None:
            volumes[target.get("dev") or ""] = (source.get("pool") or "", source.get("volume") or "")
    found = {}
    for name, file in tops.items():
        pool, volume = volumes.get(name, ("", ""))
        if not definition.same_volume(pool, volume, file.pool, file.path):
            pool = volume = ""
        found[name] = definition.NewDisk(name, file.path, file.format, pool, volume)
    return found
