# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Definitions that are not ours to trust: the list of what is allowed, against libvirt's schema and against mutated definitions."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils._archive.model import Member, Role
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._notices import Code
from ansible_collections.kvmops.backup.plugins.module_utils._restore import allowed, host_exposure
from ansible_collections.kvmops.backup.plugins.module_utils._restore import plan as restore_plan
from ansible_collections.kvmops.backup.plugins.module_utils._restore.model import BlockDevice, ExistingVm, HostFile
from ansible_collections.kvmops.backup.tests.unit.plugins.module_utils._restore.restore_values import (
    CAPABILITIES,
    DISKS,
    ORIGINAL,
    OTHER_UUID,
    VDA,
    VDB,
    configuration,
    domain_xml,
    host,
    planned,
    request,
)

SCHEMAS = Path("/usr/share/libvirt/schemas")
RNG = "{http://relaxng.org/ns/structure/1.0}"
#: Allowed, and younger than the libvirt of the oldest distribution that the tests run on.
YOUNGER = {
    "/domain/iothreadids/iothread/poll", "/domain/features/ras", "/domain/features/ps2", "/domain/features/aia",
    "/domain/features/async-teardown", "/domain/cpu/topology@clusters", "/domain/cpu/maxphysaddr@limit",
    "/domain/os/loader@format", "/domain/devices/disk/driver/iothreads", "/domain/devices/disk/driver@discard_no_unref",
    "/domain/devices/disk/blockio@discard_granularity", "/domain/devices/controller/target@memReserve",
    "/domain/devices/video/model@blob", "/domain/devices/memory@dynamicMemslots",
    "/domain/devices/iommu/driver@dma_translation", "/domain/devices/crypto",
}  # fmt: skip
#: Elements of the schema that no VM gets from an archive that is not ours, with what they would reach.
LEFT_OUT = {
    "/domain": {
        "bootloader", "bootloader_args", "idmap", "datacenterpath",  # other hypervisors
        "launchSecurity",  # keys and certificates of a host
        "seclabel", "commandline", "capabilities", "deprecation", "override",  # past libvirt's care
        "namespace",
    },
    "/domain/os": {
        "kernel", "initrd", "dtb", "cmdline", "acpi",  # host files, and what is for them
        "init", "initarg", "initdir", "initenv", "initgroup", "inituser", "root", "loader_args",
    },
    "/domain/features": {"capabilities", "xen"},
    "/domain/blkiotune": {"device"},
    "/domain/cputune": {"vcpusched", "iothreadsched", "emulatorsched", "cachetune", "memorytune"},  # of the whole host
    "/domain/resource": {"partition", "fibrechannel"},
    "/domain/devices": {"emulator", "hostdev", "filesystem", "shmem", "lease", "pstore"},
    "/domain/devices/disk": {"backenddomain", "privateData"},
    "/domain/devices/interface": {"script", "downscript", "portForward", "backenddomain", "route", "guest"},
    "/domain/devices/memory/source": {"path", "pmem", "alignsize"},
    "/domain/devices/memory/target": {"label", "readonly"},
    "/domain/devices/memory": {"uuid"},
    "/domain/devices/tpm/backend": {"device"},
    "/domain/devices/rng/backend": {"source", "protocol", "log"},
    "/domain/devices/input": {"source"},
    "/domain/devices/smartcard": {"certificate", "database", "source", "protocol", "log", "target"},
    "/domain/devices/redirdev": {"source", "protocol", "log"},
    "/domain/devices/channel/source": {"reconnect", "seclabel"},
    "/domain/devices/channel": {"log", "protocol"},
    "/domain/devices/serial/source": {"reconnect", "seclabel"},
    "/domain/devices/serial": {"log", "protocol"},
    "/domain/devices/parallel/source": {"reconnect", "seclabel"},
    "/domain/devices/parallel": {"log", "protocol"},
    "/domain/devices/console/source": {"reconnect", "seclabel"},
    "/domain/devices/console": {"log", "protocol"},
}  # fmt: skip


#: Attributes, of elements that are allowed, which name something of the host or belong to a kind that is not allowed.
LEFT_OUT_ATTRIBUTES = {
    "tty", "path", "host", "service", "master", "slave", "append", "tls", "mode", "socket", "xauth", "display",
    "fullscreen", "p2p", "replaceUser", "rendernode", "logFile", "tap", "vhost", "rawio", "sgio", "file", "managed",
    "address", "port", "peer", "classID", "floor", "maxEventChannels", "maxGrantFrames", "type",
    # of sound systems of the host
    "bufferCount", "clientName", "connectPorts", "dev", "exactName", "latency", "name", "serverName", "streamName",
    "tryPoll", "driver", "dspPolicy", "exclusive", "tryMMap",
}  # fmt: skip


