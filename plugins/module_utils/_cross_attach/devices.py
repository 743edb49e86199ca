# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""A disk goes into a receiver and out of it. What counts is its definitions: return codes of libvirt say too little."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection
from string import ascii_lowercase
from typing import Any

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._attachments import Attachment
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import files, receivers
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import (
    Connection,
    by_uuid,
    libvirt,
    translate,
)

MORE_PORTS = (
    "Shut the receiver down for the attach, or give it places for more disks while it is off: controllers of model "
    "pcie-root-port (q35), or one of model pci-bridge (pc)."
)
_PORTS = ("pcie-root-port", "pcie-switch-downstream-port")
UNPLUG_S = 30.0  # a guest that has just seen the disk, or is just booting, may need some seconds
_POLL_S = 0.1
_ASK_AGAIN_S = 5.0  # QEMU forgets a request that the guest did not answer


def free_target(used: Collection[str]) -> str:
    """The first name of a virtio disk that a VM has no disk under. Pure."""
    letters = (
        "".join(each) for length in itertools.count(1) for each in itertools.product(ascii_lowercase, repeat=length)
    )
    return next(name for name in (f"vd{each}" for each in letters) if name not in used)


def has_port(xml: str) -> bool:
    """Whether a running VM may have a place for one more virtio disk: sure is only a PCI Express bus without a free port. Pure."""
    root = _xml.parse(xml, "The domain XML")
    controllers = root.findall("devices/controller[@type='pci']")
    models = {each.get("index"): each.get("model", "") for each in controllers}
    if "pcie-root" not in models.values() or any(model.endswith("-bridge") for model in models.values()):
        return True
    taken = {int(each.get("bus", "0"), 0) for each in root.iterfind("devices//address[@type='pci']")}
    return any(model in _PORTS and int(index or "0") not in taken for index, model in models.items())


def document(attachment: Attachment) -> str:
    """The <disk> as a receiver gets it. Pure."""
    disk = etree.Element("disk", type="file", device="disk")
    etree.SubElement(disk, "driver", name="qemu", type=attachment.format, cache="none")
    etree.SubElement(disk, "source", file=attachment.attached_path)
    etree.SubElement(disk, "target", dev=attachment.receiver_target, bus="virtio")
    etree.SubElement(disk, "serial").text = attachment.serial
    etree.SubElement(disk, "readonly")
    return _xml.text(disk)


def plug(conn: Connection, attachment: Attachment) -> None:
    """Give the receiver the disk wherever it does not have it yet: in the running guest, in its definition. Raises KvmopsError."""
    seen = receivers.look(conn, attachment)
    domain = by_uuid(conn, attachment.receiver_uuid)
    what = _what(attachment)
    if domain is None:
        raise KvmopsError(what, f"the VM {attachment.receiver_name} is not there any more")
    flags = 0
    if seen.running and not seen.live:
        flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
    if seen.persistent and not seen.config:
        flags |= libvirt.VIR_DOMAIN_AFFECT_CONFIG
    if flags:
        try:
            domain.attachDeviceFlags(document(attachment), flags)
        except libvirt.libvirtError as error:
            failed = translate(error, what)
            raise KvmopsError(what, failed.why, failed.hint or _way_out(str(error))) from error
    if not receivers.look(conn, attachment).complete:
        raise KvmopsError(
            what, "libvirt says that it is done, but the definitions of the receiver do not have the disk"
        )
    files.sync(conn.getURI(), attachment.receiver_name)


def _way_out(text: str) -> str:
    if "No PCI buses" in text:
        return "A machine without PCI takes no virtio disk: name another VM."
    if "PCI" in text and ("slot" in text or "port" in text):
        return MORE_PORTS
    return ""


def unplug(conn: Connection, attachment: Attachment) -> None:
    """Take the disk from the receiver, which need not have it. Raises KvmopsError where the guest does not let it go in time."""
    domain = by_uuid(conn, attachment.receiver_uuid)
    seen = receivers.look(conn, attachment)
    why = ""
    if domain is None or not (seen.live or seen.config):
        return
    if seen.config:
        why = _detach(domain, attachment, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    deadline = time.monotonic() + UNPLUG_S
    while seen.live and time.monotonic() < deadline:
        why = _detach(domain, attachment, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        asked = time.monotonic()
        seen = receivers.look(conn, attachment)
        while seen.live and time.monotonic() < min(asked + _ASK_AGAIN_S, deadline):
            time.sleep(_POLL_S)
            seen = receivers.look(conn, attachment)
    seen = receivers.look(conn, attachment)
    if seen.live:
        raise KvmopsError(
            _what(attachment, "detaching"),
            f"device did not detach: the guest has not let {attachment.receiver_target} go within {UNPLUG_S:.0f} s"
            + (f" ({why})" if why else ""),
            "The disk stays recorded as attached. Run the task again when the receiver's operating system is up, or shut the "
            "receiver down: its definition does not have the disk any more.",
        )
    if seen.config:
        raise KvmopsError(_what(attachment, "detaching"), why or "the definition of the receiver still has the disk")
    files.sync(conn.getURI(), attachment.receiver_name)


def _detach(domain: Any, attachment: Attachment, flag: int) -> str:
    """Asks for it; libvirt's words where it has any. Whether it happened, the definitions tell."""
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE if flag == libvirt.VIR_DOMAIN_AFFECT_CONFIG else 0
    try:
        element = receivers.element_of(domain.XMLDesc(flags), attachment.serial)
        if element is not None:  # libvirt 9 takes a request for what is not there badly
            domain.detachDeviceFlags(etree.tostring(element, encoding="unicode", with_tail=False), flag)
    except libvirt.libvirtError as error:
        return str(error)
    return ""


def _what(attachment: Attachment, doing: str = "attaching") -> str:
    disk = f"{attachment.target} ({attachment.path})"
    return f"{doing.capitalize()} {disk} as {attachment.receiver_target} of VM {attachment.receiver_name}"
