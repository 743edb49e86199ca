# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whom QEMU's files belong to, by what libvirt and its configuration say."""

from __future__ import annotations

import pytest
from lxml import etree

from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import security
from ansible_collections.kvmops.backup.plugins.module_utils._ownership import Ownership, ids

_CAPABILITIES = """<capabilities><host><secmodel><model>apparmor</model></secmodel><secmodel><model>dac</model>
<baselabel type='kvm'>+64055:+994</baselabel><baselabel type='qemu'>+1:+2</baselabel></secmodel></host></capabilities>"""


class _Host:
    def getCapabilities(self) -> str:
        return _CAPABILITIES


@pytest.mark.parametrize(
    ("text", "static"),
    [
        ("dynamic_ownership = 0", True),
        ("user = 'x'\n  dynamic_ownership=0 # mine\n", True),
        ("#dynamic_ownership = 0", False),
        ("dynamic_ownership = 1", False),
        ("", False),
    ],
)
def test_is_static(text: str, static: bool) -> None:
    assert security.is_static(text) is static


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("+64055:+994", Ownership(64055, 994)),
        ("root:root", Ownership(0, 0)),
        ("nobody-there:root", None),
        ("", None),
    ],
)
def test_user_of(label: str, expected: Ownership | None) -> None:
    assert security.user_of(label) == expected


@pytest.mark.parametrize(
    ("conf", "seclabel", "expected"),
    [
        ("", "", None),
        ("", "<seclabel type='dynamic' model='dac' relabel='yes'/>", None),
        ("dynamic_ownership = 0", "", Ownership(64055, 994)),
        ("dynamic_ownership = 0", "<seclabel type='static' model='dac'><label>+7:+8</label></seclabel>", Ownership(7, 8)),
        ("", "<seclabel type='static' model='dac' relabel='no'><label>+7:+8</label></seclabel>", Ownership(7, 8)),
        ("", "<seclabel type='none' model='selinux' relabel='no'/>", None),
    ],
)
def test_owner_of_new_files(
    monkeypatch: pytest.MonkeyPatch, conf: str, seclabel: str, expected: Ownership | None
) -> None:
    monkeypatch.setattr(security, "_read", lambda path: conf)
    monkeypatch.setattr(security.os, "geteuid", lambda: 0)
    domain = etree.fromstring(f"<domain type='kvm'>{seclabel}</domain>")
    assert security.owner_of_new_files(_Host(), domain) == expected


@pytest.mark.parametrize(("label", "expected"), [("+0:+0", (0, 0)), ("+64055:+994", (64055, 994)), ("", (1, 2))])
def test_ids(label: str, expected: tuple[int, int]) -> None:
    assert ids(label, (1, 2)) == expected