def of_schema() -> set[str]:
    """Every path of an element, and with @NAME of an attribute, that libvirt's schema has in a <domain>."""
    definitions: dict[str, list[etree._Element]] = {}

    def load(name: str, seen: set[str]) -> None:
        if name in seen:
            return
        seen.add(name)
        root = etree.parse(str(SCHEMAS / name)).getroot()
        for include in root.iter(f"{RNG}include"):
            load(include.get("href") or "", seen)
        for define in root.iter(f"{RNG}define"):
            definitions.setdefault(define.get("name") or "", []).append(define)

    found: set[str] = set()

    def walk(node: etree._Element, path: str, stack: frozenset[str]) -> None:
        for child in node:
            kind = str(child.tag).removeprefix(RNG)
            if kind == "element":
                inner = f"{path}/{child.get('name') or '*'}"
                found.add(inner)
                if inner.count("/") < 9:
                    walk(child, inner, stack)
            elif kind == "attribute":
                found.add(f"{path}@{child.get('name') or '*'}")
            elif kind == "ref" and child.get("name") not in stack:
                for define in definitions.get(child.get("name") or "", []):
                    walk(define, path, stack | {child.get("name") or ""})
            elif isinstance(child.tag, str) and kind != "ref":
                walk(child, path, stack)

    load("domain.rng", set())
    for define in definitions["domain"]:
        walk(define, "", frozenset({"domain"}))
    return found


def of_table(table: dict[str, allowed.Element], path: str = "") -> Iterator[tuple[str, allowed.Element]]:
    for tag, element in table.items():
        yield f"{path}/{tag}", element
        yield from of_table(element.children, f"{path}/{tag}")


TABLE = dict(of_table(allowed.read(allowed.DOMAIN)))


def test_what_is_allowed_is_in_libvirts_schema() -> None:
    schema = of_schema()
    ours = {path for path in TABLE if "*" not in path and "{" not in path}
    ours |= {f"{path}@{name}" for path in ours for name in TABLE[path].attributes}
    unknown = {p for p in ours - schema if not any(p == y or p.startswith((f"{y}/", f"{y}@")) for y in YOUNGER)}
    # every device has these at most
    assert {path for path in unknown if not path.endswith(("/acpi", "/acpi@index", "/alias", "/alias@name"))} == set()


def test_every_element_of_the_schema_is_allowed_or_left_out_on_purpose() -> None:
    for path in sorted(of_schema()):
        parent, _slash, tag = path.rpartition("/")
        if parent not in TABLE or TABLE[parent].quiet or TABLE[parent].child(tag) is not None or "@" in path:
            continue
        assert tag in LEFT_OUT.get(parent, ()), f"{path}: neither allowed nor known to be left out"


def test_every_attribute_of_the_schema_is_allowed_or_left_out_on_purpose() -> None:
    for path in sorted(of_schema()):
        element, _at, name = path.partition("@")
        if name and element in TABLE and not TABLE[element].quiet and name not in TABLE[element].attributes:
            assert name in LEFT_OUT_ATTRIBUTES, f"{path}: neither allowed nor known to be left out"


