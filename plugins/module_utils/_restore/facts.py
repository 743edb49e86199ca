# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a plan has to know about this host, read before anything is decided. Changes nothing."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ansible_collections.kvmops.backup.plugins.module_utils import _filenames, _files, _mounts, _text, _trust, _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive import digests
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import (
    CHUNK_BYTES,
    Configuration,
    Member,
    Role,
)
from ansible_collections.kvmops.backup.plugins.module_utils._errors import TargetError
from ansible_collections.kvmops.backup.plugins.module_utils._image import layers, qemu_img
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import boot_files, firmware_state, storage
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    Domain,
    libvirt,
    translate,
    unless_gone,
)
from ansible_collections.kvmops.backup.plugins.module_utils._progress import Progress
from ansible_collections.kvmops.backup.plugins.module_utils._restore import (
    definition,
    disks,
    host_exposure,
    host_requirements,
    mark,
    places,
    states,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import (
    BlockDevice,
    ExistingVm,
    HostCapabilities,
    HostFacts,
    HostFile,
    Mark,
    RestorePlace,
)
from ansible_collections.kvmops.backup.plugins.module_utils._restore.request import RestoreRequest
from ansible_collections.kvmops.backup.plugins.module_utils._template import mark as template_mark
from ansible_collections.kvmops.backup.plugins.module_utils._template import requirement
from ansible_collections.kvmops.backup.plugins.module_utils._template.match import Match


def gather(
    conn: Connection,
    configuration: Configuration,
    request: RestoreRequest,
    archive_path: str,
    heads: states.Heads | None = None,
    progress: Progress | None = None,
) -> HostFacts:
    """The facts for the restore of one point. Raises KvmopsError when libvirt or a file system does not answer.

    ``heads``: of the memory images of its snapshots, None where these do not matter. ``progress``: of reading the template
    of a thin clone; None: the template does not matter.
    """
    root = _xml.parse(configuration.domain_xml, f"the configuration in {archive_path}")
    roots = [root, *([] if heads is None else states.definitions(configuration, heads))]
    pools = {pool.name: pool.target_path for pool in storage.pools(conn) if pool.active and pool.target_path}
    target = None
    if request.pool or request.path:
        path = _filenames.absolute(request.path) if request.path else ""  # libvirt knows no current directory
        target = _model_place(storage.resolve_target(conn, pool=request.pool, path=path), pools, path)
    wanted = {request.name or configuration.vm_name, configuration.vm_uuid.lower(), request.uuid.lower()}
    try:
        vms: list[ExistingVm] = []
        for domain in conn.listAllDomains(0):
            with unless_gone():
                vms.append(_existing_vm(domain, wanted, pools))
        networks = frozenset(network.name() for network in conn.listAllNetworks(0))
        capabilities = _capabilities(conn, root, vms)
    except libvirt.libvirtError as error:
        raise translate(error, "The state of this host") from error
    images = {m.former_path: m for m in configuration.members if m.role in (Role.ISO, Role.BOOT) and m.former_path}
    return HostFacts(
        archive_place=_place(conn, pools, path=os.path.dirname(os.path.realpath(archive_path))),
        nvram_place=_place(conn, pools, path=firmware_state.nvram_directory(conn)),
        tpm_place=_tpm_place(conn, pools),
        target=target,
        former=_former(conn, configuration, roots, pools),
        vms=tuple(vms),
        networks=networks,
        interfaces=frozenset(os.listdir("/sys/class/net")),
        capabilities=capabilities,
        files=_host_files(
            set(images).union(*(definition.host_file_names(each, pools) for each in roots)),
            images,
            vms,
            pools,
            digests.ALGORITHMS[configuration.digest_algorithm],
        ),
        block_devices=_block_devices(roots),
        hostdevs=_host_devices(),
        template=_template(conn, configuration, progress),
        pools=pools,
    )


def _template(conn: Connection, configuration: Configuration, progress: Progress | None) -> Match | None:
    """The template of a thin clone; without ``progress`` it is left to the caller."""
    if configuration.requires is None or progress is None:
        return None
    return requirement.match_on_host(conn, configuration.requires, progress, thorough=True)


def _former(
    conn: Connection, configuration: Configuration, roots: list[etree._Element], pools: Mapping[str, str]
) -> dict[str, RestorePlace]:
    keys = {places.former_key(member) for member in configuration.members}
    keys |= {disk.pool for root in roots for disk in disks.elements(root)}
    found: dict[str, RestorePlace] = {}
    for key in keys - {""}:
        if key.startswith("/"):
            if _filenames.why_unseen(key) or os.path.isdir(key):  # the place says why it cannot be used
                found[key] = _place(conn, pools, path=key)
        else:
            found[key] = _place(conn, pools, pool=key)
    return found


def _place(conn: Connection, pools: Mapping[str, str], *, pool: str = "", path: str = "") -> RestorePlace:
    """A place that need not be fit; the reason is in it."""
    try:
        return _model_place(storage.resolve_target(conn, pool=pool, path=path), pools, path)
    except TargetError as error:
        return RestorePlace(path=path, pool=pool, problem=f"cannot be used: {error.why}")


def _model_place(place: storage.Place, pools: Mapping[str, str], path: str) -> RestorePlace:
    """``path`` is how the user or the archive spells the directory; a pool's spelling wins, libvirt compares names.

    Raises TargetError for names that libvirt cannot have.
    """
    if _text.shown(path) != path:
        raise TargetError(
            f"The directory {path}",
            "its name is not UTF-8 or has control characters, and libvirt knows no such names",
            "Rename it.",
        )
    # files of a directory below a pool's are no volumes of the pool
    of_pool = os.path.realpath(pools.get(place.pool, "/")) == place.directory
    return RestorePlace(
        path=_filenames.absolute(pools[place.pool] if of_pool else path or place.directory),
        real_path=place.directory,
        pool=place.pool if of_pool else "",
        filesystem=str(os.stat(place.directory).st_dev),
        free_bytes=place.free_bytes,
        names=frozenset(os.listdir(place.directory)),
        kind=place.kind,
        open_to_all=_trust.open_to_all(place.directory),
    )


def _tpm_place(conn: Connection, pools: Mapping[str, str]) -> RestorePlace:
    """A host that never had a VM with a TPM does not have the directory yet."""
    directory = firmware_state.tpm_directory(conn)
    if os.path.isdir(directory):
        return _place(conn, pools, path=directory)
    above = _place(conn, pools, path=os.path.dirname(directory))
    return replace(above, path=directory, real_path=directory, pool="", names=frozenset())


def _existing_vm(domain: Domain, wanted: set[str], pools: Mapping[str, str]) -> ExistingVm:
    name, uuid = domain.name(), domain.UUIDString()
    persistent, active = bool(domain.isPersistent()), bool(domain.isActive())
    texts = [domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE)] if persistent else []
    texts += [domain.XMLDesc(0)] if active else []
    roots = [_xml.parse(text, f"the definition of {name}") for text in texts]
    states = []
    for each in domain.listAllSnapshots(0):
        with unless_gone():
            states.append((each.getName(), _xml.parse(each.getXMLDesc(0), f"the snapshot {each.getName()} of {name}")))
    all_roots = [*roots, *(root for _dummy, root in states)]
    named = _files_of(all_roots, pools) | _memory_files(states)
    disk_files = frozenset(path for path in named if path == _filenames.canonical(path) and os.path.lexists(path))
    tops = frozenset[str]().union(*map(_filenames.spellings, _named(roots, pools, "source")))
    found = mark.read(roots[0])
    locked: frozenset[str] = frozenset()
    if not active and {name, uuid} & wanted:
        locked = frozenset(path for path in disk_files if _is_held(path))
    return ExistingVm(
        name=name,
        uuid=uuid,
        running=active,
        persistent=persistent,
        managed_save=bool(domain.hasManagedSaveImage(0)),
        xml=texts[0],
        macs=frozenset(mac for root in roots for mac in definition.mac_addresses(root) if mac),
        files=named | _other_files(roots) | firmware_state.default_files(domain.connect(), name, uuid),
        disk_files=disk_files,
        hostdevs=frozenset(identity for root in roots for identity in host_exposure.identities(root)),
        locked_files=locked,
        mark=found,
        touched_files=frozenset() if found is None else _touched(found) | _strayed(found, roots, pools),
        snapshots=tuple(name for name, _dummy in states),
        template=template_mark.is_marked(roots[0]),
        missing_bases=frozenset(path for path in named - tops if not _may_be_there(path)),
        own_disks=frozenset(map(os.path.realpath, _named(all_roots, pools, "source"))),
    )


