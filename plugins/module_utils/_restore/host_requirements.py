# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a definition needs that this host does not have (C14): all of it at once, before the first byte is written."""

from __future__ import annotations

from collections.abc import Mapping

from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._restore import definition
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import HostCapabilities, HostFacts

_CPU_MODES = {"host-passthrough", "maximum", "host-model"}
#: Devices that libvirt refuses to define, or to start, where QEMU or a helper of it is not installed: what it is, the element
#: and the attribute in a definition, the enumeration in the domain capabilities.
DEVICES = (
    ("display of the type", "graphics", "type", "graphics/enum[@name='type']"),
    ("video card", "video/model", "type", "video/enum[@name='modelType']"),
    ("TPM of the type", "tpm/backend", "type", "tpm/enum[@name='backendModel']"),
    ("driver of shared directories", "filesystem/driver", "type", "filesystem/enum[@name='driverType']"),
)


def missing(root: etree._Element, networks: Mapping[str, str], facts: HostFacts, *, trusted: bool) -> list[str]:
    """One phrase per missing thing, naming it; [] if the VM can run here."""
    capabilities = facts.capabilities
    lacking = definition.missing_networks(root, networks, facts)
    if capabilities.problem:
        lacking.append(capabilities.problem)
    else:
        lacking += _machine(root, capabilities)
        lacking += _cpu(root, capabilities)
        lacking += _firmware(root, facts, trusted)
        lacking += _devices(root, capabilities)
    lacking += [
        f"{name} (booted by the VM, and not in the archive) as a file that everybody on this host may read"
        for name in definition.private_boot_files(root, facts)
    ]
    return lacking


def _machine(root: etree._Element, capabilities: HostCapabilities) -> list[str]:
    lacking = []
    emulator = (root.findtext("devices/emulator") or "").strip()
    if emulator and emulator not in capabilities.emulators:
        lacking.append(f"the emulator {emulator}")
    os_type = root.find("os/type")
    machine = (os_type.get("machine") or "") if os_type is not None else ""
    if machine and machine not in capabilities.machines:
        lacking.append(f"the machine type {machine}")
    return lacking


def _cpu(root: etree._Element, capabilities: HostCapabilities) -> list[str]:
    cpu = root.find("cpu")
    if cpu is None:
        return []
    mode = cpu.get("mode") or "custom"
    if mode in _CPU_MODES:
        return [] if mode in capabilities.cpu_modes else [f"the CPU mode {mode}"]
    model = (cpu.findtext("model") or "").strip()
    if not model:
        return []
    if model not in capabilities.cpu_models:
        return [f"the CPU model {model}"]
    # A model may lack features here that the definition disables anyway; then only a start can tell.
    forgiving = cpu.get("check") == "none" or cpu.find("feature[@policy='disable']") is not None
    return [] if capabilities.cpu_models[model] or forgiving else [f"a CPU that can run the model {model}"]


def _devices(root: etree._Element, capabilities: HostCapabilities) -> list[str]:
    lacking = []
    for kind, element, attribute, key in DEVICES:
        values = (each.get(attribute) or "" for each in root.iterfind(f"devices/{element}"))
        here = capabilities.devices.get(key)
        lacking += [f"the {kind} {value}" for value in values if here is not None and value and value not in here]
    return list(dict.fromkeys(lacking))


def _firmware(root: etree._Element, facts: HostFacts, trusted: bool) -> list[str]:
    os_element = root.find("os")
    if os_element is None:
        return []
    automatic = os_element.get("firmware")
    if automatic:
        return [] if automatic in facts.capabilities.firmware_auto else [f"firmware of the kind {automatic}"]
    loader = (os_element.findtext("loader") or "").strip()
    return [] if definition.loader_is_here(loader, facts, trusted) else [f"the firmware {loader}"]
