# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a domain definition can reach on the host beyond the VM's own disks, and what a restore does about it.

Two tables are the whole policy (docs/SECURITY.md explains it to users). A definition that is not ours to trust keeps what the
list in `allowed` names, and loses the rest. One that is ours keeps what it had; RULES say what is worth a warning then, and
what only one VM can have and a copy beside the original loses. Host devices have rules of their own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._archive.config import NAMESPACE
from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Skipped
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code, Notice
from ansible_collections.kvmops.backup.plugins.module_utils._restore import allowed
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import ExistingVm, HostFacts

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_ENTROPY = ("/dev/urandom", "/dev/random", "/dev/hwrng")
_CHARACTER_DEVICES = ("serial", "parallel", "console", "channel")
_HARMLESS_CHARACTERS = ("pty", "null", "vc", "stdio", "spicevmc", "spiceport", "qemu-vdagent", "dbus")
# Below /var/lib, since libvirt 9.7 below /run; of a user's own libvirt in the home directory or below /run/user.
_OWN_SOCKET = re.compile(r"/libvirt/qemu/(?:run/)?channel/")
_HARMLESS_INTERFACES = ("network", "bridge", "user", "direct", "hostdev")


def _character_devices(root: etree._Element) -> Iterator[etree._Element]:
    for device in root.iterfind("devices/*"):
        if device.tag not in _CHARACTER_DEVICES or device.get("type") in _HARMLESS_CHARACTERS:
            continue
        source = device.find("source")
        path = source.get("path") or "" if source is not None else ""
        if device.get("type") == "unix" and (not path or is_own_socket(path)):
            continue
        yield device


def is_own_socket(path: str) -> bool:
    """Whether a channel's socket is one that libvirt makes by itself. The name is never passed on: libvirt finds a new one."""
    return bool(_OWN_SOCKET.search(path))


def _random_sources(root: etree._Element) -> Iterator[etree._Element]:
    for device in root.iterfind("devices/rng"):
        backend = device.find("backend")
        model = backend.get("model") if backend is not None else "random"
        if model == "builtin":
            continue
        if model != "random" or (backend is not None and (backend.text or _ENTROPY[0]).strip() not in _ENTROPY):
            yield device


def _found(*paths: str) -> Callable[[etree._Element], Iterator[etree._Element]]:
    def find(root: etree._Element) -> Iterator[etree._Element]:
        for path in paths:
            yield from root.iterfind(path)

    return find


def _typed(path: str, attribute: str, harmless: Sequence[str]) -> Callable[[etree._Element], Iterator[etree._Element]]:
    def find(root: etree._Element) -> Iterator[etree._Element]:
        return (element for element in root.iterfind(path) if element.get(attribute) not in harmless)

    return find


#: What is judged by its first occurrence, so that there must be no other.
_ONCE = (
    "name", "uuid", "genid", "os", "devices", "os/loader", "os/nvram", "devices/disk/target", "devices/disk/driver",
    "devices/interface/source", "devices/interface/mac",
)  # fmt: skip
_OF_BOOT_FILES = ("file", "type", "bar", "enabled", "readonly", "secure", "stateless", "format")
#: Why something is left out of a definition that is not ours to trust; says what to do about it.
NOT_TAKEN = "it is not taken from an archive that is not trusted ('trust: true' takes it)"


@dataclass(frozen=True)
class Exposure:
    """``warnings``: what stays although it reaches out of the VM, and what is no loss; ``skipped``: what was left out."""

    warnings: tuple[Notice, ...] = ()
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class ExposureRule:
    """One kind of item. ``exclusive``: two VMs cannot share it; ``always``: left out whatever the archive is."""

    kind: str
    find: Callable[[etree._Element], Iterator[etree._Element]]
    exclusive: bool = False
    always: bool = False


