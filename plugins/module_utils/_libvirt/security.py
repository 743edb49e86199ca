# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# This file is private to the kvmops.backup collection.
"""Whom QEMU runs as, and whether libvirt gives a VM's files to that user by itself."""

from __future__ import annotations

import grp
import os
import pwd
import re

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._libraries import etree
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt.connection import Connection
from ansible_collections.kvmops.backup.plugins.module_utils._ownership import Ownership

_CONF = "/etc/libvirt/qemu.conf"
_OFF = re.compile(r"^\s*dynamic_ownership\s*=\s*0", re.MULTILINE)


def owner_of_new_files(conn: Connection, domain: etree._Element) -> Ownership | None:
    """Whom the files of a VM must belong to, by its definition and the host; None where libvirt sees to it.

    libvirt tells whom QEMU runs as, but not whether it changes owners: that is in its configuration.
    """
    own = domain.find("seclabel[@model='dac']")
    fixed = own is not None and own.get("relabel") == "no"
    if os.geteuid() != 0 or not (fixed or is_static(_read(_CONF))):
        return None
    label = "" if own is None else own.findtext("label", "")
    if not label:
        host = _xml.parse(conn.getCapabilities(), "the capabilities of this host")
        models = [each for each in host.iterfind("host/secmodel") if each.findtext("model") == "dac"]
        labels = {each.get("type"): each.text or "" for model in models for each in model.iterfind("baselabel")}
        label = labels.get(domain.get("type"), "")
    return user_of(label)


def is_static(configuration: str) -> bool:
    """Whether a qemu.conf keeps libvirt from changing owners. Pure."""
    return bool(_OFF.search(configuration))


def user_of(label: str) -> Ownership | None:
    """User and group in a label of libvirt's DAC driver, by numbers (+0:+0) or names; None for others."""
    user, _dummy, group = label.partition(":")
    try:
        uid = int(user) if user.lstrip("+").isdecimal() else pwd.getpwnam(user).pw_uid
        gid = int(group) if group.lstrip("+").isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        return None
    return Ownership(uid, gid)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # a host without it has the defaults
        return ""