HOSTILE = [
    "/etc/shadow", "/root/.ssh/authorized_keys", "/dev/sda", "/dev/dri/renderD128", "/run/libvirt/libvirt-sock",
    "nbd://10.0.0.1/x", "file:///etc/shadow", "json:{\"driver\":\"file\"}", "//server/share", "../../etc/shadow",
    "unix:/run/x.sock", "/var/lib/libvirt/images/other.qcow2", "tcp:10.0.0.1:7", "|/bin/sh", "\\\\server\\share",
]  # fmt: skip
ATTRIBUTES = sorted(
    {"file", "dev", "path", "dir", "pool", "volume", "name", "socket", "rendernode", "logFile", "tap", "vhost", "host",
     "service", "display", "xauth", "address", "usage", "template", "protocol", "url", "value", "type", "model", "mode",
     "bridge", "network", "listen", "serverName", "database", "secret", "evdev", "append", "uuid"}
    | {name for element in TABLE.values() for name in element.attributes}
)  # fmt: skip
TAGS = sorted(
    {"source", "log", "script", "backend", "seclabel", "label", "reservations", "dataStore", "backingStore", "mirror",
     "hostdev", "filesystem", "shmem", "lease", "pstore", "redirdev", "smartcard", "audio", "kernel", "initrd", "dtb",
     "table", "path", "server", "sink", "input", "output", "device", "identity", "knownHosts", "cookie", "profile",
     "driver", "rom", "binary", "encryption", "auth", "host", "varstore"}
    | {path.rpartition("/")[2] for path in TABLE if "{" not in path and "*" not in path}
)  # fmt: skip
DEVICES = """
<disk type='file' device='cdrom'><driver name='qemu' type='qcow2'/><source file='/iso/public.iso'/><target dev='sda'/></disk>
<disk type='file' device='floppy'><source file='/iso/private.img'/><target dev='fda'/></disk>
<disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sdb'/></disk>
<controller type='scsi' index='0' model='virtio-scsi'/><serial type='pty'><target port='0'/></serial>
<console type='pty'><target type='serial' port='0'/></console>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel><input type='tablet' bus='usb'/>
<graphics type='vnc' port='-1' autoport='yes'><listen type='address' address='127.0.0.1'/></graphics>
<video><model type='vga'/></video><sound model='ich9'/><audio id='1' type='none'/><redirdev bus='usb' type='spicevmc'/>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm><memballoon model='virtio'/><vsock><cid auto='yes'/></vsock>
"""
#: What may be free text: it is for people or the guest, and names nothing of the host.
TEXTS = {"title", "description", "entry", "passwd", "id"}
HERE = host(
    files={"/iso/public.iso": HostFile(1, public=True, pool_iso=False), "/iso/private.img": HostFile(1, False, False)},
    block_devices={"/dev/sdx": BlockDevice("/dev/sdx")},
    hostdevs=frozenset({"pci:0000:01:00.1"}),
    vms=(ExistingVm("other", OTHER_UUID, disk_files=frozenset({"/var/lib/libvirt/images/other.qcow2"})),),
)
OWN = re.compile(r"/vms/|/data/|/backup/|/var/lib/libvirt/qemu/nvram/|/dev/(?:u?random|hwrng)$|/iso/public\.iso$")
REACHES_OUT = re.compile(r"^\s*/|://|^json:|^unix:|^nbd:|^tcp:|^fd:|\.\./|^\||^\\\\")


def mutated(seed: int, count: int) -> str:
    """A definition with elements, attributes and texts put where they may or may not belong."""
    pick = random.Random(seed)
    root = etree.fromstring(
        domain_xml(
            DISKS + DEVICES, os_extra="<loader type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader><nvram>/n</nvram>"
        )
    )
    mutate(root, pick, count)
    return etree.tostring(root, encoding="unicode")


def mutate(root: etree._Element, pick: random.Random, count: int, within: list[etree._Element] | None = None) -> None:
    """Puts such things into a document, or into some elements of it."""
    for _dummy in range(count):
        elements = [each for each in (root.iter() if within is None else within) if isinstance(each.tag, str)]
        element = pick.choice(elements)
        kind = pick.randrange(6)
        if kind == 0:
            element.set(pick.choice(ATTRIBUTES), pick.choice(HOSTILE))
        elif kind == 1 and element.attrib:
            element.set(pick.choice(sorted(element.attrib)), pick.choice([*HOSTILE, "file", "volume", "unix", "host"]))
        elif kind == 2:
            child = etree.SubElement(element, pick.choice(TAGS), {pick.choice(ATTRIBUTES): pick.choice(HOSTILE)})
            child.text = pick.choice(["", *HOSTILE])
        elif kind == 3:
            element.text = pick.choice(HOSTILE)
        elif kind == 4 and element is not root:
            element.addnext(etree.fromstring(etree.tostring(element, with_tail=False)))
        else:
            element.append(etree.Comment("x"))
            element[-1].tail = pick.choice(HOSTILE)


def reaching_out(xml: str) -> list[str]:
    """Every attribute and text that names something of the host which neither the restore nor the request chose."""
    found = []
    for element in etree.fromstring(xml).iter():
        if not isinstance(element.tag, str):
            found.append("a comment")
            continue
        tag = etree.QName(element).localname
        values = [(tag, element.text or ""), (tag, element.tail or ""), *element.attrib.items()]
        for name, value in values:
            if name in TEXTS or OWN.match(value) or value in CAPABILITIES.firmware:
                continue
            if REACHES_OUT.search(value):
                found.append(f"{tag} {name}: {value}")
    return found


