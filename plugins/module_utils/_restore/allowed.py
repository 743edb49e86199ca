# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""What a definition that is not ours to trust may hold: a list of elements and attributes by libvirt's schema. Data.

One element in a line, indented below its parent: ``TAG ATTRIBUTE… [: KIND of text]``. An attribute is ``NAME`` (a word),
``NAME:KIND`` or ``NAME=A|B`` (one of these). ``NAME!`` decides about its element: with another value the whole element goes,
and ``NAME!=`` goes with any value. ``!TAG``: if the element goes, so does its parent. ``~TAG``: what is not listed in it goes
without a word, since the restore or libvirt fills it in. ``*``: any tag. ``+GROUP``: the lines of
that group. ``...`` goes on with the attributes.

No kind can be a path, a URI or a socket, except in `loader`, which must be one of the host's own (host_requirements.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Optional

KINDS: Mapping[str, re.Pattern[str]] = {
    "word": re.compile(r"[^/:\\|\x00-\x1f\x7f]{0,255}"),
    # MAC, IP, host name, UUID, time; a colon only between hexadecimal digits, where it is no scheme
    "address": re.compile(r"[0-9A-Za-z.%+_-]{0,255}|[0-9A-Fa-f:.T+-]{1,64}(?:%[0-9A-Za-z._-]{1,32})?"),
    "relative": re.compile(r"[^/:\\|\x00-\x1f\x7f][^:\\|\x00-\x1f\x7f]{0,255}"),  # a time zone, a name in fw_cfg
    "parameter": re.compile(r"[\w.,:][\w.,:/]{0,255}"),  # of a network filter, such as 10.0.0.0/8
    "entropy": re.compile(r"/dev/(?:u?random|hwrng)"),
    "text": re.compile(r"[^\x00-\x08\x0b-\x1f\x7f]{0,65536}"),  # for people or the guest: names nothing of the host
    "firmware": re.compile(r"/[^\x00-\x1f\x7f]{0,4096}"),
    "osinfo": re.compile(r"http://[a-z0-9.-]+/[A-Za-z0-9._/-]{0,255}"),
}

_GROUPS = {
    "cpu": """
        cpu mode match check migratable
          model fallback vendor_id : word
          vendor : word
          topology sockets dies clusters cores threads
          feature name policy
          cache level mode
          maxphysaddr mode bits limit
          numa
            cell id cpus memory unit memAccess discard
              distances
                sibling id value
              cache level associativity policy
                size value unit
                line value unit
            interconnects
              latency initiator target cache type value
              bandwidth initiator target cache type value unit
        """,
    "device": """
        alias name
        acpi index
        address type domain bus slot function multifunction controller target unit port base cssid ssid devno reg iobase irq
          zpci uid fid
        """,
    "virtio": """
        driver iommu ats packed page_per_vq
        """,
    "character": """
        +device
        source channel
          clipboard copypaste
          mouse mode
        """,
    "port": """
        +character
        target type port
          model name
        """,
}

#: spice and virtio carry these; nothing of them is on the host.
CHARACTERS = "pty|null|vc|stdio|spicevmc|spiceport"

