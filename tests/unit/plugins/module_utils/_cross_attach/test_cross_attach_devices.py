# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A disk goes out of a receiver: what its definitions say counts, and libvirt is never asked for what is not there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import libvirt
import pytest

from ansible_collections.kvmops.backup.plugins.module_utils._attachments import Attachment
from ansible_collections.kvmops.backup.plugins.module_utils._cross_attach import devices
from ansible_collections.kvmops.backup.plugins.module_utils._errors import KvmopsError
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import files, receivers

ATTACHED = Attachment(
    "id", "vda", "/vm/a", "/vm/a", "qcow2", 1, "", "r", "appliance", "vdb", "kvmops0123456789abcd", 5, "agent"
)
LIVE, CONFIG = libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG


@dataclass
class Receiver:
    """A running, persistent domain whose guest lets a disk go at the `answers`-th request, and a libvirt that says `error` then."""

    live: bool = True
    config: bool = True
    answers: int = 1
    error: bool = False
    asked: list[int] = field(default_factory=list)

    def XMLDesc(self, flags: int) -> str:
        there = self.config if flags & libvirt.VIR_DOMAIN_XML_INACTIVE else self.live
        disk = f"<disk><serial>{ATTACHED.serial}</serial><readonly/></disk>"
        return f"<domain><devices>{disk if there else ''}</devices></domain>"

    def detachDeviceFlags(self, xml: str, flag: int) -> None:
        assert re.search(ATTACHED.serial, xml)
        self.asked.append(flag)
        if flag == CONFIG:
            self.config = False
        elif self.asked.count(LIVE) == self.answers:
            self.live = False
        if self.error:
            raise libvirt.libvirtError("device not found: disk vdb not found")

    def isActive(self) -> bool:
        return True

    isPersistent = isActive

    def hasManagedSaveImage(self, _flags: int) -> bool:
        return False


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "UNPLUG_S", 0.3)
    monkeypatch.setattr(devices, "_ASK_AGAIN_S", 0.02)
    monkeypatch.setattr(devices, "_POLL_S", 0.005)
    monkeypatch.setattr(files, "sync", lambda *_arguments: None)


def unplug(domain: Receiver | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (devices, receivers):
        monkeypatch.setattr(module, "by_uuid", lambda _conn, _uuid: domain)

    class Connection:
        def getURI(self) -> str:
            return ""

    devices.unplug(Connection(), ATTACHED)


@pytest.mark.parametrize(
    ("live", "config", "asked"),
    [(True, True, [CONFIG, LIVE]), (True, False, [LIVE]), (False, True, [CONFIG]), (False, False, [])],
)
def test_only_what_is_there_is_asked_for(
    live: bool, config: bool, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = Receiver(live=live, config=config)
    unplug(domain, monkeypatch)
    assert domain.asked == asked and not domain.live and not domain.config


def test_a_receiver_that_is_gone_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unplug(None, monkeypatch)


def test_a_guest_that_was_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = Receiver(config=False, answers=3)
    unplug(domain, monkeypatch)
    assert domain.asked == [LIVE] * 3


def test_what_libvirt_says_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    unplug(Receiver(error=True), monkeypatch)
    with pytest.raises(KvmopsError, match=r"device did not detach.*\(device not found.*stays recorded"):
        unplug(Receiver(error=True, answers=10**6), monkeypatch)
    with pytest.raises(KvmopsError, match=r"has not let vdb go"):
        unplug(Receiver(answers=10**6), monkeypatch)
