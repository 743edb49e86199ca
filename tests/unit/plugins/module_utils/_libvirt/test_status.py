# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirt's note about a running VM, put right."""

from __future__ import annotations

from ansible_collections.kvmops.backup.plugins.module_utils import _xml
from ansible_collections.kvmops.backup.plugins.module_utils._libvirt import status

NOTE = """<?xml version='1.0'?>
<domstatus state='running' pid='17'>
  <blockjobs active='yes'><blockjob name='commit-vda-libvirt-1-format'/></blockjobs>
  <domain type='qemu' id='1'>
    <devices>
      <disk type='file'><target dev='vda'/>{vda}</disk>
      <disk type='file'><target dev='vdb'/>{vdb}</disk>
    </devices>
  </domain>
</domstatus>
"""
LIVING = "<mirror type='file' job='active-commit' ready='yes'><source file='/b'/></mirror>"
UNREADABLE = "<mirror type='file' job=''><source file='/a'/></mirror>"


def disks(text):
    found = _xml.parse(text).iterfind("domain/devices/disk")
    return {disk.find("target").get("dev"): disk.find("mirror") is not None for disk in found}


def test_only_what_libvirt_cannot_read_goes():
    note = NOTE.format(vda=UNREADABLE, vdb=LIVING)
    assert disks(status.without_mirrors(note, ())) == {"vda": False, "vdb": True}


def test_a_job_that_nobody_has_goes_by_the_name_of_its_disk():
    note = NOTE.format(vda=LIVING, vdb=LIVING)
    assert disks(status.without_mirrors(note, ("vdb",))) == {"vda": True, "vdb": False}


def test_all_else_stays():
    note = NOTE.format(vda=UNREADABLE, vdb="")
    then = NOTE.format(vda="", vdb="").replace("'", '"')
    assert status.without_mirrors(note, ()).replace("'", '"') == then