DOMAIN = f"""
domain type!=kvm|qemu id
  name : text
  uuid : address
  genid : address
  title : text
  description : text
  ~metadata
    libosinfo:libosinfo
      libosinfo:os id:osinfo
  memory unit dumpCore : word
  currentMemory unit : word
  maxMemory unit slots : word
  memtune
    hard_limit unit : word
    soft_limit unit : word
    min_guarantee unit : word
    swap_hard_limit unit : word
  memoryBacking
    hugepages
      page size unit nodeset
    nosharepages
    locked
    source type
    access mode
    allocation mode threads
    discard
  numatune
    memory mode nodeset placement
    memnode cellid mode nodeset
  blkiotune
    weight : word
  vcpu placement cpuset current : word
  vcpus
    vcpu id enabled hotpluggable order
  iothreads : word
  iothreadids
    iothread id thread_pool_min thread_pool_max
      poll max grow shrink
  defaultiothread thread_pool_min thread_pool_max
  cputune
    shares : word
    period : word
    quota : word
    global_period : word
    global_quota : word
    emulator_period : word
    emulator_quota : word
    iothread_period : word
    iothread_quota : word
    vcpupin vcpu cpuset
    emulatorpin cpuset
    iothreadpin iothread cpuset
  ~resource
  os firmware
    type arch machine : word
    firmware
      feature name enabled
    loader readonly=yes secure type stateless format : firmware
    ~nvram
    boot dev
    bootmenu enable timeout
    smbios mode=emulate|sysinfo
    bios useserial rebootTimeout
  sysinfo type!=smbios|fwcfg
    entry name:relative file!= : text
    bios
      entry name : text
    system
      entry name : text
    baseBoard
      entry name : text
    chassis
      entry name : text
    oemStrings
      entry : text
  features
    acpi
    apic eoi
    pae
    hap state
    viridian
    privnet
    gic version
    ioapic driver
    pmu state
    pvspinlock state
    vmport state
    vmcoreinfo state
    smm state
      tseg unit : word
    hpt resizing
      maxpagesize unit : word
    htm state
    nested-hv state
    ccf-assist state
    msrs unknown
    cfpc value
    sbbc value
    ibs value
    ras state
    ps2 state
    aia value
    async-teardown enabled
    tcg
      tb-cache unit : word
    kvm
      * state size
    hyperv mode
      * state value retries
        direct state
        extended state
  +cpu
  clock offset timezone:relative basis adjustment start
    timer name present tickpolicy track mode frequency
      catchup threshold slew limit
  on_poweroff : word
  on_reboot : word
  on_crash : word
  on_lockfailure : word
  pm
    suspend-to-mem enabled
    suspend-to-disk enabled
  perf
    event name enabled
  keywrap
    cipher name state
  devices
    disk type device!=disk|cdrom|floppy|lun model snapshot
      +device
      boot order loadparm
      driver name=qemu type cache error_policy rerror_policy io ioeventfd event_idx copy_on_read discard discard_no_unref
      ... detect_zeroes iothread queues queue_size iommu ats packed page_per_vq
        metadata_cache
          max_size unit : word
        iothreads
          iothread id
            queue id
      ~source
        encryption format engine=qemu
          !secret type uuid:address usage!
          cipher name size mode hash
          ivgen name hash
      encryption format engine=qemu
        !secret type uuid:address usage!
        cipher name size mode hash
        ivgen name hash
      ~auth
      ~backingStore
      ~mirror
      target dev bus removable tray rotation_rate
      geometry cyls heads secs trans
      blockio logical_block_size physical_block_size discard_granularity
      iotune
        * : word
      readonly
      shareable
      transient shareBacking
      serial : word
      wwn : word
      vendor : word
      product : word
    controller type index model ports vectors
      +device
      model name
      driver queues cmd_per_lun max_sectors ioeventfd iothread iommu ats packed page_per_vq
      target chassisNr chassis port busNr index hotplug memReserve
        node : word
      pcihole64 unit : word
      master startport
    interface type!=network|bridge|user|direct trustGuestRxFilters
      +device
      boot order loadparm
      !~source network bridge dev mode!=vepa|bridge|private portgroup
      mac address:address type check
      model type
      driver name=qemu|vhost txmode ioeventfd event_idx queues rx_queue_size tx_queue_size
      ... rss rss_hash_report iommu ats packed page_per_vq
        host csum gso tso4 tso6 ecn ufo mrg_rxbuf
        guest csum tso4 tso6 ecn ufo
      backend type=default|passt
      target dev
      link state
      mtu size
      rom bar enabled
      ip family address:address prefix
      virtualport type
        parameters managerid typeid typeidversion instanceid:address profileid interfaceid:address
      vlan trunk
        tag id nativeMode
      bandwidth
        inbound average peak burst floor
        outbound average peak burst
      filterref filter
        parameter name value:parameter
      coalesce
        rx
          frames max
      port isolated
      teaming type persistent
      tune
        sndbuf : word
    input type!=mouse|tablet|keyboard bus model
      +device
      +virtio
    graphics type!=vnc|spice|egl-headless port tlsPort websocket autoport listen:address passwd:text passwdValidTo:address
    ... connected keymap sharePolicy defaultMode powerControl multiUser socket!=
      !listen type!=address|network|none address:address network
      channel name mode
      clipboard copypaste
      filetransfer enable
      image compression
      jpeg compression
      zlib compression
      playback compression
      streaming mode
      mouse mode
      gl enable
      audio id
    video
      +device
      driver name=qemu vgaconf iommu ats packed page_per_vq
      model type ram vram vram64 vgamem heads primary blob
        acceleration accel2d accel3d
        resolution x y
    sound model
      +device
      codec type
      audio id
    audio type!=none|spice id timerPeriod
      input mixingEngine fixedSettings voices bufferLength
        settings frequency channels format
      output mixingEngine fixedSettings voices bufferLength
        settings frequency channels format
    serial type!={CHARACTERS}
      +port
    parallel type!={CHARACTERS}
      +port
    console type!={CHARACTERS}
      +port
    channel type!={CHARACTERS}|unix|qemu-vdagent
      +character
      !target type!=virtio name state
    redirdev bus type!=spicevmc
      +device
      boot order loadparm
    redirfilter
      usbdev class vendor product version allow
    smartcard mode!=passthrough type!=spicevmc
      +device
    hub type
      +device
    rng model
      +device
      +virtio
      rate bytes period
      !backend model!=random|builtin : entropy
    tpm model
      +device
      !backend type!=emulator version persistent_state
        encryption secret:address
        active_pcr_banks
          sha1
          sha256
          sha384
          sha512
        ~source
    memballoon model autodeflate freePageReporting
      +device
      +virtio
      stats period
    memory model!=dimm|virtio-mem access discard dynamicMemslots
      +device
      source
        pagesize unit : word
        nodemask : word
      target
        size unit : word
        node : word
        block unit : word
        requested unit : word
        current unit : word
    watchdog model action
      +device
    panic model
      +device
    iommu model
      +device
      driver intremap caching_mode eim iotlb aw_bits dma_translation
    vsock model
      +device
      +virtio
      cid auto address
    crypto model type=qemu
      +device
      +virtio
      backend model!=builtin queues
    nvram
      +device
"""

