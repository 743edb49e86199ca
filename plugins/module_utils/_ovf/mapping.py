# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Which KVM hardware stands for which hardware of other products. Data; docs/OVA.md shows it to users."""

from __future__ import annotations

from dataclasses import dataclass

from ansible_collections.kvmops.backup.plugins.module_utils._ovf.descriptor import (
    IDE,
    NIC,
    OTHER,
    SCSI,
    SOUND,
    STORAGE,
    USB,
)


@dataclass(frozen=True)
class Rule:
    """One device of another product: `pc` and `q35` name its counterpart on each machine type, "" for none.

    `subtypes`: in lower case, one with a `*` is a beginning; () takes every device of the type that no rule above has taken.
    `rank`: disks on controllers of a lower one come first. `native`: KVM has the very same device.
    `warning`: what a user must know, "" where a line in the report will do.
    """

    type: int
    subtypes: tuple[str, ...]
    pc: str
    q35: str
    rank: int = 0
    note: str = ""
    warning: str = ""
    native: bool = False

    def on(self, machine: str) -> str:
        """The counterpart on a machine type."""
        return self.pc if machine == "pc" else self.q35


_NO_DRIVERS = "needs no drivers that the guest may lack"
NO_SUCH_HARDWARE = "there is no such hardware on KVM"

#: Bus of the disks on a controller. Ranks: the order in which firmware of the original counts disks.
CONTROLLERS = (
    Rule(IDE, (), "ide", "sata", 0),
    Rule(SCSI, ("lsilogic", "lsilogicsas", "buslogic"), "sata", "sata", 1, _NO_DRIVERS),
    Rule(SCSI, ("virtualscsi", "pvscsi"), "sata", "sata", 1, _NO_DRIVERS),
    Rule(SCSI, ("virtio-scsi", "virtioscsi"), "scsi", "scsi", 1, native=True),
    Rule(SCSI, ("virtio", "virtio-blk"), "virtio", "virtio", 1, native=True),
    Rule(SCSI, (), "sata", "sata", 1, _NO_DRIVERS),
    Rule(STORAGE, ("ahci", "vmware.sata.ahci", "sata"), "sata", "sata", 2, native=True),
    Rule(STORAGE, ("virtioscsi", "virtio-scsi"), "scsi", "scsi", 2, native=True),
    Rule(
        STORAGE,
        ("vmware.nvme.controller", "nvme", "nvmexpress"),
        "sata",
        "sata",
        3,
        "",
        "a disk on an NVMe controller becomes a SATA disk: /dev/nvme0n1 is /dev/sda in the guest",
    ),
)

#: Models of network cards.
NICS = (
    Rule(NIC, ("virtio", "virtio-net", "virtio-net-pci"), "virtio", "virtio", native=True),
    Rule(NIC, ("vmxnet3", "vmxnet2", "vmxnet", "flexible"), "e1000e", "e1000e", note=_NO_DRIVERS),
    Rule(NIC, ("pcnet32", "pcnet"), "pcnet", "e1000"),
    Rule(NIC, ("e1000e", "82574l"), "e1000e", "e1000e", native=True),
    Rule(NIC, ("e1000", "82540em", "82543gc", "82545em"), "e1000", "e1000", native=True),
    Rule(NIC, ("rtl8139", "8139"), "rtl8139", "rtl8139", native=True),
    Rule(NIC, (), "e1000e", "e1000e", note="the model is not known"),
)

#: What oVirt writes instead of a model.
OVIRT_NICS = {"1": "rtl8139", "2": "e1000", "3": "virtio"}
#: What oVirt writes at a disk instead of a controller.
OVIRT_BUSES = {
    "ide": ("ide", "sata"),
    "virtio": ("virtio", "virtio"),
    "virtio_scsi": ("scsi", "scsi"),
    "sata": ("sata", "sata"),
}

SOUND_CARDS = (
    Rule(SOUND, ("ensoniq1371",), "es1370", "es1370"),
    Rule(SOUND, ("hdaudio", "ich6", "hda"), "ich6", "ich9"),
    Rule(SOUND, ("ac97", "ichac97"), "ac97", "ac97"),
    Rule(SOUND, ("sb16",), "sb16", "sb16"),
    Rule(SOUND, (), "ich6", "ich9", note="the model is not known"),
)

#: Models of USB controllers; the companions of ehci1 are added.
USB_CONTROLLERS = (
    Rule(USB, ("vmware.usb.xhci", "xhci"), "qemu-xhci", "qemu-xhci"),
    Rule(USB, (), "ich9-ehci1", "ich9-ehci1"),
)

#: Devices of the type "other" and storage that is none: `pc` and `q35` are "tpm", "sound", or "" for nothing.
OTHERS = (
    Rule(OTHER, ("vmware.vmci*",), "", "", note="it talks to VMware's host only"),
    Rule(
        OTHER, ("vmware.vtpm*",), "tpm", "tpm",
        warning="the TPM is new and empty: what the guest had sealed with the old one (BitLocker keys) is lost; have its "
        "recovery key at hand",
    ),
    Rule(OTHER, ("vmware.soundcard.*",), "sound", "sound"),
    Rule(
        OTHER, ("vmware.pci*", "vmware.vgpu*", "vmware.sriov*", "vmware.precisionclock*"), "", "",
        note="a device of the original's host cannot be passed on",
        warning="a device of the original's host is left out",
    ),
    Rule(
        STORAGE, ("vmware.nvdimm.device*",), "", "", note=NO_SUCH_HARDWARE, warning="a non-volatile memory module is left out",
    ),
    Rule(STORAGE, ("vmware.nvdimm*",), "", "", note=NO_SUCH_HARDWARE),
    Rule(OTHER, (), "", "", note=NO_SUCH_HARDWARE),
)  # fmt: skip

