# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""The plan of a restore: a pure function from a point, the host and the request to everything that will be done."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    Configuration,
    Member,
    Role,
    Skipped,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import RefusedError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.place_rules import PlaceKind
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._restore import (
    boot,
    definition,
    disks,
    identity,
    layout,
    mark,
    places,
    rewrite,
    states,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import (
    ExistingVm,
    HostFacts,
    PlannedDisk,
    PlannedFile,
    PlannedState,
    RestorePlan,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import DiskFormat, RestoreRequest
from ansible_collections.kvmops.backup.plugins.module_utils._template.find import BaseDisk


def plan(
    configuration: Configuration,
    host: HostFacts,
    request: RestoreRequest,
    *,
    bare: bool = False,
    heads: states.Heads | None = None,
    fresh: identity.Fresh | None = None,
    corrupt: Collection[str] = (),
    distrust: str = "",
) -> RestorePlan:
    """Decides the restore of one point. ``bare``: the source is a configuration file, not an archive; ``heads``: those of the
    memory images of its snapshots (states.memory_heads); ``corrupt``: members that QEMU had marked as that. ``distrust``: why
    the archive is not ours, "" if it is.

    Raises RefusedError that lists everything that speaks against it, HostileError for snapshots nobody can have had.
    """
    what = f"Restore of {configuration.vm_name or 'the VM'} from {request.source}"
    root = _xml.parse(configuration.domain_xml, f"the configuration in {request.source}")
    if root.tag != "domain" or root.get("type") not in rewrite.VM_TYPES:
        raise RefusedError(what, f"it describes no QEMU VM, but a <{root.tag}> of type {root.get('type')!r}")
    name = request.name or configuration.vm_name
    if not identity.is_name(name):
        raise RefusedError(what, f"{name!r} is not a name for a VM", "Give a plain one with the option 'name'.")
    ours = bool(configuration.format_version) and not distrust
    trusted = ours or request.trust
    if not trusted:  # an archive that is not ours says nothing about what the host does by itself
        configuration = replace(configuration, autostart=False, template=False)
    draft, problems, of_states = _draft(
        configuration,
        root,
        host,
        request,
        bare,
        heads or {},
        fresh or identity.Fresh(),
        trusted=trusted,
        taken=trusted and not ours,
    )
    if distrust and not trusted:
        taken_as = Notice(Code.FOREIGN, f"The archive is taken as a foreign one: {distrust}.")
        draft = replace(draft, warnings=(taken_as, *draft.warnings))
    restored_before = _restored_before(draft, configuration, host, request)
    since = "" if restored_before is None else _since(restored_before, draft)
    if draft.reduced and request.start and not request.start_reduced and not (restored_before and restored_before.running):
        problems.append(_not_started(draft.reduced))
        restored_before = None
    if restored_before is not None and (restored_before.running or not (request.force and since)):
        return _unchanged(draft, restored_before, request, since)
    marked = [file for file in draft.files if file.member.name in corrupt]
    if request.repair:
        draft = replace(draft, warnings=(*draft.warnings, *map(_to_be_repaired, marked)))
    else:
        problems += [_refused_as_corrupt(file) for file in marked]
    if problems or of_states:
        hint = " 'flatten: true' restores the VM without its snapshots." if of_states else ""
        raise RefusedError(what, "; ".join([*problems, *of_states]), f"Nothing has been touched.{hint}")
    return draft


def _refused_as_corrupt(file: PlannedFile) -> str:
    return (
        f"{file.member.name} ({file.member.target}) was marked as corrupt by QEMU before it was backed up "
        "('repair: true' repairs the restored copy)"
    )


def _to_be_repaired(file: PlannedFile) -> Notice:
    return Notice(
        Code.REPAIRED,
        f"{file.member.name} was marked as corrupt by QEMU before it was backed up: {file.path} is repaired. Check the file "
        f"systems on {file.member.target} before you trust them.",
    )


def _not_started(reduced: Sequence[str]) -> str:
    return (
        f"it would start without {', '.join(reduced)}, which an archive that is not trusted does not get ('start: false' to look "
        "at the VM first, 'start_reduced: true' to start it like that, 'trust: true' to trust the archive)"
    )


def _restored_before(
    draft: RestorePlan, configuration: Configuration, host: HostFacts, request: RestoreRequest
) -> ExistingVm | None:
    """The VM that this very restore has made earlier, whatever has become of it since."""
    name = request.name or configuration.vm_name
    vm = next((vm for vm in host.vms if vm.name == name), None)
    if vm is None or vm.mark is None:
        return None
    asked = (configuration.timestamp, draft.configuration)
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
    if vm.mark.flat != _gives_states_up(configuration, request):
        return None
    return vm


def _since(vm: ExistingVm, draft: RestorePlan) -> str:
    """Why a VM that was restored from this point is not at it any more; "" if it is."""
    planned = {state.name for state in draft.states}
    new, gone = sorted(set(vm.snapshots) - planned), sorted(planned - set(vm.snapshots))
    parts = [
        f"no longer as restored: {', '.join(sorted(vm.touched_files))}" if vm.touched_files else "",
        f"new snapshots: {', '.join(new)}" if new else "",
        f"snapshots that are gone: {', '.join(gone)}" if gone else "",
    ]
    return "; ".join(filter(None, parts))


def _unchanged(draft: RestorePlan, vm: ExistingVm, request: RestoreRequest, since: str) -> RestorePlan:
    if vm.mark is None:
        raise AssertionError("only a VM with our mark counts as restored before")
    way_back = "'force: true' takes it back to the point" + (" once it is shut down" if vm.running else "")
    gone_on = f"The VM {vm.name} has gone on since this restore and stays as it is ({since}); {way_back}."
    return replace(
        draft,
        name=vm.name,
        uuid=vm.uuid,
        domain_xml=vm.xml,
        disks=tuple(PlannedDisk(disk.target, disk.path, disk.format) for disk in vm.mark.disks if disk.top),
        files=(),
        made=(),
        states=tuple(PlannedState(name, "", "", False) for name in vm.snapshots),
        unchanged=True,
        replaced=None,
        set_aside=(),
        refresh_pools=(),
        warnings=(Notice(Code.GONE_ON, gone_on),) if since else (),
        lacking=(),
        estimated_bytes=0,
        start=request.start and not vm.running,
    )


def _gives_states_up(configuration: Configuration, request: RestoreRequest) -> bool:
    """Whether `flatten` makes a difference for this point."""
    layered = any(member.role is Role.LAYER or member.template_disk for member in configuration.members)
    return request.flatten and (layered or bool(configuration.snapshots))


@dataclass(frozen=True)
class _Decided:
    """What the rules say of names, snapshots, disks, boot files and places. `macs`: the archive's, in the order of `who`'s."""

    flat: bool
    macs: tuple[str, ...]
    who: identity.Identity
    others: tuple[ExistingVm, ...]
    tree: tuple[states.RestoredSnapshot, ...]
    fate: disks.DiskDecision
    booted: boot.BootDecision
    files: layout.Layout


def _decide(
    configuration: Configuration,
    root: etree._Element,
    host: HostFacts,
    request: RestoreRequest,
    bare: bool,
    heads: states.Heads,
    fresh: identity.Fresh,
    *,
    trusted: bool,
) -> _Decided:
    flat = _gives_states_up(configuration, request)
    own_macs = definition.mac_addresses(root)
    macs = own_macs + ([] if bare or flat else states.other_macs(configuration, heads, own_macs))
    who = identity.decide(
        configuration.vm_name,
        configuration.vm_uuid.lower(),
        macs,
        identity.IdentityWish(request.name, request.uuid, request.mac, request.force),
        host.vms,
        fresh,
    )
    others = [vm for vm in host.vms if vm is not who.replaced]
    tree = () if bare or flat else states.gather(configuration, host, others, heads, trusted=trusted)
    fate = disks.decide(configuration, root, host, others, trusted=trusted, bare=bare)
    chains = {target: each.chain for target, each in fate.fates.items() if isinstance(each, disks.Restored)}
    roots = [root, *(each.root for state in tree for each in state.all_definitions)]
    booted = boot.BootDecision() if bare else boot.decide(configuration, roots, host, trusted=trusted)
    needed = layout.Needed(
        disks=chains,
        others=states.chains(tree),
        memories=states.memories(tree),
        frozen=states.frozen(tree),
        overlays=states.overlays(tree),
        bases=_bases(host),
        boot=booted,
    )
    merged = frozenset(target for target, chain in chains.items() if flat and _has_inside(chain))
    files = layout.decide(needed, host, who, request.disk_format, merged)
    return _Decided(flat, tuple(macs), who, tuple(others), tuple(tree), fate, booted, files)


def _draft(
    configuration: Configuration,
    root: etree._Element,
    host: HostFacts,
    request: RestoreRequest,
    bare: bool,
    heads: states.Heads,
    fresh: identity.Fresh,
    *,
    trusted: bool,
    taken: bool,
) -> tuple[RestorePlan, list[str], list[str]]:
    """The plan, and the reasons why it cannot be carried out; those that lie in snapshots apart.

    ``taken``: the archive is not ours, and the user takes it as ours.
    """
    decided = _decide(configuration, root, host, request, bare, heads, fresh, trusted=trusted)
    who, others, fate, booted, files = decided.who, decided.others, decided.fate, decided.booted, decided.files
    nvram = _nvram(configuration, root, who, host, bare)
    tpm = _tpm(configuration, root, who, host, bare)
    of_machine = {file.path: place for file, place in ((nvram, host.nvram_place), (tpm, host.tpm_place)) if file}
    set_aside, clashes = layout.clashes(
        {**files.places, **of_machine}, host, who.replaced, others, request.force, configuration.template
    )
    problems = [
        *_about_templates(configuration, host, who.replaced, others, request),
        *who.problems,
        *fate.problems,
        *files.problems,
        *([] if trusted else places.unknown((file.member for file in files.files), host)),
        *clashes,
        *(f"{place.path} {place.problem}" for place in of_machine.values() if place.problem),
        *([] if request.trust else places.exposed([*files.places.values(), *of_machine.values()])),
    ]
    now = rewrite.Circumstances(
        host=host,
        others=others,
        who=who,
        macs={former: mac for former, mac in reversed([*zip(decided.macs, who.macs)]) if former},
        genid=fresh.uuid(),
        networks=request.networks,
        trusted=trusted,
        bare=bare,
        fresh=fresh,
        template=configuration.template,
        boot={
            **{path: path for path in booted.here},
            **{member.former_path: files.of_member(member.name).path for member in booted.restored},
        },
    )
    outcome = rewrite.Rewritten() if fate.problems else rewrite.rewrite(root, fate.fates, files.tops, now, who.macs)
    if outcome.lacking:
        other = any(each.startswith(("the network ", "the bridge ")) for each in outcome.lacking)
        way_out = " (the option 'networks' maps networks to those of this host)" if other else ""
        problems.append(f"this host does not have {', '.join(outcome.lacking)}{way_out}")
    of_tree = states.plan(decided.tree, files, now, heads)
    warnings = [
        # how the members were matched with the disks
        *(configuration.warnings if not configuration.format_version else ()),
        *fate.warnings,
        *files.warnings,
        *boot.warnings(booted, {each.name: files.of_member(each.name).path for each in booted.restored}, host),
        *_not_backed_up(files, bool(decided.tree)),
        *_left_over(who.replaced, set_aside, others, host, {rewrite.nvram_path(root, who, host), who.uuid}),
        *(_revived(files.places, others) if configuration.template else ()),
        *outcome.warnings,
        *_left_in_archive(configuration, bare),
        *of_tree.warnings,
    ]
    all_files = of_tree.files + tuple(file for file in (nvram, tpm) if file is not None)
    return (
        RestorePlan(
            name=who.name,
            uuid=who.uuid,
            point=configuration.timestamp,
            configuration=mark.configuration_digest(configuration) + ("-trusted" if taken else ""),
            domain_xml=_xml.text(root),
            disks=tuple(PlannedDisk(target, top.path, top.format) for target, top in files.tops.items()),
            files=all_files,
            made=files.made,
            states=of_tree.states,
            flat=decided.flat,
            replaced=who.replaced,
            set_aside=tuple(set_aside),
            refresh_pools=tuple(
                sorted(({each.pool for each in all_files} | {each.pool for each in files.made}) - {""})
            ),
            skipped=_unique(outcome.skipped),
            warnings=tuple(dict.fromkeys(warnings)),
            lacking=() if bare else tuple(_lacking(root, nvram, tpm)),
            estimated_bytes=sum(file.member.size_bytes * (2 if file.temporary else 1) for file in all_files),
            start=request.start,
            reduced=outcome.reduced,
            repair=request.repair,
            autostart=configuration.autostart and not configuration.template and _takes_its_place(configuration, who),
            requires=configuration.requires,
        ),
        problems,
        list(of_tree.problems),
    )


def _takes_its_place(configuration: Configuration, who: identity.Identity) -> bool:
    """Whether the restored VM is the original again, and no VM of its name or uuid was here any more."""
    return not who.new and who.replaced is None and who.uuid == configuration.vm_uuid.lower()


def _bases(host: HostFacts) -> Sequence[BaseDisk]:
    """The disks that a thin clone is put on; none where the host has not what it needs."""
    found = host.template
    if found is None or found.template is None or found.mismatch or found.unchecked:
        return ()
    return found.template.disks


def _about_templates(
    configuration: Configuration,
    host: HostFacts,
    replaced: ExistingVm | None,
    others: Sequence[ExistingVm],
    request: RestoreRequest,
) -> list[str]:
    """Why a template cannot be restored like that, or a thin clone not on what this host has."""
    problems = []
    if host.template is not None and (host.template.mismatch or host.template.unchecked):
        problems.append(host.template.text)
    if configuration.template and request.start:
        problems.append("it is a template, which is not started ('start: false')")
    if replaced is not None and replaced.template:
        # a template may itself stand on another one, which has clones of its own
        below = [vm.files for vm in others if vm.template and not vm.files & replaced.own_disks]
        clones = [vm.name for vm in others if vm.files & replaced.disk_files.difference(*below)]
        if clones:
            problems.append(f"the template {replaced.name} cannot be replaced: {', '.join(clones)} stand on its disks")
    return problems


def _revived(places: Iterable[str], others: Sequence[ExistingVm]) -> list[Notice]:
    here = {os.path.realpath(path) for path in places}
    clones = [vm.name for vm in others if vm.missing_bases & here]
    if not clones:
        return []
    names = ", ".join(clones)
    text = f"{names} stood on these disks: restore them too, unless the template is now what it was when they were made."
    return [Notice(Code.TEMPLATE_IN_USE, text)]


def _has_inside(chain: Sequence[Member]) -> bool:
    """Whether a disk may have snapshots in it: layers, or a qcow2 that can hold them."""
    return chain[-1].role is not Role.ISO and (len(chain) > 1 or chain[0].original_format != "raw")


def _unique(skipped: Iterable[Skipped]) -> tuple[Skipped, ...]:
    return tuple({(item.device, item.reason): item for item in skipped}.values())


def _nvram(
    configuration: Configuration, root: etree._Element, who: identity.Identity, host: HostFacts, bare: bool
) -> PlannedFile | None:
    path = rewrite.nvram_path(root, who, host)
    member = next((member for member in configuration.members if member.role is Role.NVRAM), None)
    if member is None or not path or bare:
        return None
    return PlannedFile(member=member, path=path, format=member.image_format or "raw")


def _tpm(
    configuration: Configuration, root: etree._Element, who: identity.Identity, host: HostFacts, bare: bool
) -> PlannedFile | None:
    member = next((member for member in configuration.members if member.role is Role.TPM), None)
    if member is None or bare or root.find("devices/tpm/backend[@type='emulator']") is None:
        return None
    return PlannedFile(member=member, path=os.path.join(host.tpm_place.path, who.uuid), format="raw")


def _not_backed_up(files: layout.Layout, snapshots: bool) -> list[Notice]:
    """A warning where the restored VM could not be backed up again as it is."""
    here = sorted({place.path for place in files.places.values() if place.kind is PlaceKind.ZFS})
    if not here or not snapshots:
        return []
    text = (
        f"{', '.join(here)} is on ZFS, from where a VM with snapshots cannot be backed up: restore it with 'flatten: true', "
        "or remove them (kvmops.backup.vm_snapshot with snapshot: all and state: absent)."
    )
    return [Notice(Code.NO_BACKUP, text)]


def _left_over(
    replaced: ExistingVm | None,
    set_aside: Sequence[str],
    others: Sequence[ExistingVm],
    host: HostFacts,
    in_use: Collection[str],
) -> list[Notice]:
    """``in_use``: path of the NVRAM, and uuid, that the restored VM has."""
    if replaced is None:
        return []
    firmware = {os.path.join(place.path, name) for place in (host.nvram_place, host.tpm_place) for name in place.names}
    firmware = {path for path in firmware & replaced.files if not {path, os.path.basename(path)} & set(in_use)}
    gone = map(_filenames.canonical, set_aside)
    own = (replaced.disk_files | firmware).difference(set_aside, gone, *(vm.files for vm in others))
    left = sorted(path for path in own if not path.startswith("/dev/"))
    text = f"These files of the replaced VM are not overwritten and stay: {', '.join(left)}."
    return [Notice(Code.FILES_STAY, text)] if left else []


def _left_in_archive(configuration: Configuration, bare: bool) -> list[Notice]:
    """Warnings about what the archive holds and the restored VM will not have."""
    memories = any(member.role is Role.MEMORY for member in configuration.members)
    if memories and not bare and not configuration.snapshots:
        return [Notice(Code.FILES_STAY, "The memory image in the archive belongs to no snapshot and stays there.")]
    return []


def _lacking(root: etree._Element, nvram: PlannedFile | None, tpm: PlannedFile | None) -> list[Notice]:
    """What the VM needs and the archive does not hold."""
    texts = []
    if root.find("os/nvram") is not None and nvram is None:
        texts.append("The archive holds no NVRAM: the firmware's settings are those on this host, or new ones.")
    if root.find("devices/tpm/backend[@type='emulator']") is not None and tpm is None:
        texts.append("The archive holds no TPM state: the VM starts with an empty TPM.")
    return [Notice(Code.FIRMWARE_STATE, text) for text in texts]