#: What libvirt keeps with a snapshot beside the definitions.
COOKIE = """
~cookie
  slirpHelper
  +cpu
"""

NAMESPACES = {"libosinfo": "http://libosinfo.org/xmlns/libvirt/domain/1.0"}


@dataclass(frozen=True)
class Attribute:
    """The values that an attribute may have. ``decides``: with another one its element goes."""

    kind: str = "word"
    values: Optional[frozenset[str]] = None
    decides: bool = False

    def takes(self, value: str) -> bool:
        """Whether it may be this."""
        return value in self.values if self.values is not None else is_kind(self.kind, value)


@dataclass(frozen=True)
class Element:
    """What an element may hold. ``text``: the kind of its text, "" for none; ``quiet`` and ``vital`` are ~ and !."""

    attributes: dict[str, Attribute] = field(default_factory=dict)
    children: dict[str, Element] = field(default_factory=dict)
    text: str = ""
    quiet: bool = False
    vital: bool = False

    def child(self, tag: str) -> Optional[Element]:
        """What is allowed of a child, None if it is not allowed."""
        return self.children.get(tag) or self.children.get("*")


def is_kind(kind: str, value: str) -> bool:
    """Whether a value is of that kind, as a whole."""
    return KINDS[kind].fullmatch(value) is not None


def _attribute(token: str) -> tuple[str, Attribute]:
    name, is_list, values = token.partition("=")
    name, _dummy, kind = name.partition(":")
    return name.rstrip("!"), Attribute(
        kind or "word", frozenset(filter(None, values.split("|"))) if is_list else None, name.endswith("!")
    )


def read(table: str) -> dict[str, Element]:
    """The elements of a table by their tags (namespaces as lxml writes them)."""
    top: dict[str, Element] = {}
    levels: list[tuple[int, dict[str, Element]]] = [(-1, top)]
    element = Element()
    for line in filter(str.strip, table.splitlines()):
        depth = len(line) - len(line.lstrip())
        while levels[-1][0] >= depth:
            levels.pop()
        head, _dummy, text = line.strip().partition(" : ")
        marked, *tokens = head.split()
        if marked.startswith("+"):
            levels[-1][1].update(read(_GROUPS[marked[1:]]))
            continue
        if marked == "...":
            element.attributes.update(map(_attribute, tokens))
            levels.append((depth, element.children))
            continue
        tag = marked.lstrip("!~")
        prefix, namespaced, local = tag.partition(":")
        signs = marked[: len(marked) - len(tag)]
        element = Element(dict(map(_attribute, tokens)), {}, text, "~" in signs, "!" in signs)
        levels[-1][1][f"{{{NAMESPACES[prefix]}}}{local}" if namespaced else tag] = element
        levels.append((depth, element.children))
    return top