def _may_be_there(path: str) -> bool:
    return bool(_filenames.why_unseen(path, follow=False)) or _filenames.is_there(path, follow=False)


def _files_of(roots: Iterable[etree._Element], pools: Mapping[str, str]) -> frozenset[str]:
    """Files and devices of all disks with a medium that can be written, down to the lowest layer, by all their names."""
    paths = {layer for top in _named(roots, pools, ".//source") for layer in layers.names_below(top)}
    return frozenset[str]().union(*map(_filenames.spellings, paths))


def _named(roots: Iterable[etree._Element], pools: Mapping[str, str], sources: str) -> frozenset[str]:
    """What elements below <disk> name: ``source`` the disk itself, ``.//source`` its <backingStore> too."""
    paths: set[str] = set()
    for root in roots:
        for disk in root.iter("disk"):
            if disk.get("device") in ("cdrom", "floppy"):
                continue
            for source in disk.iterfind(sources):
                path = source.get("file") or source.get("dev") or ""
                if source.get("volume"):
                    path = os.path.join(pools.get(source.get("pool") or "", ""), source.get("volume") or "")
                if path.startswith("/"):
                    paths.add(path)
    return frozenset(paths)


def _other_files(roots: Iterable[etree._Element]) -> frozenset[str]:
    """CD images, NVRAM and what QEMU loads besides: nothing may be put in their place either."""
    paths: set[str] = set()
    for root in roots:
        paths |= {source.get("file") or "" for source in root.iterfind("devices/disk/source")}
        paths |= {each.path for each in boot_files.named(root)}
        nvram = root.find("os/nvram")
        if nvram is not None:
            source = nvram.find("source")
            paths |= {(nvram.text or "").strip(), "" if source is None else source.get("file") or ""}
    return frozenset(path for path in paths if path.startswith("/"))