RULES = (
    ExposureRule("QEMU options past libvirt", lambda root: (e for e in root if str(e.tag).startswith(_QEMU))),
    ExposureRule("shared host directory", _found("devices/filesystem")),
    ExposureRule("host file or socket as a console", _character_devices, exclusive=True),
    ExposureRule("log file", _found("devices//log", "devices/interface/backend[@logFile]"), exclusive=True),
    ExposureRule("host script of a network interface", _found("devices/interface/script", "devices/interface/downscript")),
    ExposureRule("tap or vhost device of a network interface", _found(
        "devices/interface/backend[@tap]", "devices/interface/backend[@vhost]"), exclusive=True),
    ExposureRule("network interface past libvirt's networks", _typed(
        "devices/interface", "type", _HARMLESS_INTERFACES), exclusive=True),
    ExposureRule("source of random numbers", _random_sources),
    ExposureRule("host's TPM", lambda root: (
        e for e in root.iterfind("devices/tpm") if e.find("backend[@type='emulator']") is None),
        exclusive=True),
    ExposureRule("memory shared with other VMs", _found("devices/shmem")),
    ExposureRule("persistent store in a host file", _found("devices/pstore"), exclusive=True),
    ExposureRule("memory device backed by a host file", _typed("devices/memory", "model", ("dimm", "virtio-mem")), always=True),
    ExposureRule("host input device", _found("devices/input[@type='passthrough']", "devices/input[@type='evdev']"), exclusive=True),
    ExposureRule("audio written to a host file", _found("devices/audio[@type='file']"), exclusive=True),
    ExposureRule("host's smart card", _typed("devices/smartcard", "mode", ("passthrough",)), exclusive=True),
    ExposureRule("smart card of another machine", lambda root: (
        e for e in root.iterfind("devices/smartcard[@mode='passthrough']") if e.get("type") != "spicevmc"), exclusive=True),
    ExposureRule("USB redirection to a socket", _typed("devices/redirdev", "type", ("spicevmc",)), exclusive=True),
    ExposureRule("socket of the graphics", _found(
        "devices/graphics[@socket]", "devices/graphics/listen[@type='socket']"), exclusive=True),
    ExposureRule("security label", lambda root: (
        e for path in ("seclabel", "devices//seclabel") for e in root.iterfind(path)
        if e.getparent() is not root or e.get("type") in ("static", "none") or e.find("baselabel") is not None)),
    ExposureRule("persistent reservations daemon", _found("devices/disk/source/reservations")),
)  # fmt: skip


def label(element: etree._Element) -> str:
    """The item for people: its tag with the first thing in it that names something on the host."""
    tag = etree.QName(element).localname
    for node in (element, *element.iterdescendants()):
        if not isinstance(node.tag, str):
            continue
        for key in ("file", "path", "dir", "socket", "dev", "tap", "vhost", "value", "name", "host"):
            if node.get(key):
                return f"{tag} {node.get(key)}"
        if node is not element and node.text and node.text.strip():
            return f"{tag} {node.text.strip()[:80]}"
    return f"{tag} {element.get('type') or element.get('mode') or (element.text or '').strip()}".strip()


def apply(root: etree._Element, *, trusted: bool, copy: bool) -> Exposure:
    """Takes out of a definition what may not come along. ``trusted``: it is ours; ``copy``: the VM it is of stays beside it."""
    return _by_rules(root, copy) if trusted else only_allowed(root)


def _by_rules(root: etree._Element, copy: bool) -> Exposure:
    warnings: list[Notice] = []
    skipped: list[Skipped] = []
    for rule in RULES:
        for element in list(rule.find(root)):
            parent = element.getparent()
            if parent is None:
                continue
            if not rule.always and not (copy and rule.exclusive):
                text = f"Kept as it was, though it reaches out of the VM: {rule.kind} ({label(element)})."
                warnings.append(Notice(Code.REACHES_HOST, text))
                continue
            why = "its content is not in an archive" if rule.always else "it does not go with a copy"
            skipped.append(Skipped(label(element), f"{rule.kind}: {why}"))
            if element.tag in ("serial", "parallel", "console"):
                _as_pty(element)
            else:
                parent.remove(element)
    return Exposure(tuple(warnings), tuple(skipped))


def only_allowed(root: etree._Element) -> Exposure:
    """Leaves in a definition, or in the cookie of a snapshot, what is on the list (allowed.py); names everything else."""
    table = _tables()["cookie" if root.tag == "cookie" else "domain"]
    gone: list[str] = []
    etree.strip_elements(root, etree.Comment, with_tail=False)
    _tame(root, gone)
    metadata = root.find("metadata")
    notes = [] if metadata is None else [child for child in metadata if isinstance(child.tag, str)]
    _prune(root, table, gone)
    lost = [etree.QName(note) for note in notes if note.getparent() is None]
    others = sorted({name.localname for name in lost if name.namespace != NAMESPACE})
    etree.cleanup_namespaces(root)
    text = f"Notes of other programs in the definition are left out: {', '.join(others)}."
    return Exposure(
        warnings=(Notice(Code.LEFT_OUT, text),) if others else (),
        skipped=tuple(Skipped(item, NOT_TAKEN) for item in dict.fromkeys(gone)),
    )


def strip_boot_files(elements: Iterable[etree._Element]) -> None:
    """Leaves of elements that name a file which the restore writes nothing but that, and how it is loaded."""
    for element in elements:
        for child in list(element):
            element.remove(child)
        for name in set(element.attrib) - set(_OF_BOOT_FILES):
            del element.attrib[name]
        if element.get("file"):
            element.text = None


@functools.cache
def _tables() -> Mapping[str, allowed.Element]:
    return {**allowed.read(allowed.DOMAIN), **allowed.read(allowed.COOKIE)}