@settings(max_examples=150, deadline=None)
@example(28219, 2)  # a scheme where an address may be
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_a_mutated_definition_reaches_nothing(seed: int, count: int) -> None:
    xml = mutated(seed, count)
    for point in (configuration(xml, format_version=0), configuration(xml)):
        for wishes in ({}, {"name": "copy"}):
            try:
                facts = HERE if wishes else host(**{**vars(HERE), "vms": (*HERE.vms, ORIGINAL)})
                plan = planned(facts, point, distrust="it belongs to mallory", force=True, **wishes)
            except KvmopsError:
                continue
            assert reaching_out(plan.domain_xml) == [], xml
            assert not plan.autostart


def test_the_unmutated_definition_loses_what_is_the_hosts_only() -> None:
    point = configuration(domain_xml(DISKS + DEVICES), format_version=0)
    plan = planned(HERE, point)
    assert {item.device for item in plan.skipped} == {"fda", "sdb"} and reaching_out(plan.domain_xml) == []
    drives = {d.find("target").get("dev"): d for d in etree.fromstring(plan.domain_xml).iterfind("devices/disk")}
    cd = drives["sda"]
    assert (cd.find("driver").get("type"), cd.find("source").get("file")) == ("raw", "/iso/public.iso")
    assert cd.find("readonly") is not None and dict(cd.find("source/seclabel").attrib) == {
        "model": "dac",
        "relabel": "no",
    }
    assert drives["fda"].find("source") is None and "sdb" not in drives


@pytest.mark.parametrize(
    "devices",
    [
        "<redirdev bus='usb' type='spicevmc'><log file='/root/x' append='off'/></redirdev>",
        "<smartcard mode='passthrough' type='spicevmc'><log file='/root/x' append='off'/></smartcard>",
        "<interface type='user'><backend type='passt' logFile='/root/x'/></interface>",
        "<graphics type='dbus' address='unix:path=/root/x'/>",
        "<graphics type='egl-headless'><gl rendernode='/root/x'/></graphics>",
        "<audio id='1' type='oss'><input dev='/root/x'/></audio>",
        "<audio id='1' type='pulseaudio' serverName='/root/x'/>",
        "<disk type='volume' device='cdrom'><source file='/iso/public.iso' pool='vms' volume='x'/><target dev='sda'/></disk>",
        "<disk type='file' device='cdrom'><source file='/iso/public.iso' dev='/root/x'/><target dev='sda'/></disk>",
        "<disk type='file' device='cdrom'><source file='/iso/public.iso'/><target dev='sda'/>"
        "<backingStore type='file'><source file='/root/x'/></backingStore></disk>",
        "<disk type='block' device='cdrom'><source file='/iso/public.iso' dev='/root/x'/><target dev='sda'/></disk>",
    ],
)
def test_what_got_through_a_list_of_what_is_forbidden(devices: str) -> None:
    plan = planned(HERE, configuration(domain_xml(DISKS + devices), format_version=0))
    assert "/root/x" not in plan.domain_xml and "pool=" not in plan.domain_xml, plan.domain_xml


def test_a_name_that_others_may_replace_is_no_medium() -> None:
    cd = "<disk type='file' device='cdrom'><source file='/tmp/x.iso'/><target dev='sda'/></disk>"
    facts = host(files={"/tmp/x.iso": HostFile(1, public=True, pool_iso=False, settled=False)})
    point = configuration(domain_xml(DISKS + cd), format_version=0)
    assert "/tmp/x.iso" not in planned(facts, point).domain_xml
    assert "/tmp/x.iso" in planned(facts, point, trust=True).domain_xml


def test_the_cookie_of_a_snapshot_keeps_its_cpu_only() -> None:
    cookie = etree.fromstring("<cookie><!--x--><cpu mode='custom' x='/y'><model>qemu<!--x-->64</model></cpu><z>/etc</z></cookie>")
    host_exposure.only_allowed(cookie)
    assert etree.tostring(cookie) == b"<cookie><cpu mode=\"custom\"><model>qemu64</model></cpu></cookie>"