def _memory_files(states: Iterable[tuple[str, etree._Element]]) -> frozenset[str]:
    memories = (memory.get("file") or "" for _dummy, root in states for memory in root.iterfind("memory"))
    return frozenset(filter(None, memories))


def _is_held(path: str) -> bool:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        # as raw: the lock is the same whatever the format
        return qemu_img.is_in_use(path, "raw")
    except FileNotFoundError:
        return False


def _touched(found: Mark) -> frozenset[str]:
    """Files of a mark that somebody has written to, replaced or removed."""
    touched = set()
    mounts = _mounts.now()
    for disk in found.disks:
        try:
            now = os.stat(disk.path)
        except OSError:
            touched.add(disk.path)
            continue
        same_inode = now.st_ino == disk.inode or _mounts.has_passing_inodes(_mounts.of(disk.path, mounts).fs_type)
        if not same_inode or (now.st_size, now.st_mtime_ns) != (disk.size_bytes, disk.mtime_ns):
            touched.add(disk.path)
    return frozenset(touched)


def _strayed(found: Mark, roots: Iterable[etree._Element], pools: Mapping[str, str]) -> frozenset[str]:
    """Files of a mark that the VM's disks do not show any more, and what they show instead (after a snapshot, an overlay).

    Drives are left out: whoever uses a VM changes their media. So are LUNs, which no restore makes.
    """
    strayed = set()
    for root in roots:
        here = {disk.target: disk for disk in disks.elements(root)}
        shown = {target: disk for target, disk in here.items() if disk.device == "disk"}
        tops = {disk.target: disk.path for disk in found.disks if disk.top}
        drives = here.keys() - shown.keys()
        for target in (shown.keys() | tops.keys()) - drives:
            path, disk = tops.get(target, ""), shown.get(target)
            if disk is None or not _shows(disk, path, pools):
                strayed |= {path, "" if disk is None else disks.file_of(disk, pools) or disk.source}
    return frozenset(strayed - {""})


