# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The plan of a restore: a pure function from a point, the host and the request to everything that will be done."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive import names
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Configuration, Member, Role, Skipped
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._restore import (
    definition,
    disks,
    identity,
    mark,
    needs,
    places,
    reach,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import (
    ExistingVm,
    HostFacts,
    Place,
    PlannedDisk,
    PlannedFile,
    RestorePlan,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import DiskFormat, RestoreRequest

_VM_TYPES = ("kvm", "qemu")


@dataclass(frozen=True)
class _Layer:
    """One restored member with its part in a disk: ``depth`` 0 is the lowest layer."""

    member: Member
    target: str
    depth: int
    top: bool
    format: str


def plan(
    configuration: Configuration,
    host: HostFacts,
    request: RestoreRequest,
    *,
    bare: bool = False,
    fresh: identity.Fresh | None = None,
) -> RestorePlan:
    """Decides the restore of one point. ``bare``: the source is a configuration file, not an archive.

    Raises RefusedError that lists everything that speaks against it.
    """
    what = f"Restore of {configuration.vm_name or 'the VM'} from {request.source}"
    root = _xml.parse(configuration.domain_xml, f"the configuration in {request.source}")
    if root.tag != "domain" or root.get("type") not in _VM_TYPES:
        raise RefusedError(what, f"it describes no QEMU VM, but a <{root.tag}> of type {root.get('type')!r}")
    name = request.name or configuration.vm_name
    if not identity.is_name(name):
        raise RefusedError(what, f"{name!r} is not a name for a VM", "Give a plain one with the option 'name'.")
    mark.strip(root)
    restored_before = _restored_before(configuration, host, request)
    draft, problems = _draft(configuration, root, host, request, bare, fresh or identity.Fresh())
    if restored_before is not None:
        return _unchanged(draft, restored_before, request)
    if problems:
        raise RefusedError(what, "; ".join(problems), "Nothing has been touched.")
    return draft


def _restored_before(configuration: Configuration, host: HostFacts, request: RestoreRequest) -> ExistingVm | None:
    """The VM that this very restore has made earlier.

    With `force` an idle VM whose disks were written since is taken back to the point again.
    """
    name = request.name or configuration.vm_name
    vm = next((vm for vm in host.vms if vm.name == name), None)
    if vm is None or vm.mark is None:
        return None
    asked = (configuration.timestamp, mark.configuration_digest(configuration))
    same_point = (vm.mark.point, vm.mark.configuration) == asked
    wanted_uuid = configuration.vm_uuid if request.uuid == "keep" else request.uuid
    if not same_point or (wanted_uuid not in ("", "new") and wanted_uuid.lower() != vm.uuid):
        return None
    if host.target is not None and any(os.path.dirname(disk.path) != host.target.path for disk in vm.mark.disks):
        return None
    if request.disk_format is DiskFormat.QCOW2 and any(
        disk.format == "raw" and not disk.path.endswith(".iso") for disk in vm.mark.disks
    ):
        return None
    if request.force and vm.touched_files and not vm.running:
        return None
    return vm


def _unchanged(draft: RestorePlan, vm: ExistingVm, request: RestoreRequest) -> RestorePlan:
    if vm.mark is None:
        raise AssertionError("only a VM with our mark counts as restored before")
    return replace(
        draft,
        name=vm.name,
        uuid=vm.uuid,
        domain_xml=vm.xml,
        disks=tuple(PlannedDisk(disk.target, disk.path, disk.format) for disk in vm.mark.disks),
        files=(),
        unchanged=True,
        replaced=None,
        set_aside=(),
        refresh_pools=(),
        warnings=(),
        estimated_bytes=0,
        start=request.start and not vm.running,
    )


def _draft(
    configuration: Configuration,
    root: etree._Element,
    host: HostFacts,
    request: RestoreRequest,
    bare: bool,
    fresh: identity.Fresh,
) -> tuple[RestorePlan, list[str]]:
    """The plan, and the reasons why it cannot be carried out."""
    who = identity.decide(
        configuration.vm_name,
        configuration.vm_uuid.lower(),
        definition.mac_addresses(root),
        identity.Wish(request.name, request.uuid, request.mac, request.force),
        host.vms,
        fresh,
    )
    others = [vm for vm in host.vms if vm is not who.replaced]
    fate = disks.decide(configuration, root, host, others, bare=bare)
    layers = _layers(fate.fates, request.disk_format)
    where = places.decide([layer.member for layer in layers], host)
    files = _files(layers, where.places, configuration, who)
    nvram = _nvram(configuration, root, who, host, bare)
    files += [nvram] if nvram is not None else []
    all_places = {**where.places, **({nvram.member.name: host.nvram_place} if nvram is not None else {})}
    set_aside, clashes = _clashes(files, all_places, host, who.replaced, others, request.force)
    problems = [*who.problems, *fate.problems, *where.problems, *clashes, *_unknown_formats(layers)]
    lacking = needs.missing(root, request.networks, host)
    if lacking:
        problems.append("this host does not have " + ", ".join(lacking))
    warnings = [*fate.warnings, *where.warnings]
    if not configuration.format_version:
        warnings = [*configuration.warnings, *warnings]  # how the members were matched with the disks
    kept, left_out = reach.apply(root, trusted=bool(configuration.format_version), copy=who.new)
    host_devices, absent = reach.decide_hostdevs(root, host, others, bare=bare)
    new_disks = _new_disks(root, files, layers)
    changes = definition.Changes(
        identity=who,
        genid=fresh.uuid(),
        fates=fate.fates,
        disks=new_disks,
        networks=request.networks,
        nvram_path=_nvram_path(root, who, host),
    )
    outcome = definition.apply(root, changes, host) if not fate.problems else definition.Outcome()
    warnings += _left_over(who.replaced, set_aside)
    warnings += [*kept, *host_devices, *outcome.warnings, *_not_restored(configuration, layers, root, nvram, bare)]
    skipped = [*outcome.skipped, *left_out, *absent]
    return (
        RestorePlan(
            name=who.name,
            uuid=who.uuid,
            point=configuration.timestamp,
            configuration=mark.configuration_digest(configuration),
            domain_xml=_xml.text(root),
            disks=tuple(PlannedDisk(disk.target, disk.path, disk.format) for disk in new_disks.values()),
            files=tuple(files),
            replaced=who.replaced,
            set_aside=tuple(set_aside),
            refresh_pools=tuple(sorted({file.pool for file in files if file.pool})),
            skipped=_unique(skipped),
            warnings=tuple(dict.fromkeys(warnings)),
            estimated_bytes=sum(file.member.size_bytes for file in files),
            start=request.start,
        ),
        problems,
    )


def _unique(skipped: Iterable[Skipped]) -> tuple[Skipped, ...]:
    return tuple({(item.device, item.reason): item for item in skipped}.values())


def _layers(fates: Mapping[str, disks.Fate], disk_format: DiskFormat) -> list[_Layer]:
    layers = []
    for target, fate in fates.items():
        if not isinstance(fate, disks.Restored):
            continue
        for depth, member in enumerate(fate.chain):
            as_raw = member.original_format == "raw" and disk_format is DiskFormat.KEEP
            image_format = "raw" if as_raw or member.role is Role.ISO else member.image_format or "qcow2"
            layers.append(_Layer(member, target, depth, depth == len(fate.chain) - 1, image_format))
    return layers


def _unknown_formats(layers: Sequence[_Layer]) -> list[str]:
    """A damaged or disguised image must not end up as a raw disk, nor QEMU be let loose on formats nobody asked for."""
    problems = []
    for layer in layers:
        name, image_format = layer.member.name, layer.member.image_format or "qcow2"
        if image_format not in ("qcow2", "raw"):
            problems.append(f"the member {name} is {image_format}; only qcow2 and raw are restored")
        elif image_format == "raw" and name.endswith((".qcow2", ".snapshot")):
            problems.append(f"the member {name} is no qcow2 image, whatever its name says")
    return problems


def _files(
    layers: Sequence[_Layer], where: Mapping[str, Place], configuration: Configuration, who: identity.Identity
) -> list[PlannedFile]:
    files: list[PlannedFile] = []
    taken: set[str] = set()
    for layer in layers:
        place = where[layer.member.name]
        name = "" if who.new else _former_name(layer)
        if not name or os.path.join(place.path, name) in taken:
            name = _derived_name(layer, who.name)
        path = os.path.join(place.path, name)
        taken.add(path)
        below = files[-1] if layer.depth else None
        files.append(
            PlannedFile(
                member=layer.member,
                path=path,
                format=layer.format,
                pool=place.pool,
                backing=below.path if below is not None else "",
                backing_format=below.format if below is not None else "",
            )
        )
    return files


def _former_name(layer: _Layer) -> str:
    """The file's former name; "" where it is not known or not fit for a file of a VM."""
    name = os.path.basename(layer.member.former_path) or layer.member.name
    if layer.member.former_path.startswith("/dev/") or name.startswith(".") or any(ord(letter) < 32 for letter in name):
        return ""
    if layer.member.original_format == "raw" and layer.format == "qcow2" and name.endswith(".raw"):
        name = name[: -len(".raw")] + ".qcow2"
    return name


def _derived_name(layer: _Layer, vm_name: str) -> str:
    suffix = "iso" if layer.member.role is Role.ISO else layer.format
    number = f"-{layer.depth}" if layer.depth else ""
    return f"{names.stem(vm_name)}-{names.stem(layer.target)}{number}.{suffix}"


def _nvram_path(root: etree._Element, who: identity.Identity, host: HostFacts) -> str:
    """Always in libvirt's own directory: the definition must not name another file of the host."""
    nvram = root.find("os/nvram")
    if nvram is None:
        return ""
    source = nvram.find("source")
    former = (nvram.text or "").strip() or (source.get("file") or "" if source is not None else "")
    name = os.path.basename(former)
    if who.new or not name or name.startswith("."):
        name = f"{names.stem(who.name)}_VARS.fd"
    return os.path.join(host.nvram_place.path, name)


def _nvram(
    configuration: Configuration, root: etree._Element, who: identity.Identity, host: HostFacts, bare: bool
) -> PlannedFile | None:
    path = _nvram_path(root, who, host)
    member = next((member for member in configuration.members if member.role is Role.NVRAM), None)
    if member is None or not path or bare:
        return None
    return PlannedFile(member=member, path=path, format=member.image_format or "raw")


def _clashes(
    files: Sequence[PlannedFile],
    where: Mapping[str, Place],
    host: HostFacts,
    replaced: ExistingVm | None,
    others: Sequence[ExistingVm],
    force: bool,
) -> tuple[list[str], list[str]]:
    """Existing files that the restore puts aside, and why some of them must stay."""
    users = {path: vm.name for vm in others for path in vm.files}
    own = replaced.files if replaced is not None else frozenset()
    set_aside: list[str] = []
    problems: list[str] = []
    for file in files:
        place = where[file.member.name]
        name = os.path.basename(file.path)
        exists, real = name in place.names, os.path.join(place.real_path or place.path, name)
        user = users.get(file.path) or users.get(real)
        if user:
            problems.append(f"{file.path} belongs to the VM {user}")
        elif exists and not force:
            problems.append(f"the file {file.path} exists ('force: true' replaces it)")
        elif exists and not own & {file.path, real} and not place.pool and place is not host.target:
            problems.append(f"{file.path} exists, is no file of the VM and is in no pool (remove it yourself)")
        elif exists:
            set_aside.append(file.path)
        if file.member.role is Role.NVRAM and place.problem:
            problems.append(f"{place.path} {place.problem}")
    return set_aside, problems


def _left_over(replaced: ExistingVm | None, set_aside: Sequence[str]) -> list[str]:
    if replaced is None:
        return []
    left = sorted(path for path in replaced.disk_files - set(set_aside) if not path.startswith("/dev/"))
    return [f"These files of the replaced VM are not overwritten and stay: {', '.join(left)}."] if left else []


def _new_disks(
    root: etree._Element, files: Sequence[PlannedFile], layers: Sequence[_Layer]
) -> dict[str, definition.NewDisk]:
    volumes = {}
    for element in root.findall("devices/disk[@type='volume']"):
        target, source = element.find("target"), element.find("source")
        if target is not None and source is not None:
            volumes[target.get("dev") or ""] = (source.get("pool") or "", source.get("volume") or "")
    found = {}
    for layer, file in zip(layers, files):
        if not layer.top:
            continue
        pool, volume = volumes.get(layer.target, ("", ""))
        if not definition.same_volume(pool, volume, file.pool, file.path):
            pool = volume = ""
        found[layer.target] = definition.NewDisk(layer.target, file.path, file.format, pool, volume)
    return found


def _not_restored(
    configuration: Configuration,
    layers: Sequence[_Layer],
    root: etree._Element,
    nvram: PlannedFile | None,
    bare: bool,
) -> list[str]:
    """Warnings about what the archive holds, or should hold, and the restored VM will not have."""
    if bare:
        return []
    warnings = []
    if configuration.saved_states:
        listed = ", ".join(state.name for state in configuration.saved_states)
        warnings.append(f"The saved states {listed} are in the archive and are not defined again by this version.")
    if any(member.role is Role.MEMORY for member in configuration.members):
        warnings.append("The memory image of the point stays in the archive: the restored VM boots from its disks.")
    if root.find("os/nvram") is not None and nvram is None:
        warnings.append("The archive holds no NVRAM: the firmware's settings are those on this host, or new ones.")
    if root.find("devices/tpm/backend[@type='emulator']") is not None:
        warnings.append("The state of the TPM is not restored by this version: a new VM starts with an empty one.")
    return warnings