def _tame(root: etree._Element, gone: list[str]) -> None:
    """What the guest sees stays where only the host's end of it is not allowed."""
    for path in _ONCE:
        for element in root.findall(path):
            for other in element.itersiblings(element.tag):
                _xml.parent_of(other).remove(other)  # the first one counts
    for device in root.findall("devices/*"):
        if device.tag in ("serial", "parallel", "console") and device.get("type") not in allowed.CHARACTERS.split("|"):
            gone.append(label(device))
            _as_pty(device)
        elif device.get("type") in ("pty", "unix") and device.tag in _CHARACTER_DEVICES:
            paths = [source.get("path") or "" for source in device.findall("source")]
            if device.get("type") == "unix" and any(path and not is_own_socket(path) for path in paths):
                gone.append(label(device))
                _xml.parent_of(device).remove(device)
                continue
            for child in device.findall("source"):
                device.remove(child)  # libvirt makes its own
            device.attrib.pop("tty", "")
        elif device.tag == "audio" and device.get("type") not in ("none", "spice"):
            gone.append(label(device))
            number = device.get("id") or "1"
            device.clear()
            device.set("id", number)
            device.set("type", "none")
    for element in root.findall("devices/emulator"):
        _xml.parent_of(element).remove(element)  # libvirt has one of its own
    for element in root.findall("seclabel"):
        if element.get("type", "dynamic") == "dynamic" and element.find("baselabel") is None:
            root.remove(element)  # as libvirt labels every VM


def _prune(element: etree._Element, rule: allowed.Element, gone: list[str]) -> bool:
    """Whether an element may stay, without what is not allowed in it; ``gone`` gets what that was."""
    for name, value in [(str(name), str(value)) for name, value in element.attrib.items()]:
        attribute = rule.attributes.get(name)
        if attribute is not None and attribute.takes(value):
            continue
        if attribute is not None and attribute.decides:
            return False
        del element.attrib[name]
        if not rule.quiet:
            gone.append(f"{etree.QName(element).localname} {name}={value[:80]}")
    text = (element.text or "").strip()
    if text and not (rule.text and allowed.is_kind(rule.text, text)):
        if rule.text:
            return False
        element.text = None
    for child in list(element):
        own, inside = rule.child(child.tag), list[str]()
        name = label(child)
        if (child.tail or "").strip():
            child.tail = None
        if own is not None and _prune(child, own, inside):
            gone += inside
            continue
        if own is not None and own.vital:
            return False
        element.remove(child)
        if not rule.quiet:
            gone.append(name)
    return True


def _as_pty(element: etree._Element) -> None:
    """The guest keeps its serial port; the host's end becomes a terminal."""
    element.set("type", "pty")
    for child in list(element):
        if child.tag in ("source", "protocol", "log"):
            element.remove(child)


def hostdev_identity(element: etree._Element) -> str:
    """What a <hostdev> (or an <interface type='hostdev'>) takes from the host; "" where it cannot be told."""
    source = element.find("source")
    address = source.find("address") if source is not None else None
    if source is None:
        return ""
    kind = element.get("type") if element.tag == "hostdev" else "pci"
    if kind == "mdev" and address is not None:
        return f"mdev:{(address.get('uuid') or '').lower()}"
    vendor, product = source.find("vendor"), source.find("product")
    if kind == "usb" and vendor is not None and product is not None:
        return f"usb:{_number(vendor.get('id')):04x}:{_number(product.get('id')):04x}"
    if address is None or kind not in ("pci", "usb"):
        return ""
    if kind == "usb":
        return f"usb:{_number(address.get('bus'))}-{_number(address.get('device'))}"
    parts = [_number(address.get(key)) for key in ("domain", "bus", "slot", "function")]
    return "pci:{:04x}:{:02x}:{:02x}.{:x}".format(*parts)


def _number(text: str | None) -> int:
    try:
        return int(text or "0", 0)
    except ValueError:
        return -1


def hostdevs(root: etree._Element) -> list[etree._Element]:
    """All elements that take a device of the host."""
    return [*root.findall("devices/hostdev"), *root.findall("devices/interface[@type='hostdev']")]


def identities(root: etree._Element) -> list[str]:
    """What a definition takes from the host, as far as that can be told."""
    return [identity for element in hostdevs(root) if (identity := hostdev_identity(element))]


def decide_hostdevs(
    root: etree._Element, facts: HostFacts, others: Sequence[ExistingVm], *, bare: bool
) -> tuple[list[Notice], list[Skipped]]:
    """Host devices stay where they are present and no other VM has them (C8); otherwise they are left out."""
    taken: Mapping[str, str] = {identity: vm.name for vm in others for identity in vm.hostdevs}
    warnings: list[Notice] = []
    skipped: list[Skipped] = []
    for element in hostdevs(root):
        identity = hostdev_identity(element)
        if bare and element.get("type") in ("scsi", "scsi_host", "storage"):
            reason = "a configuration file is restored without block devices"
        elif not identity or identity not in facts.hostdevs:
            reason = "it is not on this host" if identity else "whether it is on this host cannot be told"
        elif identity in taken:
            reason = f"the VM {taken[identity]} has it"
        else:
            warnings.append(Notice(Code.REACHES_HOST, f"The VM gets a device of this host: {identity}."))
            continue
        skipped.append(Skipped(identity or f"hostdev {element.get('type') or ''}".strip(), reason))
        _xml.parent_of(element).remove(element)
    return warnings, skipped