def _shows(disk: disks.DiskElement, path: str, pools: Mapping[str, str]) -> bool:
    file = disks.file_of(disk, pools)
    if not file:  # a volume whose pool is not active now
        return disk.type == "volume" and disk.source == os.path.basename(path)
    return os.path.realpath(file) == os.path.realpath(path)


def _capabilities(conn: Connection, root: etree._Element, vms: Iterable[ExistingVm]) -> HostCapabilities:
    kind = root.get("type") or ""
    os_type = root.find("os/type")
    arch = (os_type.get("arch") or "x86_64") if os_type is not None else "x86_64"
    host = _xml.parse(conn.getCapabilities(), "the capabilities of this host")
    guest = next((each for each in host.iterfind("guest/arch") if each.get("name") == arch), None)
    domain = None if guest is None else guest.find(f"domain[@type='{kind}']")
    if guest is None or domain is None:
        what = f"an emulator for {arch}" if guest is None else f"hardware virtualization (a VM of type {kind})"
        return HostCapabilities(problem=what)
    # a VM of this host may run on an emulator that libvirt does not know by itself
    emulators = {e.text or "" for e in [*guest.iterfind("emulator"), *domain.iterfind("emulator")]}
    for vm in vms:
        emulators.add(_xml.parse(vm.xml, vm.name).findtext("devices/emulator") or "")
    machines = set()
    for machine in [*guest.iterfind("machine"), *domain.iterfind("machine")]:
        machines |= {machine.text or "", machine.get("canonical") or ""}
    details = _domain_capabilities(conn, arch, (os_type.get("machine") or None) if os_type is not None else None, kind)
    cpu = details.find("cpu")
    modes = {} if cpu is None else {mode.get("name") or "": mode for mode in cpu.iterfind("mode")}
    custom = modes.get("custom")
    return HostCapabilities(
        emulator=details.findtext("path") or "",
        emulators=frozenset(emulators - {""}),
        machines=frozenset(machines - {""}),
        cpu_modes=frozenset(name for name, mode in modes.items() if mode.get("supported") == "yes"),
        cpu_models={} if custom is None else {m.text or "": m.get("usable") != "no" for m in custom.iterfind("model")},
        firmware=frozenset(value.text or "" for value in details.iterfind("os/loader/value")),
        firmware_auto=frozenset(value.text or "" for value in details.iterfind("os/enum[@name='firmware']/value")),
        devices=_devices(details),
    )


def has_kvm(conn: Connection) -> bool:
    """Whether this host runs PCs with hardware virtualization."""
    host = _xml.parse(conn.getCapabilities(), "the capabilities of this host")
    return host.find("guest/arch[@name='x86_64']/domain[@type='kvm']") is not None


def _devices(details: etree._Element) -> dict[str, frozenset[str]]:
    """What the host has of each kind in `needs.DEVICES`."""
    found = {}
    for *_dummy, key in host_requirements.DEVICES:
        kind = details.find(f"devices/{key.partition('/')[0]}")
        values = None if kind is None else details.find(f"devices/{key}")
        if kind is not None and kind.get("supported") == "no":
            found[key] = frozenset[str]()
        elif values is not None:
            found[key] = frozenset(value.text or "" for value in values.iterfind("value"))
    return found