QEMU = "<qemu:commandline><qemu:arg value='-chardev'/></qemu:commandline><seclabel type='static'><label>+0:+0</label></seclabel>"


def test_a_forged_archive_brings_nothing_that_ours_may() -> None:
    """Right in form and digests, in the hands of another user."""
    point = configuration(domain_xml(top=QEMU), autostart=True, template=True)
    plan = planned(point=point, distrust="it belongs to mallory")
    assert "chardev" not in plan.domain_xml and "+0:+0" not in plan.domain_xml and "template" not in plan.domain_xml
    assert not plan.autostart and plan.warnings[0].code is Code.FOREIGN and "it belongs to mallory" in plan.warnings[0].text
    assert plan.reduced == ("commandline -chardev", "seclabel +0:+0")
    ours = planned(point=point)
    assert "chardev" in ours.domain_xml and "+0:+0" in ours.domain_xml and ours.reduced == ()
    taken = planned(point=configuration(domain_xml(top=QEMU), autostart=True), distrust="mallory's", trust=True)
    assert "chardev" in taken.domain_xml and taken.autostart and taken.configuration != plan.configuration


def test_what_was_reduced_is_started_on_demand_only() -> None:
    point = configuration(domain_xml(top=QEMU), format_version=0)
    with pytest.raises(KvmopsError, match=r"without commandline -chardev, seclabel.*start_reduced"):
        planned(point=point, start=True)
    assert planned(point=point, start=True, start_reduced=True).start and planned(point=point).reduced
    assert planned(point=configuration(format_version=0), start=True).start  # nothing was left out
    assert planned(point=point, start=True, trust=True).start


def test_an_archive_that_is_not_ours_chooses_no_directory() -> None:
    """``/data`` is no pool, and no VM of the host has a disk there."""
    point = configuration(format_version=0)
    facts = host()
    with pytest.raises(KvmopsError, match=r"/data is no storage pool.*'pool' or 'path'"):
        restore_plan.plan(point, facts, request())
    with_disk = replace(facts, vms=(ExistingVm("db", OTHER_UUID, disk_files=frozenset({"/data/db.raw"})),))
    assert restore_plan.plan(point, with_disk, request()).disks[1].path == "/data/web.raw"
    assert restore_plan.plan(configuration(), facts, request()).disks[1].path == "/data/web.raw"


@pytest.mark.parametrize("distrust", ["", "it belongs to mallory"])
def test_nothing_is_put_where_every_user_may_replace_it(distrust: str) -> None:
    facts = host()
    facts = replace(facts, former={key: replace(place, open_to_all="/vms") for key, place in facts.former.items()})
    with pytest.raises(KvmopsError, match=r"every user may replace files in the pool vms \(/vms\), .*chmod o-w /vms"):
        planned(facts, distrust=distrust)
    assert planned(facts, distrust=distrust, trust=True)


def test_a_kernel_comes_from_the_archive_never_from_this_host() -> None:
    """Also where this host has the very same file: libvirt would give it to QEMU's user."""
    kernel = Member("0_vmlinuz.boot", Role.BOOT, 1000, digest="d" * 64, former_path="/boot/vmlinuz")
    xml = domain_xml(os_extra="<kernel x='/etc'>/boot/vmlinuz</kernel><initrd>/boot/initrd</initrd><cmdline>quiet</cmdline>")
    files = {name: HostFile(1000, True, False, matches=True) for name in ("/boot/vmlinuz", "/boot/initrd")}
    point = configuration(xml, members=(VDA, VDB, kernel))
    plan = planned(host(files=files), point, distrust="mallory's")
    os_element = etree.fromstring(plan.domain_xml).find("os")
    assert os_element.findtext("kernel").startswith("/vms/") and not os_element.find("kernel").attrib
    assert os_element.findtext("cmdline") == "quiet" and os_element.find("initrd") is None
    assert plan.reduced == ("initrd /boot/initrd",)
    assert "/boot/vmlinuz" in planned(host(files=files), point).domain_xml


def test_our_own_mark_is_no_note_of_another_program() -> None:
    root = etree.fromstring(
        "<domain type='kvm'><name>web</name><metadata><k:restored xmlns:k='urn:kvmops:backup:1' point='5'/>"
        "<a:b xmlns:a='urn:x'/></metadata></domain>"
    )
    (told,) = host_exposure.only_allowed(root).warnings
    assert told.text.endswith("left out: b.") and root.find("metadata/*") is None