#: Settings that have no counterpart, by the beginning of their key: why they are ignored.
SETTINGS = (
    ("bootoptions.", "the firmware here has no such option"),
    ("cpuallocation.", "reservations and shares are the host's to give"),
    ("cpuhot", "nothing is hot-added"),
    ("memoryhot", "nothing is hot-added"),
    ("flags.", "an option of VMware's hypervisor"),
    ("nestedhv", "nested virtualization is the host's to give"),
    ("nvram", "VMware's firmware settings cannot be read by others"),
    ("poweropinfo.", "how VMware's buttons work"),
    ("sev", "it needs a host with it"),
    ("sgx", "it needs a host with it"),
    ("slotinfo.", "slots are given anew"),
    ("tools.", "an option of VMware Tools"),
    ("uefi.secureboot.", "keys of the firmware are not taken over"),
    ("virtual", "an option of VMware's hypervisor"),
    ("wakeonlan", "the card here has no such option"),
    ("", "it has no counterpart"),
)
#: Settings that are understood.
UNDERSTOOD = (
    "firmware", "bootoptions.efisecurebootenabled", "videoramsizeinkb", "enable3dsupport", "bios.bootorder", "bios.hddorder",
    "usb.present", "uefi.secureboot.enabled",
)  # fmt: skip

#: libosinfo's names of guests, where the original names a release and not just a family.
SYSTEMS = {
    "centos6_64guest": "http://centos.org/centos/6.0",
    "centos7_64guest": "http://centos.org/centos/7.0",
    "centos8_64guest": "http://centos.org/centos/8",
    "debian7_64guest": "http://debian.org/debian/7",
    "debian8_64guest": "http://debian.org/debian/8",
    "debian9_64guest": "http://debian.org/debian/9",
    "debian10_64guest": "http://debian.org/debian/10",
    "debian11_64guest": "http://debian.org/debian/11",
    "debian12_64guest": "http://debian.org/debian/12",
    "oraclelinux7_64guest": "http://oracle.com/ol/7.0",
    "oraclelinux8_64guest": "http://oracle.com/ol/8.0",
    "rhel4guest": "http://redhat.com/rhel/4.0",
    "rhel5_64guest": "http://redhat.com/rhel/5.0",
    "rhel6_64guest": "http://redhat.com/rhel/6.0",
    "rhel7_64guest": "http://redhat.com/rhel/7.0",
    "rhel8_64guest": "http://redhat.com/rhel/8.0",
    "rhel9_64guest": "http://redhat.com/rhel/9.0",
    "sles11_64guest": "http://suse.com/sles/11",
    "sles12_64guest": "http://suse.com/sles/12",
    "sles15_64guest": "http://suse.com/sles/15",
    "windows2019srv_64guest": "http://microsoft.com/win/2k19",
    "windows2019srvnext_64guest": "http://microsoft.com/win/2k22",
    "windows7_64guest": "http://microsoft.com/win/7",
    "windows7guest": "http://microsoft.com/win/7",
    "windows7server64guest": "http://microsoft.com/win/2k8r2",
    "windows8_64guest": "http://microsoft.com/win/8",
    "windows8guest": "http://microsoft.com/win/8",
    "windows8server64guest": "http://microsoft.com/win/2k12",
    "windows9_64guest": "http://microsoft.com/win/10",
    "windows9guest": "http://microsoft.com/win/10",
    "windows9server64guest": "http://microsoft.com/win/2k16",
    "windows11_64guest": "http://microsoft.com/win/11",
    "winxpproguest": "http://microsoft.com/win/xp",
}

#: The same for the numbers of CIM's operating systems, where the descriptor has nothing more exact.
SYSTEMS_BY_ID = {
    "58": "http://microsoft.com/win/2k",
    "67": "http://microsoft.com/win/xp",
    "69": "http://microsoft.com/win/2k3",
    "70": "http://microsoft.com/win/2k3",
    "71": "http://microsoft.com/win/xp",
    "73": "http://microsoft.com/win/vista",
    "74": "http://microsoft.com/win/vista",
    "76": "http://microsoft.com/win/2k8",
    "77": "http://microsoft.com/win/2k8",
    "103": "http://microsoft.com/win/2k8r2",
    "105": "http://microsoft.com/win/7",
}
WINDOWS_IDS = frozenset(
    map(str, (15, 16, 17, 18, 58, 63, 67, *range(69, 78), 103, 105, *range(111, 122)))
)


def rule(rules: tuple[Rule, ...], type_: int, subtypes: tuple[str, ...]) -> Rule | None:
    """The rule for a device. Several subtypes are alternatives, the best first: the first that KVM has as well, else the first that
    any rule names, else the rule for all of the type."""
    own = [each for each in rules if each.type == type_]
    named = [each for subtype in subtypes for each in own if any(_is(subtype, known) for known in each.subtypes)]
    candidates = [*(each for each in named if each.native), *named, *(each for each in own if not each.subtypes)]
    return candidates[0] if candidates else None


def _is(subtype: str, known: str) -> bool:
    return subtype.startswith(known[:-1]) if known.endswith("*") else subtype == known


def why_ignored(key: str) -> str:
    """Why a setting is ignored."""
    return next(why for beginning, why in SETTINGS if key.startswith(beginning))