def _domain_capabilities(conn: Connection, arch: str, machine: str | None, kind: str) -> etree._Element:
    try:
        text = conn.getDomainCapabilities(None, arch, machine, kind, 0)
    except libvirt.libvirtError:
        # a machine type that is not here is named by the plan, with everything else
        text = conn.getDomainCapabilities(None, arch, None, kind, 0)
    return _xml.parse(text, "the capabilities of this host")


def _host_files(
    names: Iterable[str],
    images: Mapping[str, Member],
    vms: Iterable[ExistingVm],
    pools: Mapping[str, str],
    algorithm: digests.Algorithm,
) -> dict[str, HostFile]:
    directories = {os.path.realpath(path) for path in pools.values()}
    vm_disks = {path for vm in vms for path in vm.disk_files}
    found = {}
    for name in names:
        try:
            status = os.stat(name)
        except OSError:
            continue
        if not stat.S_ISREG(status.st_mode):
            continue
        matches = None
        if name in images:
            matches = _same_bytes(name, status.st_size, images[name], algorithm)
        real = os.path.realpath(name)
        pool_iso = os.path.dirname(real) in directories and real.lower().endswith(".iso") and real not in vm_disks
        settled = not _trust.doubt(name, status)
        found[name] = HostFile(status.st_size, _is_public(name, status.st_mode), pool_iso, matches, settled)
    return found


def _is_public(path: str, mode: int) -> bool:
    """Whether any user of the host may read the file: nothing is given away when a guest sees it."""
    directory = os.path.dirname(os.path.realpath(path))
    while mode & stat.S_IROTH:
        if not os.stat(directory).st_mode & stat.S_IXOTH:
            return False
        if directory == "/":
            return True
        directory = os.path.dirname(directory)
    return False


def _same_bytes(path: str, size_bytes: int, member: Member, algorithm: digests.Algorithm) -> bool | None:
    """Whether a file is what the archive holds; None if the archive has no digest to compare with."""
    if size_bytes != member.size_bytes:
        return False
    if not member.digest:
        return None
    return _digest(path, _files.evidence(path), algorithm) == member.digest


@functools.cache
def _digest(path: str, evidence: tuple[int, ...], algorithm: digests.Algorithm) -> str:
    """As an archive's member would have it; a run that plans twice reads an image of gigabytes once (``evidence``: the key)."""
    with open(path, "rb") as file:
        chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
        return algorithm.of_member(b"".join(algorithm.of_chunk(chunk) for chunk in chunks))


def _block_devices(roots: list[etree._Element]) -> dict[str, BlockDevice]:
    found = {}
    for disk in (disk for root in roots for disk in disks.elements(root)):
        if disk.device != "lun" or disk.type != "block":
            continue
        real, problem = os.path.realpath(disk.source), ""
        try:
            if not stat.S_ISBLK(os.stat(real).st_mode):
                found[disk.source] = BlockDevice(real, "is not a block device")
                continue
            # the kernel refuses an exclusive opening of what is mounted or part of something else
            fd = os.open(real, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
            try:
                if os.lseek(fd, 0, os.SEEK_END) == 0:
                    problem = "has nothing behind it"
            finally:
                os.close(fd)
        except FileNotFoundError:
            continue
        except OSError as error:
            problem = f"is in use ({error.strerror})"
        found[disk.source] = BlockDevice(real, problem)
    return found


def _host_devices() -> frozenset[str]:
    found = {f"pci:{name}" for name in _listing("/sys/bus/pci/devices")}
    found |= {f"mdev:{name.lower()}" for name in _listing("/sys/bus/mdev/devices")}
    for name in _listing("/sys/bus/usb/devices"):
        keys = ("idVendor", "idProduct", "busnum", "devnum")
        vendor, product, bus, device = (_attribute(f"/sys/bus/usb/devices/{name}/{key}") for key in keys)
        if vendor and product and bus and device:
            found |= {f"usb:{vendor}:{product}", f"usb:{int(bus)}-{int(device)}"}
    return frozenset(found)


def _listing(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _attribute(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
